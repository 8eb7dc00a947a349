"""Two processes over quantized layers: one choice of precisions for both, and ranks that stay alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import layerpeft
from layerpeft import LayerFullConfig, LayerLoraConfig, check_trained
from layerpeft.model.layers import base_of
from tests.helpers.loops import adamw, record
from tests.helpers.processes import in_two_ranks
from tests.helpers.quanting import kinds, train, wide, wrap
from tests.helpers.repeating import some, wanted

pytest.importorskip("bitsandbytes")
pytest.importorskip("hqq")
CONFIGS = {
    "frozen": lambda: LayerLoraConfig(select="last:2", r=4, quantize_frozen="nf4"),
    "waits": lambda: LayerLoraConfig(
        select={"by": "gradient_norm", "keep": 2, "num_batches": 1}, r=4, quantize_frozen=2
    ),
    "budget": lambda: LayerLoraConfig(
        select="all", r=4, quant={"mean_bits": 5, "per": "module", "objective": "kl", "select": {"num_batches": 2}}
    ),
    "whole": lambda: LayerFullConfig(select="last:1", quantize_frozen="int8"),
}

PACKED = ("nf4", "hqq2")


def batches(rank, count=6):
    draw = torch.Generator().manual_seed(100 + rank)
    ids = [torch.randint(0, 64, (2, 12), generator=draw) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def play(config, rank):
    """One rank's training: where precisions lie, and what trained."""
    config, data = CONFIGS[config](), batches(rank)
    given = {"batches": data} if config.quant is not None else {}
    model = layerpeft.get_peft_model(wide(), config, **given)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = adamw(model)
    for batch in data[:4]:
        parallel(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_trained(model)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"kinds": kinds(model), "modules": record(model).quantized.modules, "trained": trained}


def sharded(precision):
    """The largest difference in what trained between `fully_shard` and one process, on the same batches."""
    torch.manual_seed(3)
    alone = train(wrap(quantize_frozen=precision), 3)
    torch.manual_seed(3)
    model, mesh = wrap(quantize_frozen=precision), init_device_mesh("cpu", (2,))
    for block in base_of(model).model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, 3)
    wanted = {n: p for n, p in alone.named_parameters() if p.requires_grad}
    ours = {n: p.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    assert set(ours) == set(wanted)
    return max(float((p - wanted[n]).detach().abs().max()) for n, p in ours.items())


def main(folder, *scenes):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {name: play(name, rank) for name in scenes if name in CONFIGS}
    torch.save(found | {"sharded": {p: sharded(p) for p in scenes if p in PACKED}}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    scenes = [*wanted(request, "name"), *wanted(request, "packed")]
    return in_two_ranks(__file__, tmp_path_factory.mktemp("ranks"), *scenes)


@pytest.mark.parametrize("name", some(CONFIGS, ["waits", "budget"]))
def test_both_processes_store_the_same_and_train_alike(ranks, name):
    first, second = (rank[name] for rank in ranks)
    assert first["modules"] == second["modules"] and first["kinds"] == second["kinds"]
    assert first["trained"] and all(torch.equal(t, second["trained"][n]) for n, t in first["trained"].items())
    assert len(set(first["modules"].values())) > 1


@pytest.mark.parametrize("packed", some(PACKED, 1))
def test_packed_weights_can_be_sharded(ranks, packed):
    for rank in ranks:
        assert rank["sharded"][packed] == pytest.approx(0, abs=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

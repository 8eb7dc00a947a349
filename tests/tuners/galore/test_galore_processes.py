"""Two processes train by projection as one with accumulation does, in the same subspaces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.integrations.engines.known import whole
from layerpeft.integrations.peft import whole_state
from layerpeft.model.names import clean
from layerpeft.tuners.galore.projection import as_stored, basis_of, running, weight_of
from tests.helpers.loops import llama
from tests.helpers.processes import in_two_ranks
from tests.helpers.projecting import TARGETS, apart, gpt2, modules, refreshes, trained, weights
from tests.helpers.repeating import some, wanted

STEPS = 10
SCENES = {
    "sketch": (torch.float64, {}),
    "sketch, left": (torch.float64, {"proj_type": "left", "moments": "project"}),
    "svd": (torch.float64, {"subspace": "svd"}),
    "random": (torch.float64, {"subspace": "random"}),
    "all at once": (torch.float64, {"stagger": False, "gap_overlap": 0.3}),
    "float32": (torch.float32, {}),
    "deferred": (torch.float64, {"select": {"by": "gradient_norm", "keep": 2}}),
}
CONV = {"target_modules": ["c_attn", "c_proj", "c_fc"], "update_proj_gap": 2}
# under FSDP2; "dense": folds that are kept as a sum
DIVIDED = {
    "sketch": SCENES["sketch"],
    "svd, left": (torch.float64, {"subspace": "svd", "proj_type": "left", "moments": "project"}),
    "dense": (torch.float64, {"r": 16, "update_proj_gap": 2, "stagger": False}),
    "turned": (torch.float64, CONV),
    "turned, left, dense": (torch.float64, CONV | {"r": 16, "proj_type": "left", "stagger": False}),
    "bfloat16": (torch.bfloat16, {}),
}


def base(options):
    return gpt2() if "c_fc" in options.get("target_modules", ()) else llama(num_hidden_layers=3)


def wrap(dtype, options):
    config = {"select": [0, 2], "r": 4, "update_proj_gap": 3, "target_modules": TARGETS, **options}
    return layerpeft.get_peft_model(base(options).to(dtype), LayerGaloreConfig(**config)).train()


def batches():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (8, 12), generator=draw) for _ in range(6)]


@torch.no_grad()
def merged(model):
    """As `weights`, of weights that are divided, too."""
    found = {clean(n).removeprefix("base_model.model."): p for n, p in model.named_parameters() if ".lora_" not in n}
    found = {n: whole(p.detach()).clone() for n, p in found.items()}
    for name, layer in modules(model).items():
        left, right = running(layer)
        found[f"{name}.weight"] += as_stored(layer, left @ right).to(found[f"{name}.weight"])
    return found


def told(model, weights=weights):
    bases = {n: basis_of(layer).clone() for n, layer in modules(model).items()}
    return {"weights": weights(model), "bases": bases, "refreshes": refreshes(model)}


def train(model, parallel, share, micro, weights=weights):
    """Every step sees `share` of its eight sequences, in `micro` parts."""
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    for number in range(STEPS):
        parts = batches()[number % 6][share].chunk(micro)
        for last, ids in enumerate(parts, 1 - micro):
            if isinstance(parallel, FSDPModule):
                parallel.set_requires_gradient_sync(last == 0)
            parallel.require_backward_grad_sync = last == 0
            (parallel(input_ids=ids, labels=ids).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return told(model, weights)


def divided(dtype, options, rank, folder):
    """A run under FSDP2, and the folder of its gathered weights taken up by another model that is divided."""
    model = shard(wrap(dtype, options))
    found = train(model, model, slice(4 * rank, 4 * rank + 4), 2, merged)
    state = whole_state(model)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    other = shard(wrap(dtype, options))
    other.load_adapter(folder, "default")
    with model.disable_adapter(), other.disable_adapter():
        plain, other_plain = ({n: whole(weight_of(m).detach()) for n, m in modules(x).items()} for x in (model, other))
    return found | {"taken up": merged(other), "plain": (plain, other_plain)}


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(folder, *scenes):
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    torch.set_num_threads(1)
    for name, (dtype, options) in ((n, SCENES[n]) for n in scenes if n in SCENES):
        model = wrap(dtype, options)
        parallel = DistributedDataParallel(model, find_unused_parameters="deferred" in name)
        found[name] = train(model, parallel, slice(4 * rank, 4 * rank + 4), 2)
    for name in (s.removeprefix("divided ") for s in scenes if s.startswith("divided ")):
        found["divided", name] = divided(*DIVIDED[name], rank, folder / name)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    scenes = [*wanted(request, "scene"), *(f"divided {scene}" for scene in wanted(request, "parts"))]
    return in_two_ranks(__file__, tmp_path_factory.mktemp("ranks"), *scenes)


@pytest.mark.parametrize("scene", some(SCENES, ["deferred"]))
def test_two_processes_equal_one_with_accumulation(ranks, scene):
    dtype, options = SCENES[scene]
    ours, theirs = (r[scene] for r in ranks)
    assert set(ours["bases"]) == set(theirs["bases"])
    assert all(torch.equal(q, theirs["bases"][n]) for n, q in ours["bases"].items())
    assert all(torch.equal(w, theirs["weights"][n]) for n, w in ours["weights"].items())
    assert ours["refreshes"] == theirs["refreshes"] and min(r for r, _, _ in ours["refreshes"]) >= 3
    model = wrap(dtype, options)
    alone = train(model, model, slice(0, 8), 4)
    assert alone["refreshes"] == ours["refreshes"]
    start = {n: p.detach() for n, p in llama(num_hidden_layers=3).to(dtype).named_parameters()}
    movement, difference = apart(alone["weights"], start), apart(ours["weights"], alone["weights"])
    print(f"{scene}: {difference:.1e} apart, {difference / movement:.1e} of the movement")
    assert movement > 1e-2 and difference <= (1e-6 if dtype == torch.float64 else 1e-2 * movement)


@pytest.mark.parametrize("parts", some(DIVIDED, ["turned, left, dense"]))
def test_processes_that_hold_parts_equal_one_and_give_the_base_back(ranks, parts):
    dtype, options = DIVIDED[parts]
    ours, theirs = (r["divided", parts] for r in ranks)
    model, start = wrap(dtype, options), {n: p.detach() for n, p in base(options).to(dtype).named_parameters()}
    alone = train(model, model, slice(0, 8), 4, merged)
    movement = apart(alone["weights"], start)
    for found in (ours, theirs):
        assert all(torch.equal(t, ours["weights"][n]) for n, t in found["weights"].items())
        assert found["refreshes"] == alone["refreshes"] and min(r for r, _, _ in ours["refreshes"]) >= 3
        assert apart(found["taken up"], found["weights"]) <= 1e-12
        assert all(torch.equal(w, start[f"{n}.weight"]) for kept in found["plain"] for n, w in kept.items())
        assert movement > 1e-2 and apart(found["weights"], alone["weights"]) <= (
            1e-6 if dtype == torch.float64 else 0.2 * movement
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Two processes train by projection as one with accumulation does, in the same subspaces."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.tuners.galore.projection import basis_of
from tests.helpers.loops import llama
from tests.helpers.processes import in_two_ranks
from tests.helpers.projecting import TARGETS, apart, modules, refreshes, trained, weights

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


def wrap(dtype, options):
    config = {"select": [0, 2], "r": 4, "update_proj_gap": 3, "target_modules": TARGETS, **options}
    return layerpeft.get_peft_model(llama(num_hidden_layers=3).to(dtype), LayerGaloreConfig(**config)).train()


def batches():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (8, 12), generator=draw) for _ in range(6)]


def told(model):
    bases = {n: basis_of(layer).clone() for n, layer in modules(model).items()}
    return {"weights": weights(model), "bases": bases, "refreshes": refreshes(model)}


def train(model, parallel, share, micro):
    """Every step sees `share` of its eight sequences, in `micro` parts."""
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    for number in range(STEPS):
        parts = batches()[number % 6][share].chunk(micro)
        for last, ids in enumerate(parts, 1 - micro):
            parallel.require_backward_grad_sync = last == 0
            (parallel(input_ids=ids, labels=ids).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return told(model)


def main(folder):
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    torch.set_num_threads(1)
    for name, (dtype, options) in SCENES.items():
        model = wrap(dtype, options)
        parallel = DistributedDataParallel(model, find_unused_parameters="deferred" in name)
        found[name] = train(model, parallel, slice(4 * rank, 4 * rank + 4), 2)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scene", SCENES)
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))

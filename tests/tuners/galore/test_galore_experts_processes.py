"""Two processes train experts by projection as one with accumulation does, also where an expert is reached on one of them only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from layerpeft.tuners.galore.projection import basis_of, state_of
from tests.helpers.expert_models import build, modules, wrap
from tests.helpers.processes import in_two_ranks
from tests.helpers.repeating import some, wanted

STEPS = 10
RANK = 2  # no more than tokens reach an expert: what is left of a basis beyond that is rounding's, and another in every process
SCENES = {
    "sketch": {},
    "sketch, left": {"proj_type": "left", "moments": "project"},
    "svd": {"subspace": "svd", "stagger": False},
}


def ids():
    """A few tokens a sequence, so that most batches leave an expert out."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (4, 3), generator=draw) for _ in range(5)]


def train(options, share, micro, parallel=None):
    model = wrap(build(how="eager", dtype=torch.float64, num_hidden_layers=2), update_proj_gap=3, r=RANK, **options)
    outer = model if parallel is None else parallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    for number in range(STEPS):
        for part in ids()[number % 5][share].chunk(micro):
            (outer(input_ids=part, labels=part).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = modules(model)
    found = {"bases": {n: basis_of(layer).clone() for n, layer in layers.items()}}
    found["refreshes"] = [(state_of(layer).refreshes, state_of(layer).failed) for layer in layers.values()]
    merged = dict(model.merge_and_unload().named_parameters())
    return found | {"weights": {n: merged[n].detach() for n in layers}}


def main(folder, *scenes):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    share = slice(2 * rank, 2 * rank + 2)
    found = {
        name: train(options, share, 1, DistributedDataParallel) for name, options in SCENES.items() if name in scenes
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    return in_two_ranks(__file__, tmp_path_factory.mktemp("ranks"), *wanted(request, "scene"))


@pytest.mark.parametrize("scene", some(SCENES, ["sketch, left"]))
def test_two_processes_equal_one_with_accumulation(ranks, scene):
    ours, theirs = (r[scene] for r in ranks)
    for key in ("bases", "weights"):
        assert ours[key] and all(torch.equal(t, theirs[key][n]) for n, t in ours[key].items())
    assert ours["refreshes"] == theirs["refreshes"] and min(r for r, _ in ours["refreshes"]) >= 3
    alone = train(SCENES[scene], slice(0, 4), 2)
    assert alone["refreshes"] == ours["refreshes"] and {f for _, f in alone["refreshes"]} == {0}
    start = dict(build(dtype=torch.float64, num_hidden_layers=2).named_parameters())
    movement = max(float((w - start[n]).abs().max()) for n, w in alone["weights"].items())
    difference = max(float((w - ours["weights"][n]).abs().max()) for n, w in alone["weights"].items())
    print(f"{scene}: {difference:.1e} apart after movements of {movement:.1e}")
    assert movement > 5e-3 and difference <= 1e-6


def test_some_experts_were_reached_on_one_process_only():
    model, apart = build(how="eager"), 0
    for batch in ids():
        hit = []
        for share in (slice(0, 2), slice(2, 4)):
            model.zero_grad()
            model(input_ids=batch[share], labels=batch[share]).loss.backward()
            weights = [p.grad for n, p in model.named_parameters() if "experts.down_proj" in n]
            hit.append([bool(w.any()) for grad in weights for w in grad])
        apart += sum(a != b for a, b in zip(*hit, strict=True))
    assert apart > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Projection is GaLore: the same weights as the reference package's optimizer, and what breaks that equality."""

from __future__ import annotations

import pytest
import torch

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.tuners.galore import subspace
from tests.helpers.loops import llama, make_batches
from tests.helpers.repeating import some

galore_torch = pytest.importorskip("galore_torch")
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
STEPS, GAP, RANK, RATE = 50, 10, 4, 1e-2
EXACT = {"subspace": "svd", "basis": "raw", "stagger": False}


def start():
    return llama(num_hidden_layers=2).double()


def is_target(name):
    return any(f".{t}.weight" in name for t in TARGETS)


def reference(proj_type, steps=STEPS, decay=0.0, clip=None, eps=1e-14):
    model = start()
    chosen = [p.requires_grad_(is_target(n)) for n, p in model.named_parameters()]
    options = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    group = {"params": [p for p in chosen if p.requires_grad], **options}
    optimizer = galore_torch.GaLoreAdamW([group], lr=RATE, eps=eps, weight_decay=decay, no_deprecation_warning=True)
    run(model, optimizer, steps, clip)
    return {n: p.detach() for n, p in model.named_parameters() if is_target(n)}


def run(model, optimizer, steps, clip=None):
    batches = make_batches()
    for number in range(steps):
        model(**batches[number % len(batches)]).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        optimizer.step()
        optimizer.zero_grad()


def ours(proj_type, steps=STEPS, decay=0.0, clip=None, eps=1e-14, **options):
    config = {"r": RANK, "update_proj_gap": GAP, "proj_type": proj_type, "target_modules": TARGETS, **EXACT, **options}
    model = layerpeft.get_peft_model(start(), LayerGaloreConfig(**config))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float64}
    run(model, torch.optim.AdamW(trained, RATE, eps=eps, weight_decay=decay), steps, clip)
    merged = model.merge_and_unload()
    return {n: p.detach() for n, p in merged.named_parameters() if is_target(n)}


def apart(one, other):
    """(largest difference, largest movement) of two runs from the same start."""
    first = {n: p.detach() for n, p in start().named_parameters() if is_target(n)}
    assert set(one) == set(other) == set(first) and len(first) == 8
    difference = max(float((one[n] - other[n]).abs().max()) for n in first)
    return difference, max(float((other[n] - first[n]).abs().max()) for n in first)


@pytest.mark.spread(2)
@pytest.mark.parametrize("proj_type", some(["right", "left", "std", "reverse_std"], 2))
def test_fifty_steps_and_five_refreshes_are_those_of_the_reference(proj_type):
    difference, movement = apart(ours(proj_type), reference(proj_type))
    assert movement > 0.02
    print(f"{proj_type}: {difference:.1e} apart after movements of {movement:.2f}")
    assert difference <= 1e-6 and difference <= 1e-3 * movement


BREAKS = {
    "weight decay falls on B here and on W there": ({"decay": 0.1}, {"decay": 0.1}, 1e-3),
    "eps is added before the bias correction there": ({"eps": 1e-6}, {"eps": 1e-6}, 1e-7),
    "clipping sees the projected norm here": ({"clip": 1e-3, "eps": 1e-6}, {"clip": 1e-3, "eps": 1e-6}, 1e-5),
    "aligned bases": ({"basis": "aligned"}, {}, 1e-3),
    "refreshes spread over the gap": ({"stagger": True}, {}, 1e-3),
    "a sketch serves from the next step on": ({"subspace": "sketch"}, {}, 1e-3),
}


@pytest.mark.spread(2)
@pytest.mark.parametrize("why", BREAKS)
def test_what_breaks_the_equality(why):
    mine, theirs, least = BREAKS[why]
    difference, movement = apart(ours("right", 20, **mine), reference("right", 20, **theirs))
    assert least * movement < difference < 2 * movement  # otherwise, and still training of the same size
    print(f"{why}: {difference / movement:.1e} of the movement")


@pytest.mark.spread(2)
@pytest.mark.parametrize(("basis", "equal"), [("aligned", True), ("raw", False)])
def test_with_aligned_bases_the_precision_of_the_svd_does_not_matter(monkeypatch, basis, equal):
    narrow = ours("right", 20, basis=basis)
    plain, draw = subspace.strongest, torch.Generator().manual_seed(0)

    def other_lapack(seen, rank, side):
        """In float64, and with signs of its own: those of singular vectors are arbitrary."""
        found = plain(seen, rank, side, wide=True)
        signs = torch.randint(0, 2, (len(found), 1), generator=draw) * 2 - 1
        return found * signs

    monkeypatch.setattr(subspace, "strongest", other_lapack)
    difference, movement = apart(ours("right", 20, basis=basis), narrow)
    assert (difference <= 1e-2 * movement) is equal

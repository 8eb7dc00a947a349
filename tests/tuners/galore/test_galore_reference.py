"""Projection is GaLore: the same weights as the reference package's optimizer, and what breaks that equality."""

from __future__ import annotations

import pytest
import torch

from benchmarks.case import load
from benchmarks.kinds.parting import apart, ours, parting, start, weights
from layerpeft.tuners.galore import subspace
from tests.helpers.repeating import some

pytest.importorskip("galore_torch")
CASE = load("galore_reference").options
# by how much of the largest movement at least
BREAKS = {
    "weight_decay 0.1": 1e-3,  # falls on B here and on W there
    "eps 1e-6": 1e-7,  # is added before the bias correction there
    "clipping at 1e-3, with eps 1e-6": 1e-5,  # sees the projected norm here
    "aligned": 1e-3,
    "stagger": 1e-3,
    "sketch": 1e-3,  # serves from the next step on
}


def test_the_measured_case_is_the_one_that_is_held_here() -> None:
    assert len(weights(CASE, start(CASE))) == 8  # four linears of two layers
    assert set(CASE.breaks) == set(BREAKS) and CASE.steps == 5 * CASE.gap and CASE.parting_steps == 2 * CASE.gap


@pytest.mark.spread(2)
@pytest.mark.parametrize("proj_type", some(["right", "left", "std", "reverse_std"], 2))
def test_fifty_steps_and_five_refreshes_are_those_of_the_reference(proj_type: str) -> None:
    difference, movement = parting(CASE, CASE.steps, proj_type)
    assert movement > 0.02
    assert difference <= 1e-6 and difference <= 1e-3 * movement


@pytest.mark.spread(2)
@pytest.mark.parametrize("why", BREAKS)
def test_what_breaks_the_equality(why: str) -> None:
    difference, movement = parting(CASE, CASE.parting_steps, **CASE.breaks[why])
    assert BREAKS[why] * movement < difference < 2 * movement  # otherwise, and still training of the same size


@pytest.mark.spread(2)
@pytest.mark.parametrize(("basis", "equal"), [("aligned", True), ("raw", False)])
def test_with_aligned_bases_the_precision_of_the_svd_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, basis: str, equal: bool
) -> None:
    narrow = ours(CASE, CASE.parting_steps, basis=basis)
    plain, draw = subspace.strongest, torch.Generator().manual_seed(0)

    def other_lapack(seen: torch.Tensor, rank: int, side: str) -> torch.Tensor:
        """In float64, and with signs of its own: those of singular vectors are arbitrary."""
        found = plain(seen, rank, side, wide=True)
        assert found is not None
        signs = torch.randint(0, 2, (len(found), 1), generator=draw) * 2 - 1
        return found * signs

    monkeypatch.setattr(subspace, "strongest", other_lapack)
    difference, movement = apart(CASE, ours(CASE, CASE.parting_steps, basis=basis), narrow)
    assert (difference <= 1e-2 * movement) is equal

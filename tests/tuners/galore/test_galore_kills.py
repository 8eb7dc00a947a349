"""A run that is killed at any moment, and resumed from its last whole checkpoint, ends as the unbroken one does, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from layerpeft.tuners.galore import projection, subspace
from tests.helpers import killing
from tests.helpers.killing import ANY, EVERY, FEW, MANY, STEPS, TIMES, WRITING, Runs, differing
from tests.helpers.loops import make_batches
from tests.helpers.projecting import snapshot, wrap

REFRESH = "within a refresh"
KILLS = {FEW: {ANY: 1, WRITING: 2, REFRESH: 1}, MANY: {ANY: 10, WRITING: 5, REFRESH: 5}}


# what each process runs


def watch_refreshes():
    killing.watch_functions(REFRESH, projection, ("fold", "rotate", "set_basis"))
    killing.watch_functions(REFRESH, subspace, ("strongest",))


def run(case, folder, checkpoint=None):
    torch.manual_seed(0)
    ids = torch.cat([b["input_ids"] for b in make_batches()])
    model = wrap(update_proj_gap=4, moments="project")
    trainer = killing.trainer_of(model, folder, [{"input_ids": x, "labels": x} for x in ids], accumulate=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    state = {f"{i}|{k}": v for i, s in trainer.optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {"model": snapshot(model), "optimizer": state, "losses": killing.losses(trainer)}


def main(root, times):
    kills = [("run", kind) for kind, number in KILLS[times].items() for _ in range(number)]
    killing.main(root, Runs(run, {WRITING: killing.watch_files, REFRESH: watch_refreshes}, kills))


# what is asked of them


@pytest.fixture(scope="module", params=TIMES)
def killed(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("killed")
    return root, *killing.start(__file__, root, request.param), KILLS[request.param]


@pytest.mark.parametrize("kind", KILLS[FEW])
def test_a_killed_run_ends_as_the_unbroken_one(killed, kind):
    root, told, errors, kills = killed
    whole = torch.load(root / "unwatched" / "found.pt")
    assert len(whole["losses"]) == STEPS and whole["optimizer"] and whole["model"]
    runs = [r for r in told["runs"] if r["kind"] == kind]
    assert len(runs) == kills[kind] and all(r["died"] for r in runs)
    assert all(r["done"] for r in runs), errors[-3000:]
    for one in runs:
        found = torch.load(Path(one["folder"]) / "found.pt")
        for part in ("model", "optimizer"):
            assert not differing(found[part], whole[part]), one
        assert found["losses"] == whole["losses"], one


def test_the_kills_were_where_they_should_be(killed):
    _, told, *_ = killed
    counts = told["counts"]["run"]
    assert counts[WRITING] > 40 and counts[REFRESH] > 50
    assert any(r["from"] for r in told["runs"] if r["kind"] == REFRESH)
    # some checkpoint was passed over because it was not whole
    written = [r for r in told["runs"] if r["kind"] == WRITING]
    assert any(r["checkpoints"] and r["from"] < r["checkpoints"] * EVERY for r in written)


def test_watching_changes_nothing(killed):
    root, *_ = killed
    watched, alone = (torch.load(root / k / "found.pt") for k in ("whole run", "unwatched"))
    assert watched["losses"] == alone["losses"] and watched["counts"] and not alone["counts"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

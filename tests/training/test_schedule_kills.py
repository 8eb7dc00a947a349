"""A run whose layers change is killed at any moment and resumed: it ends as the unbroken one does, bit for bit."""

from __future__ import annotations

import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from layerpeft import LayerFullConfig, get_peft_model
from layerpeft.training import optimizer_states, switching
from layerpeft.training.follower import followers_of
from tests.helpers import killing
from tests.helpers.killing import ANY, EVERY, FEW, MANY, STEPS, TIMES, WRITING, Runs, differing
from tests.helpers.loops import llama
from tests.helpers.scheduling import rows, switcher_of, wrapped
from tests.helpers.switched import moments

SWITCH = "within a switch"
KILLS = {FEW: {ANY: 1, WRITING: 2, SWITCH: 1}, MANY: {ANY: 8, WRITING: 7, SWITCH: 5}}
UNIFORM = {"pick": "uniform", "keep": 2, "reselect_steps": 2, "state": "offload"}
GRADIENT = {
    "by": "gradient_norm",
    "pick": "sample",
    "keep": 2,
    "reselect_steps": 2,
    "rescore_steps": 4,
    "memory": "ema",
}
CASES = {  # method, select, micro-batches per step
    "lora uniform": ("lora", UNIFORM, 1),
    "full gradient": ("full", GRADIENT | {"state": "offload"}, 2),
    "galore gradient": ("galore", GRADIENT | {"state": "clear", "reselect_steps": 4}, 1),
    "masters uniform": ("masters", UNIFORM | {"reselect_steps": 4}, 2),
    "galore uniform": ("galore", UNIFORM, 2),
    "full uniform": ("full", UNIFORM | {"always": -1}, 1),
    "lora gradient": ("lora", GRADIENT | {"state": "keep", "warmup_steps": 1}, 2),
}
RUN = {FEW: tuple(CASES)[1:2], MANY: tuple(CASES)}


# what each process runs


def watch_switches():
    killing.watch_functions(SWITCH, switching, ("take",))
    killing.watch_functions(SWITCH, optimizer_states, ("put_away", "bring_back", "packed"))


class Last(TrainerCallback):
    """The optimizer's states as they are after the last step, those that lie on the CPU included: they go when training ends."""

    found: dict[str, torch.Tensor] = {}
    away = 0

    def __init__(self, model):
        self.model = model

    def on_step_end(self, args, state, control, optimizer=None, **_):
        if state.global_step == STEPS:
            self.found = moments(self.model, getattr(optimizer, "optimizer", optimizer))
            self.away = len(switcher_of(self.model).store)


def built(method, select):
    if method != "masters":
        return wrapped(method, **select)
    config = LayerFullConfig(select=select, master_weights=True, task_type="CAUSAL_LM")
    return get_peft_model(llama().bfloat16(), config)


def run(case, folder, checkpoint=None):
    method, select, accumulate = CASES[case]
    torch.manual_seed(0)
    model = built(method, select)
    last = Last(model)
    trainer = killing.trainer_of(model, folder, rows(), accumulate, callbacks=[last])
    trainer.train(resume_from_checkpoint=checkpoint)
    follower = followers_of(model)[0]
    # where the schedule stands is compared part by part
    weights = {n: t.clone() for n, t in model.state_dict().items() if not n.endswith("_extra_state")}
    masters = dict(follower.method.masters.copies) if follower.method.masters is not None else {}
    told = {
        "losses": killing.losses(trainer),
        "standing": switcher_of(model).plain(),
        "steps": follower.record.steps_trained,
    }
    return {"weights": weights, "states": last.found, "away": last.away, "masters": masters} | told


def main(root, times):
    turn = cycle(RUN[times])
    kills = [(next(turn), kind) for kind, number in KILLS[times].items() for _ in range(number)]
    watches = {WRITING: killing.watch_files, SWITCH: watch_switches}
    killing.main(root, Runs(run, watches, kills, RUN[times]))


# what is asked of them


@pytest.fixture(scope="module", params=TIMES)
def killed(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("killed")
    return root, *killing.start(__file__, root, request.param), request.param


@pytest.mark.parametrize("kind", KILLS[FEW])
def test_a_killed_run_ends_as_the_unbroken_one(killed, kind):
    root, told, errors, times = killed
    runs = [r for r in told["runs"] if r["kind"] == kind]
    assert len(runs) == KILLS[times][kind] and all(r["died"] for r in runs)
    assert all(r["done"] for r in runs), errors[-3000:]
    for one in runs:
        found, whole = (torch.load(f / "found.pt") for f in (Path(one["folder"]), root / f"whole {one['case']}"))
        for part in ("weights", "states", "masters"):
            assert not differing(found[part], whole[part]), (one, part)
        for part in ("losses", "standing", "steps", "away"):
            assert found[part] == whole[part], (one, part)


def test_the_unbroken_runs_have_something_to_lose(killed):
    root, told, _, times = killed
    assert set(told["counts"]) == {r["case"] for r in told["runs"]} == set(RUN[times])
    for case in RUN[times]:
        method, select, _ = CASES[case]
        whole = torch.load(root / f"whole {case}" / "found.pt")
        history = whole["standing"]["history"]
        assert len(whole["losses"]) == STEPS and whole["states"] and whole["weights"], case
        assert len(history) > 2 and len({tuple(h["layers"]) for h in history}) > 1, case
        assert bool(whole["away"]) == (select["state"] == "offload"), case
        assert bool(whole["masters"]) == (method == "masters"), case
        assert whole["standing"]["measured"] > 2 or "by" not in select, case


def test_the_kills_were_where_they_should_be(killed):
    _, told, *_ = killed
    counts = told["counts"]
    assert all(c[WRITING] > 40 and c[SWITCH] > 20 for c in counts.values())
    assert any(r["from"] for r in told["runs"] if r["kind"] == SWITCH)
    # some checkpoint was passed over because it was not whole
    written = [r for r in told["runs"] if r["kind"] == WRITING]
    assert any(r["checkpoints"] and r["from"] < r["checkpoints"] * EVERY for r in written)


def test_watching_changes_nothing(killed):
    root, *_, times = killed
    watched, alone = (torch.load(root / k / "found.pt") for k in (f"whole {RUN[times][0]}", "unwatched"))
    assert watched["counts"] and not alone["counts"]
    assert watched["losses"] == alone["losses"] and not differing(watched["weights"], alone["weights"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

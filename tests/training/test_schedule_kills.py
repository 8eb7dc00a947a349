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
from tests.helpers.killing import ANY, EVERY, MANY, STEPS, WRITING, Runs, differing
from tests.helpers.loops import llama
from tests.helpers.scheduling import rows, switcher_of, wrapped
from tests.helpers.switched import moments

SWITCH = "within a switch"
KILLS = {ANY: 8, WRITING: 7, SWITCH: 5} if MANY else {ANY: 3, WRITING: 4, SWITCH: 2}
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
    "galore uniform": ("galore", UNIFORM, 2),
    "full uniform": ("full", UNIFORM | {"always": -1}, 1),
    "lora gradient": ("lora", GRADIENT | {"state": "keep", "warmup_steps": 1}, 2),
    "masters uniform": ("masters", UNIFORM | {"reselect_steps": 4}, 2),
}


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


def main(root):
    turn = cycle(CASES)
    kills = [(next(turn), kind) for kind, times in KILLS.items() for _ in range(times)]
    watches = {WRITING: killing.watch_files, SWITCH: watch_switches}
    killing.main(root, Runs(run, watches, kills, tuple(CASES)))


# what is asked of them


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    return root, *killing.start(__file__, root)


@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_run_ends_as_the_unbroken_one(killed, kind):
    root, told, errors = killed
    runs = [r for r in told["runs"] if r["kind"] == kind]
    assert len(runs) == KILLS[kind] and all(r["died"] for r in runs)
    assert all(r["done"] for r in runs), errors[-3000:]
    for one in runs:
        found, whole = (torch.load(f / "found.pt") for f in (Path(one["folder"]), root / f"whole {one['case']}"))
        for part in ("weights", "states", "masters"):
            assert not differing(found[part], whole[part]), (one, part)
        for part in ("losses", "standing", "steps", "away"):
            assert found[part] == whole[part], (one, part)


@pytest.mark.parametrize("case", CASES)
def test_the_unbroken_runs_have_something_to_lose(killed, case):
    root, told, _ = killed
    method, select, _ = CASES[case]
    whole = torch.load(root / f"whole {case}" / "found.pt")
    history = whole["standing"]["history"]
    assert len(whole["losses"]) == STEPS and whole["states"] and whole["weights"]
    assert len(history) > 2 and len({tuple(h["layers"]) for h in history}) > 1
    assert bool(whole["away"]) == (select["state"] == "offload")
    assert bool(whole["masters"]) == (method == "masters")
    assert whole["standing"]["measured"] > 2 or "by" not in select
    assert any(r["case"] == case for r in told["runs"])


def test_the_kills_were_where_they_should_be(killed):
    _, told, _ = killed
    counts = told["counts"]
    assert all(c[WRITING] > 40 and c[SWITCH] > 20 for c in counts.values())
    assert any(r["from"] for r in told["runs"] if r["kind"] == SWITCH)
    # some checkpoint was passed over because it was not whole
    written = [r for r in told["runs"] if r["kind"] == WRITING]
    assert any(r["checkpoints"] and r["from"] < r["checkpoints"] * EVERY for r in written)


def test_watching_changes_nothing(killed):
    root, _, _ = killed
    watched, alone = (torch.load(root / k / "found.pt") for k in (f"whole {next(iter(CASES))}", "unwatched"))
    assert watched["counts"] and not alone["counts"]
    assert watched["losses"] == alone["losses"] and not differing(watched["weights"], alone["weights"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

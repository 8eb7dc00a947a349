"""Processes under an engine train what one process trains: the same weights in every one, and the same again after a resume."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file

from layerpeft import get_peft_model
from layerpeft.errors import ConfigError
from layerpeft.integrations.engines.fsdp import FSDP1, FSDP2
from layerpeft.integrations.engines.known import asked_for
from layerpeft.saving.manifest import read_manifest
from tests.helpers.engines import config, in_ranks, model, rows, train

slow = pytest.mark.slow
# Of all runs: the first goes through, the second goes on from its second step.
CELLS = [
    *[("ddp", name) for name in ("lora-depth", "lora-grad", "galore", "full", "lisa", "lora-nf4")],
    *[
        ("fsdp2", n)
        for n in ("lora-depth", "lora-batches", "lora-sched", "lora-sched-clear", "lisa", "full", "full-grad")
    ],
    *[(e, n) for e in ("fsdp2_noram", "fsdp2_sharded") for n in ("lora-grad", "lora-sched", "full", "lisa")],
    *[("fsdp2_ac", name) for name in ("lora-depth", "lora-grad", "full", "lisa")],
    *[("fsdp2_bf16", name) for name in ("lora-grad", "full", "lisa", "lora-sched")],
    *[("fsdp2", name) for name in ("lora-outliers", "lora-nf4")],
    *[("fsdp2", f"galore{n}") for n in ("", "-grad", "-svd", "-random", "-project", "-base", "-batches", "-outliers")],
    *[("fsdp2", f"galore-{n}") for n in ("sched", "sched-clear", "sched-offload", "nf4", "packed")],
    *[(e, n) for e in ("fsdp2_noram", "fsdp2_sharded", "fsdp2_ac", "fsdp2_bf16") for n in ("galore", "galore-sched")],
    *[("zero1", name) for name in ("lora-depth", "lora-grad", "lisa")],
    *[
        ("zero2", n)
        for n in ("lora-depth", "lora-batches", "lora-grad", "lora-outliers", "lora-sched-clear", "lora-nf4")
    ],
    *[("zero2", name) for name in ("galore", "full", "full-grad", "lisa")],
    *[("zero3", name) for name in ("lora-depth", "lora-batches", "full")],
    *[(engine, "full") for engine in ("zero2_bf16", "zero3_bf16")],
    *[("zero2_bf16", name) for name in ("lisa", "full-grad", "lora-grad")],
    *[("zero2_file", name) for name in ("lora-depth", "lora-grad", "lisa", "galore")],
    ("zero3_file", "full"),
    *[("zero3_apart", name) for name in ("lora-depth", "full")],
]
QUICK = [("fsdp2", "lora-grad")]
# Runs of another kind: options of the trainer
WAYS: dict[str, dict[str, Any]] = {
    "accumulation with a ragged last batch": {"gradient_accumulation_steps": 2, "count": 20, "max_steps": 5, "ragged": True},
    "clipping": {"max_grad_norm": 0.05},
    "evaluation while training": {"eval_strategy": "steps", "eval_steps": 1},
    "the best is loaded at the end": {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    },
}  # fmt: skip


@cache
def _alone(name: str, way: str = "", at_once: int = 4) -> Any:
    return train(name, _folder() / f"one {name} {way} {at_once}", at_once=at_once, **WAYS.get(way, {}))


def _folder() -> Any:
    return _folder.at  # type: ignore[attr-defined]


@pytest.fixture(scope="module", autouse=True)
def _kept_runs(tmp_path_factory):
    _folder.at = tmp_path_factory.mktemp("engines")  # type: ignore[attr-defined]
    _alone.cache_clear()


def apart(a, b, turned=1.0):
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) / (turned if ".lora_A." in n else 1.0) for n in a)


def check_alike(runs, one, limit, turned=1.0):
    """Processes hold the same, and what one process holds; `turned`: so many times further may bases be, which rounding turns."""
    first, *others = runs
    assert not isinstance(first, str), first
    for other in others:
        assert apart(first["weights"], other["weights"]) == 0 and first["steps"] == other["steps"]
    assert first["steps"] == one["steps"] and apart(first["weights"], one["weights"], turned) <= limit
    if limit < 1e-3:
        assert first["losses"] == pytest.approx(one["losses"], abs=limit)
        assert first["held_out"] == pytest.approx(one["held_out"], abs=limit)


def through_and_on(engine, cells):
    """Every cell goes through, is like one process, is saved as one process saves it, and goes on to the same end."""
    runs = []
    for name in cells:
        goes_on = {"name": name, "out": f"{name}-on", "checkpoint": f"{name}/checkpoint-2", "save_strategy": "no"}
        runs += [{"name": name, "out": name}, goes_on]
    place = _folder() / engine / cells[0]
    found = in_ranks(place, engine, runs)
    for i, name in enumerate(cells):
        one, limit = _alone(name), 2e-2 if engine.endswith("bf16") else 5e-4
        turned = 4.0 if name.startswith("galore") and engine.endswith("bf16") else 1.0
        check_alike([rank[2 * i] for rank in found], one, limit, turned)
        for rank in found:
            assert not isinstance(rank[2 * i + 1], str), rank[2 * i + 1]
            assert apart(rank[2 * i + 1]["weights"], rank[2 * i]["weights"]) <= 2e-6
        if name.startswith("galore") and not engine.endswith("bf16"):
            both = found[0][2 * i : 2 * i + 2]
            assert all(torch.equal(run["base"], one["base"]) for run in both)
            if name not in ("galore-nf4", "galore-packed"):
                check_reference(both, place / name / "final")
        if engine == "fsdp2_sharded" and not name.startswith("galore"):  # Trainer saves no folder of such
            continue
        ours, theirs = (
            load_file(f / "final/adapter_model.safetensors") for f in (place / name, _folder() / f"one {name}  4")
        )
        assert ours.keys() == theirs.keys() and apart(ours, theirs, turned) <= limit
        manifest = read_manifest(place / name / "final")
        assert manifest["checks"]["end"] == "every chosen target moved, and no frozen parameter did"
    return [found[0][2 * i] for i in range(len(cells))]


@torch.no_grad()
def check_reference(runs, folder):
    """The base comes back bit for bit, and plain PEFT makes of the folder what was trained."""
    ids, base = torch.stack([row["input_ids"] for row in rows(4)]), model().eval()
    before = base(input_ids=ids).logits.clone()
    saved = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
    for run in runs:
        assert torch.equal(run["base"], before)
        assert float((saved - run["live"]).abs().max()) <= 1e-5 < float((saved - before).abs().max())


def test_what_waits_and_what_changes_under_fsdp2_is_trained_saved_and_resumed():
    first, *_ = through_and_on("fsdp2", [name for _, name in QUICK])
    lowest = min(layer for layer, steps in first["steps"].items() if steps)
    # the pool in the pass that is measured; from then on nothing below the lowest that trains, not even ahead of its time
    assert lowest > 1 and first["fetched"] == {layer: 4 if layer >= lowest else 1 for layer in range(2, 6)}


def test_the_version_is_that_of_the_accelerator_there_is(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert asked_for() is FSDP1
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=2))
    assert asked_for() is FSDP2


@pytest.mark.parametrize(
    ("version", "name"), [("2", "galore-experts"), ("2", "lora-nf4-deferred"), ("1", "lora-grad"), ("1", "galore")]
)
def test_what_cannot_be_right_is_refused_at_wrapping(version, name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    base = model()
    with pytest.raises(ConfigError, match="(?s)FSDP.*use (DDP|fsdp_version: 2)"):
        get_peft_model(base, config(name, None))
    assert not any("lora" in n for n, _ in base.named_modules())


@slow
@pytest.mark.parametrize(("engine", "name"), CELLS)
def test_processes_train_what_one_does_and_go_on(engine, name):
    through_and_on(engine, [name])


@slow
@pytest.mark.parametrize(
    ("engine", "name"),
    [(e, n) for e in ("fsdp2", "zero2") for n in ("lora-grad", "lora-sched", "lisa")]
    + [("fsdp2", "galore"), ("zero2", "galore"), ("zero3", "lora-depth"), ("zero3", "full")],
)
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_training(way, engine, name):
    runs, place = [{"name": name, "out": "run", **WAYS[way]}], _folder() / f"{way} {engine} {name}"
    found = in_ranks(place, engine, runs)
    # two processes fill the last batch up with rows of the first, each with others than one process
    one = in_ranks(place / "ddp", "ddp", runs)[0][0] if "ragged" in way else _alone(name, way)
    check_alike([rank[0] for rank in found], one, 5e-4)


@slow
@pytest.mark.parametrize("name", ["lora-grad", "lisa", "galore", "lora-nf4"])
def test_what_stage_3_cannot_do_is_refused_with_a_way_out(name):
    found = in_ranks(_folder() / f"no {name}", "zero3", [{"name": name, "out": "run"}])
    for (said,) in found:
        assert isinstance(said, str) and "DeepSpeed ZeRO-3" in said and "ZeRO-2" in said and "DDP" in said


@slow
@pytest.mark.parametrize("name", ["lora-grad", "lora-sched", "lisa", "galore"])
def test_three_processes_and_going_on_in_three_where_two_began(name):
    place, one = _folder() / f"three {name}", _alone(name, at_once=6)
    two = in_ranks(place, "fsdp2", [{"name": name, "out": "run", "at_once": 6}])
    runs = [
        {"name": name, "out": "on", "at_once": 6, "checkpoint": "run/checkpoint-2"},
        {"name": name, "out": "all", "at_once": 6},
    ]
    three = in_ranks(place, "fsdp2", runs, ranks=3)
    for runs in ([rank[0] for rank in two], [rank[1] for rank in three], [rank[0] for rank in three]):
        assert not isinstance(runs[0], str), runs[0]
        assert all(apart(run["weights"], runs[0]["weights"]) == 0 for run in runs)
        assert apart(runs[0]["weights"], one["weights"]) <= 5e-4

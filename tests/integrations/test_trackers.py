"""Trackers are told of the choice, and shown the table and the picture of layers, from any trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.integrations import trackers
from layerpeft.integrations.trackers import Shown, send
from tests.helpers.pictures import Pictures
from tests.helpers.short import short_llama

ROWS = [(0, "model.layers.0", 1.5, True, 3, 0.1), (1, "model.layers.1", None, False, 0, None)]
COLUMNS = ("layer", "name", "score", "chosen", "steps", "change")


class Heard(TrainerCallback):
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.told.append(dict(logs))


def trained(folder: Path, select: dict[str, Any], report_to: str = "none") -> Heard:
    """Three steps on the short Llama, with transformers' own Trainer."""
    rows = [{"input_ids": torch.arange(8 * i, 8 * i + 8), "labels": torch.arange(8 * i, 8 * i + 8)} for i in range(6)]
    model = AutoModelForCausalLM.from_pretrained(short_llama(3))
    config = LayerLoraConfig(select=select, r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config, batches=[{k: v[None] for k, v in row.items()} for row in rows[:2]])
    told = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    args = TrainingArguments(str(folder), report_to="none", disable_tqdm=True, **told)
    heard = Heard()
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[heard])
    trainer.args.report_to = [report_to] if report_to != "none" else []  # by now Trainer has looked for its own
    trainer.train()
    return heard


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pictures, "looked_at", True)


@pytest.mark.parametrize(
    "select", [{"by": "gradient_norm", "keep": 1}, {"pick": "uniform", "keep": 1, "reselect_steps": 1}]
)
def test_a_trainer_sends_choice_and_picture(
    select: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, Shown, bool]] = []
    way: Callable[..., None] = lambda args, step, shown: sent.append((step, shown, shown.picture.is_file()))  # noqa: E731
    monkeypatch.setitem(trackers.WAYS, "mine", way)
    heard = trained(tmp_path, select | {"log_gradients": True}, "mine")
    first = heard.told[0]
    assert [first[f"layers/on/{i}"] for i in range(3)].count(1.0) == 1 and first["layers/active"] == 1
    assert ("layers/score/0" in first) == ("by" in select)
    assert sum("layers/on/0" in told for told in heard.told) == (1 if "by" in select else 3)
    assert all(any(key.startswith("layers/grad_norm/") for key in told) for told in heard.told[:3])
    ((step, shown, drawn),) = sent
    assert step == 3 and shown.name == "layers" and shown.columns == COLUMNS and drawn
    assert len(shown.rows) == 3 and not shown.picture.exists(), "pictures go with the folder that held them"
    steps = [row[4] for row in shown.rows]
    assert sum(steps) == (3 if "by" not in select else max(steps)) and max(steps) >= 1


def test_without_trackers_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerpeft.training.tracked.layer_report", lambda *_: pytest.fail("nobody asked"))
    trained(tmp_path, {"by": "depth", "keep": 1})


class Spy(ModuleType):
    """A tracker's library, as far as it is called."""

    def __init__(self, name: str, **given: Any) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []
        for key, value in given.items():
            setattr(self, key, value)


def put(monkeypatch: pytest.MonkeyPatch, name: str, *calls: str, **given: Any) -> Spy:
    spy = Spy(name, **given)
    for call in calls:
        setattr(
            spy,
            call,
            lambda *a, _call=call, **k: spy.calls.append((_call, *a, *k.values())) or (_call, *a, *k.values()),
        )
    monkeypatch.setitem(sys.modules, name, spy)
    return spy


@pytest.fixture
def shown(tmp_path: Path, pictures: None) -> Shown:
    from layerpeft.training.pictures import write_png
    from layerpeft.training.report import Row

    write_png([Row(*row) for row in ROWS], tmp_path / "layers.png", "two layers")
    return Shown("layers", COLUMNS, ROWS, tmp_path / "layers.png")


def arguments(folder: Path, *names: str) -> Any:
    return SimpleNamespace(report_to=list(names), output_dir=str(folder))


def test_each_tracker_is_told_in_its_own_way(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = put(monkeypatch, "wandb", "Table", "Image")
    wandb.run = SimpleNamespace(log=lambda logged: wandb.calls.append(("log", logged)))
    trackio = put(monkeypatch, "trackio", "Table", "Image", "log")
    mlflow = put(monkeypatch, "mlflow", "log_table", "log_artifact", active_run=lambda: object())
    send(arguments(tmp_path, "wandb", "trackio", "mlflow", "clearml"), 3, shown)
    for spy in (wandb, trackio):
        assert set(spy.calls[-1][1]) == {"layers/table", "layers/picture"} and spy.calls[-1][0] == "log"
        assert ("Image", str(shown.picture)) in spy.calls
    assert [call[0] for call in mlflow.calls] == ["log_table", "log_artifact"]
    assert mlflow.calls[0][1]["score"] == [1.5, None] and mlflow.calls[1][1] == str(shown.picture)
    assert trackio.calls[0][1].shape == (2, 6)


def test_one_that_fails_stops_nothing(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "trackio")
    mlflow = put(monkeypatch, "mlflow", "log_table", "log_artifact", active_run=lambda: object())
    send(arguments(tmp_path, "trackio", "mlflow"), 3, shown)
    assert mlflow.calls
    mlflow.calls.clear()
    mlflow.active_run = lambda: None
    send(arguments(tmp_path, "mlflow"), 3, shown)
    assert not mlflow.calls


def test_tensorboard_has_table_and_picture(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    send(arguments(tmp_path, "tensorboard"), 3, shown)
    read = EventAccumulator(str(tmp_path / "runs" / "layers"))
    read.Reload()
    assert read.Tags()["images"] == ["layers/picture"] and read.Tags()["tensors"] == ["layers/table/text_summary"]
    assert read.Images("layers/picture")[0].step == 3

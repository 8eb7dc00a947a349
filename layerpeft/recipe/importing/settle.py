"""The end of an import: what every recipe has, and values that the trainer or the block does not take."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from layerpeft.recipe import keys
from layerpeft.recipe.importing.draft import Draft
from layerpeft.recipe.importing.rules import fitted, near
from layerpeft.recipe.trainers.table import absent, row_of
from layerpeft.selection.typecheck import complaint
from layerpeft.tuners.methods import METHODS

NAMED = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}  # keys that take text, of which few are names
WATCHES = ("eval_strategy", "eval_steps", "eval_packing", "load_best_model_at_end", "metric_for_best_model")
REQUIRED = {
    "model_name_or_path": "the file names no model; say which (--model FOLDER, or its name on the hub)",
    "dataset_name": "the file names no rows",
}


def settle(draft: Draft, stem: str) -> None:
    """Fills in what is missing, and takes out what does not fit. `stem`: of the file's name."""
    if draft.given.model:
        asked = draft.top.pop("model_name_or_path", None)
        draft.notes.pop("model_name_or_path", None)
        draft.put("model_name_or_path", draft.given.model, f"--model; the file says {asked}" if asked else "--model")
    for key, sentence in REQUIRED.items():
        if key not in draft.top:
            draft.refuse(key, sentence)
    if "output_dir" not in draft.top:
        draft.put("output_dir", f"outputs/{stem}", "the file names none")
    if "select" not in draft.block:
        draft.inside("select", "all")
    draft.top["trainer"] = draft.trainer
    if (why := absent(row_of(draft.trainer))) is not None:
        draft.refuse("trainer", why)
    for need in row_of(draft.trainer).needs:
        if need not in draft.top:
            draft.note("trainer", f"it needs {need} besides, which no file of theirs says in a way that is read here")
    _fit(draft)
    if "eval_dataset" not in draft.top or not row_of(draft.trainer).evaluates:
        for key in [k for k in WATCHES if k in draft.top]:
            value = draft.top.pop(key)
            if value not in (False, "no"):
                draft.leave(key, _heard(draft, key, "no held-out rows are named (eval_dataset: 5%)"), value)
            draft.notes.pop(key, None)


def _heard(draft: Draft, key: str, why: str) -> str:
    told = "; ".join(draft.notes.pop(key, []))
    return f"{why} (from {told})" if told else why


def _fit(draft: Draft) -> None:
    """Takes out what the trainer's settings, or the fields of the method, do not hold."""
    known = keys.top_settings(draft.trainer)
    for key in [k for k in draft.top if k != "trainer"]:
        if key not in known:
            _drop(draft, draft.top, key, key, f"is no setting of trainer: {draft.trainer}")
            continue
        value = draft.top[key] = fitted(known[key], draft.top[key])
        names = [item.value for item in NAMED[key]] if key in NAMED else []
        if value == "auto" and complaint(known[key], value):
            _drop(draft, draft.top, key, key, "is what happens where nothing is said")
        elif names and value not in names:
            _drop(draft, draft.top, key, key, f"is none that is known here{near(value, names)}")
        elif sentence := complaint(known[key], value):
            _drop(draft, draft.top, key, key, sentence)
        elif key == "bf16" and value is True and row_of(draft.trainer).trl:
            _drop(draft, draft.top, key, key, "is the default, where a device multiplies in bfloat16")
    fields = keys.block_settings(METHODS[draft.method])
    for key in [k for k in draft.block if k not in ("method", "select")]:
        if key not in fields:
            _drop(draft, draft.block, key, f"layerpeft.{key}", f"is no field of method: {draft.method}")
            continue
        draft.block[key] = fitted(fields[key], draft.block[key])
        if sentence := complaint(fields[key], draft.block[key]):
            draft.refuse(key, sentence)


def _drop(draft: Draft, place: dict[str, Any], key: str, shown: str, why: str) -> None:
    value = place.pop(key)
    draft.leave(key, _heard(draft, shown, why), value)

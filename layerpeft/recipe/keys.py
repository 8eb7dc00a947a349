"""The keys of a recipe: its own, those that other versions and other tools use, and what each of them becomes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from layerpeft.recipe.reading import SAMPLE_BY
from layerpeft.recipe.trainers.row import named
from layerpeft.recipe.trainers.table import ROWS, absent, row_of
from layerpeft.selection.typecheck import Setting, settings_of

TRAINERS = ROWS  # by name

# keys that are neither TRL's nor transformers', or that one of them types too narrowly for a file
_OWN: dict[str, Setting] = {
    "trainer": Setting(str),
    "dataset_name": Setting(str | list[str | dict[str, Any]]),
    "eval_dataset": Setting(str | list[str | dict[str, Any]] | None),
    "columns": Setting(dict[str, str] | None),
    "sample_by": Setting(str | None, choices=SAMPLE_BY),
    "max_train_samples": Setting(int | None),
    "max_eval_samples": Setting(int | None),
    "output_dir": Setting(str),
    "overwrite_output_dir": Setting(bool, False),
    "resume_from_checkpoint": Setting(bool | str | None),
    "sample_tokens": Setting(int, 48),
    "exits": Setting(list[int | str] | None),
    "drop": Setting(int | str | list[Any] | dict[str, Any] | None),
    "layerpeft": Setting(dict),
}
_MODEL = ("model_name_or_path", "model_revision", "dtype", "attn_implementation")
_SCRIPT = ("dataset_config", "dataset_train_split", "dataset_test_split")
REQUIRED = ("trainer", "model_name_or_path", "dataset_name", "output_dir")

# fields of the argument classes that a recipe does not set, and what to do instead
FIXED = {
    "do_train": "`layerpeft train` always trains; take the key out",
    "do_eval": "held-out rows are always measured before and after; take the key out",
    "do_predict": "held-out rows are always measured before and after; take the key out",
    "local_rank": "torchrun sets it; take it out",
    "task_type": "it follows from `trainer`; take it out",
    "peft_type": "it follows from `method`; take it out",
    "inference_mode": "a recipe trains; take it out",
    "auto_mapping": "PEFT fills it in; take it out",
    "peft_version": "PEFT fills it in; take it out",
    "base_model_name_or_path": "model_name_or_path at the top level says it; take it out here",
    "revision": "model_revision at the top level says it; take it out here",
    "batches": "a recipe takes batches from its training rows; take it out",
    "dataset_streaming": "streamed data sets are not supported, take it out; name files or a data set that fits on the disk",
}
# what means that nothing is set, of numbers that have a word for it
UNSET = {"max_steps": -1}
# smallest value that makes sense (None: above zero)
AT_LEAST: dict[str, int | None] = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 1,
    "num_train_epochs": None, "learning_rate": None, "max_train_samples": 1, "max_eval_samples": 1, "sample_tokens": 0,
    "max_steps": 1, "warmup_steps": 0, "warmup_ratio": 0, "logging_steps": None, "save_steps": None, "eval_steps": None,
    "eval_delay": 0, "eval_accumulation_steps": 1, "adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 0,
    "label_smoothing_factor": 0, "dataset_num_proc": 1, "dataloader_prefetch_factor": 1, "ddp_timeout": 1, "num_generations": 1,
    "max_completion_length": 1, "max_new_tokens": 1, "generation_max_length": 1, "generation_num_beams": 1,
    "max_target_length": 1, "stride": 0, "mlm_probability": None, "max_seconds": None,
    "weight_decay": 0, "max_grad_norm": 0, "dataloader_num_workers": 0, "r": 1, "lora_dropout": 0, "seed": 0, "data_seed": 0,
}  # fmt: skip
AT_MOST: Mapping[str, int] = dict.fromkeys(("seed", "data_seed"), 2**32 - 1)  # which numpy takes


@cache
def arguments_class(trainer: str) -> type:
    """The class whose fields stand at the top level, such as trl.SFTConfig or transformers.TrainingArguments."""
    return named(row_of(trainer).arguments)


@cache
def present() -> tuple[str, ...]:
    """The trainers whose libraries are here."""
    return tuple(name for name, row in ROWS.items() if absent(row) is None)


@cache
def argument_settings(trainer: str) -> Mapping[str, Setting]:
    """The training arguments that a recipe may set."""
    return {k: v for k, v in settings_of(arguments_class(trainer)).items() if k not in FIXED}


@cache
def top_settings(trainer: str) -> Mapping[str, Setting]:
    """Every key of the top level for one trainer, with its type."""
    from trl import ModelConfig, ScriptArguments

    model, script = settings_of(ModelConfig), settings_of(ScriptArguments)
    return {
        **argument_settings(trainer),
        **{k: model[k] for k in _MODEL},
        **{k: script[k] for k in _SCRIPT},
        **row_of(trainer).keys,
        **_OWN,
        "trainer": Setting(str, choices=tuple(TRAINERS)),
    }


def own_keys() -> list[str]:
    """The keys that name model, data and output, in the order in which a recipe is written."""
    return ["trainer", *_MODEL, "dataset_name", "eval_dataset", *_SCRIPT, "columns", *list(_OWN)[4:]]


@cache
def block_settings(config: type) -> Mapping[str, Setting]:
    """What may stand in the `layerpeft:` block for a config class, beside `method` and `select`."""
    return {k: v for k, v in settings_of(config).items() if k not in FIXED and k not in ("select", "method")}

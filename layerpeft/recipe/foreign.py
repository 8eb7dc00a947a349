"""Keys of other tools: what they are called here, and by which other road the same thing is had."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerpeft.recipe.cures import EMPTY, cure
from layerpeft.recipe.keys import TRAINERS
from layerpeft.selection.typecheck import Setting

# methods of papers that are a method of ours with a choice of layers
METHOD_ROADS = {
    "lisa": "`method: full, select: {pick: uniform, keep: 2, reselect_steps: 20}` (`layerpeft train lisa` is an example)",
    "badam": "`method: full, select: {pick: cycle, keep: 1, reselect_steps: 50, state: clear}` (`layerpeft train badam`)",
    "spectrum": "`method: full, select: {by: snr, keep: 25%}`, or by kind of linear (`layerpeft train spectrum`)",
    "freeze": "`method: full, select: last:2`",
    "quant": "`method: lora, select: last:4, quantize_frozen: nf4`, or with `quant: {mean_bits: 4.5}` instead",
    "qlora": "`method: lora, select: all, quantize_trained: nf4`",
    "dora": "`method: lora, select: all, use_dora: true`",
    "telly": "`method: full, select: last:4` (`layerpeft train telly`)",
    "layra": "`method: lora, select: first:10+last:2` (`layerpeft train layra`)",
}


RENAMED = {
    # transformers and TRL, older versions
    "evaluation_strategy": "eval_strategy", "max_seq_length": "max_length", "torch_dtype": "dtype", "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size", "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_model_id": "hub_model_id", "push_to_hub_token": "hub_token", "use_liger": "use_liger_kernel",
    "train_file": "dataset_name", "data_files": "dataset_name", "validation_file": "eval_dataset",
    # axolotl, LLaMA-Factory, torchtune, mlx-lm, ms-swift
    "base_model": "model_name_or_path", "sequence_len": "max_length", "cutoff_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs", "epochs": "num_train_epochs", "lr": "learning_rate", "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim", "sample_packing": "packing", "eval_sample_packing": "eval_packing",
    "grad_accumulation_steps": "gradient_accumulation_steps", "adapter_path": "output_dir", "max_samples": "max_train_samples",
    "random_state": "seed", "clip_grad_norm": "max_grad_norm", "gradient_clipping": "max_grad_norm",
    "log_every_n_steps": "logging_steps", "steps_per_report": "logging_steps", "steps_per_eval": "eval_steps",
    "save_every": "save_steps", "grad_checkpoint": "gradient_checkpointing", "compile": "torch_compile",
}  # fmt: skip


@dataclass
class Translation:
    """A recipe in this version's words: data, what was mapped, and what could not be (path and sentence).
    `last`: keys of the command line, which overrule the recipe's under any spelling; `cured`: keys that complaints say to write."""

    data: dict[str, Any]
    last: frozenset[str] = frozenset()
    moved: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    complaints: list[tuple[str, str]] = field(default_factory=list)
    cured: set[str] = field(default_factory=set)

    def refuse(self, key: str, sentence: str) -> None:
        """Notes what is wrong with a key."""
        self.complaints.append((key, f"{key}: {sentence}"))


def translate(data: Mapping[str, Any], known: Mapping[str, Setting], last: frozenset[str] = frozenset()) -> Translation:
    """Maps the spellings of other versions and tools where they mean the same, and says what to write where they do not.
    `last`: the keys that come from the command line."""
    out = Translation({}, last)
    for key, value in data.items():
        if key in known:
            out.data.setdefault(key, value)
        elif value is None and key in {**RENAMED, **_CONVERTED}:
            out.complaints.append((key, f"{key}: {EMPTY}"))
        elif key in RENAMED and not isinstance(value, Mapping):
            _move(out, data, key, RENAMED[key], value)
        elif key in _CONVERTED and (key != "flash_attention" or importlib.util.find_spec("flash_attn")):
            _CONVERTED[key](out, data, key, value)
        elif road := cure(key, value, data):
            out.refuse(key, road.on_command(data) if key in last and road.write else str(road))
            out.cured |= set(road.write)
        else:
            out.data[key] = value  # unknown: reported with the nearest name where the rest is checked
    return out


def _move(out: Translation, data: Mapping[str, Any], old: str, new: str, value: Any) -> None:
    if new in out.last and old not in out.last:
        return
    overrules = old in out.last and new not in out.last and new not in out.moved
    if (new in data or new in out.data) and not overrules:
        out.refuse(old, f"this is {new}, which the recipe sets as well; keep {new}")
        return
    out.data[new] = value
    out.moved[new] = old
    shown = "" if value == data[old] else f": {value!r}"
    out.notices.append(f"{old} is read as {new}{shown}")


def _warmup_ratio(out: Translation, data: Mapping[str, Any], key: str, value: Any) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        _move(out, data, key, "warmup_steps", value)
    else:
        steps = value if isinstance(value, int) and value is not True and value > 0 else 0.1
        sentence = f"this is warmup_steps now, where a share is below 1; got {value!r}; write `warmup_steps: {steps}`"
        out.refuse(key, sentence)


Converter = Callable[[Translation, Mapping[str, Any], str, Any], None]


def _flag(new: str, setting: Any) -> Converter:
    """A switch of old that is a value of another key today; false is the default and goes without a word."""

    def convert(out: Translation, data: Mapping[str, Any], key: str, value: Any) -> None:
        if value is True:
            _move(out, data, key, new, setting)
        elif value is False:
            out.notices.append(f"{key}: false is the default and was taken out")
        else:
            out.refuse(key, f"expected true or false, got {value!r}; today it is `{new}: {setting}`, or take it out")

    return convert


def _stage(out: Translation, data: Mapping[str, Any], key: str, value: Any) -> None:
    if (trainer := {"rm": "reward"}.get(value, value)) in TRAINERS:
        _move(out, data, key, "trainer", trainer)
    else:
        roads = "` or `trainer: ".join(TRAINERS)
        out.refuse(key, f"{value!r} is not a trainer of this version; write `trainer: {roads}`")
        out.cured.add("trainer")


def _always(out: Translation, data: Mapping[str, Any], key: str, value: Any) -> None:
    if value is True:
        out.notices.append(f"{key}: true is what always happens now, and was taken out")
    else:
        out.refuse(key, f"{value!r} is not offered any more; weights are always saved as safetensors; take it out")


_CONVERTED: dict[str, Converter] = {
    "warmup_ratio": _warmup_ratio,
    "group_by_length": _flag("train_sampling_strategy", "group_by_length"),
    "adafactor": _flag("optim", "adafactor"),
    "flash_attention": _flag("attn_implementation", "flash_attention_2"),
    "stage": _stage,
    "save_safetensors": _always,
}

BLOCK_HINTS = {
    "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules", "kind": "method",
}  # fmt: skip
# fields of `select` that are written beside it
OF_SELECT = ("layers", "by", "keep", "pick", "exclude", "num_batches", "reselect_steps", "rescore_steps", "stack")


def select_of(block: Mapping[str, Any]) -> dict[str, Any]:
    """`select` with the fields that stand beside it in a block."""
    select = block.get("select")
    start = dict(select) if isinstance(select, Mapping) else {} if select in (None, "all") else {"layers": select}
    return start | {key: block[key] for key in OF_SELECT if block.get(key) is not None}

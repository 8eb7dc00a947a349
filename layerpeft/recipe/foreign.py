"""Keys of other tools: what they are called here, and by which other road the same thing is had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerpeft.recipe.keys import TRAINERS
from layerpeft.selection.typecheck import Setting

# methods of papers that are a method of ours with a choice of layers
METHOD_ROADS = {
    "lisa": "`method: full, select: {pick: uniform, keep: 2, reselect_steps: 20}` (`layerpeft train lisa` is an example)",
    "badam": "`method: full, select: {pick: cycle, keep: 1, reselect_steps: 50, state: clear}` (`layerpeft train badam`)",
    "spectrum": "`method: full, select: {by: snr, keep: 25%}`",
    "freeze": "`method: full, select: last:2`",
    "quant": "`method: lora, select: last:4, quantize_frozen: nf4`, or with `quant: {mean_bits: 4.5}` instead",
    "qlora": "`method: lora, select: all, quantize_trained: nf4`",
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
}  # fmt: skip


@dataclass
class Translation:
    """A recipe in this version's words: data, what was mapped, and what could not be (path and sentence).
    `last`: keys of the command line, which overrule the recipe's under any spelling."""

    data: dict[str, Any]
    last: frozenset[str] = frozenset()
    moved: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    complaints: list[tuple[str, str]] = field(default_factory=list)

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
        elif key in RENAMED:
            _move(out, data, key, RENAMED[key], value)
        elif key in _CONVERTED:
            _CONVERTED[key](out, data, key, value)
        elif sentence := other_road(key, value):
            out.refuse(key, sentence)
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
        out.refuse(key, f"this is warmup_steps now, where a share is below 1; got {value!r}")


Converter = Callable[[Translation, Mapping[str, Any], str, Any], None]


def _flag(new: str, setting: Any) -> Converter:
    """A switch of old that is a value of another key today; false is the default and goes without a word."""

    def convert(out: Translation, data: Mapping[str, Any], key: str, value: Any) -> None:
        if value is True:
            _move(out, data, key, new, setting)
        elif value is False:
            out.notices.append(f"{key}: false is the default and was taken out")
        else:
            out.refuse(key, f"expected true or false, got {value!r}; today it is `{new}: {setting}`")

    return convert


def _stage(out: Translation, data: Mapping[str, Any], key: str, value: Any) -> None:
    if value == "sft":
        _move(out, data, key, "trainer", value)
    else:
        out.refuse(key, f"{value!r} is not a trainer of this version; write `trainer:` {' or '.join(TRAINERS)}")


def _always(out: Translation, data: Mapping[str, Any], key: str, value: Any) -> None:
    if value is True:
        out.notices.append(f"{key}: true is what always happens now, and was taken out")
    else:
        out.refuse(key, f"{value!r} is not offered any more; weights are always saved as safetensors")


_CONVERTED: dict[str, Converter] = {
    "warmup_ratio": _warmup_ratio,
    "group_by_length": _flag("train_sampling_strategy", "group_by_length"),
    "adafactor": _flag("optim", "adafactor"),
    "flash_attention": _flag("attn_implementation", "flash_attention_2"),
    "stage": _stage,
    "save_safetensors": _always,
}

_BLOCK = {  # the same setting by another road: TRL's, axolotl's and LLaMA-Factory's names for what the block says
    "lora_r": "r", "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules", "lora_target": "target_modules", "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save", "additional_target": "modules_to_save", "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern", "use_dora": "use_dora", "use_rslora": "use_rslora", "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
}  # fmt: skip
_SELECT = ("peft_layers_to_transform", "layers_to_transform", "lora_layers_to_transform")
_LATER = {
    "lisa_": "LISA (other layers every few steps, with full weights) is"
    " `layerpeft: {method: full, select: {pick: uniform, keep: 2, reselect_steps: 20}}`; `layerpeft train lisa` is an example",
    "galore": "GaLore (gradient projection) is a method: `layerpeft: {method: galore, r: 128, update_proj_gap: 200, scale: 0.25}`",
    "apollo": "APOLLO is not in this version; take it out",
    "badam": "BAdam (one layer after the other, with full weights) is"
    " `layerpeft: {method: full, select: {pick: cycle, keep: 1, reselect_steps: 50, state: clear}}`",
    "spectrum_": "Spectrum (full weights by signal-to-noise ratio) is `layerpeft: {method: full, select: {by: snr, keep: 25%}}`",
    "freeze_": 'full weights on some layers are `layerpeft: {method: full, select: "last:2"}`',
}
_ORDERS = {"ascending": "ascending", "descending": "descending", "random": "permutation"}  # BAdam's names for ours
_SENTENCES = {
    "finetuning_type": "write `layerpeft: {method: lora}`",
    "adapter": "write `layerpeft: {method: lora}`",
    "use_peft": "a recipe always trains an adapter: take it out, and write `layerpeft: {method: lora}`",
    "load_adapter": "going on from an adapter is not in this version; resume_from_checkpoint goes on with a run",
    "lora_task_type": "it follows from `trainer`",
    "lora_target_linear": "write `layerpeft: {target_modules: all-linear}`",
    "method": "it belongs in the block: `layerpeft: {method: lora}`",
    "logging_dir": "transformers 5 reads the environment variable TENSORBOARD_LOGGING_DIR instead; take it out",
    "datasets": 'write `dataset_name:` (a hub id, or a list of files) and, if need be, `columns: {prompt: "{question}", ...}`',
    "dataset": "write `dataset_name:` (a hub id, a file, or a list of files)",
    "data": "write `dataset_name:` (a hub id, a file, or a list of files)",
    "template": "the chat template of the tokenizer is used; take it out (another one: chat_template_path)",
    "val_set_size": "held-out rows are named, not drawn: write `eval_dataset:` or `dataset_test_split:`",
    "test_split_size": "held-out rows are named, not drawn: write `eval_dataset:` or `dataset_test_split:`",
    "flash_attn": "write `attn_implementation:` (sdpa, eager, flash_attention_2)",
    "train_on_inputs": "write `completion_only_loss:` (the other way round)",
    "iters": "write `max_steps:` (optimizer steps, not micro-batches)",
    "batch_size": "write `per_device_train_batch_size:` and, if needed, `gradient_accumulation_steps:`",
    "wandb_project": "write `report_to: wandb`, and set the environment variable WANDB_PROJECT",
    "wandb_name": "write `report_to: wandb` and `run_name:`",
    "use_wandb": "write `report_to: wandb`",
    "model": "write `model_name_or_path:`",
    "use_mps_device": "the device is found by itself; take it out (CPU: `use_cpu: true`)",
    "device_map": "write `model_init_kwargs: {device_map: auto}`",
    "quantization_bit": "write `model_init_kwargs: {quantization_config: {load_in_4bit: true}}`",
    "quantization_config": "write `model_init_kwargs: {quantization_config: ...}`",
}


def other_road(key: str, value: Any) -> str | None:
    """How a recipe says what this foreign key says, as the end of a sentence; None for a key that nobody knows."""
    if key in _BLOCK:
        return f"write it in the block: `layerpeft: {{{_BLOCK[key]}: {_flow(value)}}}`"
    if key in _SELECT:
        return f"write it in the block: `layerpeft: {{select: {_flow(value)}}}`"
    if key in ("num_layers", "lora_layers") and isinstance(value, int):
        return f"write it in the block: `layerpeft: {{select: {'all' if value < 1 else f'last:{value}'}}}`"
    if key in ("load_in_4bit", "load_in_8bit"):
        return f"write `model_init_kwargs: {{quantization_config: {{{key}: {_flow(value)}}}}}`"
    if key.startswith(("bnb_4bit_", "llm_int8_")):
        return f"write `model_init_kwargs: {{quantization_config: {{load_in_4bit: true, {key}: {_flow(value)}}}}}`"
    if key in _SENTENCES:
        return _SENTENCES[key]
    if sentence := _paper(key, value):
        return sentence
    for start, sentence in _LATER.items():
        if key.startswith((start, f"use_{start}")):
            return sentence
    return None


def _paper(key: str, value: Any) -> str | None:
    """The road of a setting of LISA (LMFlow, axolotl) or BAdam (LLaMA-Factory) that means the same here, with its value."""
    lisa = {"pick": "uniform", "keep": 2, "reselect_steps": 20}
    badam = {"pick": "cycle", "keep": 1, "reselect_steps": 50}
    if key == "badam_switch_mode" and value in _ORDERS:
        select: dict[str, Any] = badam | {"order": _ORDERS[value], "state": "clear"}
    elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return None
    elif key in ("lisa_n_layers", "lisa_activated_layers"):
        select = lisa | {"keep": value}
    elif key in ("lisa_step_interval", "lisa_interval_steps"):
        select = lisa | {"reselect_steps": value}
    elif key == "badam_switch_interval":
        select = badam | {"reselect_steps": value, "state": "clear"}
    else:
        return None
    inside = ", ".join(f"{k}: {v}" for k, v in select.items())
    return f"write it in the block: `layerpeft: {{method: full, select: {{{inside}}}}}`"


BLOCK_HINTS = {
    "rank": "r", "lora_r": "r", "lora_rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
    "lora_target_modules": "target_modules", "lora_target": "target_modules", "layers": "select", "by": "select",
    "keep": "select", "pick": "select", "exclude": "select", "num_batches": "select", "seed": "select",
    "layers_to_transform": "select", "layers_pattern": "select", "kind": "method",
}  # fmt: skip


def _flow(value: Any) -> str:
    plain = isinstance(value, bool) or value is None
    return {True: "true", False: "false", None: "null"}[value] if plain else str(value)

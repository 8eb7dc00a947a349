"""LMFlow's flags (src/lmflow/args.py; what LISA freezes in src/lmflow/pipeline/utils/lisa_trainer.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerpeft.integrations.places import expanded
from layerpeft.recipe.importing import data, methods
from layerpeft.recipe.importing.data import ASKED, TEXT, TURNS, Rows
from layerpeft.recipe.importing.draft import Draft, flag, number, said, whole
from layerpeft.recipe.importing.rules import ELSEWHERE, Rule, lora, on, out, to, together
from layerpeft.recipe.importing.shell import PROGRAM
from layerpeft.recipe.shipped import beside

MARKS = (
    "dataset_path",
    "lisa_interval_steps",
    "use_lisa",
    "block_size",
    "use_lora",
    "use_qlora",
    "conversation_template",
    "disable_group_texts",
    "validation_split_percentage",
    "arch_type",
    "use_flash_attention",
    "save_aggregated_lora",
    "use_customized_optim",
)
DEFAULTS: dict[str, Any] = {"gradient_checkpointing": False, "learning_rate": 5e-5}
FORMS = {"text_only": TEXT, "text2text": ASKED, "conversation": TURNS}
SCRIPTS = {"dpo": "dpo", "dpov2": "dpo", "reward": "reward", "rm": "reward"}


def start(draft: Draft) -> None:
    """Trainer, model, what trains, rows: what several of its flags say together."""
    draft.trainer = _trainer(draft)
    if (model := draft.get("model_name_or_path")) is not None:
        draft.put("model_name_or_path", data.place(draft.given, str(model)))
    _method(draft)
    draft.method = draft.method or methods.FULL
    found = [_set(draft, "dataset_path")] if draft.get("dataset_path") is not None else []
    data.put(draft, found, told="dataset_path" if found else "")
    data.answers_alone(draft, found, draft.get("train_on_prompt", False), "train_on_prompt")
    if draft.get("eval_dataset_path") is not None:
        data.put(draft, [_set(draft, "eval_dataset_path")], "eval_dataset", "eval_dataset_path")
    if (share := draft.get("validation_split_percentage")) is not None:
        data.held_out(draft, "validation_split_percentage", (number(share) or 0) / 100)
    if not flag(draft.get("disable_group_texts", True)):
        draft.put("packing", True, "disable_group_texts: false")


def _trainer(draft: Draft) -> str:
    script = Path(str(draft.get(PROGRAM, ""))).stem
    kind = next((ours for word, ours in SCRIPTS.items() if word in script.split("_")), "sft")
    if script:
        draft.note("trainer", script)
    if "ppo" in script or "raft" in script:
        draft.refuse(script, "neither PPO nor RAFT is here; grpo and rloo learn from rewards")
    if draft.get("arch_type", "decoder_only") != "decoder_only":
        draft.refuse(
            "arch_type",
            "models that are no decoders are those of other tasks here (trainer: seq2seq, classification, …)",
        )
    return kind


def _method(draft: Draft) -> None:
    q, dora = flag(draft.get("use_qlora", False)), flag(draft.get("use_dora", False))
    if flag(draft.get("use_lora", False)) or q or dora:
        names = {
            "r": "lora_r",
            "lora_alpha": "lora_alpha",
            "lora_dropout": "lora_dropout",
            "target_modules": "lora_target_modules",
        }
        told = {
            ours: theirs + ("" if theirs in draft.given.data else ", its default") for ours, theirs in names.items()
        }
        rank, alpha, dropout = draft.get("lora_r", 8), draft.get("lora_alpha", 32), draft.get("lora_dropout", 0.1)
        methods.adapters(draft, rank, alpha, dropout, draft.get("lora_target_modules"), told)
        draft.note("layerpeft.method", "use_qlora" if q else "use_lora")
        if dora:
            draft.inside("use_dora", True, "use_dora")
        if q and whole(draft.get("bits", 4)) == 8:
            methods.quantized(draft, "8bit", {}, "use_qlora, bits: 8")
        elif q:
            options = methods.four_bits(draft.get("quant_type", "nf4"), draft.get("double_quant", True))
            methods.quantized(draft, "4bit", options, "use_qlora")
        if flag(draft.get("use_lisa", False)):
            draft.refuse(
                "use_lisa",
                "draws of layers with adapters on them: say method: lora with select: {pick: uniform, …} yourself",
            )
    elif flag(draft.get("use_lisa", False)):
        layers, steps = draft.get("lisa_activated_layers", 2), draft.get("lisa_interval_steps", 20)
        methods.lisa(
            draft, layers, steps, f"LISA: {said('lisa_activated_layers', layers)}, {said('lisa_interval_steps', steps)}"
        )
    else:
        methods.everything(draft, "neither LoRA nor LISA, so all weights train")


def _set(draft: Draft, key: str) -> Rows:
    """A folder of JSON files, each `{"type": …, "instances": […]}`."""
    name = str(draft.get(key))
    folder = expanded(beside(name, draft.given.home))
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [folder] if folder.is_file() else []
    kind = _kind(files[0]) if files else None
    columns = {"prompt": "{input}", "completion": "{output}"} if kind == "text2text" else {}
    note = "LMFlow keeps rows under `instances`; a row a line is read here: jq -c '.instances[]' FILE > rows.jsonl"
    return Rows(
        data.place(draft.given, name), FORMS.get(str(kind), ""), columns, f"type: {kind}" if kind else "", notes=(note,)
    )


def _kind(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get("type") if isinstance(found, dict) else None


_LAYERS = out("layers are found by themselves")
KEYS: dict[str, Rule] = {
    PROGRAM: together,
    "block_size": to("max_length"),
    "torch_dtype": to("dtype"),
    "model_max_length": to("max_length"),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), together),
    "lisa_layers_attribute": _LAYERS,
    "lisa_activated_layers": together,
    "lisa_interval_steps": together,
    "use_lisa": together,
    "bits": together,
    "quant_type": together,
    "double_quant": together,
    "save_aggregated_lora": out("`layerpeft merge` makes a full model"),
    "lora_model_path": lora("init_lora_weights", lambda v: True),
    "use_flash_attention": on("attn_implementation", "flash_attention_2"),
    "conversation_template": out("the chat template of the tokenizer is used (another one: chat_template_path)"),
    "preprocessing_num_workers": to("dataset_num_proc"),
    "train_file": to("dataset_name"),
    "validation_file": to("eval_dataset"),
    "truncate_to_model_max_length": out("max_length says it"),
    "group_texts_batch_size": out("rows are packed by themselves"),
    "keep_linebreaks": out("text stays as it is", True),
    "truncation_side": out("the end of a row is cut"),
    "padding_side": out("the tokenizer says it"),
    "use_customized_optim": out("its optimizers are not here (optim names those of transformers)", False),
    "customized_optim*": out("its optimizers are not here (optim names those of transformers)"),
    "optim_*": out("optim_args takes what an optimizer has besides"),
    "use_ram_optimized_load": out("models are always loaded so", True),
    "do_rope_scaling": out("a model's own positions are used", False),
    "rope_*": out("a model's own positions are used"),
    "use_int8": ELSEWHERE,
    "eos_padding": out("padding carries no loss"),
    "ignore_bias_buffers": out("is for an old DDP", False),
    "finetune_part": out("what is chosen trains"),
    "config_name": out("the config of the model's folder is used"),
    "tokenizer_name": out("the tokenizer of the model's folder is used"),
    "use_fast_tokenizer": out("tokenizers are fast", True),
    "load_in_4bit": out("use_qlora says it there"),
    "token": out("`hf auth login` says who you are"),
    "streaming": out("streamed rows are not supported; name files, or a data set that fits on the disk", False),
    "master_port": out("torchrun says it"),
}

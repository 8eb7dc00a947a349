"""ms-swift's flags and keys (docs/source_en/Instruction/Command-line-parameters.md; swift/llm/argument of version 3)."""

from __future__ import annotations

import json
from typing import Any

from layerpeft.recipe import cures
from layerpeft.recipe.importing import data, methods
from layerpeft.recipe.importing.data import Rows
from layerpeft.recipe.importing.draft import NO_TRAINER, Draft, flag, number, said, whole, words
from layerpeft.recipe.importing.rules import ELSEWHERE, Rule, lora, on, out, to, together
from layerpeft.recipe.importing.shell import PROGRAM
from layerpeft.recipe.templates import EXAMPLE, in_recipe

MARKS = (
    "train_type",
    "tuner_type",
    "sft_type",
    "rlhf_type",
    "model",
    "model_id_or_path",
    "target_modules",
    "split_dataset_ratio",
    "val_dataset",
    "attn_impl",
    "lora_rank",
    "freeze_parameters",
    "trainable_parameters",
    "quant_bits",
    "quant_method",
    "model_author",
    "lisa_step_interval",
)
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "gradient_checkpointing": True,
    "logging_steps": 5,
}
RLHF = {
    "dpo": "dpo",
    "orpo": "orpo",
    "kto": "kto",
    "cpo": "cpo",
    "simpo": "cpo",
    "rm": "reward",
    "grpo": "grpo",
    "gkd": "gkd",
}
READ_TOGETHER = (
    "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "target_regex", "lisa_activated_layers", "lisa_step_interval",
    "use_galore", "galore_target_modules", "galore_rank", "galore_update_proj_gap", "galore_scale", "galore_proj_type",
    "galore_quantization", "galore_proj_quant", "freeze_parameters", "freeze_parameters_ratio", "freeze_parameters_regex",
    "trainable_parameters", "trainable_parameters_regex", "quant_bits", "quant_method",
)  # fmt: skip
TYPES = ("train_type", "tuner_type", "sft_type")


def start(draft: Draft) -> None:
    """Trainer, model, what trains, rows: what several of its flags say together."""
    draft.trainer = _trainer(draft)
    for key in ("model", "model_id_or_path"):
        if (model := draft.get(key)) is not None:
            draft.put("model_name_or_path", data.place(draft.given, str(model)), key)
            if not flag(draft.get("use_hf", False)):
                draft.note(
                    "model_name_or_path",
                    "ms-swift looks on ModelScope; here it is a folder, or a name on the hub of Hugging Face",
                )
    _method(draft)
    draft.method = draft.method or methods.FULL
    _quantized(draft)
    found = [_set(draft, name) for name in _listed(draft.get("dataset", []))]
    data.put(draft, found, told="dataset" if found else "")
    most = [name.partition("#")[2] for name in _listed(draft.get("dataset", []))]
    if any(most):
        data.limited(draft, "dataset", whole(most[0]), found)
    data.put(
        draft, [_set(draft, name) for name in _listed(draft.get("val_dataset", []))], "eval_dataset", "val_dataset"
    )
    _columns(draft)
    if (share := draft.get("split_dataset_ratio")) is not None:
        data.held_out(draft, "split_dataset_ratio", share)
    if "learning_rate" not in draft.given.data:
        draft.put("learning_rate", 1e-5 if draft.method == methods.FULL else 1e-4, "its default")


def _trainer(draft: Draft) -> str:
    program, kind = draft.name(PROGRAM, "") or "", draft.name("rlhf_type")
    if kind is None and "rlhf" in program:
        kind = "dpo"
    if kind is None:
        draft.note("trainer", program)
        return "causal_lm" if program.endswith(" pt") else "sft"
    draft.note("trainer", said("rlhf_type", kind))
    if kind not in RLHF:
        draft.refuse_name("rlhf_type", kind, NO_TRAINER, RLHF)
    if kind == "simpo":
        draft.put("loss_type", "simpo", said("rlhf_type", kind))
    return RLHF.get(kind, "dpo")


# ---- what trains ----------------------------------------------------------------------------------------------------


def _method(draft: Draft) -> None:
    given = [(key, value) for key in TYPES if (value := draft.name(key)) is not None]
    key, kind = given[0] if given else ("tuner_type", "lora")
    if kind in ("lora", "longlora"):
        _adapters(draft)
        draft.note("layerpeft.method", said(key, kind) if given else "its default")
        if kind == "longlora":
            draft.leave(key, "LongLoRA's attention is not in this version; its adapters are", kind)
    elif kind == "llamapro":
        draft.refuse(
            key,
            "llamapro puts new layers into the model, which a recipe does not; expand the model beforehand, and train what "
            "was added: method: full, select: [the added layers]",
        )
    elif kind != "full":
        draft.refuse_name(key, kind, "not in this version", ("lora", "full"))
    elif flag(draft.get("use_galore", False)):
        _galore(draft)
    elif whole(draft.get("lisa_activated_layers", 0)):
        layers, steps = draft.get("lisa_activated_layers"), draft.get("lisa_step_interval", 20)
        methods.lisa(draft, layers, steps, "LISA: lisa_activated_layers, lisa_step_interval")
    else:
        _whole(draft, said(key, kind))


def _adapters(draft: Draft) -> None:
    told = {
        "r": "lora_rank",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "target_modules": "target_modules",
    }
    told = {ours: theirs + ("" if theirs in draft.given.data else ", its default") for ours, theirs in told.items()}
    targets = draft.get("target_modules", "all-linear")
    targets = targets if isinstance(targets, str) else words(targets)
    if targets in (["all-linear"], ["ALL"], ["DEFAULT"], "ALL", "DEFAULT", "all-linear"):
        targets = "all-linear"
    if (pattern := draft.get("target_regex")) is not None:
        targets, told["target_modules"] = str(pattern), "target_regex"
    alpha, dropout = draft.get("lora_alpha", 32), draft.get("lora_dropout", 0.05)
    methods.adapters(draft, draft.get("lora_rank", 8), alpha, dropout, None, told)
    named = targets if "target_regex" in draft.given.data else cures.names(targets)
    draft.inside("target_modules", named, told["target_modules"])
    methods.modules(draft, "modules_to_save", draft.get("modules_to_save"))


def _whole(draft: Draft, why: str) -> None:
    """All weights, less those of frozen beginnings of names, and those of trainable ones again."""
    named, pattern = draft.get("trainable_parameters", []), draft.get("trainable_parameters_regex")
    frozen, share = draft.get("freeze_parameters", []), number(draft.get("freeze_parameters_ratio", 0)) or 0
    if draft.get("freeze_parameters_regex") is not None:
        draft.refuse(
            "freeze_parameters_regex", "what trains is named here, not what is frozen (select, target_modules)"
        )
    if frozen:
        draft.refuse(
            "freeze_parameters",
            "what trains is named here, not what is frozen (select, target_modules, exclude_modules)",
        )
    elif 0 < share < 1:
        draft.refuse(
            "freeze_parameters_ratio", "a share of all weights is no choice of layers; say which, as in select: last:4"
        )
    elif share == 1 and (named or pattern):
        given = [f".*(?:{pattern})"] if pattern else words(named)
        methods.by_names(
            draft, "trainable_parameters_regex" if pattern else "trainable_parameters", given, literal=not pattern
        )
    elif share == 1:
        draft.refuse("freeze_parameters_ratio", "everything is frozen, and nothing is named that trains")
    else:
        methods.everything(draft, why)


def _galore(draft: Draft) -> None:
    if flag(draft.get("galore_quantization", False)) or flag(draft.get("galore_proj_quant", False)):
        why = "Q-GaLore's packed bases are not in this version (gap_overlap is its other idea)"
        draft.leave("galore_quantization", why, True)
    targets = draft.get("galore_target_modules")
    options = {
        "r": draft.get("galore_rank", 128), "update_proj_gap": draft.get("galore_update_proj_gap", 50),
        "scale": draft.get("galore_scale", 1.0), "proj_type": draft.get("galore_proj_type", "std"),
        "target_modules": words(targets) if targets else "all-linear",
    }  # fmt: skip
    told = {n: f"galore_{ {'r': 'rank'}.get(n, n) }" for n in options}
    methods.projected(draft, options, told)


def _quantized(draft: Draft) -> None:
    bits, way = whole(draft.get("quant_bits", draft.get("quantization_bit"))), draft.get("quant_method", "bnb")
    if not bits:
        return
    if way != "bnb" or bits not in (4, 8):
        draft.refuse("quant_bits", f"{bits} bits by {way} are not loaded here: bitsandbytes does 4 and 8")
    elif bits == 8:
        methods.quantized(draft, "8bit", {}, "quant_bits: 8")
    else:
        options = methods.four_bits(
            draft.get("bnb_4bit_quant_type", "nf4"), draft.get("bnb_4bit_use_double_quant", True)
        )
        compute = draft.get("bnb_4bit_compute_dtype")
        methods.quantized(draft, "4bit", options | {"bnb_4bit_compute_dtype": compute}, "quant_bits: 4")


# ---- rows -----------------------------------------------------------------------------------------------------------


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _set(draft: Draft, name: str) -> Rows:
    """`path_or_id:subset#rows`."""
    name = name.partition("#")[0]
    path, _, subset = name.rpartition(":") if ":" in name and "://" not in name else (name, "", "")
    return Rows(data.place(draft.given, path), config=subset or None)


def _columns(draft: Draft) -> None:
    """`{"question": "query", "answer": "response"}`: columns of the rows, and what they are to be called."""
    given = draft.get("columns")
    if given is None:
        return
    try:
        named = json.loads(given) if isinstance(given, str) else given
        ours = {v: k for k, v in dict(named).items()}
    except (ValueError, TypeError):
        draft.leave("columns", "no JSON mapping of columns")
        return
    if {"query", "response"} <= ours.keys():
        draft.put("columns", data.asked(ours["query"], ours["response"], ours.get("system")), "columns")
    else:
        draft.leave("columns", f"say what is what, as in {in_recipe(EXAMPLE)}")


# ---- everything else ------------------------------------------------------------------------------------------------


def _mapping(value: Any) -> Any:
    """JSON text as a mapping."""
    try:
        return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
    except ValueError:
        raise ValueError("no readable JSON") from None


def _attention(draft: Draft, key: str, value: Any) -> None:
    name = {"flash_attn": "flash_attention_2"}.get(str(value), str(value))
    found = cures.cure(
        "flash_attn", {"flash_attention_2": "fa2", "flash_attention_3": "fa3"}.get(name, name), draft.given.data
    )
    ours = found.write.get("attn_implementation", name) if found else name
    draft.put("attn_implementation", ours, said(key, value) + (f" ({found.why})" if found and found.why else ""))


def _init(value: Any) -> Any:
    return {"true": True, "false": False}.get(str(value).lower(), value)


_FROZEN = out("what is not chosen is frozen (`stack` of select says of which part layers are)")
_SELF = out("is of rows about the model itself, whose places it fills; fill them in the rows")
_MORE = out("is of models and rows that ms-swift registers")
KEYS: dict[str, Rule] = {
    PROGRAM: together,
    "torch_dtype": to("dtype"),
    "attn_impl": _attention,
    "init_weights": lora("init_lora_weights", _init),
    "init_lora_weights": lora("init_lora_weights", _init),
    "use_dora": lora("use_dora", flag),
    "use_rslora": lora("use_rslora", flag),
    "lora_bias": lora("bias"),
    "lora_bias_trainable": lora("bias"),
    "target_parameters": lora("target_parameters"),
    "lora_dtype": out("adapters are float32"),
    "lora_lr_ratio": out("LoRA+ is not in this version"),
    "lorap_*": out("LoRA+ is not in this version"),
    **dict.fromkeys(READ_TOGETHER, together),
    "freeze_vit": _FROZEN,
    "freeze_aligner": _FROZEN,
    "freeze_llm": _FROZEN,
    "tuner_backend": out("adapters are PEFT's", "peft"),
    "use_hf": together,
    "model_type": _MORE,
    "template": out("the chat template of the tokenizer is used (another one: chat_template_path)"),
    "template_type": out("the chat template of the tokenizer is used (another one: chat_template_path)"),
    "model_author": _SELF,
    "model_name": _SELF,
    "system": out("a system turn is to stand in the rows"),
    "custom_register_path": _MORE,
    "custom_dataset_info": _MORE,
    "external_plugins": _MORE,
    "model_kwargs": _MORE,
    "truncation_strategy": out("rows that are too long are cut, and counted"),
    "loss_scale": out("answers carry loss, each token alike"),
    "load_from_cache_file": out("prepared rows are kept by themselves"),
    "lazy_tokenize": out("prepared rows are kept by themselves"),
    "dataset_shuffle": to("shuffle_dataset", flag),
    "check_model": _MORE,
    "train_dataloader_shuffle": out("rows are shuffled by data_seed", True),
    "val_dataset_shuffle": out("held-out rows stay in order", False),
    "streaming": out("streamed rows are not supported; name files, or a data set that fits on the disk", False),
    "lr_scheduler_kwargs": to("lr_scheduler_kwargs", _mapping),
    "gradient_checkpointing_kwargs": to("gradient_checkpointing_kwargs", _mapping),
    "use_liger": on("use_liger_kernel", True),
    "rpo_alpha": out("the loss of the chosen answer is one of several (loss_type, loss_weights)"),
    "ref_model*": out("the reference is the model itself with the adapter off; no second model is loaded"),
    "add_version": out("output_dir is as it stands"),
    "save_on_each_node": to("save_on_each_node", flag),
    "acc_strategy": out("`layerpeft eval` measures it"),
    "vllm_*": ELSEWHERE,
    "use_vllm": to("use_vllm", flag),
    "adapters": out("going on from an adapter is not in this version; resume_from_checkpoint goes on with a run"),
    "max_pixels": _MORE,
    "llamapro_*": out("belongs to llamapro"),
    "reward_model*": out("rewards of GRPO may be models: `rewards: outputs/reward`"),
    "reward_funcs": out("rewards are functions of a file beside the recipe: `rewards:` names them"),
    "padding_free": to("padding_free", flag),
    "enable_dft_loss": to("loss_type", lambda v: "dft"),
    "task_type": out("it follows from `trainer`", "causal_lm"),
    "sequence_parallel_size": out("sequences are not divided", 1),
}

"""LLaMA-Factory's keys (src/llamafactory/hparams), what freezing means (model/adapter.py), and BAdam (train/trainer_utils.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerpeft.integrations.places import expanded
from layerpeft.recipe import cures
from layerpeft.recipe.importing import data, methods
from layerpeft.recipe.importing.data import ALPACA, ASKED, LIKED, PAIRS, TEXT, TURNS, Rows
from layerpeft.recipe.importing.draft import NO_TRAINER, Draft, flag, number, said, whole, words
from layerpeft.recipe.importing.rules import ELSEWHERE, KERNEL, Rule, lora, on, out, to, together

MARKS = (
    "stage",
    "finetuning_type",
    "template",
    "cutoff_len",
    "dataset_dir",
    "lora_target",
    "lora_rank",
    "freeze_trainable_layers",
    "use_llama_pro",
    "use_badam",
    "use_galore",
    "do_train",
    "plot_loss",
    "preprocessing_num_workers",
    "overwrite_cache",
)
DEFAULTS: dict[str, Any] = {"max_length": 2048, "gradient_checkpointing": True, "learning_rate": 5e-5}
INFO = "dataset_info.json"
LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "pissa_init", "pissa_iter")
FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "use_llama_pro")
BADAM = ("use_badam", "badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval")
PROJECTED = tuple(
    name
    for kind in ("galore", "apollo")
    for name in (f"use_{kind}", *(f"{kind}_{k}" for k in ("target", "rank", "update_interval", "proj_type")))
) + ("galore_scale",)
STAGES = {"pt": "causal_lm", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto"}


def start(draft: Draft) -> None:
    """Trainer, model, what trains, rows: what several of its keys say together."""
    draft.trainer = _trainer(draft)
    if (model := draft.get("model_name_or_path")) is not None:
        draft.put("model_name_or_path", data.place(draft.given, str(model)))
    _method(draft)
    draft.method = draft.method or methods.FULL
    _quantized(draft)
    _datasets(draft)


# ---- the trainer ----------------------------------------------------------------------------------------------------


def _trainer(draft: Draft) -> str:
    stage, loss = draft.name("stage", "sft") or "", draft.name("pref_loss", "sigmoid")
    draft.note("trainer", said("stage", stage))
    if stage not in STAGES:
        what = f"{NO_TRAINER} (grpo and rloo learn from rewards)" if stage == "ppo" else NO_TRAINER
        draft.refuse_name("stage", stage, what, STAGES)
        return "sft"
    if stage != "dpo":
        return STAGES[stage]
    draft.note("trainer", said("pref_loss", loss))
    extra = number(draft.get("pref_ftx", 0)) or 0
    if loss == "orpo":
        return "orpo"
    if loss == "simpo":
        draft.put("loss_type", "simpo", said("pref_loss", loss))
        draft.put("cpo_alpha", extra, "pref_ftx")
        return "cpo"
    if loss == "kto_pair":
        draft.refuse("pref_loss", "kto_pair is not in this version; trainer: kto takes pairs as two rows each")
    if extra:
        draft.put("loss_type", [loss, "sft"], f"{said('pref_loss', loss)}, pref_ftx")
        draft.put("loss_weights", [1.0, extra], said("pref_ftx", extra))
    elif loss != "sigmoid":
        draft.put("loss_type", [loss], said("pref_loss", loss))
    return "dpo"


# ---- what trains ----------------------------------------------------------------------------------------------------


def _method(draft: Draft) -> None:
    kind = draft.name("finetuning_type", "lora") or ""
    if kind == "lora":
        _adapters(draft)
    elif kind not in ("freeze", "full"):
        draft.refuse_name("finetuning_type", kind, "not in this version", ("lora", "freeze", "full"))
    elif flag(draft.get("use_badam", False)):
        _badam(draft, kind)
    elif kind == "freeze":
        _frozen(draft)
    elif not _projects(draft):
        methods.everything(draft, said("finetuning_type", kind))
    if kind == "freeze" and _projects(draft, asked=True):
        draft.refuse(
            "use_galore", "a projection of frozen layers: say finetuning_type: full, and which layers with select"
        )


def _adapters(draft: Draft) -> None:
    rank = draft.get("lora_rank", 8)
    alpha = draft.get("lora_alpha", 2 * (whole(rank) or 8))
    told = {
        name: f"{key}{'' if key in draft.given.data else ', its default'}"
        for name, key in (
            ("r", "lora_rank"),
            ("lora_alpha", "lora_alpha"),
            ("lora_dropout", "lora_dropout"),
            ("target_modules", "lora_target"),
        )
    }
    methods.adapters(draft, rank, alpha, draft.get("lora_dropout", 0.0), draft.get("lora_target", "all"), told)
    draft.note("layerpeft.method", "finetuning_type: lora")
    methods.modules(draft, "additional_target", draft.get("additional_target"))
    if flag(draft.get("use_llama_pro", False)):
        _pro(draft)
    if flag(draft.get("pissa_init", False)):
        steps = whole(draft.get("pissa_iter", 16))
        draft.inside(
            "init_lora_weights", "pissa" if steps in (-1, None) else f"pissa_niter_{steps}", "pissa_init, pissa_iter"
        )


def _frozen(draft: Draft) -> None:
    """Layers by number from either end, or those that were added; modules of them; modules outside."""
    count = whole(draft.get("freeze_trainable_layers", 2))
    if flag(draft.get("use_llama_pro", False)):
        _pro(draft)
    elif not count:
        draft.refuse("freeze_trainable_layers", "expected how many of the last layers train (below 0: of the first)")
    else:
        named = "freeze_trainable_layers" in draft.given.data
        why = said("freeze_trainable_layers", count) + ("" if named else ", its default")
        methods.in_place(draft, methods.last(draft, "freeze_trainable_layers", count), why)
    named_modules = words(draft.get("freeze_trainable_modules", "all"))
    if "all" not in named_modules:
        draft.inside("target_modules", named_modules, "freeze_trainable_modules")
    extra = draft.get("freeze_extra_modules")
    methods.modules(draft, "freeze_extra_modules", extra)
    if any("norm" in name for name in words(extra)):
        draft.note(
            "layerpeft.modules_to_save",
            "there a part of a name is enough, and `norm` trains the norms in all layers, too",
        )


def _pro(draft: Draft) -> None:
    layers = methods.added(draft, "use_llama_pro", draft.get("freeze_trainable_layers", 2))
    if layers is not None:
        why = f"use_llama_pro: the added layers, {said('freeze_trainable_layers', draft.get('freeze_trainable_layers', 2))}"
        draft.inside("select", layers, why)
        if not draft.method:
            draft.method = methods.FULL
            draft.inside("method", methods.FULL)


def _badam(draft: Draft, kind: str) -> None:
    if kind == "freeze":
        draft.refuse(
            "use_badam", "with finetuning_type: freeze it has layers without a gradient in its turns; say full"
        )
    if draft.get("badam_mode", "layer") != "layer":
        draft.refuse("badam_mode", "shares of a tensor do not train by themselves here; layers do (badam_mode: layer)")
        return
    order, steps = draft.name("badam_switch_mode", "ascending"), draft.get("badam_switch_interval", 50)
    methods.badam(
        draft, order, steps, draft.get("badam_start_block"), "use_badam, badam_switch_mode, badam_switch_interval"
    )


def _projects(draft: Draft, asked: bool = False) -> bool:
    """GaLore or APOLLO, where one of them is on; `asked`: only whether."""
    name = next((n for n in ("galore", "apollo") if flag(draft.get(f"use_{n}", False))), None)
    if name is None or asked:
        return name is not None
    gap = draft.get(f"{name}_update_interval", 200)
    scale = draft.get("galore_scale", 2.0) if name == "galore" else None
    kind = draft.get(f"{name}_proj_type", "std")
    options = {
        "r": draft.get(f"{name}_rank", 16), "update_proj_gap": gap, "scale": scale, "proj_type": kind,
        "target_modules": cures.names(draft.get(f"{name}_target", "all")),
    }  # fmt: skip
    keys = {"r": "rank", "update_proj_gap": "update_interval", "target_modules": "target"}
    told = {k: f"{name}_{keys.get(k, k)}" for k in options}
    methods.projected(draft, options, told, random=name == "apollo")
    draft.note("layerpeft.method", f"use_{name}: true")
    return True


def _quantized(draft: Draft) -> None:
    bits, way = whole(draft.get("quantization_bit")), draft.get("quantization_method", "bnb")
    if bits is None:
        return
    if str(way) not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        draft.refuse("quantization_bit", f"{bits} bits by {way} are not loaded here: bitsandbytes does 4 and 8")
    elif bits == 8:
        methods.quantized(draft, "8bit", {}, "quantization_bit: 8")
    else:
        options = methods.four_bits(draft.get("quantization_type", "nf4"), draft.get("double_quantization", True))
        methods.quantized(draft, "4bit", options, "quantization_bit: 4")


# ---- rows -----------------------------------------------------------------------------------------------------------


def _datasets(draft: Draft) -> None:
    folder = str(draft.get("dataset_dir", "data"))
    known, where = _info(draft, folder)
    found = [_set(draft, name, known, where) for name in words(draft.get("dataset"))]
    shares = words(str(draft.get("interleave_probs", "")))
    if len(shares) == len(found) > 1 and all(number(s) is not None for s in shares):
        found = [data.Rows(**{**vars(one), "weight": float(s)}) for one, s in zip(found, shares, strict=True)]
    data.put(draft, found, told=said("dataset", draft.get("dataset")) if found else "")
    data.answers_alone(draft, found, draft.get("train_on_prompt", False), "train_on_prompt")
    held = [_set(draft, name, known, where) for name in words(draft.get("eval_dataset"))]
    data.put(draft, held, "eval_dataset", said("eval_dataset", draft.get("eval_dataset")) if held else "")
    if (most := draft.get("max_samples")) is not None:
        data.limited(draft, "max_samples", most, found)
    if (size := draft.get("val_size")) is not None:
        data.held_out(draft, "val_size", size)


def _info(draft: Draft, folder: str) -> tuple[dict[str, Any] | None, Path]:
    """What its data sets are, by name, and the folder that says so: `dataset_dir` from here or beside the file, or its own."""
    places = [expanded(folder), draft.given.home / folder, draft.given.home]
    for place in places if folder != "ONLINE" else ():
        if (place / INFO).is_file():
            try:
                return json.loads((place / INFO).read_text(encoding="utf-8")), place
            except ValueError as error:
                draft.refuse("dataset_dir", f"{place / INFO} is not readable as JSON ({error})")
    return None, places[0]


def _set(draft: Draft, name: str, known: Mapping[str, Any] | None, where: Path) -> Rows:
    info = (known or {}).get(name)
    if not isinstance(info, Mapping):
        online = draft.given.data.get("dataset_dir") == "ONLINE"
        lacking = f"{INFO} does not name it" if known is not None else f"no {INFO} is here that says what it is"
        return Rows(name, notes=() if online else (f"{name}: {lacking}; name its file, or the data set on the hub",))
    hub = info.get("hf_hub_url") or info.get("ms_hub_url") or info.get("script_url")
    notes = (
        () if info.get("hf_hub_url") or not hub else (f"{hub} is on ModelScope there; here on the hub of Hugging Face",)
    )
    path = str(hub) if hub else _file(draft, where, str(info.get("file_name")))
    form, columns = _form(draft, name, info)
    told = f"{name} in {INFO}: {info.get('formatting', 'alpaca')}"
    return Rows(path, form, columns, told, info.get("subset"), info.get("split"), notes=notes)


def _file(draft: Draft, where: Path, name: str) -> str:
    """A file of the data folder, as it is found from here or from beside the recipe."""
    path = where / name
    inside = path.is_relative_to(draft.given.home)
    return data.place(draft.given, (path.relative_to(draft.given.home) if inside else path).as_posix())


def _form(draft: Draft, name: str, info: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    named, tags = info.get("columns") or {}, info.get("tags") or {}
    ranked = bool(info.get("ranking"))
    if info.get("formatting", "alpaca") == "sharegpt":
        column, who = named.get("messages", "conversations"), tags.get("role_tag", "from")
        speakers = {tags.get("user_tag", "human"), tags.get("assistant_tag", "gpt")}
        known = data.reads_turns(column, who, tags.get("content_tag", "value"))
        if not known or speakers not in ({"human", "gpt"}, {"user", "assistant"}):
            why = "turns are read of messages or conversations, with role and content or from and value; rename them"
            draft.leave(f"{INFO}: {name}", why, {**named, **tags})
        if ranked and (named.get("chosen", "chosen"), named.get("rejected", "rejected")) != ("chosen", "rejected"):
            draft.leave(f"{INFO}: {name}", "turns of a pair are read of chosen and rejected; rename them", dict(named))
        return PAIRS if ranked else TURNS, {}
    ask = named.get("prompt", "instruction") if named else "instruction"
    second = named.get("query") if named else "input"
    answer = named.get("response", "output") if named else "output"
    question = f"{{{ask}}}" + (f"\n{{{second}}}" if second else "")
    if draft.trainer == "causal_lm":
        return TEXT, {} if ask == "text" else {"text": f"{{{ask}}}"}
    if ranked:
        good, bad = named.get("chosen", "chosen"), named.get("rejected", "rejected")
        return PAIRS, {"prompt": question, "chosen": f"{{{good}}}", "rejected": f"{{{bad}}}"}
    if named.get("kto_tag"):
        return LIKED, {"prompt": question, "completion": f"{{{answer}}}", "label": f"{{{named['kto_tag']}}}"}
    native = (ask, second or "input", answer) == ("instruction", "input", "output")
    same = native and all(named.get(n, n) == n for n in ("system", "history"))
    return (ALPACA, {}) if same else (ASKED, data.asked(ask, answer, named.get("system"), second))


# ---- everything else ------------------------------------------------------------------------------------------------

_CHUNK = out("means nothing for rows that are read whole")
_FP32 = out("precisions of parts are not set one by one here")
_VISION = out("what is not chosen is frozen (`stack` of select says of which part layers are)")
_REFERENCE = out("the reference is the model itself with the adapter off; no second model is loaded")
KEYS: dict[str, Rule] = {
    "use_dora": lora("use_dora"),
    "use_rslora": lora("use_rslora"),
    "create_new_adapter": out("an adapter is always new"),
    "adapter_name_or_path": out(
        "going on from an adapter is not in this version; resume_from_checkpoint goes on with a run"
    ),
    "loraplus_*": out("LoRA+ is not in this version"),
    **dict.fromkeys(LORA, together),
    "freeze_vision_tower": _VISION,
    "freeze_multi_modal_projector": _VISION,
    "freeze_language_model": _VISION,
    **dict.fromkeys(FREEZE, together),
    "badam_verbose": out("layers.csv says which layer trained when"),
    **dict.fromkeys((*BADAM, *PROJECTED), together),
    "galore_layerwise": out("any optimizer works with a projection, accumulation too", False),
    "apollo_*": out("APOLLO is not in this version: its subspace is, its scaling by channels is not"),
    "use_muon": to("optim", lambda v: "muon"),
    "use_adam_mini": out("Adam-mini is not in this version"),
    "cutoff_len": to("max_length"),
    "packing": to("packing", flag),
    "neat_packing": on("packing", True),
    "train_on_prompt": together,
    "mask_history": out("all answers of a conversation carry loss"),
    "disable_gradient_checkpointing": to("gradient_checkpointing", lambda v: not flag(v)),
    "use_unsloth_gc": to("gradient_checkpointing", lambda v: True),
    "use_unsloth": KERNEL,
    "enable_liger_kernel": on("use_liger_kernel", True),
    "use_reentrant_gc": out("checkpointing is of the kind that lets the backward pass end early"),
    "template": out("the chat template of the tokenizer is used (another one: chat_template_path)"),
    "default_system": out("a system turn is to stand in the rows"),
    "tool_format": out("the chat template writes tools"),
    "pure_bf16": on("dtype", "bfloat16"),
    "upcast_*": _FP32,
    "pref_beta": to("beta"),
    "pref_bco_weight": out("BCO's loss is not in this version", 0.0),
    "dpo_label_smoothing": to("label_smoothing"),
    "kto_chosen_weight": to("desirable_weight"),
    "kto_rejected_weight": to("undesirable_weight"),
    "simpo_gamma": to("simpo_gamma"),
    "ld_alpha": to("ld_alpha"),
    "ref_model*": _REFERENCE,
    "reward_model*": out("rewards of GRPO and RLOO may be models: `rewards: outputs/reward`"),
    "ppo_*": out("there is no PPO"),
    "preprocessing_num_workers": to("dataset_num_proc"),
    "preprocessing_batch_size": _CHUNK,
    "buffer_size": _CHUNK,
    "streaming": out("streamed rows are not supported; name files, or a data set that fits on the disk", False),
    "mix_strategy": out("several data sets are shuffled together, by their weights"),
    "interleave_probs": together,
    "tokenized_path": out("prepared rows are kept by themselves"),
    "ignore_pad_token_for_loss": out("padding carries no loss", True),
    "eval_on_each_dataset": out("held-out rows are measured together", False),
    "eval_num_beams": ELSEWHERE,
    "predict_with_generate": ELSEWHERE,
    "include_num_input_tokens_seen": to("include_num_input_tokens_seen"),
    "include_effective_tokens_per_second": out("log.jsonl has the rates"),
    "disable_shuffling": to("shuffle_dataset", lambda v: not flag(v)),
    "early_stopping_steps": out("early stopping is not in this version"),
    "compute_accuracy": out("`layerpeft eval` measures it"),
    "export_*": ELSEWHERE,
    "infer_*": ELSEWHERE,
    "use_fast_tokenizer": out("tokenizers are fast", True),
    "low_cpu_mem_usage": out("models are always loaded so", True),
    "shift_attn": out("S2-attention is not in this version", False),
    "mixture_of_depths": out("mixture of depths is not in this version"),
    "moe_aux_loss_coef": to("router_aux_loss_coef"),
    "rope_scaling": out("a model's own positions are used; its config.json may say others"),
    "use_kv_cache": ELSEWHERE,
    "image_*": out("the processor's own sizes are used"),
    "video_*": out("videos are not read"),
    "swanlab_*": out("trackers read their own environment variables"),
    "ray_*": out("Ray is not used"),
    "use_dft_loss": to("loss_type", lambda v: "dft"),
    "hf_hub_token": out("`hf auth login` says who you are"),
    "quantization_*": together,
    "double_quantization": together,
    "num_train_epochs": to("num_train_epochs"),
}

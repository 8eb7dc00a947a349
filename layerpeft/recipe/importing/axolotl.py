"""axolotl's keys (its schemas in src/axolotl/utils/schemas; unfrozen_parameters in src/axolotl/utils/freeze.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerpeft.recipe import cures
from layerpeft.recipe.importing import data, methods
from layerpeft.recipe.importing.data import ALPACA, ASKED, LIKED, PAIRS, TEXT, TURNS, Rows
from layerpeft.recipe.importing.draft import NO_TRAINER, Draft, flag, said, whole
from layerpeft.recipe.importing.rules import KERNEL, TOKENS, Rule, lora, on, out, to, together
from layerpeft.recipe.templates import EXAMPLE, in_recipe

MARKS = (
    "base_model", "adapter", "datasets", "micro_batch_size", "sequence_len", "sample_packing", "val_set_size", "lora_r",
    "unfrozen_parameters", "lora_target_linear", "dataset_prepared_path", "rl", "num_epochs", "special_tokens",
)  # fmt: skip
# where its own default is another than ours
DEFAULTS: dict[str, Any] = {
    "max_length": 512, "per_device_train_batch_size": 1, "num_train_epochs": 1, "lr_scheduler_type": "cosine",
    "gradient_checkpointing": False,
}  # fmt: skip


def start(draft: Draft) -> None:
    """Trainer, model, what trains, rows and sizes of batches: what several of its keys say together."""
    draft.trainer = _trainer(draft)
    if (model := draft.get("base_model")) is not None:
        draft.put("model_name_or_path", data.place(draft.given, str(model)), "base_model")
    _method(draft)
    _datasets(draft)
    micro, total = draft.get("micro_batch_size"), draft.get("batch_size")
    if micro is not None:
        draft.put("per_device_train_batch_size", micro, said("micro_batch_size", micro))
    if total is not None and (whole(total) or 0) >= (whole(micro) or 1):
        steps = (whole(total) or 1) // (whole(micro) or 1)
        draft.put("gradient_accumulation_steps", steps, f"{said('batch_size', total)} of one process")


# ---- the trainer ----------------------------------------------------------------------------------------------------

RL = {"dpo": "dpo", "ipo": "dpo", "orpo": "orpo", "kto": "kto", "simpo": "cpo", "grpo": "grpo"}


def _trainer(draft: Draft) -> str:
    rl = draft.name("rl")
    if flag(draft.get("reward_model", False)):
        draft.note("trainer", "reward_model: true")
        return "reward"
    if flag(draft.get("process_reward_model", False)):
        draft.refuse("process_reward_model", "rewards of single steps are not in this version")
    if rl in RL:
        draft.note("trainer", said("rl", rl))
        if rl == "ipo":
            draft.put("loss_type", ["ipo"], said("rl", rl))
        if rl == "simpo":
            draft.put("loss_type", "simpo", said("rl", rl))
        return RL[rl]
    if rl is not None:
        draft.refuse_name("rl", rl, NO_TRAINER, RL)
    if draft.given.data.get("pretraining_dataset") and not draft.given.data.get("datasets"):
        draft.note("trainer", "pretraining_dataset")
        return "causal_lm"
    return "sft"


# ---- what trains ----------------------------------------------------------------------------------------------------


def _method(draft: Draft) -> None:
    adapter, named = draft.name("adapter"), draft.get("unfrozen_parameters")
    if adapter in ("lora", "qlora"):
        _adapters(draft, adapter)
        if named:
            draft.refuse(
                "unfrozen_parameters", "adapters on some layers and weights of others do not train in one model here"
            )
        return
    if adapter:
        draft.refuse_name("adapter", adapter, "not in this version (without one all weights train)", ("lora", "qlora"))
    optimizer = draft.given.data.get("optimizer")
    layers, steps = draft.get("lisa_n_layers"), draft.get("lisa_step_interval")
    share = draft.get("spectrum_top_fraction")
    if named:
        methods.by_names(draft, "unfrozen_parameters", named)
        if methods.projecting(optimizer):
            draft.refuse("optimizer", f"{optimizer!r} over unfrozen_parameters: say one of the two")
    elif layers:
        methods.lisa(
            draft, layers, steps, f"LISA: {said('lisa_n_layers', layers)}, {said('lisa_step_interval', steps)}"
        )
    elif share is not None:
        _spectrum(draft, share)
    elif methods.projecting(optimizer):
        arguments, targets = draft.get("optim_args"), draft.get("optim_target_modules")
        methods.by_optimizer(draft, "optimizer", str(draft.get("optimizer")), arguments, targets)
    else:
        methods.everything(draft, "no adapter, so all weights train")
    draft.method = draft.method or methods.FULL


def _adapters(draft: Draft, adapter: str) -> None:
    linear, targets = flag(draft.get("lora_target_linear", False)), draft.get("lora_target_modules")
    told = {
        "r": "lora_r", "lora_dropout": "lora_dropout",
        "target_modules": "lora_target_linear: true" if linear else "lora_target_modules",
    }  # fmt: skip
    rank, dropout = draft.get("lora_r", 8), draft.get("lora_dropout", 0.0)
    methods.adapters(draft, rank, draft.get("lora_alpha"), dropout, "all-linear" if linear else targets, told)
    draft.note("layerpeft.method", said("adapter", adapter))
    if (layers := draft.get("peft_layers_to_transform")) is not None:
        draft.inside("select", layers, "peft_layers_to_transform")
    four, eight = flag(draft.get("load_in_4bit", False)), flag(draft.get("load_in_8bit", False))
    if adapter == "qlora" or four:
        more = draft.get("bnb_config_kwargs", {})
        if not isinstance(more, Mapping):
            draft.leave("bnb_config_kwargs", "expected a mapping")
        options = methods.four_bits() | (dict(more) if isinstance(more, Mapping) else {})
        methods.quantized(draft, "4bit", options, "adapter: qlora" if adapter == "qlora" else "load_in_4bit: true")
    elif eight:
        methods.quantized(draft, "8bit", {}, "load_in_8bit: true")


def _spectrum(draft: Draft, share: Any) -> None:
    found = cures.cure("spectrum_top_fraction", share)
    block = found.write.get("layerpeft", {}) if found else {}
    if "select" not in block:
        draft.refuse("spectrum_top_fraction", f"expected a share above 0, got {share!r}")
        return
    select = {"by": "snr", "unit": "target", "within": "kind", "keep": block["select"]["keep"]}
    methods.in_place(draft, select, f"{said('spectrum_top_fraction', share)}, measured on the model itself")
    draft.inside("target_modules", "all-linear")
    draft.inside("modules_to_save", ["embed_tokens", "lm_head"], "the plugin always trains them")


def _replicated(draft: Draft, key: str, value: Any) -> None:
    draft.refuse(key, "layers that are copied into a model are to be there beforehand; a recipe chooses among them")


def _peft(draft: Draft, key: str, value: Any) -> None:
    bits = value.get("loftq_config", {}).get("loftq_bits") if isinstance(value, Mapping) else None
    if bits:
        draft.inside("init_lora_weights", "loftq", said(key, value))
        draft.inside("loftq_config", {"loftq_bits": bits}, said(key, value))
    else:
        draft.leave(key, "load_in_4bit and load_in_8bit say in how many bits the base is")


# ---- rows -----------------------------------------------------------------------------------------------------------

# columns of the rows by the name of their prompt format
FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    "alpaca": (ALPACA, {}), "alpaca_chat": (ALPACA, {}), "alpaca_w_system": (ALPACA, {}),
    "alpaca_chat.load_qa": (ASKED, data.asked("question", "answer")),
    "gpteacher": (ASKED, data.asked("instruction", "response", second="input")),
    "oasst": (ASKED, data.asked("INSTRUCTION", "RESPONSE")), "jeopardy": (ASKED, data.asked("question", "answer")),
    "summarizetldr": (ASKED, data.asked("article", "summary")),
    "chat_template": (TURNS, {}), "sharegpt": (TURNS, {}), "pygmalion": (TURNS, {}),
    "pretrain": (TEXT, {}),
}  # fmt: skip
# of preferences, by what stands behind the name of the chat format (chatml.intel, llama3.ultra, …)
PREFERENCES: dict[str, dict[str, str]] = {
    "intel": {"prompt": "{question}", "chosen": "{chosen}", "rejected": "{rejected}"},
    "argilla": {"prompt": "{instruction}", "chosen": "{chosen_response}", "rejected": "{rejected_response}"},
    "argilla_chat": {}, "icr": {"prompt": "{input}", "chosen": "{chosen}", "rejected": "{rejected}"},
    "prompt_pairs": {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}, "ultra": {}, "default": {},
}  # fmt: skip
LIKES = {
    "argilla": "instruction", "intel": "question", "ultra": "prompt", "prompt_pairs": "prompt", "default": "prompt",
}  # fmt: skip
LOADERS = ("json", "csv", "parquet", "text")


def _datasets(draft: Draft) -> None:
    key = "datasets" if draft.given.data.get("datasets") else "pretraining_dataset"
    found = _sets(draft, key)
    data.put(draft, found, told=key if found else "")
    data.answers_alone(draft, found, draft.get("train_on_inputs", False), "train_on_inputs")
    data.put(draft, _sets(draft, "test_datasets"), "eval_dataset", "test_datasets")
    if (share := draft.get("val_set_size")) is not None:
        data.held_out(draft, "val_set_size", share)


def _sets(draft: Draft, key: str) -> list[Rows]:
    given = draft.get(key, [])
    items = given if isinstance(given, list) else [given]
    found = [{"path": item} if isinstance(item, str) else item for item in items]
    wrong = [item for item in found if not isinstance(item, Mapping) or not item.get("path")]
    if wrong:
        draft.refuse(key, f"expected data sets with a path each, got {wrong[0]!r}")
    return [_set(draft, f"{key}[{i}]", item) for i, item in enumerate(found) if item not in wrong]


def _set(draft: Draft, key: str, given: Mapping[str, Any]) -> Rows:
    path, files = given.get("path"), given.get("data_files")
    if files is not None and path not in LOADERS:
        draft.leave(f"{key}.data_files", "files of a data set on the hub are its splits here", files)
        files = None
    found = files if path in LOADERS and files is not None else path
    names = [data.place(draft.given, str(name)) for name in (found if isinstance(found, list) else [found])]
    form, columns, told = _form(draft, key, given)
    read = {
        "path", "data_files", "type", "split", "name", "ds_type", "field_messages", "message_property_mappings",
        "message_field_role", "message_field_content", "field", "text_column", "trust_remote_code", "chat_template",
    }  # fmt: skip
    for name in [n for n, value in given.items() if n not in read and value is not None]:
        if name == "roles_to_train" and given[name] == ["assistant"]:
            continue
        draft.leave(f"{key}.{name}", "no data set here has such a setting", given[name])
    return Rows(names[0] if len(names) == 1 else names, form, columns, told, given.get("name"), given.get("split"))


def _form(draft: Draft, key: str, given: Mapping[str, Any]) -> tuple[str, dict[str, str], str]:
    """What its rows are: the form, templates for their columns, and what is said of it."""
    kind = given.get("type")
    told = f"type: {kind}" if isinstance(kind, str) else "a format of its own"
    if draft.trainer in ("dpo", "orpo", "cpo", "kto", "reward"):
        return _preferences(draft, key, kind, told)
    if isinstance(kind, Mapping):
        return _own(draft, key, kind)
    if kind == "completion" or draft.trainer == "causal_lm":
        field = given.get("field") or given.get("text_column") or "text"
        return TEXT, {} if field == "text" else {"text": f"{{{field}}}"}, told
    name = str(kind).partition(":")[0].removesuffix(".load")
    form, columns = FORMATS.get(name) or FORMATS.get(name.partition(".")[0], ("", {}))
    if form == TURNS:
        mapped = given.get("message_property_mappings") or {}
        who = given.get("message_field_role") or mapped.get("role") or ("from" if name == "sharegpt" else "role")
        says = (
            given.get("message_field_content")
            or mapped.get("content")
            or ("value" if name == "sharegpt" else "content")
        )
        column = given.get("field_messages") or ("conversations" if name == "sharegpt" else "messages")
        if not data.reads_turns(column, who, says):
            why = "turns are read of messages or conversations, with role and content or from and value; rename them"
            draft.leave(f"{key}.field_messages", why, f"{column} ({who}, {says})")
    elif not form and kind is not None and draft.trainer == "sft":
        why = f"this prompt format is not known; say what is what, as in {in_recipe(EXAMPLE)}"
        draft.leave(f"{key}.type", why, kind)
    return form, columns, told if kind is not None else ""


def _own(draft: Draft, key: str, kind: Mapping[str, Any]) -> tuple[str, dict[str, str], str]:
    """A format that the file defines itself, with its fields and templates."""
    ask, second = kind.get("field_instruction") or "instruction", kind.get("field_input") or "input"
    answer, system = kind.get("field_output") or "output", kind.get("field_system")
    template = str(kind.get("format") or "{instruction}")
    filled = template.replace("{instruction}", f"{{{ask}}}").replace("{input}", f"{{{second}}}")
    if kind.get("no_input_format"):
        draft.leave(f"{key}.type.no_input_format", "one template serves all rows; an empty cell is empty text")
    if kind.get("system_prompt"):
        filled = f"{str(kind['system_prompt']).replace('{', '{{').replace('}', '}}')}\n{filled}"
    elif system:
        filled = f"{{{system}}}\n{filled}"
    return ASKED, {"prompt": filled, "completion": f"{{{answer}}}"}, "type: a format of its own"


def _preferences(draft: Draft, key: str, kind: Any, told: str) -> tuple[str, dict[str, str], str]:
    liked = draft.trainer == "kto"
    if isinstance(kind, Mapping):
        named = ("prompt", "completion", "label") if liked else ("prompt", "chosen", "rejected")
        columns = {n: str(kind.get(f"field_{n}") or n) for n in named}
        templates = {n: str(kind.get(f"{n}_format") or f"{{{n}}}") for n in named}
        return (
            (LIKED if liked else PAIRS),
            {n: templates[n].replace(f"{{{n}}}", f"{{{columns[n]}}}") for n in named},
            told,
        )
    name = str(kind).rpartition(".")[2]
    if liked and name in LIKES:
        return LIKED, {"prompt": f"{{{LIKES[name]}}}", "completion": "{completion}", "label": "{label}"}, told
    if not liked and name in PREFERENCES:
        return PAIRS, PREFERENCES[name], told
    if kind is not None:
        draft.leave(f"{key}.type", "this format is not known; say with columns which are prompt and answers", kind)
    return (LIKED if liked else PAIRS), {}, told


# ---- everything else ------------------------------------------------------------------------------------------------


def _min_rate(draft: Draft, key: str, value: Any) -> None:
    draft.put("lr_scheduler_type", "cosine_with_min_lr", said(key, value))
    draft.put("lr_scheduler_kwargs", {"min_lr_rate": value}, said(key, value))


def _scheduler(draft: Draft, key: str, value: Any) -> None:
    if value == "cosine" and draft.given.data.get("cosine_min_lr_ratio"):
        draft.note("lr_scheduler_type", said(key, value))
    else:
        draft.put("lr_scheduler_type", value, said(key, value))


def _trl(draft: Draft, key: str, value: Any) -> None:
    for name, inner in (value if isinstance(value, Mapping) else {}).items():
        if name in ("reward_funcs", "reward_weights"):
            draft.leave(
                f"trl.{name}", "rewards are functions of a file beside the recipe: `rewards:` names them", inner
            )
        elif inner is not None:
            draft.put(name, inner, f"trl.{name}")


def _plugins(draft: Draft, key: str, value: Any) -> None:
    for name in value if isinstance(value, list) else [value]:
        short = str(name).rpartition(".")[2]
        known = "liger" in str(name).lower() or "spectrum" in str(name).lower()
        if not known:
            draft.leave("plugins", "plug-ins of axolotl do not run here", short)


def _half(kind: str) -> Rule:
    return on("dtype", kind)


_LIGER = on("use_liger_kernel", True)
_ROOM = out("each row is as long as it is, or rows are packed")
_SHARD = out("the rows that train are all there are (max_train_samples takes the first)")
KEYS: dict[str, Rule] = {
    "revision_of_model": to("model_revision"),
    "lora_target_parameters": lora("target_parameters"),
    "lora_model_dir": out("going on from an adapter is not in this version; resume_from_checkpoint goes on with a run"),
    "lora_modules_to_save": lora("modules_to_save"),
    "lora_fan_in_fan_out": lora("fan_in_fan_out"),
    "lora_rank_pattern": lora("rank_pattern"),
    "lora_alpha_pattern": lora("alpha_pattern"),
    "peft_use_dora": lora("use_dora"),
    "peft_use_rslora": lora("use_rslora"),
    "peft_init_lora_weights": lora("init_lora_weights"),
    "peft_trainable_token_indices": lora("trainable_token_indices"),
    "peft_ensure_weight_tying": lora("ensure_weight_tying"),
    "peft_layer_replication": _replicated,
    "peft": _peft,
    "peft_layers_pattern": out("layers are found by themselves"),
    "peft_autocast_adapter_dtype": out("adapters are float32"),
    "gptq": out("a base that is quantized on the disk says so itself"),
    "lora_r": together,
    "lora_alpha": together,
    "lora_*_kernel": KERNEL,
    "lora_mlp_kernel": KERNEL,
    "lora_qkv_kernel": KERNEL,
    "lora_o_kernel": KERNEL,
    "unsloth_*": KERNEL,
    "lora_dropout": together,
    "lora_target_modules": together,
    "lora_target_linear": together,
    "load_in_4bit": together,
    "load_in_8bit": together,
    "peft_layers_to_transform": together,
    "bnb_config_kwargs": together,
    "lisa_layers_attribute": out("layers are found by themselves"),
    "lisa_n_layers": together,
    "lisa_step_interval": together,
    "spectrum_model_name": out("the ratios are measured on the model itself"),
    "optim_target_modules": together,
    "optimizer": to("optim"),
    "lr_scheduler": _scheduler,
    "cosine_min_lr_ratio": _min_rate,
    "cosine_constant_lr_ratio": out("no schedule here has a constant end"),
    "lr_quadratic_warmup": out("a warm-up is linear"),
    "embedding_lr": out("embeddings have the rate of all"),
    "embedding_lr_scale": out("embeddings have the rate of all"),
    "lr_groups": out("rates go by layers here (layer_lr, layer_lr_decay), not by modules"),
    "sequence_len": to("max_length"),
    "sample_packing": to("packing", flag),
    "eval_sample_packing": to("eval_packing", flag),
    "sample_packing_*": out("packing has no such setting (packing_strategy says how)"),
    "pad_to_sequence_len": _ROOM,
    "group_by_length": on("train_sampling_strategy", "group_by_length"),
    "multipack_real_batches": _ROOM,
    "batch_flattening": _ROOM,
    "min_sample_len": out("short rows train as well"),
    "max_prompt_len": out("max_length is of prompt and answer together"),
    "num_epochs": to("num_train_epochs"),
    "dataset_processes": to("dataset_num_proc"),
    "eval_batch_size": to("per_device_eval_batch_size"),
    "bfloat16": _half("bfloat16"),
    "float16": _half("float16"),
    "float32": _half("float32"),
    "fp8": out("FP8 is not in this version"),
    "rl_beta": to("beta"),
    "dpo_beta": to("beta"),
    "orpo_alpha": to("beta"),
    "kto_desirable_weight": to("desirable_weight"),
    "kto_undesirable_weight": to("undesirable_weight"),
    "dpo_use_weighting": to("use_weighting"),
    "trl": _trl,
    "rpo_alpha": out(
        "the loss of the chosen answer is one of several: loss_type: [sigmoid, sft], loss_weights: [1.0, 1.0]"
    ),
    "shuffle_merged_datasets": out("rows are shuffled by data_seed", True),
    "dataset_shard_*": _SHARD,
    "skip_prepare_dataset": _SHARD,
    "dataset_exact_deduplication": out("copies of other rows are counted by `layerpeft preview`, and train"),
    "default_system_message": out("a system turn is to stand in the rows"),
    "chat_template_jinja": to("chat_template_path"),
    "eot_tokens": TOKENS,
    "special_tokens": out("the tokenizer's own are used (pad_token, eos_token: the trainer's settings)"),
    "resize_token_embeddings_to_32x": TOKENS,
    "train_on_inputs": together,
    "val_set_size": together,
    "plugins": _plugins,
    "liger_*": _LIGER,
    "cut_cross_entropy": KERNEL,
    "flash_attn_*": KERNEL,
    "flash_optimum": KERNEL,
    "hub_model_id": to("hub_model_id"),
    "auto_resume_from_checkpoints": on("resume_from_checkpoint", True),
    "hf_use_auth_token": out("`hf auth login` says who you are"),
    "wandb_watch": out("per-layer gradients: log_gradients of select"),
    "loss_watchdog_*": out("a loss that is not finite stops a run"),
    "gc_steps": out("memory is not cleared between steps"),
    "eval_table_size": out("samples before and after training are always written"),
    "world_size": out("torchrun says it"),
    "eval_max_new_tokens": to("sample_tokens"),
    "do_causal_lm_eval": out("`layerpeft eval` does, after training"),
    "do_bench_eval": out("`layerpeft eval` prints the line for lm-evaluation-harness"),
    "debug": out("-v says more"),
    "noisy_embedding_alpha": to("neftune_noise_alpha"),
    "sequence_parallel_degree": out("sequences are not divided", 1),
    "gpu_memory_limit": out("`layerpeft plan --fit 24GB` finds what fits"),
    "xformers_attention": out("torch's own attention is as good"),
}

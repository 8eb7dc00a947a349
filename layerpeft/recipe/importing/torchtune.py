"""torchtune's files: components by name with their options (recipes/configs; the builders of torchtune.models and .datasets)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerpeft.recipe.importing import data, methods
from layerpeft.recipe.importing.data import ALPACA, ASKED, PAIRS, TEXT, TURNS, Rows
from layerpeft.recipe.importing.draft import Draft, flag, said, whole, words
from layerpeft.recipe.importing.rules import Rule, on, out, to

COMPONENT = "_component_"
MARKS = (
    "checkpointer",
    "metric_logger",
    "enable_activation_checkpointing",
    "log_peak_memory_stats",
    "max_steps_per_epoch",
    "clip_grad_norm",
)
DEFAULTS: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "gradient_checkpointing": False}


def start(draft: Draft) -> None:
    """Trainer, model, what trains, rows, optimizer and schedule: its mappings with a component each."""
    draft.trainer = _trainer(draft)
    _model(draft)
    _rows(draft)
    _optimizer(draft)
    _schedule(draft)
    _lengths(draft)


def name_of(given: Any) -> str:
    """The component of a mapping, without the module it lies in."""
    return str(given.get(COMPONENT, "")).rpartition(".")[2] if isinstance(given, Mapping) else ""


def _options(given: Any) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k != COMPONENT and v is not None} if isinstance(given, Mapping) else {}


def _unread(draft: Draft, key: str, given: Any, read: set[str], why: str) -> None:
    for name, value in _options(given).items():
        if name not in read:
            draft.leave(f"{key}.{name}", why, value)


# ---- the trainer ----------------------------------------------------------------------------------------------------

LOSSES = {"DPOLoss": "dpo", "RSOLoss": "dpo"}


def _trainer(draft: Draft) -> str:
    loss = draft.get("loss")
    name = name_of(loss)
    for key in ("policy_model", "reward_and_value_model", "valuemodel"):
        if key in draft.given.data:
            draft.refuse(key, "there is no PPO here; grpo and rloo learn from rewards")
    if "teacher_model" in draft.given.data:
        draft.refuse(
            "teacher_model", "what is learned from a teacher is written `layerpeft: {distill: {teacher: …}}` here"
        )
    if name not in LOSSES:
        if name:
            draft.leave("loss", "the loss of sft is that of the next token", name)
        return "sft"
    draft.note("trainer", said("loss", name))
    options = _options(loss)
    if name == "RSOLoss":
        draft.put("loss_type", ["hinge"], said("loss", name))
    if "beta" in options or "gamma" in options:
        draft.put("beta", options.get("beta", options.get("gamma")), "loss.beta" if "beta" in options else "loss.gamma")
    if options.get("label_smoothing"):
        draft.put("label_smoothing", options["label_smoothing"], "loss.label_smoothing")
    _unread(draft, "loss", loss, {"beta", "gamma", "label_smoothing"}, "the loss has no such setting here")
    return LOSSES[name]


# ---- the model ------------------------------------------------------------------------------------------------------

ATTENTION = {"output_proj": "o_proj"}  # its names for the linears of attention, where they differ
MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}  # Phi-3
_LORA = {
    "lora_attn_modules",
    "apply_lora_to_mlp",
    "apply_lora_to_output",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "quantize_base",
}


def _model(draft: Draft) -> None:
    checkpoint, model = draft.get("checkpointer", {}), draft.get("model", {})
    folder = _options(checkpoint).get("checkpoint_dir")
    if folder is not None:
        draft.put("model_name_or_path", data.place(draft.given, str(folder)), "checkpointer.checkpoint_dir")
    own = {"checkpoint_dir", "checkpoint_files", "output_dir", "model_type", "recipe_checkpoint", "safe_serialization"}
    _unread(draft, "checkpointer", checkpoint, own, "a folder of transformers' is read whole")
    name, options = name_of(model), _options(model)
    if not name:
        draft.refuse("model", f"expected a mapping with {COMPONENT}")
        draft.method = methods.FULL
        return
    draft.note("layerpeft.method", said("model", name))
    if not name.startswith(("lora_", "qlora_")):
        methods.everything(draft, f"model: {name}, all of whose weights train")
        _unread(draft, "model", model, set(), "the model's own config says it")
        return
    _adapters(draft, name, options)
    _unread(draft, "model", model, _LORA, "the model's own config says it")


def _adapters(draft: Draft, name: str, options: Mapping[str, Any]) -> None:
    attention = words(options.get("lora_attn_modules"))
    mlp = flag(options.get("apply_lora_to_mlp", False))
    targets = [ATTENTION.get(n, n) for n in attention] + MLP * mlp
    if "phi3" in name:
        targets = list(dict.fromkeys(FUSED.get(n, n) for n in targets))
    told = {
        "r": "model.lora_rank", "lora_alpha": "model.lora_alpha", "lora_dropout": "model.lora_dropout",
        "target_modules": f"{said('model.lora_attn_modules', attention)}, {said('apply_lora_to_mlp', mlp)}",
    }  # fmt: skip
    if not targets:
        draft.refuse("model.lora_attn_modules", "names no linear, so nothing would train")
    rank, alpha = options.get("lora_rank", 8), options.get("lora_alpha", 16)
    methods.adapters(draft, rank, alpha, options.get("lora_dropout", 0.0), targets, told)
    if flag(options.get("use_dora", False)):
        draft.inside("use_dora", True, "model.use_dora")
    if flag(options.get("apply_lora_to_output", False)):
        why = "the loss reads the head's weight past any adapter; train it whole instead (modules_to_save: [lm_head])"
        draft.leave("model.apply_lora_to_output", why, True)
    if name.startswith("qlora_") or flag(options.get("quantize_base", False)):
        methods.quantized(draft, "4bit", methods.four_bits(), f"model: {name}, whose base is NF4")


# ---- rows -----------------------------------------------------------------------------------------------------------

# builders with rows of their own: the data set, its form, its columns
BUILDERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", ALPACA, {}), "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", ALPACA, {}),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", TURNS, {}),
    "samsum_dataset": ("Samsung/samsum", ASKED, {
        "prompt": "Summarize this dialogue:\n{dialogue}\n---\nSummary:\n", "completion": "{summary}",
    }),
    "grammar_dataset": ("liweili/c4_200m", ASKED, {
        "prompt": "Correct this to standard English: {input}\n---\nCorrected: ", "completion": "{output}",
    }),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", TEXT, {"text": "{article}"}),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", TEXT, {"text": "{page}"}),
    "stack_exchange_paired_dataset": ("lvwerra/stack-exchange-paired", PAIRS, {
        "prompt": "{question}", "chosen": "{response_j}", "rejected": "{response_k}",
    }),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", PAIRS, {}),
}  # fmt: skip
CONFIGS = {"wikitext_dataset": "wikitext-103-raw-v1", "cnn_dailymail_articles_dataset": "3.0.0"}
_READ = {
    "source",
    "data_files",
    "column_map",
    "conversation_column",
    "conversation_style",
    "column",
    "split",
    "name",
    "packed",
    "train_on_input",
    "data_dir",
    "masking_strategy",
    "train_on_prompt",
}


def _rows(draft: Draft) -> None:
    given = draft.get("dataset")
    items = given if isinstance(given, list) else [given] if given is not None else []
    found = [_set(draft, "dataset", item) for item in items if isinstance(item, Mapping)]
    data.put(draft, found, told=", ".join(name_of(item) for item in items))
    first = _options(items[0]) if items else {}
    usual = first.get("masking_strategy") != "train_on_all"
    prompts = first.get("train_on_input", False) if usual else True
    data.answers_alone(draft, found, prompts, "dataset.train_on_input")
    held = draft.get("dataset_val")
    data.put(draft, [_set(draft, "dataset_val", held)] if held else [], "eval_dataset", "dataset_val")
    packed = any(flag(_options(item).get("packed", False)) for item in items)
    if packed:
        draft.put("packing", True, "dataset.packed: true")


def _set(draft: Draft, key: str, given: Mapping[str, Any]) -> Rows:
    name, options = name_of(given), _options(given)
    _unread(draft, key, given, _READ, "no data set here has such a setting")
    source, form, columns = BUILDERS.get(name, ("", "", {}))
    source, files = str(options.get("source", source)), options.get("data_files")
    if files is not None and source in ("json", "csv", "text", "parquet", ""):
        source = (
            files
            if isinstance(files, str)
            else str(next(iter(files.values() if isinstance(files, Mapping) else files)))
        )
    if not form:
        form, columns = _form(draft, key, name, options)
    config = options.get("name", CONFIGS.get(name))
    return Rows(data.place(draft.given, source), form, columns, name, config, options.get("split"))


def _form(draft: Draft, key: str, name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    mapped = options.get("column_map") or {}
    if name == "text_completion_dataset":
        column = options.get("column", "text")
        return TEXT, {} if column == "text" else {"text": f"{{{column}}}"}
    if name == "instruct_dataset":
        return ASKED, data.asked(str(mapped.get("input", "input")), str(mapped.get("output", "output")))
    if name == "preference_dataset":
        return PAIRS, {}
    if name == "chat_dataset":
        column = options.get("conversation_column", "messages")
        if column not in ("messages", "conversations"):
            draft.leave(
                f"{key}.conversation_column", "turns are read of messages or conversations; rename the column", column
            )
        return TURNS, {}
    draft.leave(key, "this builder is not known; name the rows, and say with columns what is what", name)
    return "", {}


# ---- optimizer, schedule, lengths ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": "adamw_torch",
    "Adam": "adamw_torch",
    "SGD": "sgd",
    "AdamW8bit": "adamw_bnb_8bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "PagedAdamW": "paged_adamw_32bit",
    "Adafactor": "adafactor",
    "RMSprop": "rmsprop",
    "Adagrad": "adagrad",
    "Lion": "lion_32bit",
}


def _optimizer(draft: Draft) -> None:
    given = draft.get("optimizer")
    name, options = name_of(given), _options(given)
    if not name:
        return
    if name in OPTIMIZERS:
        fused = flag(options.get("fused", False)) and name == "AdamW"
        draft.put("optim", "adamw_torch_fused" if fused else OPTIMIZERS[name], said("optimizer", name))
    else:
        draft.leave("optimizer", f"is none that is known here; there are {', '.join(OPTIMIZERS)}", name)
    for theirs, ours in (("lr", "learning_rate"), ("weight_decay", "weight_decay"), ("eps", "adam_epsilon")):
        if theirs in options:
            draft.put(ours, options[theirs], f"optimizer.{theirs}")
    if isinstance(betas := options.get("betas"), list) and len(betas) == 2:
        draft.put("adam_beta1", betas[0], "optimizer.betas")
        draft.put("adam_beta2", betas[1], "optimizer.betas")
    if "weight_decay" not in options and name in ("AdamW", "AdamW8bit", "PagedAdamW8bit", "PagedAdamW"):
        draft.put("weight_decay", 0.01, f"{name}'s own default")
    _unread(
        draft,
        "optimizer",
        given,
        {"lr", "weight_decay", "eps", "betas", "fused"},
        "optim_args takes what an optimizer has besides",
    )


def _schedule(draft: Draft) -> None:
    given = draft.get("lr_scheduler")
    name, options = name_of(given), _options(given)
    if not name:
        draft.put("lr_scheduler_type", "constant", "no lr_scheduler")
        return
    kind = next((k for k in ("cosine", "linear", "constant") if k in name.lower()), None)
    if kind is None:
        draft.leave("lr_scheduler", "is none that is known here (cosine, linear, constant)", name)
    else:
        draft.put("lr_scheduler_type", kind, said("lr_scheduler", name))
    if "num_warmup_steps" in options:
        draft.put("warmup_steps", options["num_warmup_steps"], "lr_scheduler.num_warmup_steps")
    _unread(draft, "lr_scheduler", given, {"num_warmup_steps"}, "lr_scheduler_kwargs takes what a schedule has besides")


def _lengths(draft: Draft) -> None:
    tokens = draft.get("tokenizer")
    if (longest := _options(tokens).get("max_seq_len")) is not None:
        draft.put("max_length", longest, "tokenizer.max_seq_len")
    else:
        draft.put("max_length", None, "tokenizer.max_seq_len: null, so nothing is cut")
    _unread(
        draft,
        "tokenizer",
        tokens,
        {"max_seq_len", "path", "merges_file"},
        "the tokenizer of the model's folder is used",
    )
    draft.read.add("clip_grad_norm")
    clip = draft.given.data.get("clip_grad_norm")
    draft.put("max_grad_norm", 0.0 if clip in (None, "None") else clip, said("clip_grad_norm", clip))
    most, epochs = whole(draft.get("max_steps_per_epoch")), whole(draft.get("epochs", 1)) or 1
    draft.put("num_train_epochs", epochs, said("epochs", epochs))
    if most is not None:
        draft.put("max_steps", most * epochs, f"{said('max_steps_per_epoch', most)}, {said('epochs', epochs)}")


def _logger(draft: Draft, key: str, value: Any) -> None:
    kind = next((k for k in ("wandb", "tensorboard", "comet", "mlflow") if k in name_of(value).lower()), None)
    if kind is None:
        draft.leave(key, "log.jsonl is always written", name_of(value))
        return
    draft.put("report_to", {"comet": "comet_ml"}.get(kind, kind), said(key, name_of(value)))
    _unread(draft, key, value, {"log_dir"}, "trackers read their own environment variables")


def _device(draft: Draft, key: str, value: Any) -> None:
    if value == "cpu":
        draft.put("use_cpu", True, said(key, value))
    else:
        draft.leave(key, "the device is found by itself")


PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
KEYS: dict[str, Rule] = {
    "dtype": to("dtype", lambda v: PRECISIONS.get(str(v), v)),
    "batch_size": to("per_device_train_batch_size"),
    "batch_size_val": to("per_device_eval_batch_size"),
    "run_val_every_n_steps": to("eval_steps"),
    "compile": to("torch_compile", flag),
    "enable_activation_checkpointing": to("gradient_checkpointing", flag),
    "enable_activation_offloading": to("activation_offloading", flag),
    "log_every_n_steps": to("logging_steps"),
    "metric_logger": _logger,
    "device": _device,
    "shuffle": out("rows are shuffled by data_seed", True),
    "optimizer_in_bwd": out(
        "an optimizer steps after the backward pass; a projection, or layers by turns, keep few gradients", False
    ),
    "profiler": out("layerpeft plan --measure counts a step"),
    "log_peak_memory_stats": out("layerpeft plan --measure counts a step"),
    "log_level": out("-v says more"),
    "save_adapter_weights_only": out("the adapter alone is saved"),
    "ac_mode": out("whole layers are recomputed"),
    "ac_option": out("whole layers are recomputed"),
    "custom_sharded_layers": out("an engine is said at launch"),
    "fsdp_cpu_offload": out("an engine is said at launch"),
    "quantizer": out("`quant:` in the block says which layers have how many bits"),
    "resume_from_checkpoint": on("resume_from_checkpoint", True),
    "ref_checkpointer": out("the reference is the model itself with the adapter off; no second model is loaded"),
    "tensor_parallel_*": out("tensors are not divided here"),
    "base_model_path": out("the folder of the model is model_name_or_path"),
    "tokenizer": out("the tokenizer of the model's folder is used"),
    "save_every_n_steps": to("save_steps"),
    "cudnn_deterministic_mode": to("full_determinism", flag),
}

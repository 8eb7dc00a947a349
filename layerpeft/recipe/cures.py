"""Keys and values of other tools that a recipe says otherwise: for each the lines to write, with the value that was given."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerpeft.recipe.importing.patterns import place_of
from layerpeft.recipe.yaml import flow


@dataclass(frozen=True)
class Cure:
    """What a recipe says in the place of a key: these settings of the top level; none: the key goes. `why`: said before it."""

    write: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    after: str = ""

    def __str__(self) -> str:
        why = f"{self.why}; " if self.why else ""
        if not self.write:
            return f"{why}take it out{self.after}"
        where = "write it in the block: " if [*self.write] == ["layerpeft"] else "write "
        return why + where + " and ".join(f"`{k}: {written(v)}`" for k, v in self.write.items()) + self.after

    def on_command(self, recipe: Mapping[str, Any]) -> str:
        """The same for the command line; what is said of the whole block for an example's sake stays as the recipe has it."""
        given, held = dict(self.write), recipe.get("layerpeft")
        own = dict(given.pop("layerpeft", {}))
        if isinstance(held, Mapping) and held.get("select") is not None and own.get("select") == "all":
            del own["select"]
        settings = {**given, **{f"layerpeft.{k}": v for k, v in own.items()}}
        why = f"{self.why}; " if self.why else ""
        return f"{why}write " + " ".join(f"`{shlex.quote(f'{k}={flow(v)}')}`" for k, v in settings.items()) + self.after


def written(value: Any) -> str:
    """A value as YAML on one line, as it may stand anywhere in a recipe."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(k)}: {written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, str) and re.fullmatch(r"(first|last|stride):\d+%?(\+(first|last):\d+%?)*", value):
        return value  # a colon that needs no quotes
    return flow([value])[1:-1]


def block(why: str = "", after: str = "", /, **settings: Any) -> Cure:
    return Cure({"layerpeft": settings}, why, after)


def top(why: str = "", after: str = "", /, **settings: Any) -> Cure:
    return Cure(settings, why, after)


def out(why: str = "", after: str = "") -> Cure:
    return Cure({}, why, after)


EMPTY = out("nothing stands behind it")
DEFAULT = out("false is the default")
_ROOM = {"pick": "uniform", "keep": 2, "reselect_steps": 20}
_TURNS = {"pick": "cycle", "keep": 1, "reselect_steps": 50, "state": "clear"}
LISA = block(
    "LISA's draws (other layers every few steps, with full weights)",
    " (`layerpeft train lisa`)",
    method="full",
    select=_ROOM,
)
BADAM = block("BAdam (one layer after the other, with full weights)", method="full", select=_TURNS)
GALORE = block("GaLore (gradient projection)", method="galore", r=128, update_proj_gap=200, scale=0.25)
SPECTRUM = block(
    "Spectrum (full weights by signal-to-noise ratio; of whole layers here)",
    method="full",
    select={"by": "snr", "keep": "25%"},
)
FREEZE = block(
    "full weights on some layers", method="full", select="last:2"
)  # LLaMA-Factory's number where none is named

# ---- keys whose value goes over as it stands -------------------------------------------------------------------------

_INTO = {  # ... into the block
    "lora_r": "r", "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_bias": "bias",
    "lora_target_parameters": "target_parameters", "lora_rank_pattern": "rank_pattern", "lora_alpha_pattern": "alpha_pattern",
    "lora_fan_in_fan_out": "fan_in_fan_out", "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora",
    "peft_layers_to_transform": "select", "layers_to_transform": "select", "lora_layers_to_transform": "select",
    "lora_init_type": "init_lora_weights", "peft_init_lora_weights": "init_lora_weights", "init_weights": "init_lora_weights",
    "peft_trainable_token_indices": "trainable_token_indices",
}  # fmt: skip
_NAMES = {  # ... names of modules, which some tools write with commas
    "lora_target_modules": "target_modules", "lora_target": "target_modules", "lora_attn_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save", "additional_target": "modules_to_save", "freeze_extra_modules": "modules_to_save",
}  # fmt: skip
_PROJECTION = {
    "rank": "r", "update_interval": "update_proj_gap", "update_proj_gap": "update_proj_gap", "scale": "scale",
    "proj_type": "proj_type", "target": "target_modules", "target_modules": "target_modules",
}  # fmt: skip
_TOP = {
    "dataset": "dataset_name", "data": "dataset_name", "dataset_path": "dataset_name", "train_dataset": "dataset_name",
    "val_dataset": "eval_dataset", "iters": "max_steps", "batch_size": "per_device_train_batch_size",
    "preprocessing_num_workers": "dataset_num_proc", "dataset_processes": "dataset_num_proc", "model": "model_name_or_path",
    "enable_activation_offloading": "activation_offloading", "wandb_name": "run_name", "wandb_run_name": "run_name",
    "base_model_name_or_path": "model_name_or_path", "revision": "model_revision",
}  # fmt: skip

# ---- switches: what true says; false is the default ------------------------------------------------------------------


def _quantized(**settings: Any) -> Cure:
    return top(model_init_kwargs={"quantization_config": settings})


_ON: dict[str, Cure] = {
    "load_in_4bit": _quantized(load_in_4bit=True),
    "load_in_8bit": _quantized(load_in_8bit=True),
    "use_bnb_nested_quant": _quantized(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "double_quantization": _quantized(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "pissa_init": block(init_lora_weights="pissa"),
    "lora_target_linear": block(target_modules="all-linear"),
    "apply_lora_to_mlp": block(target_modules="all-linear"),
    "full_finetuning": block(method="full", select="all"),
    "use_galore": GALORE,
    "use_badam": BADAM,
    "use_lisa": LISA,
    "use_wandb": top(report_to="wandb"),
    "use_tensorboard": top(report_to="tensorboard"),
    "sdp_attention": top(attn_implementation="sdpa"),
    "sdpa_attention": top(attn_implementation="sdpa"),
    "eager_attention": top(attn_implementation="eager"),
    "flex_attention": top(attn_implementation="flex_attention"),
    "use_gradient_checkpointing": top(gradient_checkpointing=True),
    "enable_activation_checkpointing": top(gradient_checkpointing=True),
}
_HELD_OUT = top("held-out rows are named, not drawn", " (a file of yours, or a hub id)", eval_dataset="held_out.jsonl")
_FOUND = "it is found from the model"
_OUT = {  # what has no counterpart, and why nothing is lost with it
    "use_mps_device": "the device is found by itself (CPU: use_cpu: true)",
    "logging_dir": "transformers 5 reads the environment variable TENSORBOARD_LOGGING_DIR, and a recipe's curves lie in output_dir",
    "template": "the chat template of the tokenizer is used (another one: chat_template_path)",
    "chat_template": "the chat template of the tokenizer is used (another one: chat_template_path)",
    "lora_task_type": "it follows from `trainer`",
    "load_adapter": "going on from an adapter is not in this version; resume_from_checkpoint goes on with a run",
    "lora_model_dir": "going on from an adapter is not in this version; resume_from_checkpoint goes on with a run",
    "adapter_name_or_path": "going on from an adapter is not in this version; resume_from_checkpoint goes on with a run",
    "resume_adapter_file": "going on from an adapter is not in this version; resume_from_checkpoint goes on with a run",
    "create_new_adapter": "an adapter is always new",
    "early_stopping_patience": "early stopping is not in this version",
    "loraplus_lr_ratio": "LoRA+ is not in this version",
    "loraplus_lr_embedding": "LoRA+ is not in this version",
    "use_llama_pro": "layers are chosen, not added, in this version",
    "pissa_convert": "the adapter that is saved is a stock one",
    "quantization_method": "what a quantization_config says is bitsandbytes'",
    "xformers_attention": "torch's own attention is as good",
    "s2_attention": "it is not in this version",
    "badam_mode": "a layer is a block",
    "badam_start_block": "the order says where the rounds begin",
    "badam_verbose": "what trains when is in layers.csv",
    "lisa_layers_attribute": "layers are found by themselves",
    "spectrum_model_name": "the ratios are measured on the model itself",
    "galore_layerwise": "any optimizer works with method: galore",
    "galore_dim": "only matrices are projected",
    "layers_pattern": "layers are found by themselves",
    "lora_on_cpu": "plan --fit says what fits",
    "plot_loss": "training_loss.png is always drawn",
    "dataset_dir": "a data set is named by its path",
    "dataset_prepared_path": "prepared rows are kept by themselves",
    "overwrite_cache": "prepared rows are kept by themselves",
    "shuffle": "rows are shuffled by data_seed",
    "profiler": "layerpeft plan --measure counts a step",
    "log_peak_memory_stats": "layerpeft plan --measure counts a step",
    "save_adapter_weights_only": "the adapter alone is saved",
    "strict": "every key is checked",
    "loss": "the loss follows from `trainer`",
    "tokenizer": _FOUND,
    "tokenizer_type": _FOUND,
    "tokenizer_config": _FOUND,
    "model_type": _FOUND,
    "is_llama_derived_model": _FOUND,
    "fast_inference": "nothing is generated but the samples",
    "load_in_16bit": "dtype says it",
    "freeze_vision_tower": "what is not chosen is frozen (the stack of select says of which part)",
    "freeze_multi_modal_projector": "what is not chosen is frozen",
    "freeze_language_model": "what is not chosen is frozen (the stack of select says of which part)",
    "max_steps_per_epoch": "max_steps counts the steps of the whole run",
}
_FAMILIES = (  # the rest of what other tools call by such names
    (("lisa_",), LISA),
    (("badam_",), BADAM),
    (("galore_",), GALORE),
    (("spectrum_",), SPECTRUM),
    (("freeze_",), FREEZE),
    (("apollo_", "use_apollo"), out("APOLLO is not in this version")),
    (("relora", "use_relora"), out("ReLoRA is not in this version")),
    (("wandb_", "mlflow_", "comet_", "swanlab_"), out("trackers read their own environment variables")),
)

# ---- keys whose value decides ----------------------------------------------------------------------------------------

Rule = Callable[[Any, Mapping[str, Any]], Cure | None]
METHODS: dict[str, Cure] = {
    "lora": block(method="lora"),
    "qlora": block(method="lora", quantize_trained="nf4"),
    "dora": block(method="lora", use_dora=True),
    "rslora": block(method="lora", use_rslora=True),
    "full": block(method="full", select="all"),
    "freeze": FREEZE,
    "lisa": LISA,
    "badam": BADAM,
    "galore": GALORE,
    "spectrum": SPECTRUM,
}
_ATTENTION = {
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    True: "flash_attention_2",
    "disabled": "eager",
    "auto": None,
    False: None,
}
NEEDS = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_ORDERS = {"ascending": "ascending", "descending": "descending", "random": "permutation"}  # BAdam's names for ours


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def names(value: Any, single: bool = True) -> Any:
    """Names of modules as a list, from a list or text with commas; "all" and patterns stay one value, if a `single` one may be."""
    if not isinstance(value, str):
        return value
    if single and value in ("all", "all-linear"):
        return "all-linear"
    if single and re.search(r"[\\^$*+?()\[\]|]", value):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _method(value: Any, data: Mapping[str, Any]) -> Cure | None:
    name = str(value).lower()
    layers = _frozen(data.get("freeze_trainable_layers"), data) if name == "freeze" else None
    return layers or METHODS.get(name)


def _frozen(value: Any, data: Mapping[str, Any]) -> Cure | None:
    """LLaMA-Factory's number of layers: the last ones, the first ones where it is negative."""
    if _whole(value) or _whole(value, -(10**6)) and value < 0:
        return block(method="full", select=f"{'last' if value > 0 else 'first'}:{abs(value)}")
    return None


def _unfrozen(value: Any, data: Mapping[str, Any]) -> Cure | None:
    """axolotl's names or patterns of parameters: layers to choose, modules in them, and modules outside of them."""
    found: dict[int, list[str]] = {}
    outside: list[str] = []
    for given in names(value, single=False) or ():
        name = re.sub(r"\.(weight|bias)$", "", re.sub(r"\[\d*:\d*\]$", "", str(given)).strip("^$").replace("\\.", "."))
        parts = place_of(name)
        try:
            layers = [n for n in range(100) if parts and re.fullmatch(parts["number"], str(n))]
        except re.error:
            return None
        for layer in layers:
            found.setdefault(layer, []).append(parts["tail"].lstrip(".") if parts else "")
        outside += [] if layers else [name.rpartition(".")[2]]
    settings: dict[str, Any] = {"method": "full"}
    if found:
        numbers = sorted(found)
        run = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
        settings["select"] = "all" if len(numbers) == 100 else f"{numbers[0]}-{numbers[-1]}" if run else numbers
        same = len({tuple(tails) for tails in found.values()}) == 1
        tails = found[numbers[0]] if same else [f"{n}.{tail}".rstrip(".") for n in numbers for tail in found[n]]
        settings |= {} if "" in tails else {"target_modules": tails}
    return block(**settings, **({"modules_to_save": outside} if outside else {})) if found or outside else None


def _attention(value: Any, data: Mapping[str, Any]) -> Cure | None:
    kind = _ATTENTION.get(value, value)
    if kind is None:
        return out("torch's own attention is the default")
    package = NEEDS.get(kind)
    if package and importlib.util.find_spec(package) is None:
        return top(f"{kind} needs a package that is not installed ({package})", attn_implementation="sdpa")
    return top(attn_implementation=kind) if isinstance(kind, str) else None


def _rate(key: str, clock: str) -> Rule:
    """Times an epoch as a share of the run."""

    def rule(value: Any, data: Mapping[str, Any]) -> Cure | None:
        epochs = data.get("num_epochs", data.get("num_train_epochs", 3))
        if value == 0:
            return top(**{f"{key}_strategy": "no"})
        if not _whole(value) or not isinstance(epochs, int | float):
            return None
        if value == 1:
            return top(**{f"{key}_strategy": "epoch"})
        return top(**{f"{key}_strategy": "steps", clock: float(f"{1 / (value * epochs):.4g}")})

    return rule


def _layers(value: Any, data: Mapping[str, Any]) -> Cure | None:
    return block(select="all" if value < 1 else f"last:{value}") if _whole(value, -1) else None


def _paper(start: dict[str, Any], key: str) -> Rule:
    """A number of LISA's (LMFlow, axolotl) or BAdam's (LLaMA-Factory) in our words."""
    return lambda value, data: block(method="full", select=start | {key: value}) if _whole(value) else None


def _order(value: Any, data: Mapping[str, Any]) -> Cure | None:
    turns = {k: v for k, v in _TURNS.items() if k != "state"}
    known = block(method="full", select=turns | {"order": _ORDERS[value], "state": "clear"})
    return known if value in _ORDERS else None


def _share(value: Any, data: Mapping[str, Any]) -> Cure | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 100:
        return None
    return block(method="full", select={"by": "snr", "keep": value if value < 1 else f"{value:g}%"})


def _bits(value: Any, data: Mapping[str, Any]) -> Cure | None:
    kind = {4: "load_in_4bit", 8: "load_in_8bit"}.get(value) if _whole(value) else None
    return _quantized(**{kind: True}) if kind else None


def _sets(key: str) -> Rule:
    """axolotl's list of data sets, each with its path."""

    def rule(value: Any, data: Mapping[str, Any]) -> Cure | None:
        paths = (
            [d.get("path", d.get("source")) for d in value if isinstance(d, Mapping)] if isinstance(value, list) else []
        )
        if not paths or None in paths:
            return None
        columns = ' (and, if need be, `columns: {prompt: "{question}", …}`)' if key == "dataset_name" else ""
        return top("", columns, **{key: paths[0] if len(paths) == 1 else paths})

    return rule


def _mlx(value: Any, data: Mapping[str, Any]) -> Cure | None:
    """mlx-lm's mapping, whose scale is alpha/r."""
    if not isinstance(value, Mapping):
        return None
    rank, scale = value.get("rank"), value.get("scale")
    given = {"r": rank, "lora_alpha": round(scale * rank) if rank and scale else None}
    given |= {"lora_dropout": value.get("dropout"), "target_modules": value.get("keys")}
    return block(**{k: v for k, v in given.items() if v is not None})


def _component(key: str, kinds: Mapping[str, str], options: Mapping[str, str]) -> Rule:
    """torchtune's mapping with a `_component_`, whose class says one key and whose options say others."""

    def rule(value: Any, data: Mapping[str, Any]) -> Cure | None:
        if not isinstance(value, Mapping):
            return None
        kind = next((ours for part, ours in kinds.items() if part in str(value.get("_component_", "")).lower()), None)
        found = ({key: kind} if kind else {}) | {options[k]: v for k, v in value.items() if k in options}
        return top(**found) if found else None

    return rule


def _model(value: Any, data: Mapping[str, Any]) -> Cure | None:
    if not isinstance(value, Mapping):
        return top(model_name_or_path=value)
    mlp = ["gate_proj", "up_proj", "down_proj"] if value.get("apply_lora_to_mlp") else []
    targets = [{"output_proj": "o_proj"}.get(n, n) for n in value.get("lora_attn_modules") or []] + mlp
    given = {_INTO[k]: v for k, v in value.items() if k in _INTO} | ({"target_modules": targets} if targets else {})
    return block("model_name_or_path names its folder, or its name on the hub", **given) if given else None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("finetuning_type", "adapter", "train_type", "tuner_type", "fine_tune_type", "method"), _method),
    "use_peft": lambda v, d: METHODS["full" if v is False else "lora"],
    "freeze_trainable_layers": _frozen,
    "freeze_trainable_modules": lambda v, d: (
        out("every weight of a chosen layer trains") if v == "all" else block(method="full", target_modules=names(v))
    ),
    "unfrozen_parameters": _unfrozen,
    "num_layers": _layers,
    "lora_layers": _layers,
    "lora_parameters": _mlx,
    "peft": lambda v, d: block(**v) if isinstance(v, Mapping) else None,
    "pissa_iter": lambda v, d: block(init_lora_weights=f"pissa_niter_{v}" if _whole(v) else "pissa"),
    "lisa_n_layers": _paper(_ROOM, "keep"),
    "lisa_activated_layers": _paper(_ROOM, "keep"),
    "lisa_step_interval": _paper(_ROOM, "reselect_steps"),
    "lisa_interval_steps": _paper(_ROOM, "reselect_steps"),
    "badam_switch_interval": _paper(_TURNS, "reselect_steps"),
    "badam_switch_mode": _order,
    "spectrum_top_fraction": _share,
    "quantization_bit": _bits,
    "quantization_config": lambda v, d: _quantized(**v) if isinstance(v, Mapping) else None,
    "quantization_type": lambda v, d: _quantized(load_in_4bit=True, bnb_4bit_quant_type=v),
    "device_map": lambda v, d: top(model_init_kwargs={"device_map": v}),
    "flash_attn": _attention,
    "flash_attention": _attention,
    "train_on_inputs": lambda v, d: top(completion_only_loss=not v),
    "mask_prompt": lambda v, d: top(completion_only_loss=bool(v)),
    "wandb_project": lambda v, d: top("", f" and set WANDB_PROJECT={v} in the environment", report_to="wandb"),
    **dict.fromkeys(
        ("val_size", "val_set_size", "test_split_size", "split_dataset_ratio"),
        lambda v, d: _HELD_OUT if v else out("nothing is held out by itself"),
    ),
    "datasets": _sets("dataset_name"),
    "test_datasets": _sets("eval_dataset"),
    "saves_per_epoch": _rate("save", "save_steps"),
    "evals_per_epoch": _rate("eval", "eval_steps"),
    "device": lambda v, d: top(use_cpu=True) if v == "cpu" else out("the device is found by itself"),
    "model": _model,
    "checkpointer": _component("", {}, {"checkpoint_dir": "model_name_or_path"}),
    "optimizer": _component(
        "optim",
        {"adamw8bit": "adamw_bnb_8bit", "adam": "adamw_torch", "sgd": "sgd"},
        {"lr": "learning_rate", "weight_decay": "weight_decay"},
    ),
    "lr_scheduler": _component(
        "lr_scheduler_type",
        {"cosine": "cosine", "linear": "linear", "constant": "constant"},
        {"num_warmup_steps": "warmup_steps"},
    ),
    "metric_logger": lambda v, d: (
        _component("report_to", {"wandb": "wandb", "tensorboard": "tensorboard"}, {})(v, d)
        or out("log.jsonl is always written")
    ),
}


def cure(key: str, value: Any, data: Mapping[str, Any] | None = None) -> Cure | None:
    """How a recipe says what this key of another tool says with this value (`data`: the keys beside it); None: nobody knows it."""
    found = _found(key, value, data or {})
    return EMPTY if found is not None and value is None else found


def _found(key: str, value: Any, data: Mapping[str, Any]) -> Cure | None:
    given = _RULES[key](value, data) if key in _RULES and value is not None else None
    if given is not None:
        return given
    if key in _ON:
        return DEFAULT if value is False else _ON[key]
    if key in _INTO:
        return block(**{_INTO[key]: value})
    if key in _NAMES:
        field = _NAMES[key]
        return block(**{field: names(value, single=field == "target_modules")})
    tail = key.removeprefix("galore_")
    if tail != key and tail in _PROJECTION and value is not None:
        return block(method="galore", **{_PROJECTION[tail]: names(value) if "target" in tail else value})
    if key in _TOP and not isinstance(value, Mapping):
        return top(**{_TOP[key]: value})
    if key.startswith(("bnb_4bit_", "llm_int8_")):
        return _quantized(**{"load_in_4bit" if key[0] == "b" else "load_in_8bit": True, key: value})
    if key in _OUT:
        return out(_OUT[key])
    if key in _RULES and value is None:
        return EMPTY
    return next((found for starts, found in _FAMILIES if key.startswith(starts)), None)


# ---- values of other tools -------------------------------------------------------------------------------------------

_VALUES: dict[tuple[str, Any], Any] = {
    ("dtype", "bf16"): "bfloat16", ("dtype", "fp16"): "float16", ("dtype", "half"): "float16", ("dtype", "fp32"): "float32",
    ("dtype", "float"): "float32", ("gradient_checkpointing", "unsloth"): True, ("gradient_checkpointing", "offload"): True,
    ("optim", "adam"): "adamw_torch", ("optim", "adamw"): "adamw_torch", ("optim", "lion"): "lion_32bit",
    ("optim", "adamw_8bit_bnb"): "adamw_bnb_8bit", ("save_strategy", False): "no", ("eval_strategy", False): "no",
    ("lr_scheduler_type", "cosine_annealing"): "cosine", ("packing", "auto"): False,
}  # fmt: skip


def value_cure(key: str, value: Any, here: Callable[[], bool], needed: bool = False) -> Cure | None:
    """What to write in the place of a value that is none for this key; `here`: whether a device multiplies in bfloat16."""
    if value is None:
        return None if needed else EMPTY
    if (key, value) in _VALUES if isinstance(value, str | bool) else False:
        return top(**{key: _VALUES[key, value]})
    if value == "auto" and key in ("bf16", "fp16"):
        return top(**{key: here() if key == "bf16" else False})
    return None if value != "auto" or needed else out("what is left out is at its default")

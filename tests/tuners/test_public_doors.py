"""Every public way of PEFT, and of torch's modules, to read, write, move, copy or cast an adapter, times every config class.

A cell is "as LoRA does", which the same check asks of PEFT's own LoRA in the first column, or it is refused with the way out.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerHeadConfig, LayerLoraConfig
from layerpeft.errors import LayerpeftError

X = torch.arange(9)[None]
TARGETS = ["q_proj", "down_proj"]
NAMES = [f"model.layers.{i}.{n}" for i in (1, 2) for n in ("self_attn.q_proj", "mlp.down_proj")]
COMMON: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
UNIFORM = {"pick": "uniform", "keep": 1, "reselect_steps": 2}
lora = partial(LayerLoraConfig, r=4, lora_alpha=8, **COMMON)
galore = partial(LayerGaloreConfig, r=4, update_proj_gap=2, **COMMON)
full = partial(LayerFullConfig, task_type="CAUSAL_LM")
heads = partial(LayerHeadConfig, task_type="CAUSAL_LM")
COLUMNS: dict[str, Callable[[], Any]] = {
    "plain PEFT": lambda: peft.LoraConfig(r=4, lora_alpha=8, **COMMON | {"target_modules": NAMES}),
    "lora": lambda: lora(select="last:2"),
    "lora, packed base": lambda: lora(select="last:2", quantize_frozen="nf4", quantize_trained="nf4"),
    "lora, schedule": lambda: lora(select=UNIFORM),
    "lora, waiting": lambda: lora(select={"by": "gradient_norm", "keep": 1}),
    "projection": lambda: galore(select="last:2"),
    "projection, base on the CPU": lambda: galore(select="last:2", fold="base", proj_type="left"),
    "projection, packed base": lambda: galore(select="last:2", quantize_frozen="nf4", quantize_trained="nf4"),
    "projection, schedule": lambda: galore(select=UNIFORM),
    "full": lambda: full(select="last:1"),
    "full, schedule": lambda: full(select=UNIFORM),
    "heads": lambda: heads(select={"unit": "head", "layers": [[1, 0], [2, 0], [2, 1]]}),
    "heads, packed base": lambda: heads(select={"unit": "head", "layers": [[1, 0], [2, 1]]}, quantize_frozen="nf4"),
    "heads, schedule": lambda: heads(select=UNIFORM | {"unit": "head", "layers": [2, 3, 4, 5]}),
}
WAITS = "lora, waiting"


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=X).logits.float()


def wrap(column: str, model: Any = None) -> Any:
    torch.manual_seed(1)
    return layerpeft.get_peft_model(base() if model is None else model, COLUMNS[column]())


def train(model: Any, steps: int = 5) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    model.train()
    for seed in range(steps):
        x = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(seed))
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@dataclass
class Scene:
    """One cell: a trained model of one config class, and what it and its base say."""

    column: str
    model: Any
    on: torch.Tensor
    off: torch.Tensor
    tmp: Any
    start: Any  # the model before it trained
    bare: Any  # the base as the config stores it
    folder: str  # of the trained model

    @property
    def packed(self) -> bool:
        return "packed" in self.column

    def fresh(self) -> Any:
        return copy.deepcopy(self.start)

    def base(self) -> Any:
        return copy.deepcopy(self.bare)

    def close(self, model: Any, want: torch.Tensor, most: float = 2e-5) -> None:
        got = logits(model)
        apart = float((got - want).abs().max())
        assert apart <= most, f"the output is off by {apart:.1e}"

    def kept(self, model: Any = None, most: float = 2e-5) -> None:
        """The model says what it said, and its base what that said."""
        model = self.model if model is None else model
        self.close(model, self.on, most)
        with model.disable_adapter():
            self.close(model, self.off, 0 if most <= 2e-5 else most)
        self.close(model, self.on, most)

    def other(self) -> tuple[str, torch.Tensor]:
        """A folder of a stock adapter on the same modules, and what the base says with it."""
        names = (
            NAMES if not self.column.endswith(("schedule", "waiting")) else [n.replace("1", "0") for n in NAMES] + NAMES
        )
        torch.manual_seed(2)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=False, **COMMON | {"target_modules": sorted(set(names))}
        )
        model = peft.get_peft_model(self.base(), config)
        model.save_pretrained(self.tmp / "other")
        return str(self.tmp / "other"), logits(model)


# ---- doors: what is done, and what LoRA gives


def casts(s: Scene, cast: Callable[[Any], Any], most: float = 0.1) -> None:
    cast(s.model)
    s.close(s.model, s.on, most)
    with s.model.disable_adapter():
        s.close(s.model, s.off if s.packed else logits(cast(base())), most if s.packed else 0)
    s.close(s.model, s.on, most)


def rounds_mixed(s: Scene) -> None:
    peft.utils.cast_mixed_precision_params(s.model, torch.bfloat16)
    want = base()
    for p in want.parameters():
        p.data = p.bfloat16()
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=s.column.startswith("full")
    ):  # without it PEFT's own copies break, too
        s.close(s.model, s.on, 0.1)
        with s.model.disable_adapter():
            s.close(s.model, logits(want), 0.1 if s.column.startswith("full") else 0)


def for_kbit(s: Scene) -> None:
    peft.prepare_model_for_kbit_training(s.model, use_gradient_checkpointing=False)
    assert not any(p.requires_grad for p in s.model.parameters())
    s.kept()


def emptied(s: Scene) -> None:
    state = {k: v.clone() for k, v in s.model.state_dict().items()}
    buffers = {n: b.clone() for n, b in s.model.named_buffers()}
    s.model.to_empty(device="cpu")
    for name, buffer in s.model.named_buffers():
        buffer.copy_(buffers[name])
    s.model.load_state_dict(state)
    s.close(s.model, s.on)


def loaded_plainly(s: Scene) -> None:
    fresh = s.fresh()
    fresh.load_state_dict({k: v.clone() for k, v in s.model.state_dict().items()})
    s.kept(fresh)


def taken_out(s: Scene) -> None:
    state = peft.get_peft_model_state_dict(s.model)
    if s.column.startswith("full"):
        fresh = peft.get_peft_model(
            s.base(),
            peft.LoraConfig(
                target_modules="dummy-target-modules",
                modules_to_save=sorted({k.removeprefix("base_model.model.").rpartition(".")[0] for k in state}),
            ),
        )
    else:
        (rank,) = {t.shape[0] for k, t in state.items() if ".lora_A." in k}
        names = sorted({k.removeprefix("base_model.model.").partition(".lora_")[0] for k in state})
        alpha = rank if s.column.startswith("projection") else 8
        bias = any(k.endswith(".lora_B.bias") for k in state)
        stock = peft.LoraConfig(r=rank, lora_alpha=1 if bias else alpha, target_modules=names, lora_bias=bias)
        fresh = peft.get_peft_model(s.base(), stock)
    found = peft.set_peft_model_state_dict(fresh, state)
    assert not found.unexpected_keys
    s.close(fresh, s.on)


def put_in(s: Scene) -> None:
    fresh = s.fresh()
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(s.model))
    s.kept(fresh)


def moved(model: Any) -> None:
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1


def copied(s: Scene) -> None:
    twin = copy.deepcopy(s.model)
    s.kept(twin)
    moved(twin)
    s.kept()


def pickled(s: Scene) -> None:
    file = io.BytesIO()
    torch.save(s.model, file)
    twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    s.kept(twin)
    twin.save_pretrained(s.tmp / "pickled")
    if s.column != WAITS:
        s.close(peft.PeftModel.from_pretrained(s.base(), s.tmp / "pickled"), s.on)


def frozen(s: Scene) -> None:
    s.model.requires_grad_(False)
    s.model.zero_grad()
    s.model.train().eval()
    s.kept()


def visited(s: Scene) -> None:
    seen: list[nn.Module] = []
    s.model.apply(seen.append)
    assert set(map(id, seen)) == set(map(id, s.model.modules()))
    s.model.share_memory()
    s.kept()


def compiled(s: Scene) -> None:
    torch.compiler.set_stance("force_eager")
    try:
        s.close(torch.compile(s.model, backend="eager"), s.on)
        s.model.compile(backend="eager")
        s.kept()
        assert not [k for k in peft.get_peft_model_state_dict(s.model) if "_orig_mod" in k]
    finally:
        torch.compiler.set_stance("default")


def listed(s: Scene) -> None:
    own = {n for n, _ in s.model.named_parameters()}
    assert {n for n in s.model.state_dict() if not n.endswith("_extra_state")} >= own
    trainable, every = s.model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in s.model.parameters() if p.requires_grad) and every >= trainable
    status = s.model.get_model_status()
    assert status.enabled and status.active_adapters == ["default"] == s.model.active_adapters
    assert s.packed or len(s.model.get_layer_status()) == status.num_adapter_layers
    assert s.model.has_active_enabled_adapter and s.model.active_peft_config is s.model.peft_config["default"]


def saved(s: Scene) -> None:
    s.close(peft.PeftModel.from_pretrained(s.base(), s.folder), s.on)
    if os.path.isfile(f"{s.folder}/layerpeft.json"):
        s.close(layerpeft.load(s.folder, s.base()), s.on)
    s.model.save_pretrained(s.tmp / "pickle", safe_serialization=False)
    s.close(peft.PeftModel.from_pretrained(s.base(), s.tmp / "pickle"), s.on)


def saved_of_before(s: Scene) -> None:
    state = {k: v.clone() for k, v in s.model.state_dict().items()}
    moved(s.model)
    assert not torch.equal(logits(s.model), s.on)
    s.model.save_pretrained(s.tmp / "before", state_dict=state)
    s.close(peft.PeftModel.from_pretrained(s.base(), s.tmp / "before"), s.on)


def resumed(s: Scene) -> None:
    fresh = s.fresh()
    fresh.load_adapter(s.folder, "default", is_trainable=True)
    s.kept(fresh)


def second(s: Scene) -> None:
    folder, want = s.other()
    s.model.load_adapter(folder, "b")
    s.close(s.model, s.on)
    s.model.set_adapter("b")
    s.close(s.model, want)
    s.model.set_adapter("default")
    s.close(s.model, s.on)
    s.model.delete_adapter("b")
    s.kept()


def deleted(s: Scene) -> None:
    folder, want = s.other()
    s.model.load_adapter(folder, "b")
    s.model.set_adapter("b")
    s.model.delete_adapter("default")
    s.close(s.model, want)
    with s.model.disable_adapter():
        s.close(s.model, s.off, 0)


def added(s: Scene) -> None:
    s.model.add_adapter("b", peft.LoraConfig(r=2, **COMMON))
    s.kept()


def let_train(s: Scene) -> None:
    before = {n for n, p in s.model.named_parameters() if p.requires_grad}
    s.model.set_requires_grad("default", False)
    assert not any(p.requires_grad for n, p in s.model.named_parameters() if ".lora_" in n)
    s.model.set_requires_grad("default", True)
    assert {n for n, p in s.model.named_parameters() if p.requires_grad} >= before
    assert not any(p.requires_grad for n, p in s.model.named_parameters() if "base_layer" in n)
    s.kept()


def switched(s: Scene) -> None:
    s.model.base_model.disable_adapter_layers()
    s.close(s.model, s.off, 0)
    s.model.base_model.enable_adapter_layers()
    s.kept()


def merged(s: Scene) -> None:
    most = 0.2 if s.packed else 2e-5
    s.model.merge_adapter()
    s.close(s.model, s.on, most)
    s.model.unmerge_adapter()
    s.kept(most=most if s.column == "lora, packed base" else 2e-5) if not s.column.startswith(
        ("plain", "lora")
    ) else s.close(s.model, s.on, most)
    s.close(copy.deepcopy(s.model).merge_and_unload(), s.on, most)
    s.close(s.model.unload(), s.off, most)


def mixed(s: Scene) -> None:
    with torch.no_grad():
        got = s.model(input_ids=X.expand(2, -1), adapter_names=["__base__", "default"]).logits
    assert float((got - torch.cat([s.off, s.on])).abs().max()) < 2e-5


def weighted(s: Scene) -> None:
    s.model.add_weighted_adapter(["default"], [1.0], "w", combination_type="linear")
    s.model.set_adapter("w")
    s.close(s.model, s.on, 1e-4)


def converted(s: Scene) -> None:
    config, state = peft.convert_to_lora(s.model, rank=64)
    fresh = peft.get_peft_model(s.base(), config)
    peft.set_peft_model_state_dict(fresh, state)
    s.close(fresh, s.on, 1e-4)


def base_read(s: Scene) -> None:
    found = peft.utils.get_base_model_state_dict(s.model)
    want = s.base().state_dict()
    assert set(found) >= set(want) and (s.packed or set(found) == set(want))
    assert all(torch.equal(found[k], t) for k, t in want.items() if isinstance(t, torch.Tensor))
    peft.utils.set_base_model_state_dict(s.model, found)
    s.kept()


def base_read_when_off(s: Scene) -> None:
    with s.model.disable_adapter():
        found = peft.utils.get_base_model_state_dict(s.model)
    assert all(torch.equal(found[k], t) for k, t in s.base().state_dict().items() if isinstance(t, torch.Tensor))
    s.kept()


def rescaled(s: Scene) -> None:
    stock = peft.PeftModel.from_pretrained(s.base(), s.folder)  # PEFT's own
    with peft.helpers.rescale_adapter_scale(stock, 0.5):
        want = logits(stock)
    assert float((want - s.on).abs().max()) > 1e-4 or s.column == WAITS
    with peft.helpers.rescale_adapter_scale(s.model, 0.5):
        s.close(s.model, want)
        if not s.packed:
            s.model.merge_adapter()
            s.close(s.model, want)
            s.model.unmerge_adapter()
    for layer in tuner_layers(s.model):
        layer.scale_layer(0.5)
    s.close(s.model, want)
    for layer in tuner_layers(s.model):
        layer.unscale_layer()
    s.close(s.model, s.on)
    for layer in tuner_layers(s.model):
        layer.set_scale("default", 0.5)
    s.close(s.model, want)


def tuner_layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def begun_anew(s: Scene) -> None:
    for layer in tuner_layers(s.model):
        layer.reset_lora_parameters("default", True)
    assert tuner_layers(s.model), "no LoRA layer"
    s.close(s.model, s.off, 0)


def uncast(s: Scene) -> None:
    with peft.helpers.disable_input_dtype_casting(s.model):
        s.close(s.model, s.on)


def swapped(s: Scene) -> None:
    folder, want = s.other()
    hotswap.hotswap_adapter(s.model, folder, "default")
    s.close(s.model, want)
    with s.model.disable_adapter():
        s.close(s.model, s.off, 0)


def padded(s: Scene) -> None:
    hotswap.prepare_model_for_compiled_hotswap(s.model, target_rank=8)
    s.close(s.model, s.on)


def own_weight(s: Scene) -> None:
    with s.model.disable_adapter():
        for name, module in s.model.base_model.model.named_modules():
            if isinstance(module, BaseTunerLayer) and not s.packed:
                assert torch.equal(module.weight, base().get_submodule(name).weight)
                assert torch.equal(module.get_base_layer().weight, module.weight)
    s.kept()


DOORS: dict[str, Callable[[Scene], None]] = {
    "to bfloat16 type": lambda s: casts(s, lambda m: m.to(torch.bfloat16)),
    "half": lambda s: casts(s, lambda m: m.half()),
    "double float": lambda s: casts(s, lambda m: m.double().float(), 1e-4),
    "cast_mixed_precision_params": rounds_mixed,
    "prepare_model_for_kbit_training": for_kbit,
    "to_empty": emptied,
    "load_state_dict state_dict": loaded_plainly,
    "get_peft_model_state_dict": taken_out,
    "set_peft_model_state_dict": put_in,
    "copy.deepcopy": copied,
    "pickle": pickled,
    "requires_grad_ zero_grad train eval": frozen,
    "apply share_memory": visited,
    "compile forward": compiled,
    "named_parameters parameters get_nb_trainable_parameters get_layer_status get_model_status active_adapters "
    "active_adapter active_peft_config peft_config has_active_enabled_adapter": listed,
    "save_pretrained from_pretrained load_peft_weights create_or_update_model_card": saved,
    "save_pretrained(state_dict=)": saved_of_before,
    "load_adapter (resume)": resumed,
    "load_adapter set_adapter": second,
    "delete_adapter": deleted,
    "add_adapter inject_adapter update_layer": added,
    "set_requires_grad": let_train,
    "disable_adapter disable_adapter_layers enable_adapter_layers enable_adapters disable_adapters": switched,
    "merge_adapter unmerge_adapter merge unmerge merged merged_adapters merge_and_unload unload": merged,
    "forward(adapter_names=)": mixed,
    "add_weighted_adapter": weighted,
    "convert_to_lora save_as_lora supports_lora_conversion get_delta_weight": converted,
    "get_base_model_state_dict set_base_model_state_dict": base_read,
    "get_base_model_state_dict (off)": base_read_when_off,
    "rescale_adapter_scale scale_layer unscale_layer set_scale": rescaled,
    "reset_lora_parameters": begun_anew,
    "disable_input_dtype_casting": uncast,
    "hotswap_adapter hotswap_adapter_from_state_dict": swapped,
    "prepare_model_for_compiled_hotswap": padded,
    "weight bias get_base_layer get_base_model": own_weight,
}
PROJECTION, FULL, HEADS = "projection", "full", "heads"
# by the beginnings of the door's name and the column's: what it says; PEFT's own words where LoRA over such a base says them too
REFUSED: dict[tuple[str, str], str] = {
    ("to_empty", PROJECTION): "Load a folder that a projection run has saved",
    ("load_state_dict", PROJECTION): "Load a folder that a projection run has saved",
    ("set_peft_model_state_dict", PROJECTION): "Load a folder that a projection run has saved",
    ("save_pretrained(state_dict=)", PROJECTION): "save a projection as it stands, model.save_pretrained(folder)",
    ("forward(adapter_names=)", PROJECTION): "call the model once with the adapter and once within disable_adapter()",
    ("add_weighted_adapter", PROJECTION): "mix what PeftModel.from_pretrained and load_adapter make of the folder",
    ("get_base_model_state_dict set", "projection, packed"): "as LoRA",
    ("get_base_model_state_dict set", PROJECTION): "with model.disable_adapter()",
    ("pickle", WAITS): "pickle it after the first optimizer step",
    ("load_adapter set_adapter", FULL): "put the adapter over that, or load it over the base",
    ("delete_adapter", FULL): "put the adapter over that, or load it over the base",
    ("add_adapter", FULL): "put the adapter over that, or load it over the base",
    ("forward(adapter_names=)", FULL): "call the model once with the adapter and once within disable_adapter()",
    ("add_weighted_adapter", FULL): "mix what PeftModel.from_pretrained and load_adapter make of the folder",
    ("convert_to_lora", FULL): "Could not detect any layer that supports LoRA",
    ("get_base_model_state_dict set", FULL): "with model.disable_adapter()",
    ("rescale_adapter_scale", FULL): "only supported for models with `LoraLayer`s",
    ("reset_lora_parameters", FULL): "no LoRA layer",
    ("hotswap_adapter", FULL): "unexpected keys found",
    ("prepare_model_for_compiled_hotswap", FULL): "No adapter layers found",
    ("set_peft_model_state_dict", HEADS): "holds no layerpeft_heads.safetensors",
    ("merge_adapter", "heads, packed"): "merge the saved adapter into the base in 16 bit",
    ("merge_adapter", HEADS): "layerpeft merge gives biases to models",
    ("rescale_adapter_scale", "heads, packed"): "as LoRA",
    ("rescale_adapter_scale", HEADS): "layerpeft merge gives biases to models",
    ("add_weighted_adapter", HEADS): "of which it would leave nothing",
    ("convert_to_lora", HEADS): "do not support LoRA conversion",
    ("hotswap_adapter", HEADS): "unexpected keys found",
    ("cast_mixed_precision_params", "heads, packed"): "is invalid for input of size",
    ("to_empty", "heads, packed"): "Unexpected key(s) in state_dict",
    ("load_state_dict", "heads, packed"): "Unexpected key(s) in state_dict",
    (
        "cast_mixed_precision_params",
        "lora, packed",
    ): "is invalid for input of size",  # bitsandbytes' bytes are cast as numbers
    ("cast_mixed_precision_params", "projection, packed"): "is invalid for input of size",
    ("to_empty", "lora, packed"): "Unexpected key(s) in state_dict",  # bitsandbytes takes no states of its own
    ("load_state_dict", "lora, packed"): "Unexpected key(s) in state_dict",
    ("convert_to_lora", "lora, packed"): "do not support LoRA conversion",
    ("convert_to_lora", "projection, packed"): "do not support LoRA conversion",
}


# what is none of a door, and why
OTHER = {
    "hooks, names and parts of any module": """T_destination add_module buffers call_super_init children dump_patches extra_repr
        get_buffer get_extra_state get_parameter get_submodule modules named_buffers named_children named_modules register_module
        register_backward_hook register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
        register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_parameter
        register_state_dict_post_hook register_state_dict_pre_hook set_extra_state set_submodule""",
    "moves as `to` does, by the same `_apply`": "cpu cuda ipu mtia xpu",
    "prompts, which no config here trains": """get_prompt get_prompt_embedding_to_save map_cache_to_layer_device_map
        bloom_model_postprocess_past_key_value shift_tokens_right""",
    "facts of a class or of a config": """adapter_layer_names base_model_torch_dtype frozen_peft_weight_names get_model_config
        lora_variants modules_to_save other_param_names prefix quantization_backend resolve_lora_variant target_module_mapping
        tuner_layer_cls uses_shared_state""",
    "starts of LoRA, which a projection refuses by the option": """corda_init loftq_init lora_ga_init mica_init olora_init
        orthogonal_init pissa_init subtract_mutated_init replace_lora_weights_loftq""",
    "layers that PEFT quantizes by itself": """get_base_weight set_base_weight get_quantization_config get_quantization_kwargs
        get_gptqmodel_quant_linear quantization_extra_repr resolve_quantization_backend""",
    "the forward pass, saving and counting again": """generate print_trainable_parameters push_to_hub
        prepare_model_for_gradient_checkpointing""",
    "about models without adapters, and what others here call": """check_if_peft_model find_kappa_target_modules
        update_forward_signature update_generate_signature update_signature check_hotswap_configs_compatible get_pattern_key
        infer_device id_tensor_storage check_file_exists_on_hf_hub dtensor_from_local_like get_embedding_layer_name
        has_valid_embedding_base_layer match_target_against_key torch_load register_peft_method set_additional_trainable_modules
        transpose""",
}


def public() -> set[str]:
    """Everything that PEFT and torch offer for an adapter."""
    classes = (nn.Module, peft.PeftModel, LoraModel, Linear)
    found = {n for kind in classes for n in dir(kind) if not n.startswith("_")}
    for module in (peft.helpers, hotswap, peft.utils, peft.utils.save_and_load):
        own = ((n, f) for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_"))
        found |= {n for n, f in own if inspect.unwrap(f).__module__.startswith("peft.")}
    return found - {"smart_apply"}  # which transformers puts there while it makes a model


def test_the_table_names_everything_that_there_is():
    named = {w for text in (*DOORS, *OTHER.values()) for w in text.split() if w.isidentifier()}
    assert public() - named == set()
    assert named - public() == {"pickle", "convert_to_lora", "save_as_lora"}


@pytest.fixture(scope="module")
def scenes() -> dict[str, Any]:
    return {}


def scene(column: str, scenes: dict[str, Any], tmp: Any) -> Scene:
    if column not in scenes:
        model = wrap(column)
        start = copy.deepcopy(model)
        with model.disable_adapter():
            off = logits(model)
        if column != WAITS:
            train(model)
        model.save_pretrained(tmp / "own")
        bare = wrap(column).unload() if "packed" in column else base()
        scenes[column] = model, off, start, bare, str(tmp / "own")
    model, off, start, bare, folder = scenes[column]
    twin = copy.deepcopy(model)
    return Scene(column, twin, logits(twin), off, tmp, start, bare, folder)


REPEATED = (
    "plain PEFT",
    "lora",
    "lora, schedule",
    "projection",
    "projection, packed base",
    "full",
    "lora, packed base",
    "projection, base on the CPU",
    "projection, schedule",
    "full, schedule",
    "heads, packed base",
    "heads, schedule",
)  # what others show, too


@pytest.mark.parametrize("column", [pytest.param(c, marks=pytest.mark.slow) if c in REPEATED else c for c in COLUMNS])
def test_every_door_is_as_of_lora_or_says_the_way_out(column, scenes, tmp_path):
    wrong = {}
    for number, (door, check) in enumerate(DOORS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        cell = scene(column, scenes, folder)
        refusal = next((t for (d, c), t in REFUSED.items() if door.startswith(d) and column.startswith(c)), "as LoRA")
        try:
            check(cell)
            found = "as LoRA"
        except LayerpeftError as error:
            found = str(error)
            if check not in (emptied, saved_of_before):  # which change it before they are refused
                cell.kept()
        except Exception as error:  # gathered, so that one run shows the whole table
            found = f"{type(error).__name__}: {error}"
        if refusal not in found or (refusal == "as LoRA") != (found == "as LoRA"):
            wrong[door] = found
    assert not wrong, "\n".join(f"{door}: {found}" for door, found in wrong.items())

"""What merging takes: a model without weights that a checkpoint has to fit, and PEFT's own merging, one module at a time."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from layerpeft.integrations.empty import empty_model


def bare(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device, its config as loading in this type leaves it. `kind`: a class, automatic or not."""
    model: Any = empty_model(kind, config, dtype)
    for part in (model.config, *(getattr(model.config, key, None) for key in model.config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    return model


def converts(model: Any, dtype: torch.dtype) -> bool:
    """Whether transformers renames, joins or casts tensors of such a checkpoint while it loads or saves it."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False) or model._get_dtype_plan(dtype))


def tied(model: Any) -> dict[str, str]:
    """Names of tensors that are other tensors: the one that a checkpoint may lack -> the one that it has."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def write_config(model: Any, base: str, folder: Any) -> None:
    """config.json and generation_config.json as `save_pretrained` writes them for the loaded model."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if not model.can_generate():
        return
    try:
        settings = transformers.GenerationConfig.from_pretrained(base)
    except OSError:
        settings = model.generation_config
    settings.save_pretrained(folder)


def merged_alone(
    model: nn.Module, name: str, tensors: Mapping[str, torch.Tensor], config: Any, adapter: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of one module of a model with an adapter merged into them, by PEFT itself, over nothing but that module.

    `tensors`: its state; `adapter`: the adapter's tensors in it, by PEFT's names. Raises: ValueError where they are not finite.
    """
    module = copy.deepcopy(model.get_submodule(name))
    module.load_state_dict(dict(tensors), assign=True)
    holder = nn.Module()
    parent = holder
    *path, leaf = name.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(leaf, module)
    alone = copy.deepcopy(config)
    alone.modules_to_save, alone.inference_mode = None, True
    wrapped: Any = PeftModel(holder, alone)
    found = set_peft_model_state_dict(wrapped, dict(adapter))
    strange = [*found.unexpected_keys, *(k for k in found.missing_keys if ".lora_" in k)]
    if strange:
        raise ValueError(f"the adapter lacks, or holds in vain, {strange[0]}")
    with torch.no_grad():
        merged = wrapped.merge_and_unload(safe_merge=True)
    return dict(merged.get_submodule(name).state_dict())


def untie(model: Any) -> None:
    """Gives tensors that several modules share, and that the adapter of a PeftModel changes in one of them, to each of these by
    itself: merged in place, the change would be in all. The config says so from then on, as PEFT has it for whole copies.
    """
    base = model.get_base_model()
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                held.setdefault(id(parameter), []).append((module, name))
    changed = [m for m in base.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, TrainableTokensLayer)]
    own: list[Any] = [layer.get_base_layer() for layer in changed if hasattr(layer, "base_layer")]
    shared = [id(p) for layer in own for p in layer._parameters.values() if p is not None and len(held[id(p)]) > 1]
    for key in dict.fromkeys(shared):
        for module, name in held[key][1:]:
            parameter: Any = module._parameters[name]
            module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    config: Any = getattr(base, "config", None)
    if shared and isinstance(config, transformers.PretrainedConfig):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False  # type: ignore[attr-defined]


Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of a tensor before and after


def weigh(model: Any, rule: Callable[[str], Rule | None]) -> None:
    """Merges the active adapter of a PeftModel into those modules for which there is a rule, by their names in the base, one at a
    time in float64. PEFT's own merging passes over them then; copies of whole modules are what it takes next.
    """
    for path, layer in model.named_modules():
        name = path.removeprefix("base_model.model.")
        one = rule(name) if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper) else None
        if one is None:
            continue
        if isinstance(layer, ModulesToSaveWrapper):
            old, kept = dict(layer.original_module.named_parameters()), layer.modules_to_save[layer.active_adapters[0]]
            for inner, parameter in kept.named_parameters():
                parameter.data = one(old[inner].detach(), parameter.detach())
        elif hasattr(layer, "base_layer"):
            base: Any = layer.get_base_layer()
            types = {n: p.dtype for n, p in base.named_parameters()}
            on_mps = any(p.device.type == "mps" for p in base.parameters())  # which has no float64
            module: Any = layer
            module.to(torch.float32 if on_mps else torch.float64)
            before = {n: p.detach().clone() for n, p in base.named_parameters()}
            layer.merge(safe_merge=True)
            for inner, parameter in base.named_parameters():
                parameter.data = one(before[inner], parameter.detach()).to(types[inner])


def merge_in_place(model: Any) -> dict[str, float]:
    """Merges the active adapter of a PeftModel into its weights, quantized ones included, which PEFT rounds again.

    Returns for every quantized linear how large the rounding's error is beside the change that was merged (Frobenius norms);
    linears whose change is not a sum (DoRA) are merged without that number.
    """
    found: dict[str, float] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not hasattr(layer, "base_layer"):
            continue
        base: Any = layer.get_base_layer()
        rounds = _packed(base)
        change = _change(layer) if rounds else None
        before = dequantize_module_weight(base).float() if change is not None else None
        layer.merge(safe_merge=True)
        after: Any = layer.get_base_layer()
        if after is not base:  # HQQ's linear is a new one then, to which PEFT does not give the bias
            after.bias, after.__class__ = base.bias, base.__class__
        if change is not None and before is not None:
            error = dequantize_module_weight(after).float() - before - change
            found[name.removeprefix("base_model.model.")] = float(error.norm() / change.norm().clamp_min(1e-30))
    return found


def _packed(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return hasattr(module, "W_q") or (isinstance(weight, torch.Tensor) and not weight.is_floating_point())


def _change(layer: Any) -> torch.Tensor | None:
    """What the active adapters add to the weight, where that is a sum."""
    if not isinstance(layer, LoraLayer):
        return None
    names = [n for n in layer.active_adapters if n in layer.lora_A]
    if not names or any(n in layer.lora_variant for n in names):
        return None
    return sum((layer.get_delta_weight(n).float() for n in names[1:]), layer.get_delta_weight(names[0]).float())  # type: ignore[operator]

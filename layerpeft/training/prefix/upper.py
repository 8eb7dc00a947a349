"""A model of which the part from block k on alone is loaded: blocks below have no weights, keep their numbers, and hand on."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from layerpeft.errors import ConfigError
from layerpeft.integrations import filling
from layerpeft.model.layers import layer_map
from layerpeft.selection.states import entering_states
from layerpeft.training.prefix.running import Form, shaped
from layerpeft.training.prefix.source import Source
from layerpeft.training.prefix.upwards import forms_below

PLAIN = (str, int, float, bool, type(None))


class StandIn(GradientCheckpointingLayer):  # transformers' mark of a block: layers keep their numbers
    """Gives out the hidden states that it gets, in the form of the block whose place it has; it has no weights.

    What loops of models read of a block (`layer_idx`, `attention_type`, …) is as the block's. With a `source` it is passed over,
    and never runs. Raises: ConfigError where it would.
    """

    def __init__(self, block: nn.Module, form: Form, source: Source | None = None) -> None:
        super().__init__()
        self.form, self.source = form, source
        kept = {k: v for k, v in vars(block).items() if isinstance(v, PLAIN) and not k.startswith("_")}
        for key, value in kept.items():
            if key != "gradient_checkpointing":
                setattr(self, key, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.source is not None:
            raise self.source.lacks("this pass is not one that can begin with kept states")
        return shaped(self.form, entering_states(args, kwargs))


def load_upper(kind: Any, place: str, cut: int, *, source: Source | None = None, **options: Any) -> Any:
    """The model of a checkpoint's folder, with a `StandIn` for every block below `cut`, whose weights are never read.

    `kind`: a class of transformers with `from_pretrained`, which gets `options`, and whose answer this is. Embeddings, whatever is
    tied to them, the blocks from `cut` on and the head are there. What comes out is right only where what enters block `cut` is put
    there, as `prefix_cache` does with what a `source` holds.
    Raises: ConfigError where there are not so many blocks, where blocks below hand on more than hidden states, or where it is
    quantized or to be quantized.
    """
    if options.pop("quantization_config", None) is not None:
        raise ConfigError("the upper part alone is not quantized while it loads; take quantization_config out")
    given, _ = PreTrainedConfig.get_config_dict(place)
    if given.get("quantization_config"):
        raise ConfigError(f"{place} is quantized already; the upper part alone is loaded of plain checkpoints")
    asked = filling.settings(_stored, (), _size, before=lambda model: stand_in(model, cut, source))
    return kind.from_pretrained(place, quantization_config=asked, **options)


def stand_in(model: nn.Module, cut: int, source: Source | None = None) -> None:
    """Puts stand-ins in the places of all blocks below `cut` of a model on the meta device. Raises: ConfigError."""
    names = layer_map(model, source.stack if source is not None else None).names
    if not 0 < cut < len(names):
        raise ConfigError(
            f"cut: {cut} is not between 1 and {len(names) - 1}; {type(model).__name__} has {len(names)} blocks"
        )
    for name, form in zip(names[:cut], forms_below(model, names, cut), strict=True):
        model.set_submodule(name, StandIn(model.get_submodule(name), form, source))
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    below = {rf"(^|\.){re.escape(_without_prefix(model, name))}\." for name in names[:cut]}
    model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *below}  # type: ignore[assignment]


def _without_prefix(model: nn.Module, name: str) -> str:
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")


def _stored(_name: str, linear: nn.Linear) -> nn.Module:
    return linear


def _size(_name: str, weight: torch.Tensor) -> float:
    return weight.element_size()

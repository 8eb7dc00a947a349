"""Where the backward pass stops: at the lowest layer that trains, whatever checkpointing is on.

Autograd stops there by itself. What defeats it are hooks that make the embeddings' output require a gradient, so that
checkpointing works on frozen models (TRL and `prepare_model_for_kbit_training` ask for them): then the backward pass runs
through, and recomputes, every frozen layer below. Those hooks are taken off while nothing below needs them, whoever put them
there and however often. Reentrant checkpointing needs an input that requires a gradient; it gets one at the cut instead of at
the bottom. Nothing is detached: where something below really trains (embeddings, prompt tokens, another adapter), its gradients
flow on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layerpeft.integrations.checkpointing import (
    is_checkpointed,
    is_reentrant,
    restore_hooks,
    set_checkpointed,
    take_input_hooks,
)
from layerpeft.layers import base_of, layer_map


@dataclass(frozen=True)
class Stop:
    """Where the backward pass stops, and why; `layer` is None where it runs to the bottom."""

    layer: int | None
    why: str


@dataclass
class _Cut:
    """State on one model: the blocks, and what has been put aside."""

    blocks: Sequence[nn.Module]
    is_last: bool  # False for an encoder whose output another stack goes on with
    taken: list[Any] = field(default_factory=list)
    quiet: list[nn.Module] = field(default_factory=list)
    opened: RemovableHandle | None = None
    at: int | None = None
    reentrant: bool = False


def install(model: nn.Module, stack: str | None = None) -> Stop:
    """Watches the model's forward passes and keeps the cut where the lowest trainable layer is; a second call changes nothing.

    Does nothing, hooks included, where the first layer trains. Raises: LayerMapError for a model without blocks.
    """
    base = base_of(model)
    stop = where(base, stack)
    state: dict[str, Any] = base.__dict__
    if stop.layer is None or "_layerpeft_cut" in state:
        return stop
    cut = _Cut(_blocks(base, stack), is_last=stack is None or layer_map(base).stack == layer_map(base, stack).stack)
    state["_layerpeft_cut"] = _Keeper(cut)
    base.register_forward_pre_hook(_before_forward)
    _sync(base, cut)
    return stop


def where(model: nn.Module, stack: str | None = None) -> Stop:
    """The layer of a stack at which the backward pass stops, from what is trainable now."""
    base = base_of(model)
    return _stop(base, _blocks(base, stack))


class _Keeper:
    """Holds a cut; copies and pickles of the model start without one."""

    def __init__(self, cut: _Cut | None = None) -> None:
        self.cut = cut

    def __deepcopy__(self, memo: dict[int, Any]) -> _Keeper:
        return _Keeper()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Keeper, ()


def _before_forward(model: nn.Module, *_: Any) -> None:
    # Inside a compiled graph the state of the last eager call, or of `install`, holds.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    cut = model.__dict__["_layerpeft_cut"].cut
    if cut is not None:
        _sync(model, cut)


def _stop(model: nn.Module, blocks: Sequence[nn.Module]) -> Stop:
    lowest = next((i for i, b in enumerate(blocks) if any(p.requires_grad for p in b.parameters())), None)
    if lowest is None:
        return Stop(None, "nothing in these layers trains")
    if lowest == 0:
        return Stop(None, "the first layer trains")
    inside = {id(p) for b in blocks for p in b.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            break  # parameters come in the order of the modules: what follows lies above, or in a part of its own
        if parameter.requires_grad:
            return Stop(None, f"{name}, below the layers, trains")
    hooked = next((b for b in blocks[:lowest] for m in b.modules() if m._backward_hooks or m._backward_pre_hooks), None)
    if hooked is not None:
        return Stop(None, f"a backward hook of your own waits below layer {lowest}")
    return Stop(lowest, f"layer {lowest} is the lowest that trains")


def _sync(model: nn.Module, cut: _Cut) -> None:
    """Brings hooks and checkpointing into line with what trains now."""
    stop = _stop(model, cut.blocks)
    reentrant = stop.layer is not None and is_reentrant(cut.blocks[stop.layer])
    if reentrant and not cut.is_last:
        # The stack that follows is recomputed from inputs which have to require a gradient, down to its own bottom.
        stop = Stop(None, "reentrant checkpointing, and another stack follows this one")
    if (stop.layer, reentrant) != (cut.at, cut.reentrant):
        _undo(cut)
        cut.at, cut.reentrant = stop.layer, reentrant
        if stop.layer is not None and reentrant:
            cut.opened = cut.blocks[stop.layer - 1].register_forward_hook(_open)
    if stop.layer is not None:
        cut.taken += take_input_hooks(model)
        if reentrant:  # the blocks below have nothing to recompute for, and torch would warn of it
            for block in cut.blocks[: stop.layer]:
                if is_checkpointed(block):
                    set_checkpointed(block, False)
                    cut.quiet.append(block)


def _undo(cut: _Cut) -> None:
    restore_hooks(cut.taken)
    for block in cut.quiet:
        set_checkpointed(block, True)
    if cut.opened is not None:
        cut.opened.remove()
    cut.taken, cut.quiet, cut.opened = [], [], None


def _open(_block: nn.Module, _args: Any, output: Any) -> None:
    """Lets the hidden states require a gradient from here on."""
    hidden = output[0] if isinstance(output, tuple) else output
    if torch.is_grad_enabled() and isinstance(hidden, torch.Tensor) and hidden.is_leaf:
        hidden.requires_grad_(True)


def _blocks(model: nn.Module, stack: str | None) -> list[nn.Module]:
    return [model.get_submodule(layer.name) for layer in layer_map(model, stack).layers]

"""Where the backward pass stops: at the lowest layer that trains, whatever checkpointing is on.

Autograd stops there by itself. What defeats it are hooks that make the embeddings' output require a gradient, so that
checkpointing works on frozen models (TRL and `prepare_model_for_kbit_training` ask for them): then the backward pass runs
through, and recomputes, every frozen layer below. Those hooks are silenced, whoever put them there and however often.
Reentrant checkpointing needs an input that requires a gradient; it gets one at the cut instead of at the bottom. Nothing is
detached: where something below really trains (embeddings, prompt tokens, another adapter or stack), its gradients flow on.
A stack need not run: a batch without images reaches nothing that trains in a vision tower. The hooks would have made its output
require a gradient; so it does, and a backward pass that has nothing to do does nothing.
Where a layer trains in part, autograd stops inside of it, at the lowest tensor that trains; reentrant checkpointing goes
through the whole of it.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from layerpeft.integrations import checkpointing
from layerpeft.integrations.checkpointing import is_reentrant, modules_of, parameters_of
from layerpeft.integrations.engines.fsdp import fetch_down_to
from layerpeft.integrations.torch import tensors_of
from layerpeft.model.home import home_of, known_of
from layerpeft.model.layers import base_of, layer_map, stacks_of

# Of the blocks of a stack. A model keeps those of every stack, of the default one first: names, so that copies and pickles of
# it go on by themselves.
_Names = tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """Where the backward pass stops, and why; `layer` is None where it runs to the bottom.

    `bottom`: because something below the layers trains.
    """

    layer: int | None
    why: str
    bottom: bool = False


@dataclass(frozen=True)
class _Stack:
    """The blocks of one stack, and the lowest that trains (None where none does)."""

    blocks: tuple[nn.Module, ...]
    lowest: int | None

    @property
    def below(self) -> tuple[nn.Module, ...]:
        return self.blocks[: self.lowest]


@dataclass(frozen=True)
class _Cut:
    """What shall hold on a model now."""

    silent: bool  # the libraries' input hooks do nothing
    opened: tuple[nn.Module, ...] = ()  # reentrant blocks whose input shall require a gradient, if they need one
    straight: tuple[nn.Module, ...] = ()  # what has nothing to recompute for, of which torch would warn


def install(
    model: nn.Module, stack: str | None = None, blocks: Sequence[_Names] = (), within: bool | None = None
) -> Stop:
    """Watches the model's forward passes and keeps the cut where the lowest trainable layer is, in every stack.

    Does nothing, hooks included, where the first layer trains or nothing does; call it again when that has changed. `blocks`:
    those of every stack, which are looked for otherwise unless they are known by now; `stack` is then a path. `within`: layers
    train in part (None: as it was said before), so that there may be something to cut in the first one, too.
    Raises: LayerMapError for a model without blocks.
    """
    base = base_of(model)
    names: tuple[_Names, ...] = tuple(dict.fromkeys([*blocks, *known_of(base).blocks]))
    if within is not None and within != known_of(base).within:
        home_of(base).within = within
    if not names and stack is None and _all_firsts_train(base):
        return Stop(None, "the first layer trains")
    own = next((n for n in names if stack is None or n[0].rpartition(".")[0] == stack), None)
    if own is None:
        seen = stacks_of(base)
        own = seen.layers(stack).names
        names = tuple(dict.fromkeys([*(names or seen.blocks()), own]))
    if blocks:
        home_of(base).blocks = names
    watched = any(hook is _before_forward for hook in base._forward_pre_hooks.values())
    if watched or _partly(base, [_stack(base, each) for each in names]):
        home_of(base).blocks = names
        if not watched:
            base.register_forward_pre_hook(_before_forward)
            base.register_forward_hook(_after_forward)
            checkpointing.follow_enabling(base, _sync)
        _sync(base)
    return _where(model, base, own)


_ROWS = (nn.ModuleList, nn.Sequential)


def _all_firsts_train(base: nn.Module) -> bool:
    """Whether something trains in the first of every row of alike modules: then nothing can be cut, and layers need no search."""
    waiting, rows = [base], 0
    while waiting:
        module = waiting.pop()
        kids = [kid for kid in module._modules.values() if kid is not None]
        if isinstance(module, _ROWS) and len(kids) > 1:
            rows += 1
            if any(type(kid) is not type(kids[0]) for kid in kids):
                return False
            if not any(p.requires_grad for p in parameters_of(kids[0])):
                return False
            kids = kids[:1]
        waiting += kids
    return rows > 0


def where(model: nn.Module, stack: str | None = None) -> Stop:
    """The layer of a stack at which the backward pass stops, from what is trainable now.

    Raises: LayerMapError for a model without blocks.
    """
    base = base_of(model)
    return _where(model, base, layer_map(base, stack).names)


def _where(model: nn.Module, base: nn.Module, names: _Names) -> Stop:
    stack = _stack(base, names)
    if stack.lowest == 0:
        return Stop(None, "the first layer trains")
    inside = {id(p) for p in parameters_of(base)}
    outside = [p for p in parameters_of(model) if p.requires_grad and id(p) not in inside]
    if outside:  # prompt and prefix tuning keep what trains in front of the model
        name = next(n for n, p in model.named_parameters() if p is outside[0])
        return Stop(None, f"{name}, in front of the layers, trains")
    if stack.lowest is None:
        return Stop(None, "nothing in these layers trains")
    name = _in_front(base, stack)
    if name is not None:
        return Stop(None, f"{name}, below the layers, trains", bottom=True)
    if _awaited(modules_of(base), _inside(stack.below)):
        return Stop(None, f"a backward hook of your own waits below layer {stack.lowest}")
    return Stop(stack.lowest, f"layer {stack.lowest} is the lowest that trains")


def _before_forward(model: nn.Module, *_: Any) -> None:
    # Inside a compiled graph the state of the last eager call holds, which can be stale in one harmless way: hooks are silent
    # that would have nothing to do. The same holds for the replicas of DataParallel, which share the hooks and hold no parameter.
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and not checkpointing.is_replica(model):
        _sync(model)


def _after_forward(model: nn.Module, _args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    tensors = tensors_of(output)
    if not any(t.requires_grad for t in tensors) and checkpointing.any_silent(modules_of(model)):
        for tensor in (t for t in tensors if t.is_floating_point() and not t.is_inference()):
            tensor.requires_grad_(True)


def _sync(model: nn.Module) -> None:
    """Brings hooks and checkpointing into line with what trains now."""
    stacks = [found for names in known_of(model).blocks if (found := _stack(model, names)).blocks]
    modules = list(modules_of(model))
    below = _inside(block for stack in stacks for block in stack.below)
    cut = _cut(model, stacks) if _partly(model, stacks) and not _awaited(modules, below) else _Cut(silent=False)
    checkpointing.silence(modules, cut.silent)
    flags = checkpointing.gradient_flags(below, modules) if cut.silent else ()
    checkpointing.lower_flags(modules, flags, home_of(model).lowered)
    found = known_of(model)
    if found.floors or (cut.silent and any(isinstance(m, FSDPModule) for m in modules)):
        lowest = [s.blocks[s.lowest] for s in stacks if s.lowest and cut.silent and _in_front(model, s) is None]
        home_of(model).floors = fetch_down_to(lowest, found.floors)
    opened, straight = ({id(block) for block in blocks} for blocks in (cut.opened, cut.straight))
    for module in modules:
        checkpointing.go_straight(module, id(module) in straight)
    for block in (b for stack in stacks for b in stack.blocks):
        _set_open(block, id(block) in opened)


def _cut(model: nn.Module, stacks: Sequence[_Stack]) -> _Cut:
    entries = [b for s in stacks for b in {s.blocks[0], s.blocks[s.lowest or 0]}]
    if _reentrant_around(model, entries):
        return _Cut(silent=False)
    idle = _inside(block for stack in stacks for block in stack.below)
    return _Cut(True, tuple(filter(is_reentrant, entries)), tuple(filter(is_reentrant, idle)))


def _partly(model: nn.Module, stacks: Sequence[_Stack]) -> bool:
    """Whether some layers train and, in some stack, the lowest do not, or not as a whole."""
    below = known_of(model).within or any(s.lowest != 0 for s in stacks)
    return any(s.lowest is not None for s in stacks) and below


def _in_front(model: nn.Module, stack: _Stack) -> str | None:
    """What trains and stands before the blocks in the order of the modules, which is how embeddings and encoders stand."""
    inside = {id(p) for block in stack.blocks for p in parameters_of(block)}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            return None
        if parameter.requires_grad:
            return name
    return None


def _inside(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for block in blocks for module in modules_of(block)]


def _awaited(modules: Iterable[nn.Module], below: Iterable[nn.Module]) -> bool:
    """Whether a frozen module below has a backward hook, which the cut would leave without a call."""
    waiting = [m for m in modules if m._backward_hooks or m._backward_pre_hooks]
    under = {id(m) for m in below} if waiting else set()
    return any(id(m) in under or checkpointing.lets_gradients_in(m) for m in waiting)


def _reentrant_around(model: nn.Module, entries: Sequence[nn.Module]) -> bool:
    """Whether a container checkpoints its blocks in the reentrant way (older modelling files do), hooks on blocks included."""
    itself = all(map(checkpointing.checkpoints_itself, entries))
    return not itself and any(map(is_reentrant, modules_of(model)))


def _set_open(block: nn.Module, on: bool) -> None:
    numbers = [number for number, hook in block._forward_pre_hooks.items() if hook is _open]
    if on and not numbers:
        block.register_forward_pre_hook(_open, with_kwargs=True)
    elif not on:
        for number in numbers:
            del block._forward_pre_hooks[number], block._forward_pre_hooks_with_kwargs[number]


def _open(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Lets the hidden states require a gradient: reentrant checkpointing asks its inputs by position whether there is any."""
    hidden = args[0] if args else None
    if not torch.is_grad_enabled() or not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point():
        return
    inside = any(p.requires_grad for p in parameters_of(block))
    by_name = any(v.requires_grad for v in kwargs.values() if isinstance(v, torch.Tensor))
    if hidden.is_leaf and (inside or by_name):
        hidden.requires_grad_(True)


def _stack(model: nn.Module, names: _Names) -> _Stack:
    blocks = []
    for name in names:
        with suppress(AttributeError):  # a block that somebody has taken out
            blocks.append(model.get_submodule(name))
    lowest = next((i for i, b in enumerate(blocks) if any(p.requires_grad for p in parameters_of(b))), None)
    return _Stack(tuple(blocks), lowest)

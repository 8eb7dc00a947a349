"""Gradient checkpointing as transformers and PEFT do it: its kind, the hooks that come with it, and how to leave them out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

INPUT_HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads")  # PEFT's and transformers' functions
OWNERS = ("transformers", "peft", "trl")
ENABLE = "enable_input_require_grads"
_FUNCTION = "_gradient_checkpointing_func"


class Silent:
    """Lies in the place of a hook that is not wanted now, so that the hook's handle still removes it; pickles go without."""

    def __init__(self, hook: Callable[..., Any] | None = None) -> None:
        self.hook = hook

    def __call__(self, *_: Any) -> None:
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Silent:
        return Silent(self.hook)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Silent, ()


class Straight:
    """Lies in the place of a block's checkpointing function, and only calls the block where no input requires a gradient.

    Flags stay as the user set them.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        reached = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        return self.checkpoint(function, *args) if reached else function(*args)


class After:
    """`enable_input_require_grads` of one model, and then something more; it does not keep the model alive."""

    def __init__(self, model: nn.Module, then: Callable[[nn.Module], None]) -> None:
        self.model, self.then = weakref.ref(model), then

    def __call__(self) -> None:
        model: Any = self.model()
        getattr(type(model), ENABLE)(model)
        self.then(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> After:
        return After(memo.get(id(self.model()), self.model()), self.then)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return After, (self.model(), self.then)


def modules_of(root: nn.Module, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """All modules inside, each once, in the order of `root.modules()` and in a fraction of its time; without those that are `seen`
    and what only they hold."""
    seen = set() if seen is None else seen
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting += [kid for kid in reversed(module._modules.values()) if kid is not None]


def named_modules_of(root: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The same with their names, as `root.named_modules(prefix=name)`."""
    seen: set[int] = set()
    waiting = [(name, root)]
    while waiting:
        name, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield name, module
            inside = f"{name}." if name else ""
            waiting += [(inside + key, kid) for key, kid in reversed(module._modules.items()) if kid is not None]


def parameters_of(root: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters inside; a shared one comes more than once."""
    return (p for module in modules_of(root) for p in module._parameters.values() if p is not None)


def is_reentrant(block: nn.Module) -> bool:
    """Whether the block is checkpointed in the reentrant way, which needs an input that requires a gradient.

    Torch takes that way where none is named, and what is not known is taken for it: one gradient too many is not wrong.
    """
    function = _checkpoint(block)
    return function is not None and getattr(function, "keywords", {}).get("use_reentrant", True) is not False


def checkpoints_itself(block: nn.Module) -> bool:
    """Whether the block carries the flag of checkpointing, so that its hooks run outside of what is recomputed."""
    return hasattr(block, "gradient_checkpointing")


def is_replica(model: nn.Module) -> bool:
    """Whether this is one of the short-lived copies that DataParallel runs."""
    return bool(getattr(model, "_is_replica", False))


def go_straight(block: nn.Module, on: bool) -> None:
    """Leaves out the checkpointing of a block in which there is nothing to recompute for, or takes it up again."""
    function = block.__dict__.get(_FUNCTION)
    if on and not isinstance(function, Straight) and function is not None:
        block.__dict__[_FUNCTION] = Straight(function)
    elif not on and isinstance(function, Straight):
        block.__dict__[_FUNCTION] = function.checkpoint


def lets_gradients_in(module: nn.Module) -> bool:
    """Whether a library has hooked on the module that its output shall require a gradient, silenced hooks included."""
    return any(_is_input_hook(hook) for hook in module._forward_hooks.values())


def any_silent(modules: Iterable[nn.Module]) -> bool:
    """Whether some such hook is silenced now."""
    hooks = (hook for module in modules for hook in module._forward_hooks.values())
    return any(isinstance(hook, Silent) and hook.hook is not None for hook in hooks)


def silence(modules: Iterable[nn.Module], on: bool) -> None:
    """Silences the libraries' hooks that make a module's output require a gradient; a user's own hooks stay.

    With `on` false those speak again that their owners have not removed meanwhile.
    """
    for module in modules:
        for number, hook in list(module._forward_hooks.items()):
            if on and _is_input_hook(hook) and not isinstance(hook, Silent):
                module._forward_hooks[number] = Silent(hook)  # type: ignore[assignment]
            elif not on and isinstance(hook, Silent):
                if hook.hook is None:
                    del module._forward_hooks[number]
                else:
                    module._forward_hooks[number] = hook.hook


def gradient_flags(below: Iterable[nn.Module], modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Flags by which a model lets a gradient in itself: T5's for its position bias in frozen blocks (`below`), wav2vec2's for
    its features."""
    found = [(m, "gradient_checkpointing") for m in below if _is_bare(m)]
    extractors = [m for m in modules if "_requires_grad" in m.__dict__]
    return found + [(m, "_requires_grad") for m in extractors if not any(p.requires_grad for p in parameters_of(m))]


def lower_flags(
    modules: Iterable[nn.Module], flags: Iterable[tuple[nn.Module, str]], lowered: dict[nn.Module, str]
) -> None:
    """Turns these flags off, and those on again that were turned off before (`lowered`, kept up) and are not among them."""
    wanted = dict(flags)
    raised = [m for m in lowered if m not in wanted]
    others = (m for m in modules if m not in lowered) if raised else ()
    checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in others)
    for module in raised:
        flag = lowered.pop(module)
        setattr(module, flag, checkpointing if flag == "gradient_checkpointing" else True)
    for module, flag in wanted.items():
        if getattr(module, flag):
            lowered[module] = flag
            setattr(module, flag, False)


def follow_enabling(model: nn.Module, then: Callable[[nn.Module], None]) -> None:
    """Calls `then(model)` whenever somebody has asked for input gradients; compiled code looks at hooks only once."""
    if hasattr(type(model), ENABLE):
        model.__dict__.setdefault(ENABLE, After(model, then))


def _checkpoint(block: nn.Module) -> Callable[..., Any] | None:
    """The function that checkpoints the block; None where it is not checkpointed."""
    function = block.__dict__.get(_FUNCTION)
    if function is None or not getattr(block, "gradient_checkpointing", False):
        return None
    return function.checkpoint if isinstance(function, Straight) else function


def _is_bare(module: nn.Module) -> bool:
    """Whether a module has the flag of checkpointing and is neither a model nor a block, which use it for what it says."""
    return "gradient_checkpointing" in module.__dict__ and not isinstance(
        module, (GradientCheckpointingLayer, PreTrainedModel)
    )


def _is_input_hook(hook: Any) -> bool:
    if isinstance(hook, Silent):
        return True
    name = getattr(hook, "__name__", "")
    return name in INPUT_HOOKS and str(getattr(hook, "__module__", "")).split(".")[0] in OWNERS

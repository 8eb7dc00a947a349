"""Gradient checkpointing as transformers and PEFT do it: its flag, its kind, and the hooks that come with it."""

from __future__ import annotations

from typing import Any

from torch import nn

INPUT_HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads")  # PEFT's and transformers' functions
OWNERS = ("transformers", "peft", "trl")

Taken = tuple[nn.Module, int, Any]


def is_checkpointed(block: nn.Module) -> bool:
    """Whether transformers recomputes this block in the backward pass."""
    return bool(getattr(block, "gradient_checkpointing", False))


def set_checkpointed(block: nn.Module, on: bool) -> None:
    """Turns the recomputing of one block on or off."""
    block.gradient_checkpointing = on  # type: ignore[assignment]


def is_reentrant(block: nn.Module) -> bool:
    """Whether the block is checkpointed in the reentrant way, which needs inputs that require a gradient."""
    if not is_checkpointed(block):
        return False
    keywords = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(keywords.get("use_reentrant", False))


def take_input_hooks(model: nn.Module) -> list[Taken]:
    """Takes off the libraries' hooks that make a module's output require a gradient; a user's own hooks stay."""
    taken: list[Taken] = []
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if _is_input_hook(hook):
                taken.append((module, number, module._forward_hooks.pop(number)))
    return taken


def restore_hooks(taken: list[Taken]) -> None:
    """Puts them back where they were."""
    for module, number, hook in taken:
        module._forward_hooks[number] = hook


def _is_input_hook(hook: Any) -> bool:
    name = getattr(hook, "__name__", "")
    return name in INPUT_HOOKS and str(getattr(hook, "__module__", "")).split(".")[0] in OWNERS

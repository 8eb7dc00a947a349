"""Giving memory back: glibc keeps what was freed in blocks below 32 MB, which are most of a model's."""

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import compress
from typing import Any, TypeVar

import torch
from torch import nn

_Kind = TypeVar("_Kind")


def give_back() -> None:
    """Lets the operating system have the pages that no tensor holds any more; nothing where the C library cannot."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not


# ---- what torch does not promise about the hooks of tensors: whether one is there


def has_hook(tensor: torch.Tensor, kind: type) -> bool:
    """Whether the tensor has a hook of this class; copies and pickles of a parameter have none."""
    return any(isinstance(hook, kind) for hook in (tensor._backward_hooks or {}).values())


def eager(function: Any) -> Any:
    """The function, kept out of compiled graphs: what a hook writes down would be lost there."""
    return torch.compiler.disable(function)


def widest(device: torch.device) -> torch.dtype:
    """The type that sums are taken in there: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors in a model's output, whatever form it has."""
    if isinstance(output, torch.Tensor):
        return [output]
    if not isinstance(output, Mapping | list | tuple):
        output = getattr(output, "__dict__", {})
    values = output.values() if isinstance(output, Mapping) else output
    return [t for v in values if isinstance(v, torch.Tensor | list | tuple) for t in tensors_of(v)]


def running_backward() -> int | None:
    """The number of the backward pass that is running in this thread, the innermost one; None where none is."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def in_states(name: str) -> str:
    """A parameter's name as state dicts have it, without the wrappers that leave their own name out."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_fsdp_wrapped_module.", "")


def drop_hooks(tensor: torch.Tensor, kind: type) -> None:
    """Takes the hooks of this class off the tensor."""
    for key, hook in list((tensor._backward_hooks or {}).items()):
        if isinstance(hook, kind):
            del tensor._backward_hooks[key]  # type: ignore[index]


class Inside(nn.Module):
    """A module whose parameters are views of weights that other modules hold, whose bytes they are."""


def counted(model: nn.Module) -> dict[int, torch.Tensor]:
    """Parameters and buffers that have bytes of their own, by identity."""
    views = {id(p) for m in model.modules() if isinstance(m, Inside) for p in m.parameters()}
    return {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in views}


Parts = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors by name, and facts that JSON takes


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _text(value)
    return list(value) if isinstance(value, torch.Size) else value


def _text(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(text: str | None) -> Any:
    return None if text is None else getattr(torch, text)


def add_to(sums: dict[Any, torch.Tensor], key: Any, part: torch.Tensor) -> None:
    """Adds a tensor to the sum that has this key; the first one is the sum."""
    sums[key] = sums[key] + part if key in sums else part


def instances_of(kind: type[_Kind]) -> list[_Kind]:
    """The objects of a class, or of one below it, that the garbage collector shows."""
    kinds = {kind, *_below(kind)}
    all_there_are = gc.get_objects()  # a million: no loop of Python's own
    return list(compress(all_there_are, map(kinds.__contains__, map(type, all_there_are))))


def _below(kind: type) -> Iterator[type]:
    for below in type.__subclasses__(kind):
        yield below
        yield from _below(below)

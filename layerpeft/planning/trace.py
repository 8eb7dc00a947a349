"""Bytes and operations of one forward and backward pass, counted where they happen: over storages, by a dispatch mode."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from layerpeft.errors import ConfigError, told
from layerpeft.integrations.tracing import add_head, as_traced, in_place, operations
from layerpeft.model.layers import base_of
from layerpeft.planning.engines import Cards


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: peak bytes of what it makes besides gradients, and floating-point operations."""

    peak: int
    flops: int


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at the peak, and the operations (`flops`) of those that multiply.

    Storages that exist already do not count. torch's FlopCounterMode is not used beside it: its hooks keep alive what
    checkpointing has recomputed, and the peak would be that of no checkpointing.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.held, self.now, self.peak, self.flops = known, {}, 0, 0, 0
        self.formulas = _FORMULAS | operations()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and hasattr(args[0], "fake_device"):
            return args[0].fake_device  # asked for more often than anything is computed
        result = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in self.held:
                    self.held[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._drop, key)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)


def count(step: Callable[[], None], model: nn.Module, besides: Iterable[torch.Tensor] = ()) -> Pass:
    """Runs `step`, a forward and backward pass of `model` that starts without gradients, and counts it.
    `besides`: tensors that are there before, apart from the model's own."""
    live = Live({t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *besides]})
    with _no_collection(), live:
        step()
    return Pass(max(0, live.peak - gradient_bytes(model)), live.flops)


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that are there now."""
    return sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python's cycle collector still, so that the same model gives the same peak every time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    products = 2 * a.numel() * b.shape[-1]
    own = a.dim() == 3 and b.dim() == 2  # each expert meets its own columns of b alone
    return products // len(a) if own else products


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch counts the attention of every device but this one
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
}


@dataclass(frozen=True)
class Step:
    """How a step is run, beyond its rows and tokens: what a trainer's arguments say.

    `autocast`: the type of mixed precision; `checkpointing_kwargs`: as in TrainingArguments; `fused_head`: TRL's loss, which
    never forms the logits (SFT, DPO, GRPO), and `in_place`: counted as on an accelerator; `quantization`: a
    BitsAndBytesConfig for the base; `accumulation`: passes per optimizer step; `cards`: how many there are, and their engine.
    """

    autocast: torch.dtype | None = None
    checkpointing_kwargs: Mapping[str, Any] = field(default_factory=dict)
    fused_head: bool = False
    in_place: bool = False
    optim_args: str | None = None
    quantization: Any = None
    accumulation: int = 1
    cards: Cards | None = None


# ---- tracing --------------------------------------------------------------------------------------------------------


def _passes(
    model: nn.Module, batch_size: int, length: int, step: Step, inputs: Mapping[str, Any] | None
) -> tuple[Pass, Pass | None]:
    """One pass as it is, and one with checkpointing."""
    if step.fused_head and not isinstance(model, peft.PeftModel):
        add_head(model)
    with as_traced(model):
        kept = trace(model, batch_size, length, step, inputs)
        return kept, trace(model, batch_size, length, step, inputs) if recompute(model, step) else None


def recompute(model: nn.Module, step: Step) -> bool:
    """Turns checkpointing on, as Trainer does; False where the model has none."""
    base: Any = base_of(model)
    kwargs = {k: v for k, v in step.checkpointing_kwargs.items() if k != "selective"}
    try:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None)
    except (AttributeError, ValueError):
        return False
    return True


def trace(
    model: nn.Module,
    batch_size: int,
    length: int,
    step: Step | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Pass:
    """Counts one forward and backward pass of a model, traced or real. Raises: ConfigError for one that cannot be run so."""
    step = step or Step()
    device = next(model.parameters()).device
    given = _batch(model, batch_size, length, device) if inputs is None else _alike(inputs, device)
    if getattr(getattr(model, "config", None), "use_cache", None):
        given["use_cache"] = False
    if step.fused_head:
        given["fused_lm_head"] = True
    cast: AbstractContextManager[Any] = torch.autocast(device.type, step.autocast) if step.autocast else nullcontext()
    try:
        with in_place() if step.fused_head and step.in_place else nullcontext():
            return count(partial(_run, model, given, cast), model)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(
            "plan traces one step of a language model or a sequence classifier on token ids, or of another model on the "
            f"shapes of a batch (inputs=…); {type(base_of(model)).__name__} cannot be traced that way "
            f"({told(error, 200)})"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)


def _run(model: Callable[..., Any], given: Mapping[str, Any], cast: AbstractContextManager[Any]) -> None:
    with cast:
        loss = model(**given).loss
    loss.backward()


def _batch(model: nn.Module, batch_size: int, length: int, device: torch.device) -> dict[str, Any]:
    ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
    head: Any = getattr(base_of(model), "get_output_embeddings", lambda: None)()
    # a language model has a label per token, a classifier one per row
    return {"input_ids": ids, "labels": ids if head is not None else ids[:, 0]}


def _alike(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        k: torch.zeros(v.shape, dtype=v.dtype, device=device) if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }

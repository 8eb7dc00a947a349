"""Bytes and operations of one forward and backward pass, counted where they happen: over storages, by a dispatch mode."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import peft
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from layerpeft.errors import ConfigError, told
from layerpeft.integrations.torch import tensors_of
from layerpeft.integrations.tracing import add_head, as_traced, in_place, operations, unpacked_rows
from layerpeft.model.layers import base_of
from layerpeft.planning.beside import Beside
from layerpeft.planning.engines import Cards

RATE, SECONDS = 16_000, 10  # of sounds where nobody says


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: peak bytes of what it makes besides gradients, and floating-point operations."""

    peak: int
    flops: int


@dataclass(frozen=True)
class Part:
    """A part of a pass, which begins at `place`: bytes at its start, its peak and its end, and its operations."""

    place: tuple[str, int]
    start: int
    flops: int
    peak: int = 0
    end: int = 0


class Live(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at the peak, and the operations (`flops`) of those that multiply.

    Storages that exist already do not count. torch's FlopCounterMode is not used beside it: its hooks keep alive what
    checkpointing has recomputed, and the peak would be that of no checkpointing.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.held, self.now, self.peak, self.flops = known, {}, 0, 0, 0
        self.formulas = _FORMULAS | operations()
        self.parts = [Part(("before", 0), 0, 0)]
        self._highest = 0  # since the last mark

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
                    self.peak, self._highest = max(self.peak, self.now), max(self._highest, self.now)
                    weakref.finalize(storage, self._drop, key)
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)

    def mark(self, place: tuple[str, int]) -> None:
        """Another part of the pass begins."""
        last = self.parts[-1]
        self.parts[-1] = replace(last, peak=self._highest, end=self.now, flops=self.flops - last.flops)
        self.parts.append(Part(place, self.now, self.flops))
        self._highest = self.now


def count(step: Callable[[], None], model: nn.Module, besides: Iterable[torch.Tensor] = ()) -> Pass:
    """Runs `step`, a forward and backward pass of `model` that starts without gradients, and counts it.
    `besides`: tensors that are there before, apart from the model's own."""
    live = _counted(step, model, besides)
    return Pass(max(0, live.peak - gradient_bytes(model)), live.flops)


def _counted(
    step: Callable[[], None], model: nn.Module, besides: Iterable[torch.Tensor] = (), blocks: Sequence[nn.Module] = ()
) -> Live:
    """`blocks`: at each of which, on the way there and back, another part of the pass begins."""
    with counting(model, besides) as live, _marked(blocks, live):
        step()
        live.mark(("end", 0))
    return live


@contextmanager
def counting(model: nn.Module, besides: Iterable[torch.Tensor] = ()) -> Iterator[Live]:
    """Counts what is made inside; neither the model's tensors nor those `besides`."""
    live = Live({t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *besides]})
    with _no_collection(), live:
        yield live


@contextmanager
def _marked(blocks: Sequence[nn.Module], live: Live) -> Iterator[None]:
    """Has blocks say when they begin and end, and when the gradient of what they give is there."""
    ways = ("before", "forward", "after")  # not again where they are recomputed

    def enter(index: int, *_: Any) -> None:
        if live.parts[-1].place[0] in ways:
            live.mark(("forward", index))

    def leave(index: int, _block: nn.Module, _args: Any, output: Any) -> None:
        if live.parts[-1].place[0] not in ways:
            return
        live.mark(("after", index))
        for tensor in [t for t in tensors_of(output) if t.requires_grad][:1]:
            tensor.register_hook(lambda _: live.mark(("backward", index)))

    handles = [b.register_forward_pre_hook(partial(enter, i)) for i, b in enumerate(blocks)]
    handles += [b.register_forward_hook(partial(leave, i)) for i, b in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    BitsAndBytesConfig for the base; `accumulation`: passes per optimizer step; `cards`: how many there are, and their engine;
    `padded`: rows are of different lengths, so that attention takes a mask wherever several are padded to the longest; `packed`:
    several texts lie in one row, told apart by their positions; `beside`: what a trainer holds beside the model.
    """

    autocast: torch.dtype | None = None
    checkpointing_kwargs: Mapping[str, Any] = field(default_factory=dict)
    fused_head: bool = False
    in_place: bool = False
    optim_args: str | None = None
    quantization: Any = None
    accumulation: int = 1
    cards: Cards | None = None
    padded: bool = False
    packed: bool = False
    beside: Beside | None = None


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
    live, gradients = parted(model, batch_size, length, step or Step(), inputs)
    return Pass(max(0, live.peak - gradients), live.flops)


def parted(
    model: nn.Module,
    batch_size: int,
    length: int,
    step: Step,
    inputs: Mapping[str, Any] | None = None,
    blocks: Sequence[nn.Module] = (),
    backward: bool = True,
) -> tuple[Live, int]:
    """A pass with its parts, which begin at `blocks`, and the bytes of its gradients; not `backward`: without a way back.
    Raises: as `trace`."""
    device = next(model.parameters()).device
    cast: AbstractContextManager[Any] = torch.autocast(device.type, step.autocast) if step.autocast else nullcontext()
    try:
        given = _batch(model, batch_size, length, device, step.padded) if inputs is None else _alike(inputs, device)
        if getattr(getattr(model, "config", None), "use_cache", None):
            given["use_cache"] = False
        if step.fused_head:
            given["fused_lm_head"] = True
        folded = in_place() if step.fused_head and step.in_place else nullcontext()
        whole = nullcontext() if step.packed or "position_ids" in given else unpacked_rows()
        with _of_one_class(model), folded, whole:
            live = _counted(partial(_run if backward else _only_forward, model, given, cast), model, (), blocks)
            return live, gradient_bytes(model)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(
            "plan traces one step of a language model, an encoder or a sequence classifier on token ids, or of another model on "
            f"the shapes of a batch (inputs=…); {type(base_of(model)).__name__} cannot be traced that way "
            f"({told(error, 200)})"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)


@contextmanager
def _of_one_class(model: nn.Module) -> Iterator[None]:
    """A classifier has one class a row, without looking whether it has (DeBERTa does)."""
    about: Any = getattr(base_of(model), "config", None)
    unsaid = getattr(about, "problem_type", "") is None and getattr(about, "num_labels", 1) > 1
    if unsaid:
        about.problem_type = "single_label_classification"
    try:
        yield
    finally:
        if unsaid:
            about.problem_type = None


def _run(model: Callable[..., Any], given: Mapping[str, Any], cast: AbstractContextManager[Any]) -> None:
    with cast:
        told = "labels" in given or "start_positions" in given
        loss = model(**given).loss if told else model(**given)[0].float().mean()  # of letters, or of hidden states
    loss.backward()


def _only_forward(model: Callable[..., Any], given: Mapping[str, Any], cast: AbstractContextManager[Any]) -> None:
    with torch.no_grad(), cast:
        model(**given)


def _batch(model: nn.Module, batch_size: int, length: int, device: torch.device, padded: bool) -> dict[str, Any]:
    ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
    base: Any = base_of(model)
    about: Any = getattr(base, "config", None)
    reads = getattr(base, "main_input_name", "input_ids")
    if reads == "pixel_values":
        shape = batch_size, about.num_channels, *_pair(about.image_size)
        return {reads: torch.zeros(shape, device=device), "labels": ids[:, 0]}
    if reads == "input_features":  # of sounds, of which texts are made
        frames = torch.zeros(batch_size, about.num_mel_bins, 2 * about.max_source_positions, device=device)
        return {reads: frames, "labels": ids[:, : about.max_target_positions]}
    if (
        reads == "input_values"
    ):  # of sounds, of which letters are made: CTC looks into its labels, which are not known here
        return {reads: torch.zeros(batch_size, RATE * SECONDS, device=device)}
    if _takes(base, "start_positions"):
        return {"input_ids": ids, "start_positions": ids[:, 0], "end_positions": ids[:, 0]}
    # a language model has a label per token, a classifier one per row, or one per word
    words = "ForTokenClassification" in type(base).__name__
    classes = hasattr(base, "get_output_embeddings") and base.get_output_embeddings() is None and not words
    besides = {"token_type_ids": ids} if hasattr(about, "vision_config") and _takes(base, "token_type_ids") else {}
    if padded and batch_size > 1 and _takes(base, "attention_mask"):
        besides["attention_mask"] = torch.ones_like(ids)
        besides["attention_mask"][0, -1] = 0
    if getattr(base, "base_model", None) is base and not _takes(base, "labels"):
        return {"input_ids": ids, **besides}  # hidden states are all that it gives
    labels = ids[:, 0] if classes else ids
    if classes and getattr(about, "problem_type", None) in ("multi_label_classification", "regression"):
        labels = torch.zeros(batch_size, about.num_labels, device=device).squeeze(1)
    return {"input_ids": ids, "labels": labels, **besides}


def batch_text(model: nn.Module, batch_size: int, length: int) -> str:
    """What such a batch is, in words: texts, pictures or sounds, and how large each is."""
    base: Any = base_of(model)
    about: Any = getattr(base, "config", None)
    reads = getattr(base, "main_input_name", "input_ids")
    if reads == "pixel_values":
        height, width = _pair(about.image_size)
        size = getattr(about, "patch_size", None)
        patches = f", {(height // _pair(size)[0]) * (width // _pair(size)[1])} patches each" if size else ""
        return f"{batch_size} pictures of {width} × {height} pixels{patches}"
    if reads == "input_features":
        words = min(length, about.max_target_positions)
        return f"{batch_size} sounds of {2 * about.max_source_positions} frames, with {words} tokens each"
    if reads == "input_values":
        return f"{batch_size} sounds of {SECONDS} seconds"
    return f"{batch_size} rows of {length} tokens" + (", pictures left out" if hasattr(about, "vision_config") else "")


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _alike(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        k: torch.zeros(v.shape, dtype=v.dtype, device=device) if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }

"""Tensors that have a shape and no storage, for tracing what a model would do."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.torch import counted


@contextmanager
def as_traced(model: nn.Module) -> Iterator[None]:
    """Turns the tensors of a model on the meta device into traced ones, in place; the model runs inside this context.

    They say that they lie on the CPU, so that its attention is traced. Experts are traced in their grouped form,
    since a loop over those that tokens reach cannot be.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def traced(t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return FakeTensor(mode, torch.empty_like(t, device="meta"), torch.device("cpu"))

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(traced(parameter.data), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = traced(buffer)
    with mode, _grouped_experts(model):
        yield


@contextmanager
def _grouped_experts(model: Any) -> Iterator[None]:
    from transformers.integrations import moe

    kept, before = moe._grouped_mm, getattr(getattr(model, "config", None), "_experts_implementation", None)
    switched = before == "eager" and _takes_grouped(model)
    moe._grouped_mm = _all_by_one
    try:
        yield
    finally:
        moe._grouped_mm = kept
        if switched:
            model.set_experts_implementation(before)


def _takes_grouped(model: Any) -> bool:
    try:
        model.set_experts_implementation("grouped_mm")
    except ValueError:  # a model without experts says "eager" as well
        return False
    return True


def _all_by_one(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Every row through one expert: as many operations and bytes as each through its own; torch's own takes bfloat16 alone here."""
    return input.to(weight.dtype) @ weight[0]


@contextmanager
def unpacked_rows() -> Iterator[None]:
    """Attention as in a step in which no row holds several texts, whose places transformers finds by looking at positions: traced
    ones have none, and would be masked as if they did (with a mask, grouped keys are repeated for every head)."""
    import transformers.masking_utils as masking_utils

    kept = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _in_one
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept


def _in_one(*_: Any, **__: Any) -> None:
    """Where the texts of a row begin: there is one."""


# ---- TRL's language-model head, which takes the loss in tiles and never forms the logits; with it SFT, DPO and GRPO train


def add_head(model: nn.Module) -> None:
    """Gives a causal language model the head that SFTTrainer gives it; called with `fused_lm_head=True` it is used."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # type: ignore[arg-type]


@contextmanager
def in_place() -> Iterator[None]:
    """Counts the head as on an accelerator, whose kernels fold a tile in place; elsewhere torch makes float32 copies of it."""
    from trl.kernels import chunked_logprob

    kept = chunked_logprob._forward_tile, chunked_logprob._backward_tile
    chunked_logprob._forward_tile = chunked_logprob._backward_tile = _fold  # type: ignore[assignment]
    try:
        yield
    finally:
        chunked_logprob._forward_tile, chunked_logprob._backward_tile = kept


def _fold(*_: Any, **__: Any) -> None:
    """A kernel that makes nothing."""


# ---- quantized linears without weights: the bytes they would hold, and stand-ins that can be traced


class _StandIn:
    """In the place of a linear's forward: computes as a quantized one that takes `size` bytes."""

    def __init__(self, module: Any, size: int) -> None:
        self.module, self.size = module, size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _forward(self.module, x)


def _size(module: nn.Module) -> int | None:
    stands = vars(module).get("forward")
    return stands.size if isinstance(stands, _StandIn) else None


def as_quantized(model: nn.Module, settings: Any, size: Callable[[int, int], int]) -> None:
    """Puts stand-ins into a model on the meta device where transformers would quantize; `settings`: a BitsAndBytesConfig.

    `size`: bytes of a quantized matrix (rows, columns).

    Raises: ImportError without bitsandbytes.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)  # says on the model that it is quantized, as PEFT and TRL ask
    for module in model.modules():
        if hasattr(module, "source_cls"):  # transformers' mark on what it has put in
            stand_in(module, size(module.out_features, module.in_features))  # type: ignore[arg-type]


def stand_in(module: nn.Module, size: int) -> None:
    """Lets a linear on the meta device compute like a quantized one that takes `size` bytes."""
    module.forward = _StandIn(module, size)  # type: ignore[method-assign]


def is_stand_in(module: nn.Module) -> bool:
    """Whether a linear stands for a quantized one."""
    return _size(module) is not None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, what is quantized at its packed size with its scales."""
    packed = {id(m.weight): size for m in model.modules() if (size := _size(m)) is not None}
    return sum(packed[key] if key in packed else t.numel() * t.element_size() for key, t in counted(model).items())


def operations() -> dict[Any, Callable[..., int]]:
    """Floating-point operations of bitsandbytes' own products, where that package is in use: op and formula."""
    if "bitsandbytes" not in sys.modules:
        return {}
    # its 8-bit products are made of torch's, which are counted as they are
    return {torch.ops.bitsandbytes.gemm_4bit: lambda x, _packed, shape, *_, **__: 2 * x.numel() * shape[0]}


class _Multiply(torch.autograd.Function):
    """x Wᵀ with a W that is unpacked for the forward pass, dropped, and unpacked again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int], keep: bool) -> torch.Tensor:
        ctx.shape = shape
        if keep:
            ctx.save_for_backward(x)
        return x @ torch.empty(shape, dtype=x.dtype, device=x.device).t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device), None, None


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    given = x.dtype
    four_bit = hasattr(module, "compute_dtype")
    if four_bit and module.compute_dtype is not None:
        x = x.to(module.compute_dtype)
    shape = module.out_features, module.in_features
    y: Any = _Multiply.apply(x, shape, not four_bit)  # int8 and HQQ keep their input
    if module.bias is not None:
        y = y + module.bias.to(y.dtype)
    return y.to(given)

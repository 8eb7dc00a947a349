"""bitsandbytes' layers, put together from some rows at a time: its quantization takes up to ten times the matrix meanwhile.

Blocks of 64 weights and rows are quantized each by itself, so that nothing changes in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

BLOCK, BLOCK_NESTED = 64, 256  # weights per scale, and scales per scale of scales: bitsandbytes' defaults
SLAB = 1 << 19  # weights


def in_slabs(linear: nn.Linear, quantize: Callable[[nn.Linear], nn.Module], double_quant: bool) -> nn.Module:
    """The linear as `quantize` makes it; `quantize`: to nf4, fp4 or int8, its scales plain; `double_quant`: of the result."""
    parts = [quantize(part) for part in _slabs(linear)]
    whole: Any = parts[0]
    weights: list[Any] = [part.weight for part in parts]
    if weights[0].dtype == torch.int8:
        weight = type(weights[0])(torch.cat([w.data for w in weights]), requires_grad=False, has_fp16_weights=False)
        weight.CB, weight.SCB = weight.data, torch.cat([w.SCB for w in weights])
    else:
        weight = weights[0]
        weight.data = torch.cat([w.data for w in weights])
        weight.compress_statistics = whole.weight.compress_statistics = double_quant
        state = weight.quant_state
        state.shape = linear.weight.shape
        state.absmax = torch.cat([w.quant_state.absmax for w in weights])
        if double_quant:
            _nest(state)
    whole.weight, whole.out_features = weight, linear.out_features
    whole.bias = linear.bias
    return whole


def _nest(state: Any) -> None:
    """Quantizes the scales, as bitsandbytes does it for a whole matrix."""
    from bitsandbytes.functional import quantize_blockwise

    state.offset = state.absmax.mean()
    state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=BLOCK_NESTED)
    state.nested = True


def _slabs(linear: nn.Linear) -> Iterator[nn.Linear]:
    """Linears of some rows each, without bias, of whole blocks."""
    rows, columns = linear.weight.shape
    step = max(SLAB // columns // BLOCK, 1) * BLOCK
    for start in range(0, rows, step):
        weight = linear.weight.data[start : start + step]
        with torch.device("meta"):
            part = nn.Linear(columns, len(weight), bias=False)
        part.weight = nn.Parameter(weight, requires_grad=False)
        yield part

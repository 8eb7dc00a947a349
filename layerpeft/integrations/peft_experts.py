"""PEFT's wrapper of a parameter, and what has no values; `tests/test_canary_experts.py` fails first."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

__all__ = ["ParamWrapper", "is_traced", "stores_out_first"]


def stores_out_first(layer: Any) -> bool:
    """Whether a wrapped weight of experts is stored (experts, out, in), as PEFT sees it; otherwise (experts, in, out)."""
    return layer._did_swap_in_out_features


def is_traced(t: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no values (`plan`)."""
    return t.device.type == "meta" or type(t).__name__ == "FakeTensor"

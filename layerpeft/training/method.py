"""The tensors that an adapter trains, target by target, whatever it trains them by; and the float32 masters behind them."""

from __future__ import annotations

from torch import nn

Tensors = dict[str, dict[str, nn.Parameter]]  # target -> the adapter's tensors in it
FILE = "layerpeft_masters.safetensors"

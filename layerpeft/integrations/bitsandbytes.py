"""What layerpeft has to know of bitsandbytes; the package itself is not imported unless the model already uses it."""

from __future__ import annotations

import sys

from torch import nn


def keep_cpu_layout(model: nn.Module) -> None:
    """Keeps 4-bit weights on a CPU in the layout they were saved in.

    On CPUs with AVX512-BF16 an evaluation forward repacks them for inference; training after that loses gradients silently.
    """
    if "bitsandbytes" not in sys.modules:
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

"""Bits by layer. Whoever imports a part of it, a pickle of a config too, has its type in PEFT's tables."""

from layerpeft.quantization import quantize as quantize

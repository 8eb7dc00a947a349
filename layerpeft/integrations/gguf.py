"""The `gguf` package: names of tensors in llama.cpp's files, and an adapter's file, which is written a tensor at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def missing() -> str | None:
    """How the package is had, where it is not here."""
    return None if importlib.util.find_spec("gguf") else "pip install 'layerpeft[gguf]'"


def names_of(architecture: str, layers: int) -> Callable[[str], str | None]:
    """What a module (by its name in transformers) is called in the files of an architecture; None where it is not in them."""
    import gguf

    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[architecture], layers)
    return table.get_name


def write_adapter(
    path: Path,
    architecture: str,
    alpha: float,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Writes a LoRA adapter in float32.

    `shapes`: of the tensors, by what they are called there, in their order; `read`: one of them, `lora_a` (rank, in) or `lora_b`
    (out, rank), of which llama.cpp adds alpha / rank times the product.
    """
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    kind = numpy.dtype(numpy.float32)
    for tensor, shape in shapes.items():
        writer.add_tensor_info(tensor, shape, kind, int(numpy.prod(shape)) * kind.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in shapes:
            numbers: Any = read(tensor).detach().to("cpu", torch.float32).contiguous().numpy()
            writer.write_tensor_data(numbers)
    finally:
        writer.close()

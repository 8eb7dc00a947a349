"""What methods share whose own tensors lie beside a stock adapter: LoRA modules of zero factors, and a file of their numbers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from layerpeft.integrations.files import as_written, replacing
from layerpeft.integrations.peft import LoraVariant
from layerpeft.saving.manifest import read_manifest


def rest_factors(layer: Any, adapter: str, variant: LoraVariant) -> torch.device:
    """Both factors of a LoRA module's adapter become zero and stay so, and `variant` does its work; the device they are on."""
    factors = [layer.lora_A[adapter], layer.lora_B[adapter]]
    for parameter in (p for factor in factors for p in factor.parameters()):
        parameter.requires_grad_(False)
        if parameter.device.type != "meta":
            parameter.data.zero_()
    layer.lora_variant[adapter] = variant
    layer.lora_bias[adapter] = False  # PEFT is not to look for it: the variant does
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: ("lora_A", "lora_B")}
    return factors[0].weight.device


def zero_factors(layer: Any, adapter: str, name: str) -> dict[str, torch.Tensor]:
    """What a state dict says of such factors, of the module that it calls `name`."""
    return {
        f"{name}.lora_{factor}.{adapter}.{part}": torch.zeros_like(tensor)
        for factor in ("A", "B")
        for part, tensor in getattr(layer, f"lora_{factor}")[adapter].named_parameters()
    }


def written_beside(folder: str | os.PathLike[str], file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes the method's own tensors, by name, into a saved folder."""
    with replacing(Path(folder, file)) as path:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path, {"format": "pt"})


def read_beside(folder: str | os.PathLike[str], file: str) -> dict[str, torch.Tensor]:
    """Those of a saved folder. Raises: SaveError."""
    read_manifest(folder)
    path = os.path.join(folder, file)
    with as_written(f"{path} cannot be read"):
        return load_file(path)

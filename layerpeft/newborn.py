"""Tensors without pre-trained values: a classification head that was drawn at random must train, or it stays noise."""

from __future__ import annotations

from torch import nn

from layerpeft.layers import base_of

LOADED_MARK = "_is_hf_initialized"  # transformers sets it on every parameter that came from the checkpoint


def new_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the topmost modules in which no parameter came from the checkpoint, although others did.

    Empty for a model built from a config alone, where nothing tells the head from the rest.
    """
    base = base_of(model)
    marks = {n: bool(getattr(p, LOADED_MARK, False)) for n, p in base.named_parameters() if ".lora_" not in n}
    if not any(marks.values()) or all(marks.values()):
        return ()
    found: list[str] = []
    for name, module in base.named_modules():
        inside = [marks[f"{name}.{n}"] for n, _ in module.named_parameters() if f"{name}.{n}" in marks]
        if name and inside and not any(inside) and not any(name.startswith(f"{f}.") for f in found):
            found.append(name)
    return tuple(found)

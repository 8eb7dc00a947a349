"""Tensors without pre-trained values: a classification head that was drawn at random must train, or it stays noise."""

from torch import nn

from layerpeft.model.layers import base_of
from layerpeft.text import note

LOADED_MARK = "_is_hf_initialized"  # transformers sets it on every parameter that came from the checkpoint


def new_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the topmost modules in which no parameter came from the checkpoint, although others did.

    Empty for a model built from a config alone, where nothing tells the head from the rest. Embeddings and a language-model
    head are left alone, since resizing the vocabulary loses the mark too; a note names them.
    """
    base = base_of(model)
    values = {n: p for n, p in base.named_parameters() if ".lora_" not in n and p.is_floating_point()}
    marks = {n: bool(getattr(p, LOADED_MARK, False)) for n, p in values.items()}
    if not any(marks.values()) or all(marks.values()):
        return ()
    tables = [_table(base, side) for side in ("input", "output")]
    found: list[str] = []
    for name, module in base.named_modules():
        inside = [marks[f"{name}.{n}"] for n, _ in module.named_parameters() if f"{name}.{n}" in marks]
        if not name or not inside or any(inside) or any(name.startswith(f"{f}.") for f in found):
            continue
        if any(table is not None and any(m is table for m in module.modules()) for table in tables):
            note(
                f"{name} was not loaded from the checkpoint and stays frozen; train it with modules_to_save=[{name!r}]"
            )
        else:
            found.append(name)
    return tuple(found)


def _table(model: nn.Module, side: str) -> nn.Module | None:
    try:
        return getattr(model, f"get_{side}_embeddings", lambda: None)()
    except NotImplementedError:  # transformers raises it for models without that table
        return None

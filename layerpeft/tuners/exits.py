"""The models that sorted fine-tuning has trained at once: one per exit, each of which plain transformers loads."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from layerpeft.errors import SaveError
from layerpeft.integrations.files import must_be_new, written_whole
from layerpeft.model.layers import layer_map
from layerpeft.model.shorten import shortened
from layerpeft.saving.classes import MODELS
from layerpeft.training.exits import checked_exits
from layerpeft.tuners.load import adapter_config
from layerpeft.tuners.merge import BESIDE, merge


def exit_folder(folder: Path, depth: int) -> Path:
    """Where the model of so many layers lies."""
    return folder / f"exit-{depth}"


def save_exits(
    folder: str | os.PathLike[str], exits: Sequence[int], into: str | os.PathLike[str] | None = None, **kwargs: Any
) -> list[Path]:
    """Writes `exit-4`, `exit-8`, …: the base with the adapter of `folder` merged into it, cut after so many layers.

    `into`: where, instead of that folder itself; `kwargs`: of `layerpeft.tuners.merge.merge` (base, dtype, …). The peak is the
    merged model. Raises: ConfigError, SaveError.
    """
    source, target = Path(folder), Path(into or folder)
    task = adapter_config(source).get("task_type")
    if task not in MODELS:
        raise SaveError(f"{source} has task_type {task!r}, without a model class, so that its exits cannot be cut")
    depths = sorted(set(exits))
    for depth in depths:
        if why := must_be_new(exit_folder(target, depth)):
            raise SaveError(why)
    whole = merge(source, exit_folder(target, depths[-1]), **kwargs)
    trusted = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    model: Any = getattr(transformers, MODELS[task]).from_pretrained(whole, dtype="auto", **trusted)
    layers = layer_map(model)
    for depth in checked_exits(depths, len(layers))[:-1]:
        with written_whole(exit_folder(target, depth)) as partial:
            cut: Any = shortened(model, layers, range(depth))
            cut.save_pretrained(partial)
            for name in (n for n in BESIDE if (whole / n).is_file()):
                shutil.copyfile(whole / name, partial / name)
    return [exit_folder(target, depth) for depth in depths]

"""States that a plain run with `prefix_cache` has kept, recorded as a complete filling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerpeft.recipe.model import model_config, model_path
from layerpeft.recipe.read import load_recipe
from layerpeft.training.prefix import folders
from layerpeft.training.prefix.ahead import Ahead, Filled, config_digest, marks_of, write_ahead


def recorded(root: Path, source: str, words: list[str], **other: Any) -> Path:
    """The one folder of states below `root`, of the model of this recipe, with its record."""
    (folder,) = folders.sizes(root)
    belongs = json.loads((folder / folders.BELONGS).read_text())
    bits = belongs.pop("bits")
    del belongs["format"]
    recipe = load_recipe(source, words, "plan")
    place = Path(model_path(recipe))
    cut = int(belongs["cut"].rpartition(".")[2])
    found = {
        "belongs": belongs,
        "cut": cut,
        "bits": None if bits == "as they are" else int(bits),
        "files": marks_of(place),
        "config": config_digest(model_config(recipe)),
        "dtype": "float32",
        "packed": {},
        "cast": None,
        "entering": "float32",
        "forms": (-1,) * cut,
        "train": Filled(1, 1),
        "held_out": Filled(1, 1),
    }
    write_ahead(folder, Ahead(**found | other))
    return folder

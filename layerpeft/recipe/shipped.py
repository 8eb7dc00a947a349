"""What ships inside the package: recipes by name, data and weights by `layerpeft://` address."""

from __future__ import annotations

import glob
from pathlib import Path

from layerpeft.errors import RecipeError, unknown
from layerpeft.integrations.places import expanded, missing, near
from layerpeft.recipe.toys import place
from layerpeft.saving.naming import SHIPS

SCHEME = SHIPS
_HERE = Path(__file__).resolve().parent


def resolve(address: str) -> str:
    """The path of a `layerpeft://` address; any other text as it is. Raises: RecipeError that lists what ships."""
    if not address.startswith(SCHEME):
        return address
    name = address.removeprefix(SCHEME).strip("/")
    if name in place.names():
        return str(place.made(name))
    if name not in data_names():
        raise RecipeError(unknown("file of the package", name, [*data_names(), *place.names()]))
    return str(_HERE / "data" / name)


def beside(name: str, home: Path) -> str:
    """A path as it is found from the current folder, else beside the recipe (in `home`); as it was written if it is in neither."""
    path = expanded(name)
    if name.startswith(SCHEME) or path.is_absolute() or _is_there(path) or not _is_there(home / path):
        return name
    return str(home / path)


def _is_there(path: Path) -> bool:
    return path.exists() or glob.has_magic(str(path)) and bool(glob.glob(str(path)))


def data_names() -> list[str]:
    """The names that can follow `layerpeft://`: data files, and folders of models."""
    found = (_HERE / "data").iterdir()
    return sorted(p.name for p in found if p.suffix == ".jsonl" or (p / "config.json").is_file())


def license_that_ships(address: str) -> str | None:
    """The licence of a file behind `layerpeft://`, as the notes beside it say it; None of anything else."""
    notes = _HERE / "data" / "README.md"
    if not address.startswith(SCHEME) or not notes.is_file():
        return None
    name = f"`{address.removeprefix(SCHEME).strip('/')}`"
    lines = notes.read_text(encoding="utf-8").splitlines()
    cells = next(
        ([c.strip() for c in line.strip("| ").split(" | ")] for line in lines if name in line.split(" | ")[0]), []
    )
    return cells[-1].partition(",")[0] if cells else None


def recipes() -> dict[str, Path]:
    """Shipped recipes by name: inside the package, else (a checkout without links) beside it."""
    for folder in (_HERE / "recipes", _HERE.parents[1] / "recipes"):
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


def launch_files() -> dict[str, Path]:
    """Files that ship for `accelerate launch --config_file`, by name: `accelerate/fsdp2`."""
    for folder in (_HERE / "recipes", _HERE.parents[1] / "recipes"):
        if found := {f"accelerate/{path.stem}": path for path in sorted((folder / "accelerate").glob("*.yaml"))}:
            return found
    return {}


def find_recipe(source: str) -> Path:
    """The file behind a path or the name of a shipped recipe; a file of that name wins.
    Raises: RecipeError that names the recipes there are."""
    path = expanded(source)
    if path.is_file():
        return path
    known = recipes()
    if source in known:
        return known[source]
    if path.is_dir():
        raise RecipeError(f"{source!r} is a folder; name the recipe file in it")
    if near(source) is not None:
        raise RecipeError(f"{missing('file', source)} Or name a recipe that ships: {', '.join(sorted(known))}")
    raise RecipeError(f"{missing('file', source)}, and {unknown('recipe', source.removesuffix('.yaml'), known)}")

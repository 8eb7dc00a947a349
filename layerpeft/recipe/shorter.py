"""`drop`: a recipe's model without some of its layers, which is what its run then trains, plans and names as its base.

The shorter model is written to the output folder before training, as a folder that plain transformers loads; the adapter is one
of that model. Beside it lies the record of what was taken out and why, by which a run that is resumed builds it again.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, LayerpeftError, Problem, RecipeError, differences, told
from layerpeft.integrations.distributed import everywhere, from_first
from layerpeft.integrations.files import read_json, written_whole
from layerpeft.model.evaluating import evaluating
from layerpeft.model.layers import base_of, find_module
from layerpeft.model.shorten import shortened, silence, writing
from layerpeft.quantization.save import is_saved
from layerpeft.recipe.model import INIT, LOADING, empty_model, model_path
from layerpeft.recipe.recipe import Recipe, checkpoint_of
from layerpeft.recipe.surroundings import SHORTER, SHORTER_RECORD
from layerpeft.recipe.trainer import Setup, first_batches, load_model
from layerpeft.recipe.trainers.row import Row
from layerpeft.saving.manifest import CONFIG, MANIFEST
from layerpeft.saving.owned import files_below, put_on_record, strangers, vouch
from layerpeft.selection.drop import Droppable, droppable, dropped, measures, parse_drop
from layerpeft.selection.scorers.removal import left_out
from layerpeft.selection.scoring import needs_batches
from layerpeft.selection.select import DEFAULT_BATCHES, Selection
from layerpeft.text import is_first, note, some

KEY = "drop"
WHOLE = ("revision", "subfolder", "variant", "key_mapping", "quantization_config")  # of how the whole model is read


@dataclass(frozen=True)
class Shorter:
    """A recipe whose model has lost layers, before any weight is read; `notice`: what had to be assumed of which."""

    recipe: Recipe
    notice: str = ""


def without_weights(recipe: Recipe, *head: Any) -> Shorter:
    """The recipe with its model without weights, shortened where it drops layers; `head`: of `empty_model`.

    Where weights or data say which go, the first that may are tried, and the last that may are counted on.
    Raises: RecipeError, at keys of `drop`.
    """
    model = empty_model(recipe, *head)
    if recipe[KEY] is None:
        return Shorter(replace(recipe, model=model))
    with at_drop():
        select, recorded = parse_drop(recipe[KEY]), _recorded(recipe)
        _refuse_packed(recipe, model)
        found = droppable(model, select)
        if recorded is not None or not measures(select):
            gone = (recorded or dropped(model, select)).layers
            return Shorter(_on(recipe, _cut(model, found, gone), found, gone))
        count = found.count or 1
        _cut(model, found, found.among[:count])  # what cannot go is refused before weights say whether it does
        if select.unit != "layer":
            return Shorter(replace(recipe, model=model), f"drop: which {select.unit}s go is decided by {select.by}")
        gone = found.among[-count:] if found.count else ()
        assumed = f"as if the layers {some([str(i) for i in gone], 16)} did" if gone else "without that"
        notice = f"drop: which layers go is decided by {select.by}; what a run takes is counted {assumed}"
        return Shorter(_on(recipe, _cut(model, found, gone) if gone else model, found, gone), notice)


def shorten(setup: Setup) -> Setup:
    """The setup with the shorter model as its base, in the output folder; as it is where nothing is dropped.

    A run that is gone on with keeps its choice. Raises: LayerpeftError.
    """
    recipe = setup.recipe
    if recipe[KEY] is None:
        return setup
    with at_drop():
        home, chosen = _home(recipe), _recorded(recipe)
        if chosen is not None and (home / SHORTER).is_dir():
            if changed := strangers(home, [SHORTER_RECORD, *files_below(home, SHORTER)]):
                raise RecipeError(
                    f"{home / SHORTER} is not what the run was trained on: {some(changed)} was changed since"
                )
        else:
            setup, chosen = _written(setup, home, chosen)
    whole, select = empty_model(recipe, *setup.head), parse_drop(recipe[KEY])
    found = droppable(whole, select)
    note(f"drop: {chosen.why}: {some([str(i) for i in chosen.layers], 16)}")
    based = _based(_on(recipe, _cut(whole, found, chosen.layers), found, chosen.layers), home / SHORTER)
    return replace(setup, recipe=based, dropped=chosen)


@contextmanager
def shortened_apart(setup: Setup) -> Iterator[Setup]:
    """The same in a folder that is gone afterwards: for commands that train nothing to keep."""
    if setup.recipe[KEY] is None:
        yield setup
        return
    with tempfile.TemporaryDirectory() as own_folder:
        folder = from_first(own_folder)
        values = {k: v for k, v in setup.recipe.values.items() if k != "resume_from_checkpoint"}
        given = replace(setup.recipe, values=values | {"output_dir": folder})
        found = shorten(replace(setup, recipe=given))
        own = {"output_dir": setup.recipe.values["output_dir"]}
        yield replace(found, recipe=replace(found.recipe, values={**found.recipe.values, **own}))
        everywhere(True)  # nobody reads it any more


def silenced(found: Droppable, gone: tuple[int, ...]) -> list[str]:
    """Targets that lie in parts that are silenced, where nothing is to train. Raises: ConfigError."""
    if found.units.unit == "layer":
        return []
    for unit in gone:
        writing(found.units.layers[unit])
    return [t.name for unit in gone for t in found.units.layers[unit].targets]


def problems(value: Any, row: Row) -> tuple[Problem, ...]:
    """What is wrong with `drop` by itself, or for a trainer of this row."""
    try:
        with at_drop():
            if measures(parse_drop(value)) and not row.alone:
                raise ConfigError(
                    f"is measured on batches, of which a model makes no loss without trainer: {row.name}; name layers"
                )
    except RecipeError as error:
        return error.problems
    return ()


@contextmanager
def at_drop() -> Iterator[None]:
    """Problems inside are those of `drop`. Raises: RecipeError."""
    try:
        yield
    except RecipeError:
        raise
    except LayerpeftError as error:
        found = [Problem((KEY, *p.path), f"{KEY}: {p.text}") for p in error.problems]
        raise RecipeError(*found) from error


def _cut(model: nn.Module, found: Droppable, gone: tuple[int, ...]) -> nn.Module:
    if found.units.unit != "layer":
        return model
    return shortened(model, found.units, set(range(len(found.units))) - set(gone))


def _refuse_packed(recipe: Recipe, model: Any) -> None:
    stored = getattr(model.config, "quantization_config", None) is not None
    if stored or is_saved(model_path(recipe)):
        raise ConfigError(
            f"{model_path(recipe)} is stored in fewer bits; name the model in 16 bit, and say with quantize_frozen or "
            "model_init_kwargs in which precision the shorter one is trained"
        )


def _checkpoint(recipe: Recipe) -> Path | None:
    """What the run goes on from."""
    found = checkpoint_of(recipe)
    if found is None:
        return None
    return Path(found).absolute() if isinstance(recipe["resume_from_checkpoint"], str) else Path(found)


def _home(recipe: Recipe) -> Path:
    """Where the shorter model lies: in the output folder; of a run that is gone on with where its adapter says, or beside it."""
    checkpoint = _checkpoint(recipe)
    if checkpoint is None:
        return recipe.output_dir
    path = checkpoint / CONFIG
    named = Path((read_json(path) if path.is_file() else {}).get("base_model_name_or_path") or "")
    return named.parent if named.name == SHORTER and named.is_dir() else checkpoint.parent


def _recorded(recipe: Recipe) -> Selection | None:
    """What the run that is gone on with has taken out. Raises: RecipeError where it did so otherwise, or says nothing of it."""
    checkpoint, home = _checkpoint(recipe), _home(recipe)
    if checkpoint is None:
        return None
    said = [read_json(p).get("dropped") for p in (checkpoint / MANIFEST, home / SHORTER_RECORD) if p.is_file()]
    if not any(said):
        raise RecipeError(f"the run in {home} does not say what was taken out of its model ({SHORTER_RECORD})")
    chosen = Selection.from_dict(next(filter(None, said)))
    now, then = parse_drop(recipe[KEY]).to_dict(), dict(chosen.select)
    now |= {"by": then.get("by")} if not isinstance(now["by"], str) or now["by"].endswith(".json") else {}
    if changed := differences(then, now):
        raise RecipeError(
            f"the run in {home} dropped layers another way ({'; '.join(changed)}); resuming keeps its choice"
        )
    return chosen


def chosen_on(setup: Setup, chosen: Selection | None = None) -> tuple[nn.Module, Selection, Setup]:
    """The whole model in the type of its files, and what is dropped of it: as `chosen` before, or as its weights and the first
    batches say."""
    recipe, select = setup.recipe, parse_drop(setup.recipe[KEY])
    given = {k: v for k, v in (recipe[INIT] or {}).items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    note(f"loading the whole model {recipe['model_name_or_path']}")
    stored = replace(recipe, values={**recipe.values, INIT: given, "dtype": "auto"})
    model, batches = load_model(replace(setup, recipe=stored)), None
    if chosen is None and needs_batches(select):
        count = select.num_batches or DEFAULT_BATCHES
        note(f"scoring what goes by {select.by} on {count} batches")
        batches, setup = first_batches(setup, model, count)
    return model, chosen or dropped(model, select, batches), setup


def _written(setup: Setup, home: Path, chosen: Selection | None) -> tuple[Setup, Selection]:
    """Chooses on the whole model, unless that was done before, and writes the shorter one."""
    model, chosen, setup = chosen_on(setup, chosen)
    found = droppable(model, parse_drop(setup.recipe[KEY]))
    shorter = _checked(base_of(model), found, chosen.layers)
    if is_first():
        _save(shorter, setup.tokenizer, home, chosen)
    everywhere(True)  # the others read what the first has written
    return setup, chosen


def _checked(model: nn.Module, found: Droppable, gone: tuple[int, ...]) -> nn.Module:
    """The shorter model, which computes what the whole one does without these layers.

    Raises: ConfigError where it does not: something in it goes by the place of a layer.
    """
    if found.units.unit != "layer":
        silence(model, found.units, gone)
        return model
    shorter: Any = _cut(model, found, gone)
    with left_out([find_module(model, found.units.names[i]) for i in gone]):
        before = _answer(model)
    try:
        after = _answer(shorter)
    except Exception as error:  # whatever a model makes of it
        raise ConfigError(
            f"the model without these layers does not run: {told(error, 200)}; leave others out"
        ) from error
    apart, size = float((before - after).abs().max()), float(before.abs().max())
    near = 1e-5 if next(model.parameters()).dtype == torch.float32 else 2e-2
    if not apart <= near * max(1.0, size):
        raise ConfigError(
            f"the shorter model does not compute what the whole one does without these layers (it is off by {apart:.2g}): "
            "something in it goes by the number of a layer, which its config cannot say; leave the last layers out"
        )
    return shorter


def _answer(model: Any) -> torch.Tensor:
    """The numbers of a model's answer to a few tokens."""
    ids = torch.arange(4, 20) % model.config.get_text_config().vocab_size
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int):
        ids[-1] = end
    with evaluating(model):
        output = model(input_ids=ids[None].to(next(model.parameters()).device))
    found = getattr(output, "logits", None)
    return (output[0] if found is None else found).float()


def _save(model: Any, tokenizer: Any, home: Path, chosen: Selection) -> None:
    """The folder of the shorter model, then the record of it."""
    folder = home / SHORTER
    old = files_below(home, SHORTER) if folder.is_dir() else []
    if theirs := strangers(home, old):
        raise RecipeError(
            f"{folder} holds what layerpeft did not write ({some(theirs)}); move it, or name another output_dir"
        )
    for name in old:
        (home / name).unlink()
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    names = files_below(home, SHORTER)
    vouch(home / SHORTER_RECORD, {"dropped": chosen.to_dict()}, names)
    put_on_record(home, [SHORTER_RECORD, *names])
    note(f"the shorter model is in {folder}")


def _on(recipe: Recipe, model: nn.Module, found: Droppable, gone: tuple[int, ...]) -> Recipe:
    """The recipe on a shorter model: what was silenced does not train, and from the whole model each layer learns what it was."""
    config: Any = recipe.config
    if config is None:
        return replace(recipe, model=model)
    if silent := silenced(found, gone):
        own = config.exclude_modules
        pattern = "|".join([own, *map(re.escape, silent)]) if isinstance(own, str) else None
        config = config.changed(exclude_modules=pattern or list(dict.fromkeys([*(own or ()), *silent])))
    asked = config.distilling
    if asked is not None and asked.teacher in (recipe["model_name_or_path"], model_path(recipe)):
        left = [i for i in range(len(found.units)) if i not in gone]
        if found.units.unit == "layer" and asked.map is None:
            config = config.changed(distill=asked.plain() | {"map": dict(enumerate(left))})
    return replace(recipe, model=model, config=config)


def _based(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe whose model is the one in that folder."""
    given = recipe[INIT] or {}
    kept = {k: v for k, v in given.items() if k in LOADING and (k not in WHOLE or k == "quantization_config")}
    values: Mapping[str, Any] = {k: v for k, v in recipe.values.items() if k not in (KEY, "model_revision", INIT)}
    base = {"model_name_or_path": str(folder.resolve())} | ({INIT: kept} if kept else {})
    return replace(recipe, values={**values, **base})

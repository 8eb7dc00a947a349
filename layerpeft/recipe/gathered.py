"""The rows that a recipe asks for: of one data set or several, with a share of them held out."""

from __future__ import annotations

import hashlib
import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from layerpeft.errors import LayerpeftError, Problem, RecipeError
from layerpeft.recipe import rows
from layerpeft.recipe.forms import taken
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.sources import Named, named, several, share_of
from layerpeft.recipe.tasks.shape import shape
from layerpeft.recipe.tasks.tokenizing import tokenizer
from layerpeft.text import note


@dataclass(frozen=True)
class Picked(rows.Source):
    """Rows of several sources in an order of their own: `picked` numbers them as they stand one source after another."""

    parts: tuple[rows.Source, ...] = ()
    starts: tuple[int, ...] = ()
    picked: Sequence[int] = field(default=(), repr=False)

    def place(self, index: int) -> rows.Place:
        flat = self.picked[index]
        part = bisect_right(self.starts, flat) - 1
        return self.parts[part].place(flat - self.starts[part])

    def __len__(self) -> int:
        return len(self.picked)

    def classes(self, column: str) -> tuple[str, ...]:
        found = {part.classes(column) for part in self.parts}
        return found.pop() if len(found) == 1 else ()


def rows_of(recipe: Recipe) -> tuple[list[Any], tuple[rows.Source, rows.Source | None]]:
    """Training and held-out rows as the trainer reads them, and where they were read. Raises: RecipeError, at their keys."""
    shaped: list[Any] = []
    sources: list[Any] = []
    for key, made in (("dataset_name", _training), ("eval_dataset", _held_out)):
        try:
            found = made(recipe)
            if not found:
                shaped, sources = [*shaped, None], [*sources, None]
                continue
            for part, source in found:
                if not len(part):
                    raise RecipeError("there are no rows")
                shaped.append(part)
                sources.append(source)
            if len(shaped) == 2:
                break
        except LayerpeftError as error:
            problems = (Problem((key,), f"{key}: {problem.text}") for problem in error.listed())
            raise RecipeError(*problems) from error
    return shaped, (sources[0], sources[1])


def _training(recipe: Recipe) -> list[tuple[Any, Any]]:
    """The training rows; where a share of them is held out, that too."""
    sets, most = named(recipe["dataset_name"]), recipe["max_train_samples"]
    share = share_of(recipe["eval_dataset"])
    if share is None and not several(recipe["dataset_name"]):
        return [_read(recipe, sets[0], "dataset_name", most)]
    made = [_read(recipe, one, "dataset_name", None) for one in sets]
    whole, source = _together(made, sets, recipe["dataset_name"], "train")
    starts = source.starts
    held: list[int] = []
    if share is not None:
        held = held_out(whole, share, recipe["seed"])
    kept = sorted(set(range(len(whole))) - set(held))
    order = mixed(
        [[i for i in kept if a <= i < b] for a, b in zip(starts, (*starts[1:], len(whole)))], sets, recipe["seed"]
    )

    def pick(chosen: Sequence[int], split: str, most: int | None) -> tuple[Any, Picked]:
        return _picked(whole, replace(source, split=split), chosen[:most])

    found = [pick(order, "train", most)]
    return [*found, pick(held, "held out", recipe["max_eval_samples"])] if held else found


def _held_out(recipe: Recipe) -> list[tuple[Any, Any]]:
    name, test = recipe["eval_dataset"], recipe["dataset_test_split"]
    most = recipe["max_eval_samples"]
    if name is not None:
        sets = named(name, weighs=False)
        made = [_read(recipe, one, "eval_dataset", most if len(sets) == 1 else None) for one in sets]
        if len(made) == 1:
            return made
        whole, source = _together(made, sets, name, test)
        return [_picked(whole, source, range(len(whole))[:most])]
    train = recipe["dataset_name"]
    if several(train) or not recipe.row.evaluates or rows.local_files(train) is not None:
        return []
    source = rows.load(
        train,
        config=recipe["dataset_config"],
        split=test,
        optional="dataset_test_split" not in recipe.values,
        by=recipe["sample_by"],
    )
    return [] if source is None else [(_shaped(recipe, source, most), source)]


def _read(recipe: Recipe, one: Named, key: str, most: int | None) -> tuple[Any, rows.Source]:
    split = one.split or recipe["dataset_train_split" if key == "dataset_name" else "dataset_test_split"]
    config, by = one.config or recipe["dataset_config"], recipe["sample_by"]
    source = rows.load(one.path, config=config, split=split, by=by)
    assert source is not None
    if key == "dataset_name" and (
        told := taken(recipe.trainer, source.columns, recipe["columns"], recipe.get("dataset_text_field"), recipe.sees)
    ):
        note(f"{one.path if isinstance(one.path, str) else one.path[0]}: {told}")
    return _shaped(recipe, source, most), source


def _shaped(recipe: Recipe, source: rows.Source, most: int | None) -> Any:
    task = recipe.task
    if task is not None:
        return shape(source, task, recipe["columns"], most)
    field = recipe["dataset_text_field"]
    return rows.shape(source, recipe.trainer, recipe["columns"], field, most, talks=lambda: _talks(recipe))


def _talks(recipe: Recipe) -> bool:
    """Whether the model's tokenizer, or the recipe, has a template that writes turns."""
    return recipe.values.get("chat_template_path") is not None or tokenizer(recipe).chat_template is not None


def _together(
    made: Sequence[tuple[Any, rows.Source]], sets: Sequence[Named], name: Any, split: str
) -> tuple[Any, Picked]:
    """The rows of all data sets, one after another, none of them picked yet. Raises: RecipeError where they are not of one form."""
    import datasets

    parts = [part for part, _ in made]
    first = parts[0]
    for part, one in zip(parts[1:], sets[1:]):
        if part.features != first.features:
            here, there = (_columns(each) for each in (part, first))
            raise RecipeError(
                f"{one.path!r} has rows of {here}, and {sets[0].path!r} of {there}; data sets that are trained on "
                "together have rows of one form"
            )
    whole = first if len(parts) == 1 else datasets.concatenate_datasets(parts)
    starts = tuple(accumulate(map(len, parts[:-1]), initial=0))
    return whole, Picked(name, split, parts=tuple(source for _, source in made), starts=starts)


def _picked(whole: Any, source: Picked, chosen: Sequence[int]) -> tuple[Any, Picked]:
    return whole.select(chosen), replace(source, picked=chosen)


def _columns(part: Any) -> str:
    kinds = {name: "turns" if type(kind).__name__ == "Json" else "text" for name, kind in part.features.items()}
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def held_out(whole: Any, share: float, seed: int) -> list[int]:
    """About a share of the rows, at least one and never all: which, the seed and what the rows hold say, not where they stand. Rows
    that are the same are on one side. Raises: RecipeError where all rows are the same."""
    same: dict[bytes, list[int]] = {}
    for index, row in enumerate(whole):
        same.setdefault(digest(row, str(seed)), []).append(index)
    if len(same) < 2:
        raise RecipeError(f"of {len(whole)} rows that are all the same none can be held out")
    wanted, found = max(1, round(share * len(whole))), []
    for key in sorted(same)[:-1]:
        if not found or len(found) + len(same[key]) <= wanted:
            found += same[key]
        if len(found) >= wanted:
            break
    note(
        f"eval_dataset: {len(found)} of {len(whole)} rows are held out ({len(whole) - len(same)} rows are copies of others)"
    )
    return sorted(found)


def digest(row: Any, salt: str = "") -> bytes:
    """What a row holds, in a few bytes."""
    text = json.dumps([salt, row], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def mixed(parts: Sequence[Sequence[int]], sets: Sequence[Named], seed: int) -> list[int]:
    """Rows in the order of an epoch, which is as long as all data sets together: of each as many as its weight says, its own rows
    again and again, or the first of them in an order that the seed draws; without weights each row once, as it stands."""
    if sets[0].weight is None:
        return [index for part in parts for index in part]
    total, weights = sum(map(len, parts)), sum(one.weight or 0 for one in sets)
    placed: list[tuple[float, int, int]] = []
    for number, (part, one) in enumerate(zip(parts, sets, strict=True)):
        count = max(1, round(total * (one.weight or 0) / weights)) if part else 0
        drawn = list(part)
        random.Random(f"{seed}:{number}").shuffle(drawn)
        placed += [((i + 0.5) / count, number, drawn[i % len(drawn)]) for i in range(count)]
        if not drawn:
            continue
        often = f"each {count / len(drawn):.2g} times" if count > len(drawn) else f"{len(drawn) - count} left out"
        often = "each once" if count == len(drawn) else often
        note(f"{one.path}: {count} of {total} rows of an epoch, of {len(drawn)} rows, {often}")
    return [index for _, _, index in sorted(placed)]

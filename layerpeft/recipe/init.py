"""`layerpeft init`: a commented recipe for a model, rows and a task, with a choice of layers that fits into memory."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from layerpeft.errors import LayerMapError, LayerpeftError, Problem, Problems, RecipeError, UsageError, unknown
from layerpeft.integrations.places import expanded, missing
from layerpeft.model.costs import costs_of
from layerpeft.planning.fit import Fit
from layerpeft.recipe import keys, rows, surroundings
from layerpeft.recipe.beside.models import place_of
from layerpeft.recipe.forms import read_by, taken
from layerpeft.recipe.model import fetched
from layerpeft.recipe.pace import pace, width_of
from layerpeft.recipe.plan import Forecast, forecast
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.reading import SAMPLE_BY
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.sources import share_of
from layerpeft.recipe.tasks.seeing import sees
from layerpeft.recipe.tasks.tokenizing import tokenizer
from layerpeft.recipe.templates import EXAMPLE, as_setting
from layerpeft.recipe.trainer import prepare
from layerpeft.recipe.trainers.table import ROWS, absent
from layerpeft.recipe.written import recipe_text
from layerpeft.recipe.yaml import override, parse
from layerpeft.text import counted, no_size, once, size_of, size_text
from layerpeft.tuners.methods import DEFAULT

LOOKED_AT = 200  # rows whose length is measured
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
FEW, SOME = 20, 200  # rows: below the first none are held out, below the second more of them
TIME, SHARE = {"time": "75%"}, "50%"  # of a step that trains all layers, as the quickstart has it; else of the layers
NONE = "none"  # of held-out rows
MODEL = "model_name_or_path"


@dataclass(frozen=True)
class Wanted:
    """What is asked for. `task`: a trainer (None: told by the rows); `held_out`: rows or a share; `room`: memory, as "24GB";
    `settings`: `key=value` of the recipe."""

    model: str | None = None
    data: str | None = None
    task: str | None = None
    held_out: str | None = None
    out: str = "recipe.yaml"
    room: str | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Looked:
    """What the rows are: how many, their columns, what is read as what, and whether they have pictures that the model reads."""

    count: int
    columns: tuple[str, ...]
    read_as: str
    seen: bool = False


def look(data: str, by: Any = None) -> rows.Source:
    """The rows; `by`: what a row of plain text is. Raises: RecipeError where they cannot be read."""
    found = rows.load(data, config=None, split="train", by=by if by in SAMPLE_BY else None)
    assert found is not None
    return found


def guess(columns: Sequence[str]) -> str | None:
    """The trainer that reads most of these columns and needs nothing besides; None where none reads them."""
    reads = {name: len(read_by(name, columns)) for name in keys.present() if not ROWS[name].needs}
    best = max(reads, key=lambda name: reads[name], default=None)
    return best if best is not None and reads[best] else None


def init(wanted: Wanted) -> tuple[Path, Forecast]:
    """Writes the recipe, and plans it. Raises: UsageError with everything that is missing or wrong; RecipeError and ConfigError of
    the recipe that would be written, which then is not there."""
    wanted, source, extra, config = _checked(wanted)
    assert wanted.task is not None
    given = {"model_name_or_path": wanted.model, "dataset_name": wanted.data, "columns": extra.get("columns")}
    seen = sees(given, wanted.task)
    read_as = taken(wanted.task, source.columns, extra.get("columns"), sees=seen)
    looked = Looked(len(source), tuple(source.columns), read_as, seen)
    path = expanded(wanted.out)
    room = wanted.room or _room()
    values, comments = _values(wanted, looked, extra, config, room is not None)
    with path.open("x", encoding="utf-8") as file:
        file.write(recipe_text(path, values, {}))
    with _unwritten(path), once():
        recipe = load_recipe(str(path), [f"max_train_samples={LOOKED_AT}", "eval_dataset=null"], "plan")
        if looked.seen and "max_length" not in extra:
            comments["max_length"] = "pictures are tokens, too, and are not cut"
        elif "max_length" in values and "max_length" not in extra:
            values["max_length"], comments["max_length"] = _length(recipe)
        found = _planned(
            path, values, comments, "select" not in extra.get("layerpeft", {}) and _is_counted(recipe), room
        )
        if isinstance(found.found, Fit):
            values, comments = _fitted(values, comments, found.found, str(room))
        path.write_text(recipe_text(path, values, comments), encoding="utf-8")
        return path, forecast(str(path)) if found.changes else found


def _planned(
    path: Path, values: dict[str, Any], comments: Mapping[str, str], timed: bool, room: str | None
) -> Forecast:
    """The plan of the recipe, within `room`. `timed`: layers are chosen by what they cost, unless none costs so little."""
    if timed:
        select = values["layerpeft"]["select"]
        values["layerpeft"]["select"] = {**select, "keep": TIME}
        path.write_text(recipe_text(path, values, comments), encoding="utf-8")
        with contextlib.suppress(LayerpeftError):
            return forecast(str(path), (), room)
        values["layerpeft"]["select"] = select
    path.write_text(recipe_text(path, values, comments), encoding="utf-8")
    return forecast(str(path), (), room)


def _is_counted(recipe: Recipe) -> bool:
    """Whether what its layers cost follows from shapes; of other models it is traced, which takes minutes where rows are long."""
    found = recipe.config.examine(recipe.model)
    try:
        costs_of(recipe.model, found.layers, found.targets)
    except LayerMapError:
        return False
    return True


@contextlib.contextmanager
def _unwritten(path: Path) -> Iterator[None]:
    """Where something goes wrong inside, the file is not there."""
    try:
        yield
    except BaseException:
        path.unlink()
        raise


def _checked(wanted: Wanted) -> tuple[Wanted, rows.Source, dict[str, Any], Any]:
    """With the task, what the settings say, and the model's config. Raises: UsageError with every problem."""
    problems = Problems("init")
    for name, value in (("model", wanted.model), ("data", wanted.data)):
        if not value:
            problems.add(f"--{name}: missing; there is nobody to ask")
    extra, source, config = _given(wanted, problems, True)
    if source is not None and wanted.task is None:
        wanted = replace(wanted, task=guess(list(extra.get("columns") or source.columns)))
        if wanted.task is None:
            problems.add(f"--data: {unread(source.columns)}")
    problems.raise_if_any(UsageError)
    assert source is not None
    return wanted, source, extra, config


def unread(have: list[str]) -> str:
    """What to say of rows that no trainer reads as they are: what is needed, and the setting that says so of these columns."""
    wanted = "`prompt` and `completion`, `messages`, `instruction` and `output`, `text`, or `text` and `label`"
    return rows.lacking(wanted, have, EXAMPLE if len(have) > 1 else {"text": "{sentence}"}, as_setting)


def flags(wanted: Wanted, where: bool) -> dict[str, Any]:
    """The settings among what was said; `where`: a place to write to, too. Raises: UsageError with all that is wrong with it."""
    problems = Problems("init")
    extra, _, _ = _given(wanted, problems, where)
    problems.raise_if_any(UsageError)
    return extra


def _given(wanted: Wanted, problems: Problems, where: bool) -> tuple[dict[str, Any], rows.Source | None, Any]:
    """The settings, and the rows and the model's config where they can be read. Adds whatever is wrong with what was said."""

    def tried(flag: str, check: Callable[..., Any], *given: Any) -> Any:
        try:
            return check(*given)
        except LayerpeftError as error:
            for problem in error.problems:
                problems.add(f"--{flag}: {problem.text}")
            return None

    if wanted.room is not None and size_of(wanted.room) is None:
        problems.add(f"--fit: {no_size(wanted.room)}")
    document = override(parse("{}"), wanted.settings)
    for fault in document.faults:
        problems.add(str(fault))
    extra = dict(document.data)
    config = tried("model", check_model, wanted.model) if wanted.model else None
    source = tried("data", look, wanted.data, extra.get("sample_by")) if wanted.data else None
    if wanted.task is not None:
        tried("task", check_task, wanted, source, extra)
    if wanted.held_out is not None:
        tried("held-out", check_held_out, wanted.held_out)
    if where:
        tried("out", check_out, wanted.out)
    return extra, source, config


# ---- answers, one by one --------------------------------------------------------------------------------------------


def check_model(name: str) -> Any:
    """Its config; None of one that needs code to be read. Raises: RecipeError for what is no model here or on the hub."""
    wrong, _ = surroundings.model_trouble(name)
    if wrong:
        raise RecipeError(wrong)
    try:
        return fetched(name, Path(), transformers.AutoConfig.from_pretrained, place_of(name), trust_remote_code=False)
    except RecipeError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None


def check_task(wanted: Wanted, source: rows.Source | None, extra: Mapping[str, Any]) -> None:
    """Raises: UsageError for a task that there is none of, that needs more than was said, or that does not take such rows."""
    name, problems = str(wanted.task), Problems("")
    if name not in ROWS:
        raise UsageError(unknown("task", name, ROWS))
    if lacks := absent(ROWS[name]):
        raise UsageError(lacks)
    for need in ROWS[name].needs:
        if need not in extra:
            problems.add(f"{need}: missing; {name} needs it, as a setting: {need}=…")
    given = {MODEL: wanted.model, "dataset_name": wanted.data, "columns": extra.get("columns")}
    if source is not None and wanted.model:
        given |= {key: extra[key] for key in ("dataset_text_field", "sample_by") if key in extra}
        said = {key: value for key, value in given.items() if value is not None}
        for problem in surroundings.data_problems(said, name, "plan", sees=sees(said, name), of=_of_setting):
            problems.add(problem.text)
    problems.raise_if_any(UsageError)


def _of_setting(key: str, sentence: str) -> Problem:
    """What is wrong with a setting, of rows without the name that they have in a recipe alone."""
    return Problem((key,), sentence if key == "dataset_name" else f"{key}: {sentence}")


def check_held_out(text: str) -> None:
    """Raises: RecipeError for what is neither a share of the rows, nor rows, nor none."""
    if text != NONE and share_of(text) is None:
        look(text)


def check_out(text: str) -> None:
    """Raises: UsageError where no recipe can be written there."""
    path = expanded(text)
    if path.exists():
        raise UsageError(f"{text} exists already; name another file")
    if not path.parent.is_dir():
        raise UsageError(missing("folder", str(path.parent)))


# ---- the recipe -----------------------------------------------------------------------------------------------------


def usual_share(count: int) -> str | None:
    """How many of so many rows are held out where nobody says; None for too few."""
    return None if count < FEW else "10%" if count < SOME else "5%"


def _values(
    wanted: Wanted, looked: Looked, extra: Mapping[str, Any], config: Any, fitted: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe as it is asked for, and what is said of its values. `fitted`: blocks are recomputed only where nothing else
    makes it fit."""
    assert wanted.task is not None
    row = ROWS[wanted.task]
    held_out = wanted.held_out or usual_share(looked.count)
    held_out = None if held_out == NONE else held_out
    share = share_of(held_out) or 0.0
    left = max(1, looked.count - round(share * looked.count))
    found = pace(left, width_of(config) if config is not None else None, row.alone)
    values: dict[str, Any] = {
        "trainer": wanted.task, "model_name_or_path": wanted.model, "dataset_name": wanted.data,
        "eval_dataset": held_out if row.evaluates else None, "output_dir": f"outputs/{expanded(wanted.out).stem}",
        "layerpeft": {
            "method": DEFAULT, "select": {"by": "gradient_norm", "keep": SHARE}, "r": 16, "lora_alpha": 32,
            "target_modules": "all-linear",
        },
        "num_train_epochs": found.epochs, "per_device_train_batch_size": found.batch, "gradient_accumulation_steps": 1,
        "learning_rate": found.rate, "lr_scheduler_type": "cosine", "logging_steps": found.logging, "seed": 0,
    }  # fmt: skip
    values = {k: v for k, v in values.items() if v is not None}
    if fitted:
        values["gradient_checkpointing"] = False
    if "max_length" in keys.top_settings(wanted.task):
        values["max_length"] = None if looked.seen else LENGTHS[-1]
    said = counted(looked.count, "row") + (f", {looked.read_as}" if looked.read_as else "")
    comments = {"dataset_name": said}
    if not extra.keys() & {
        "num_train_epochs",
        "per_device_train_batch_size",
        "max_steps",
        "gradient_accumulation_steps",
    }:
        comments["num_train_epochs"] = f"{counted(found.steps, 'step')} of {counted(found.batch, 'row')}"
    return _merged(values, extra), comments


def _merged(values: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    block = {"layerpeft": {**values["layerpeft"], **extra["layerpeft"]}} if "layerpeft" in extra else {}
    return {**values, **extra, **block}


def _length(recipe: Recipe) -> tuple[int, str]:
    """A max_length for the rows, and how that was found."""
    made, tokens = prepare(recipe).train, tokenizer(recipe)
    longest = sorted(_size(row, tokens) for row in made)
    most = longest[math.ceil(0.95 * len(longest)) - 1]
    limit = next((n for n in LENGTHS if n >= most), LENGTHS[-1])
    positions = getattr(recipe.model.config, "max_position_embeddings", None)
    limit = min(limit, positions) if isinstance(positions, int) and positions > 0 else limit
    return limit, f"19 of 20 rows have at most {most} tokens, the longest {longest[-1]}"


def _size(row: Mapping[str, Any], tokens: Any) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    texts = [_words(value) for name, value in row.items() if name not in ("chosen", "rejected")]
    answers = [_words(row[name]) for name in ("chosen", "rejected") if name in row]
    return len(tokens("\n".join([*texts, max(answers, key=len, default="")]), verbose=False)["input_ids"]) + 8


def _words(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_words, value))
    return "\n".join(map(_words, value.values())) if isinstance(value, Mapping) else str(value)


def _room() -> str | None:
    """The memory of an accelerator, else half of what the machine has; None where nothing says."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_properties(0).total_memory}B"
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2}B"
    except (AttributeError, ValueError, OSError):
        return None


def _fitted(
    values: Mapping[str, Any], comments: Mapping[str, str], found: Fit, room: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """With what fits into memory, and what that gives up."""
    made = dict(values)
    for key, value in found.settings.items():
        *above, last = key.split(".")
        inner = made
        for name in above:
            inner[name] = dict(inner[name]) if isinstance(inner.get(name), Mapping) else {}
            inner = inner[name]
        inner[last] = value
    size = size_text(size_of(room) or 0)
    gave = "; ".join(found.gave_up)
    said = f"fits into {size}" + (f", and gives up: {gave}" if gave else " as it is")
    return made, {**comments, "select": f"measured on the rows; {said}"}

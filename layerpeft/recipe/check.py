"""One pass over a recipe that finds everything wrong with it: keys, types, the block, rows, folders, devices, the architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from layerpeft.errors import LayerpeftError, Problem, RecipeError, told, unknown
from layerpeft.integrations import hub
from layerpeft.integrations.code import code_beside
from layerpeft.integrations.places import expanded, missing
from layerpeft.planning import layers as layers  # choices of recipes know by it what layers cost
from layerpeft.recipe import cures, foreign, keys, model, shorter, sources, surroundings
from layerpeft.recipe.choice import BLOCK, choice_problems
from layerpeft.recipe.exits import exit_problems
from layerpeft.recipe.recipe import Recipe, made
from layerpeft.recipe.shipped import beside
from layerpeft.recipe.strange import unknown_field, unknown_key
from layerpeft.recipe.tasks import seeing
from layerpeft.recipe.trainers.table import DEFAULT as USUAL
from layerpeft.recipe.trainers.table import absent, row_of
from layerpeft.recipe.yaml import COMMAND, Document, Fault
from layerpeft.selection import plugins
from layerpeft.selection.budget import counted
from layerpeft.selection.scorers import change
from layerpeft.selection.select import SCORERS
from layerpeft.selection.typecheck import Setting, complaint
from layerpeft.training.prefix import setting
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.methods import DEFAULT, METHODS

PLACES = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "dataset_name",
    "eval_dataset",
    "output_dir",
    "resume_from_checkpoint",
)
NO_BF16 = "bf16 is off, because there is no device for it here (bf16: true with use_cpu: true forces it)"
TRAIN = ("train", "compare", "plan")  # purposes for which it matters how a step is computed
MOST = 10**9  # of what is counted: tokens, rows, steps of a batch, ranks


@dataclass
class Check:
    """One pass over a document; `found` gathers what is wrong with its lines, `wrong` the top-level keys complained of.
    `accelerator`: the recipe is to run on one, whatever is here."""

    document: Document
    purpose: str
    accelerator: bool = False
    found: list[Fault] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    sees: bool = False
    moved: Mapping[str, str] = field(default_factory=dict)

    def add(self, sentence: str, *path: str) -> None:
        """Notes a problem of the key at `path`; the line is that of the spelling in the file."""
        line = self.document.line(self.moved.get(path[0], path[0]), *path[1:]) if path else None
        fault = Fault(line, sentence, path)
        if fault not in self.found:
            self.found.append(fault)
        self.wrong |= set(path[:1])

    def add_all(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.add(problem.text, *problem.path)

    def run(self, source: str, path: Path) -> Recipe:
        """The recipe as far as it can be read; every problem is written down on the way."""
        self.found += self.document.faults
        data = self.document.data
        trainer = self.trainer(data)
        known = keys.top_settings(trainer or USUAL.name)
        data = _without_its_own(self.kept(data, known), known, "trainer" in self.wrong)
        if isinstance(data.get("columns"), Mapping):
            data["columns"] = self.kept(data["columns"], {}, "columns")
        last = frozenset(k for k in data if self.document.lines.get((k,)) == COMMAND)
        done = foreign.translate(data, known, last)
        self.moved = done.moved
        for key, sentence in done.complaints:
            self.add(sentence, key)
        if not data and self.found:
            return Recipe(source, path, USUAL.name, {}, DEFAULT, "all", {})
        values = done.data
        self.required(values, done)
        good = surroundings.placed(self.typed(values, known, trainer), path.parent)
        bf16_by_default = (
            bool(trainer) and row_of(trainer).trl and "bf16" not in values and values.get("fp16") in (None, False)
        )
        if bf16_by_default and not self.accelerator and not surroundings.has_bf16():
            good["bf16"] = False  # TRL's default is true, and refuses to start without a device for it
            done.notices += [NO_BF16] * (self.purpose in TRAIN)
        self.sees = seeing.sees(good, trainer)
        block = counted(good.get("layerpeft"), _said(good, known, trainer))
        method, select, fields, config = self.block(block, trainer, path.parent)
        if good.get(shorter.KEY) is not None:
            good[shorter.KEY], there = self.placed(good[shorter.KEY], path.parent, shorter.KEY)
            self.add_all(shorter.problems(good[shorter.KEY], row_of(trainer)) if there else ())
        self.add_all(surroundings.engine_problems(good, config))
        self.add_all(surroundings.batch_problems(good, row_of(trainer), config))
        if trainer:
            self.add_all(surroundings.beside_problems(good, row_of(trainer), self.purpose, path.parent, self.wrong))
            judged = "columns" not in self.wrong
            self.add_all(surroundings.data_problems(good, trainer, self.purpose, judged, path.parent, self.sees))
        problems, notices = surroundings.folder_problems(good, self.purpose, path.parent)
        self.add_all(problems)
        self.add_all(surroundings.device_problems(good))
        lines, notices = {key: self.document.line(self.moved.get(key, key)) for key in good}, (*done.notices, *notices)
        recipe = Recipe(
            source, path, trainer, good, method, select, fields, notices, sees=self.sees, lines=lines, config=config
        )
        if trainer:
            here = {k: v for k, v in good.items() if k not in ("bf16", "fp16")} | {"bf16": False}
            trial = replace(recipe, values=here) if self.accelerator and recipe.row.trl else recipe
            self.add_all(surroundings.argument_problems(trial, self.wrong))
            self.add_all(model.loading_problems(recipe))
            self.add_all(surroundings.teacher_problems(recipe, self.wrong))
            if (
                config is not None
                and "model_name_or_path" in good
                and not self.wrong & {"model_name_or_path", model.INIT, shorter.KEY}
            ):
                with hub.settled(surroundings.on_hub(good)):
                    return self.choice(recipe)
        return recipe

    def trainer(self, data: Mapping[str, Any]) -> str:
        """The trainer that is asked for; empty where there is none of that name, or not here."""
        named = data.get("trainer", data.get("stage"))
        if not isinstance(named, str) or named not in keys.TRAINERS:
            return ""
        if gone := absent(row_of(named)):
            self.add(f"trainer: {gone}", "trainer")
        return "" if gone else named

    def choice(self, recipe: Recipe) -> Recipe:
        """Tries the choice of layers on the architecture, which is kept."""
        try:
            found = shorter.without_weights(recipe)
            told = (found.notice,) if found.notice and self.purpose == "plan" else ()
            recipe = replace(found.recipe, notices=(*recipe.notices, *told))
            self.add_all([*choice_problems(recipe), *exit_problems(recipe)])
        except RecipeError as error:
            self.add_all(error.problems)
        return recipe

    def kept(self, given: Mapping[str, Any], known: Mapping[str, Setting], *above: str) -> dict[str, Any]:
        """Less the keys that the command line takes out: with null, where null is no value of theirs."""
        nulled = {k for k in given if (*above, k) in self.document.nulled}
        return {k: v for k, v in given.items() if k not in nulled or k in known and complaint(known[k], None) is None}

    def required(self, values: Mapping[str, Any], done: foreign.Translation) -> None:
        """Keys without which there is no run."""
        for key in keys.REQUIRED:
            if key not in values and key not in done.cured:
                extra = f" (one of {', '.join(keys.TRAINERS)})" if key == "trainer" else ""
                self.add(f"{key}: missing{extra}")
        if "layerpeft" not in values:
            example = "layerpeft: {method: lora, select: {by: gradient_norm, keep: 25%}, r: 8}"
            self.add(f"layerpeft: missing; this block says which layers and how, as in `{example}`")

    def typed(self, values: Mapping[str, Any], known: Mapping[str, Setting], trainer: str) -> dict[str, Any]:
        """The top-level keys that exist and fit their types."""
        good = {}
        for key, value in values.items():
            if key not in known:
                self.add(unknown_key(key, value, known, trainer), key)
            elif key == "columns" and (unquoted := _unquoted(value)):
                self.add(f'columns.{unquoted}: put the template in quotes, as in {unquoted}: "{{name}}"', key, unquoted)
            elif sentence := complaint(known[key], value) or _out_of_bounds(key, value) or _no_place(key, value):
                better = cures.value_cure(key, value, surroundings.has_bf16, key in (*keys.REQUIRED, BLOCK))
                self.add(f"{key}: {sentence}" + (f"; {better}" if better else ""), key)
            else:
                good[key] = value
        return good

    def block(self, block: Any, trainer: str, home: Path) -> tuple[str, Any, dict[str, Any], LayerLoraConfig | None]:
        """Checks the `layerpeft:` block: method, select and the config's fields; the last is the config that they make."""
        if block is None:
            return DEFAULT, "all", {}, None
        given = dict(block)
        method = self.kept(given, {}, "layerpeft").get("method", DEFAULT)
        if not isinstance(method, str) or method not in METHODS:
            road = foreign.METHOD_ROADS.get(method) if isinstance(method, str) else None
            sentence = f"method {method!r} is written as {road}" if road else unknown("method", method, METHODS)
            self.add(sentence, "layerpeft", "method")
            method = DEFAULT
        known = keys.block_settings(METHODS[method])
        given = self.kept(given, known, "layerpeft")
        given.pop("method", None)
        select, there = self.placed(given.pop("select", None), home, BLOCK, "select")
        if isinstance(given.get("quant"), Mapping) and "select" in given["quant"]:
            inner, also = self.placed(given["quant"]["select"], home, BLOCK, "quant")
            given["quant"], there = given["quant"] | {"select": inner}, there and also
        if "prefix_cache" in given:
            given["prefix_cache"] = setting.placed(given["prefix_cache"], partial(beside, home=home))
        if select is None:
            example = "`select: {by: gradient_norm, keep: 25%}`, `select: last:4`, or `select: all` for plain LoRA"
            self.add(f"select: missing; say which layers, as in {example}", "layerpeft")
        fields = {}
        for key, value in given.items():
            if key not in known or key in (*foreign.BLOCK_HINTS, "layers_to_transform", "layers_pattern"):
                self.add(unknown_field(key, value, method, known, block) + self.road(key), "layerpeft", key)
            elif sentence := complaint(known[key], value) or _out_of_bounds(key, value):
                better = cures.value_cure(key, value, surroundings.has_bf16)
                self.add(f"{key}: {sentence}" + (f"; {better}" if better else ""), "layerpeft", key)
            else:
                fields[key] = value
        sound = there and select is not None
        return method, select, fields, self.config(trainer, method, select, fields) if sound else None

    def placed(self, select: Any, home: Path, *path: str) -> tuple[Any, bool]:
        """`select`, with the place of the file that it names, and whether it is there."""
        found, wrong = _placed(select, home, path)
        self.add_all(wrong)
        return found, not wrong

    def config(self, trainer: str, method: str, select: Any, fields: Mapping[str, Any]) -> LayerLoraConfig | None:
        """What the block means. Adds what the constructor refuses, each at the line of its own key where there is one."""
        try:
            return made(trainer, method, select, fields, self.sees)
        except LayerpeftError as error:
            deeper = [item for item in error.items if isinstance(item, LayerpeftError)]
            chosen = [item for item in deeper if any(p.path[:1] == ("select",) for p in item.problems)]
            others = [item for item in error.items if item not in chosen]
            found = [problem for choice in chosen for problem in choice.listed()]
            rest = LayerpeftError(*others, title=error.title).listed() if others else ()
        except Exception as error:  # constructors of other libraries raise what they like
            found, rest = [], [Problem((), told(error, 400))]
        self.add_all(problem.under("layerpeft") for problem in found)
        for problem in rest:
            self.add(f"layerpeft: {problem.text}{self.road(*problem.path[:1])}", "layerpeft", *problem.path)
        return None

    def road(self, *key: str) -> str:
        """How the command line, which gives another method than the recipe's, takes out a key of that."""
        place = ("layerpeft", *key)
        there = bool(key) and self.document.lines.get(("layerpeft", "method")) == COMMAND != self.document.lines.get(
            place
        )
        return f" (layerpeft.{key[0]}=null takes it out)" if there and place in self.document.lines else ""


def _placed(select: Any, home: Path, path: tuple[str, ...]) -> tuple[Any, list[Problem]]:
    """`select` with the place of the file that `by` names, or the run that `of` does, and what is wrong with it; a scorer's code is
    loaded."""
    by = select.get("by") if isinstance(select, Mapping) else None
    if by == "change":  # of other scorers `of` is no folder
        if not isinstance(run := select.get("of"), str) or not run:
            return select, [Problem((*path, "by"), change.NO_RUN)]
        found = {**select, "of": beside(run, home)}
        there = expanded(found["of"]).is_dir()
        lost = Problem((*path, "of"), f"of: {missing('folder', run, home)}")
    elif not isinstance(by, str) or not by.endswith((".json", ".py")) or not by.isprintable():
        return select, []
    elif by.endswith(".py"):
        try:
            plugins.from_file(SCORERS, by, *code_beside(by, home, f"by: {by}"))
        except LayerpeftError as error:
            return select, [problem.under(*path) for problem in error.listed()]
        return select, []
    else:
        found = {**select, "by": beside(by, home)}
        there = expanded(found["by"]).is_file()
        lost = Problem((*path, "by"), f"by: {missing('file', by, home)}")
    return found, [] if there else [lost]


def _without_its_own(data: Mapping[str, Any], known: Mapping[str, Setting], gone: bool) -> dict[str, Any]:
    """The keys that can be judged: those of a trainer that is `gone` are gone with it."""
    return {k: v for k, v in data.items() if not gone or k in known or k in foreign.RENAMED}


def _unquoted(columns: Any) -> str | None:
    """The template that YAML reads as a mapping, because its braces stand outside of quotes."""
    if not isinstance(columns, dict):
        return None
    return next((k for k, v in columns.items() if isinstance(v, dict) and set(v.values()) == {None}), None)


def _no_place(key: str, value: Any) -> str | None:
    """What keeps a text from naming a file or a folder, whether there is one or not."""
    for text in sources.paths(value) if key in PLACES else ():
        try:
            expanded(text).lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            return f"{text[:80]!r} cannot be the name of a file or folder here: {getattr(error, 'strerror', error)}"
    return None


def _out_of_bounds(key: str, value: Any) -> str | None:
    if key in keys.UNSET and value == keys.UNSET[key]:
        return None
    if key in keys.AT_LEAST and isinstance(value, int | float):
        unset = f" (or {keys.UNSET[key]}, which leaves it open)" if key in keys.UNSET else ""
        least = keys.AT_LEAST[key]
        if least is None and value <= 0:
            return f"expected a number above 0, got {value}"
        if least is not None and value < least:
            return f"expected at least {least}{unset}, got {value}"
        if value > (most := keys.AT_MOST.get(key, MOST)):
            return f"expected at most {most:,}, got {value}"
    return None


def _said(good: Mapping[str, Any], known: Mapping[str, Setting], trainer: str) -> dict[str, Any]:
    """What the arguments of a training say of its rows, by the names that a budget has for it; what is not good is left out."""

    def value(name: str) -> Any:
        return good.get(name, known[name].default if name in known else None)

    by_default = bool(trainer) and row_of(trainer).trl and "bf16" not in good
    optimizer = value("optim")
    return {
        "rows": (value("per_device_train_batch_size") or 1) * (row_of(trainer).each if trainer else 1),
        "length": value("max_length"),
        "optimizer": None if optimizer is None else str(getattr(optimizer, "value", optimizer)),
        "checkpointing": bool(value("gradient_checkpointing")),
        "precision": "float16" if value("fp16") else "bfloat16" if by_default or value("bf16") else None,
        "fused_head": bool(trainer) and row_of(trainer).fused_head,
        "padded": True,
        "epochs": value("num_train_epochs") if (value("max_steps") or 0) < 1 else None,
    }

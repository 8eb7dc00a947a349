"""One pass over a recipe that finds everything wrong with it: keys, types, the block, rows, folders, devices, the architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from layerpeft.errors import LayerpeftError, Problem, RecipeError, hint, told, unknown
from layerpeft.integrations import hub
from layerpeft.recipe import foreign, keys, surroundings
from layerpeft.recipe.choice import choice_problems
from layerpeft.recipe.model import empty_model
from layerpeft.recipe.recipe import Recipe, made
from layerpeft.recipe.yaml import COMMAND, Document, Fault
from layerpeft.selection.typecheck import Setting, complaint
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.methods import DEFAULT, METHODS


@dataclass
class Check:
    """One pass over a document; `found` gathers what is wrong with its lines, `wrong` the top-level keys complained of.
    `accelerator`: the recipe is to run on one, whatever is here."""

    document: Document
    purpose: str
    accelerator: bool = False
    found: list[Fault] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
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
        trainer = data.get("trainer", data.get("stage"))
        trainer = trainer if trainer in keys.TRAINERS else ""
        known = keys.top_settings(trainer or "sft")
        last = frozenset(k for k in data if self.document.lines.get((k,)) == COMMAND)
        done = foreign.translate(data, known, last)
        self.moved = done.moved
        for key, sentence in done.complaints:
            self.add(sentence, key)
        if not data and self.found:
            return Recipe(source, path, "sft", {}, DEFAULT, "all", {})
        values = done.data
        self.required(values, done)
        good = self.typed(values, known, trainer)
        bf16_by_default = trainer == "sft" and not {"bf16", "fp16"} & set(values) and not self.accelerator
        if bf16_by_default and not surroundings.has_bf16():
            good["bf16"] = False  # TRL's default is true, and refuses to start without a device for it
            done.notices.append(
                "bf16 is off, because there is no device for it here (bf16: true with use_cpu: true forces it)"
            )
        method, select, fields, config = self.block(good.get("layerpeft"), trainer)
        self.add_all(surroundings.backend_problems(good, select))
        if trainer:
            self.add_all(surroundings.data_problems(good, trainer, self.purpose, "columns" not in self.wrong))
        problems, notices = surroundings.folder_problems(good, self.purpose)
        self.add_all(problems)
        self.add_all(surroundings.device_problems(good))
        lines = {key: self.document.line(self.moved.get(key, key)) for key in good}
        notices = (*done.notices, *notices)
        recipe = Recipe(source, path, trainer, good, method, select, fields, notices, lines=lines, config=config)
        if trainer:
            here = {k: v for k, v in good.items() if k not in ("bf16", "fp16")} | {"bf16": False}
            trial = replace(recipe, values=here) if self.accelerator and trainer == "sft" else recipe
            self.add_all(surroundings.argument_problems(trial, self.wrong))
            if config is not None and "model_name_or_path" in good and "model_name_or_path" not in self.wrong:
                with hub.settled(surroundings.on_hub(good)):
                    return self.choice(recipe)
        return recipe

    def choice(self, recipe: Recipe) -> Recipe:
        """Tries the choice of layers on the architecture, which is kept."""
        try:
            recipe = replace(recipe, model=empty_model(recipe))
            self.add_all(choice_problems(recipe))
        except RecipeError as error:
            self.add_all(error.problems)
        return recipe

    def required(self, values: Mapping[str, Any], done: foreign.Translation) -> None:
        """Keys without which there is no run."""
        replaced = {
            "dataset_name": ("datasets", "dataset", "data"),
            "model_name_or_path": ("model",),
            "trainer": ("stage",),
        }
        complained = {key for key, _ in done.complaints}
        for key in keys.REQUIRED:
            if key not in values and not complained & set(replaced.get(key, ())):
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
                self.add(self.unknown_key(key, value, known, trainer), key)
            elif key == "columns" and (unquoted := _unquoted(value)):
                self.add(f'columns.{unquoted}: put the template in quotes, as in {unquoted}: "{{name}}"', key, unquoted)
            elif sentence := complaint(known[key], value) or _too_small(key, value):
                self.add(f"{key}: {sentence}", key)
            else:
                good[key] = value
        return good

    def unknown_key(self, key: str, value: Any, known: Mapping[str, Setting], trainer: str) -> str:
        """What to say of a top-level key that does not exist."""
        if key in keys.FIXED:
            return f"{key}: {keys.FIXED[key]}"
        if key == "select" or any(key in keys.block_settings(kind) for kind in METHODS.values()):
            return f"{key}: this belongs in the block, as in `layerpeft: {{{key}: {value}}}`"
        if trainer == "classification" and key in keys.top_settings("sft"):
            return f"{key}: this is a setting of trainer: sft"
        kind = keys.arguments_class(trainer or "sft").__name__
        allowed = "trainer, model_name_or_path, dataset_name, columns, output_dir, layerpeft, …"
        return f"unknown key {key!r}.{hint(key, known)} Allowed: {allowed} and every field of {kind}."

    def block(self, block: Any, trainer: str) -> tuple[str, Any, dict[str, Any], LayerLoraConfig | None]:
        """Checks the `layerpeft:` block: method, select and the config's fields; the last is the config that they make."""
        if block is None:
            return DEFAULT, "all", {}, None
        given = dict(block)
        method = given.pop("method", DEFAULT)
        if not isinstance(method, str) or method not in METHODS:
            road = foreign.METHOD_ROADS.get(method) if isinstance(method, str) else None
            sentence = f"method {method!r} is written as {road}" if road else unknown("method", method, METHODS)
            self.add(sentence, "layerpeft", "method")
            method = DEFAULT
        select = given.pop("select", None)
        if select is None:
            example = "`select: {by: gradient_norm, keep: 25%}`, `select: last:4`, or `select: all` for plain LoRA"
            self.add(f"select: missing; say which layers, as in {example}", "layerpeft")
        known = keys.block_settings(METHODS[method])
        fields = {}
        for key, value in given.items():
            if key not in known or key in foreign.BLOCK_HINTS:
                self.add(self.unknown_field(key, method, known), "layerpeft", key)
            elif sentence := complaint(known[key], value) or _too_small(key, value):
                self.add(f"{key}: {sentence}", "layerpeft", key)
            else:
                fields[key] = value
        return method, select, fields, self.config(trainer, method, select, fields) if select is not None else None

    def config(self, trainer: str, method: str, select: Any, fields: Mapping[str, Any]) -> LayerLoraConfig | None:
        """What the block means. Adds what the constructor refuses, each at the line of its own key where there is one."""
        try:
            return made(trainer, method, select, fields)
        except LayerpeftError as error:
            chosen = [i for i in error.items if isinstance(i, LayerpeftError) and i.problems[0].path[:1] == ("select",)]
            others = [item for item in error.items if item not in chosen]
            found = [problem for choice in chosen for problem in choice.listed()]
            rest = LayerpeftError(*others, title=error.title).listed() if others else ()
        except Exception as error:  # constructors of other libraries raise what they like
            found, rest = [], [Problem((), told(error, 400))]
        self.add_all(problem.under("layerpeft") for problem in found)
        self.add_all(Problem(("layerpeft", *problem.path), f"layerpeft: {problem.text}") for problem in rest)
        return None

    def unknown_field(self, key: str, method: str, known: Mapping[str, Setting]) -> str:
        """What to say of a key that the method's config does not have."""
        if key in keys.FIXED:
            return f"{key}: {keys.FIXED[key]}"
        meant = foreign.BLOCK_HINTS.get(key)
        if meant == "select":
            return f"{key}: layers are chosen with `select`, as in `select: {{by: gradient_norm, keep: 4}}` or `select: last:4`"
        if meant:
            return f"unknown key {key!r} in the layerpeft block. Did you mean {meant!r}?"
        if key in keys.top_settings("sft"):
            return f"{key}: this belongs at the top level, not in the layerpeft block"
        other = next((m for m, kind in METHODS.items() if m != method and key in keys.block_settings(kind)), None)
        if other:
            return f"{key}: this belongs to method: {other}, and the method here is {method}"
        allowed = f"method, select, r, target_modules, … and every other field of {METHODS[method].__name__}"
        return (
            f"unknown key in the layerpeft block {key!r}.{hint(key, ['method', 'select', *known])} Allowed: {allowed}."
        )


def _unquoted(columns: Any) -> str | None:
    """The template that YAML reads as a mapping, because its braces stand outside of quotes."""
    if not isinstance(columns, dict):
        return None
    return next((k for k, v in columns.items() if isinstance(v, dict) and set(v.values()) == {None}), None)


def _too_small(key: str, value: Any) -> str | None:
    if key in keys.AT_LEAST and isinstance(value, int | float):
        least = keys.AT_LEAST[key]
        if least is None and value <= 0:
            return f"expected a number above 0, got {value}"
        if least is not None and value < least:
            return f"expected at least {least}, got {value}"
    return None

"""A recipe: one YAML file that says what to train. What is wrong in it is found here, before any weight is loaded."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerpeft import recipe_keys as keys
from layerpeft import rows
from layerpeft.configs import LayerLoraConfig
from layerpeft.errors import LayerpeftError, Problems, RecipeError, nearest, unknown
from layerpeft.recipe_yaml import Document, dump, override, parse
from layerpeft.save import last_checkpoint
from layerpeft.selection import Select
from layerpeft.shipped import find_recipe, resolve
from layerpeft.typecheck import Setting, build, complaint

CONFIGS = {"lora": LayerLoraConfig}
TASKS = {"sft": "CAUSAL_LM", "classification": "SEQ_CLS"}
# files that `score` and `compare` leave in output_dir: a run may start beside them
BESIDE = ("scores.json", "scores.csv", "scores.png", "compare.json", "compare.png")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe in this version's words. `values`: the top level; `block`: the config's; `notices`: mappings."""

    source: str
    path: Path
    trainer: str
    values: Mapping[str, Any]
    method: str
    select: Any
    block: Mapping[str, Any]
    notices: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        """The value of a top-level key, or its default."""
        return self.values.get(key, keys.top_settings(self.trainer)[key].default)

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"]).expanduser()


def load_recipe(source: str, settings: Sequence[str] = (), purpose: str = "train") -> Recipe:
    """Reads a recipe (a path, or the name of a shipped one) with `key=value` settings laid over it.

    `purpose`: "train", "score" or "compare", which ask for different things of data and output folder.
    Raises: RecipeError that lists every problem with its line.
    """
    path = find_recipe(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source}: not a readable text file ({error})") from error
    document = override(parse(text), settings)
    check = _Check(document, purpose)
    recipe = replace(check.run(source, path), settings=tuple(settings))
    problems = Problems(f"recipe {source}")
    for _, sentence in sorted(check.found, key=lambda item: item[0]):
        problems.add(sentence)
    problems.raise_if_any(RecipeError)
    return recipe


def training_arguments(recipe: Recipe, **changes: Any) -> Any:
    """The trl.SFTConfig or transformers.TrainingArguments of a recipe.

    The order of the rows hangs on `data_seed` alone, so that arms of a comparison see the same batches.
    """
    given = {k: v for k, v in recipe.values.items() if k in keys.argument_settings(recipe.trainer)}
    if isinstance(given.get("resume_from_checkpoint"), bool):
        del given["resume_from_checkpoint"]
    kind = keys.arguments_class(recipe.trainer)
    given.setdefault("data_seed", given.get("seed", keys.argument_settings(recipe.trainer)["seed"].default))
    given.setdefault("report_to", "none")
    return kind(**given | changes)


def layer_config(recipe: Recipe, select: Any = None, batches: Any = None) -> LayerLoraConfig:
    """The PEFT config of a recipe, with another choice of layers when `select` is given. Raises: LayerpeftError."""
    kind = CONFIGS[recipe.method]
    known = keys.block_settings(kind)
    fields = {name: build(known[name].hint, value) for name, value in recipe.block.items()}
    chosen = recipe.select if select is None else select
    return kind(select=chosen, task_type=TASKS[recipe.trainer], batches=batches, **fields)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe: keys mapped, settings applied, `select` in full, no secrets. `load_recipe` reads it back."""
    top = {key: recipe.values[key] for key in keys.own_keys() if key in recipe.values and key != "layerpeft"}
    top |= {
        key: value for key, value in recipe.values.items() if key not in top and key not in ("layerpeft", "hub_token")
    }
    top.pop("overwrite_output_dir", None)  # said once, for one run; a copy of the recipe must not write over it again
    select = recipe.select if isinstance(recipe.select, str | int | list) else Select.parse(recipe.select).to_dict()
    if isinstance(select, dict) and isinstance(recipe.select, Mapping):
        select["by"] = recipe.select.get("by", "depth")  # a path stays a path
    return dump(top | {"layerpeft": {"method": recipe.method, "select": select, **recipe.block}})


class _Check:
    """One pass over a document; `found` gathers (place in the file, sentence)."""

    def __init__(self, document: Document, purpose: str) -> None:
        self.document = document
        self.purpose = purpose
        self.found: list[tuple[tuple[int, str], str]] = []
        self.moved: Mapping[str, str] = {}

    def add(self, sentence: str, *path: str) -> None:
        """Notes a problem of the key at `path`; the line is that of the spelling in the file."""
        place = self.document.place(self.moved.get(path[0], path[0]), *path[1:]) if path else ""
        number = re.match(r"line (\d+)", place or sentence)
        order = int(number[1]) if number else (10**6 if "command line" in (place or sentence) else 10**7)
        self.found.append(((order, sentence), f"{place}: {sentence}" if place else sentence))

    def run(self, source: str, path: Path) -> Recipe:
        for sentence in self.document.problems:
            self.add(sentence)
        data = self.document.data
        trainer = data.get("trainer", data.get("stage"))
        trainer = trainer if trainer in keys.TRAINERS else ""
        known = keys.top_settings(trainer or "sft")
        last = frozenset(k for k in data if self.document.places.get((k,)) == "command line")
        done = keys.translate(data, known, last)
        self.moved = done.moved
        for key, sentence in done.complaints:
            self.add(sentence, key)
        if not data and self.found:
            return Recipe(source, path, "sft", {}, "lora", "all", {})
        values = done.data
        self.required(values, done)
        good = self.typed(values, known, trainer)
        if trainer == "sft" and not {"bf16", "fp16"} & set(values) and not _has_bf16():
            good["bf16"] = False  # TRL's default is true, and refuses to start without a device for it
            done.notices.append(
                "bf16 is off, because there is no device for it here (bf16: true with use_cpu: true forces it)"
            )
        method, select, fields = self.block(good.get("layerpeft"), bool(trainer))
        if trainer:
            self.data(good, trainer)
        self.model(good)
        self.output(good)
        self.reporting(good)
        recipe = Recipe(source, path, trainer, good, method, select, fields, tuple(done.notices))
        if not self.found:
            self.construct("", lambda: training_arguments(recipe), "output_dir")
        return recipe

    def required(self, values: Mapping[str, Any], done: keys.Translation) -> None:
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
            elif sentence := complaint(known[key], value) or _too_small(key, value):
                self.add(f"{key}: {sentence}", key)
            else:
                good[key] = value
        return good

    def unknown_key(self, key: str, value: Any, known: Mapping[str, Setting], trainer: str) -> str:
        if key in keys.FIXED:
            return f"{key}: {keys.FIXED[key]}"
        if key in keys.block_settings(LayerLoraConfig) or key == "select":
            return f"{key}: this belongs in the block, as in `layerpeft: {{{key}: {value}}}`"
        if trainer == "classification" and key in keys.top_settings("sft"):
            return f"{key}: this is a setting of trainer: sft"
        close = nearest(key, known)
        hint = f" Did you mean {close!r}?" if close else ""
        kind = keys.arguments_class(trainer or "sft").__name__
        return f"unknown key {key!r}.{hint} Allowed: {', '.join(keys.own_keys())}, and every field of {kind}."

    def block(self, block: Any, complete: bool) -> tuple[str, Any, dict[str, Any]]:
        """Checks the `layerpeft:` block: method, select and the config's fields."""
        if block is None:
            return "lora", "all", {}
        given = dict(block)
        method = given.pop("method", "lora")
        if not isinstance(method, str) or method not in CONFIGS:
            later = f"method {method!r} is not in this version; there is: {', '.join(CONFIGS)}"
            spelled = method in keys.LATER_METHODS
            self.add(later if spelled else unknown("method", method, CONFIGS), "layerpeft", "method")
            method = "lora"
        select = given.pop("select", None)
        ok = self.select(select)
        known = keys.block_settings(CONFIGS[method])
        fields = {}
        for key, value in given.items():
            if key not in known or key in keys.BLOCK_HINTS:
                self.add(self.unknown_field(key, known), "layerpeft", key)
            elif sentence := complaint(known[key], value) or _too_small(key, value):
                self.add(f"{key}: {sentence}", "layerpeft", key)
            else:
                fields[key] = value
        if ok and complete and len(fields) == len(given):
            trial = Recipe("", Path(), str(self.document.data.get("trainer", "sft")), {}, method, select, fields)
            self.construct("layerpeft: ", lambda: layer_config(trial), "layerpeft")
        return method, select, fields

    def select(self, select: Any) -> bool:
        if select is None:
            example = "`select: {by: gradient_norm, keep: 25%}`, `select: last:4`, or `select: all` for plain LoRA"
            self.add(f"select: missing; say which layers, as in {example}", "layerpeft")
            return False
        return self.construct("", lambda: Select.parse(select), "layerpeft", "select")

    def unknown_field(self, key: str, known: Mapping[str, Setting]) -> str:
        if key in keys.FIXED:
            return f"{key}: {keys.FIXED[key]}"
        hint = keys.BLOCK_HINTS.get(key)
        if hint == "select":
            return f"{key}: layers are chosen with `select`, as in `select: {{by: gradient_norm, keep: 4}}` or `select: last:4`"
        if hint:
            return f"unknown key {key!r} in the layerpeft block. Did you mean {hint!r}?"
        if key in keys.top_settings("sft"):
            return f"{key}: this belongs at the top level, not in the layerpeft block"
        return unknown("key in the layerpeft block", key, ["method", "select", *known])

    def data(self, good: Mapping[str, Any], trainer: str) -> None:
        columns = good.get("columns")
        if columns is not None and (sentence := rows.form_problem(trainer, columns)):
            self.add(f"columns: {sentence}", "columns")
            columns = None
            good = {**good, "dataset_text_field": None}  # the rows cannot be judged
        for key in ("dataset_name", "eval_dataset"):
            if good.get(key) is None:
                continue
            try:
                files = rows.local_files(good[key])
                have = rows.columns_of(files[0]) if files else None
            except LayerpeftError as error:
                self.fold(error, f"{key}: ", key)
                continue
            field = good.get("dataset_text_field", "text")
            if have is not None and field is not None:
                for sentence in rows.column_problems(trainer, have, columns, field):
                    self.add(f"{key}: {sentence}", key if not columns else "columns")
            if files and key == "dataset_name" and good.get("eval_dataset") is None:
                self.held_out(good)

    def held_out(self, good: Mapping[str, Any]) -> None:
        """Files have no test split: what needs held-out rows needs `eval_dataset`."""
        if self.purpose == "compare":
            self.add("eval_dataset: missing; arms are compared on held-out rows", "dataset_name")
        if good.get("eval_strategy", "no") != "no":
            self.add("eval_strategy: evaluates during training, but there is no eval_dataset", "eval_strategy")
        if "dataset_test_split" in good:
            self.add(
                "dataset_test_split: files have no splits; name the held-out file with eval_dataset",
                "dataset_test_split",
            )

    def model(self, good: Mapping[str, Any]) -> None:
        name = good.get("model_name_or_path")
        if name is None:
            return
        try:
            path = Path(resolve(name)).expanduser()
        except RecipeError as error:
            self.fold(error, "model_name_or_path: ", "model_name_or_path")
            return
        hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
        if path.is_dir():
            sentence = _model_folder(path)
        elif path.is_file():
            sentence = f"{name!r} is a file; name the folder that holds config.json and the weights"
        else:
            sentence = None if hub else f"no folder {name!r} (looked for {path.absolute()})"
        if sentence:
            self.add(f"model_name_or_path: {sentence}", "model_name_or_path")

    def output(self, good: Mapping[str, Any]) -> None:
        if "output_dir" not in good:
            return
        folder, resume = Path(good["output_dir"]).expanduser(), good.get("resume_from_checkpoint")
        if folder.exists() and not folder.is_dir():
            self.add(f"output_dir: {folder} is a file", "output_dir")
        elif resume is True:
            if not folder.is_dir() or last_checkpoint(folder) is None:
                self.add(
                    f"resume_from_checkpoint: there is no complete checkpoint in {folder}", "resume_from_checkpoint"
                )
        elif isinstance(resume, str):
            if not Path(resume).expanduser().is_dir():
                self.add(
                    f"resume_from_checkpoint: no folder {resume!r} (`true` takes the newest)", "resume_from_checkpoint"
                )
        elif self.purpose == "train" and not good.get("overwrite_output_dir") and folder.is_dir():
            held = sorted(p.name for p in folder.iterdir() if p.name not in BESIDE)
            if held:
                self.add(
                    f"output_dir: {folder} is not empty ({', '.join(held[:4])}{', ...' if len(held) > 4 else ''}). Name another"
                    f" (output_dir={folder}-2), go on with that run (resume_from_checkpoint=true), or write over it"
                    " (overwrite_output_dir=true)",
                    "output_dir",
                )
        if resume and good.get("overwrite_output_dir"):
            self.add(
                "overwrite_output_dir: resuming and writing over the run exclude each other", "overwrite_output_dir"
            )

    def reporting(self, good: Mapping[str, Any]) -> None:
        asked = good.get("report_to") or []
        asked = [asked] if isinstance(asked, str) else asked
        names = [name for name in asked if name not in ("none", "all")]
        if names:
            from transformers.integrations import get_available_reporting_integrations

            there = [*get_available_reporting_integrations(), "none", "all"]
            for name in names:
                if name not in there:
                    more = " (pip install wandb)" if name == "wandb" else ""
                    self.add(
                        f"report_to: {name!r} is not installed or not known{more}; there is: {', '.join(there)}",
                        "report_to",
                    )
        optim = str(good.get("optim", ""))
        if optim.startswith(("galore", "apollo", "lomo", "adalomo")):
            self.add(f"optim: {optim} works on full weights, which an adapter leaves frozen; use another", "optim")
        nested = (good.get("model_init_kwargs") or {}) if isinstance(good.get("model_init_kwargs"), dict) else {}
        if nested.get("quantization_config") and importlib.util.find_spec("bitsandbytes") is None:
            self.add(
                "model_init_kwargs: quantization needs bitsandbytes (pip install bitsandbytes)", "model_init_kwargs"
            )

    def construct(self, prefix: str, make: Callable[[], Any], *path: str) -> bool:
        """Runs a constructor whose own checks know combinations that types do not show."""
        try:
            make()
            return True
        except LayerpeftError as error:
            self.fold(error, prefix, *path)
        except Exception as error:  # constructors of other libraries raise what they like
            text = " ".join(str(error).split())
            self.add(f"{prefix}{text[:400] or type(error).__name__}", *path)
        return False

    def fold(self, error: LayerpeftError, prefix: str, *path: str) -> None:
        """Adds the problems of another report one by one, each at the line of the key it begins with where there is one."""
        head, *items = str(error).split("\n  - ")
        for item in items or [head]:
            word = re.match(r"(?:select: )?(\w+):|.*?key '(\w+)'", item)
            part = next((g for g in word.groups() if g), "") if word else ""
            inner = (*path, part) if (*path, part) in self.document.places else path
            self.add(f"{prefix}{item}", *inner)


def _has_bf16() -> bool:
    from transformers.utils import is_torch_bf16_gpu_available

    return is_torch_bf16_gpu_available()


def _too_small(key: str, value: Any) -> str | None:
    if key in keys.AT_LEAST and isinstance(value, int | float):
        least = keys.AT_LEAST[key]
        if least is None and value <= 0:
            return f"expected a number above 0, got {value}"
        if least is not None and value < least:
            return f"expected at least {least}, got {value}"
    return None


def _model_folder(path: Path) -> str | None:
    """What is wrong with a folder as a base model, or None."""
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return f"{path} holds an adapter, not a model; name its base model"
    if not (path / "config.json").is_file():
        return f"{path} has no config.json, so it is no model"
    if not any(name.endswith((".safetensors", ".bin")) for name in os.listdir(path)):
        return f"{path} has no weights (*.safetensors)"
    return None

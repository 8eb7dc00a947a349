"""Rewards: functions of a file beside the recipe, functions of TRL by name, and models that give an answer one number."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from layerpeft.errors import ConfigError, LayerpeftError, Problem, hint, unknown
from layerpeft.integrations.code import code_beside, file_beside, ran
from layerpeft.integrations.places import ADDRESS, expanded
from layerpeft.recipe.beside.models import load, place_of, tokenizer, wrong
from layerpeft.tuners.load import load as with_adapter

KEY = "rewards"
EXAMPLE = "rewards: [./rewards.py:correct_answer]"


@dataclass(frozen=True)
class Reward:
    """One item of `rewards`: a function `name` of `file`, or of TRL (no file; `options` make it), or else a model."""

    asked: str
    name: str = ""
    file: str = ""
    options: Mapping[str, Any] | None = None


def listed(given: Any) -> list[Any]:
    """The items of a recipe's `rewards`, one or several."""
    return given if isinstance(given, list) else [] if given is None else [given]


def parsed(item: Any) -> Reward:
    """What an item means. Raises: ConfigError."""
    if isinstance(item, Mapping) and len(item) == 1:
        name, options = next(iter(item.items()))
        if not isinstance(options, Mapping):
            raise ConfigError(f"{name}: expected its options as a mapping, got {options!r}")
        return Reward(name, name.removeprefix("trl.rewards."), options=dict(options))
    if not isinstance(item, str):
        raise ConfigError(f"expected the name of a function, of a file or of a model, got {item!r}; as in {EXAMPLE}")
    file, mark, name = item.rpartition(":")
    if mark and file.endswith(".py"):
        return Reward(item, name, file)
    if item.endswith(".py"):
        raise ConfigError(f"{item}: say which function of it, as in {item}:correct_answer")
    return Reward(item, item.removeprefix("trl.rewards."))


def of_trl() -> dict[str, Callable[..., Any]]:
    """TRL's own, by name."""
    from trl import rewards

    found = {name: getattr(rewards, name, None) for name in dir(rewards)}  # loaded where they are used
    return {name: function for name, function in found.items() if inspect.isfunction(function)}


def is_model(reward: Reward) -> bool:
    """Whether it is a folder, or a name on the hub."""
    return not reward.file and reward.options is None and reward.name not in of_trl()


def is_place(item: Any) -> bool:
    """Whether an item may be the folder of a model."""
    return isinstance(item, str) and ".py" not in item


def problems(given: Any, home: Path) -> list[Problem]:
    """What is wrong with `rewards`; nothing of it runs."""
    found = []
    for item in listed(given):
        try:
            _check(parsed(item), home)
        except LayerpeftError as error:
            found += [Problem((KEY,), f"{KEY}: {problem.text}") for problem in error.listed()]
    return found


def _check(reward: Reward, home: Path) -> None:
    if reward.file:
        path, data = file_beside(reward.file, home, reward.asked)
        _check_code(reward, path, data)
    elif not is_model(reward):
        _made(reward)
    elif (place := expanded(place_of(reward.asked))).is_dir():
        if not any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigError(f"{place} has no config.json, so it is no model")
    elif not ("/" in reward.asked and ADDRESS.fullmatch(reward.asked)):
        known = of_trl()
        raise ConfigError(
            f"{unknown('reward', reward.name, known)} Or a function of a file beside the recipe (./rewards.py:correct_answer), or "
            "the folder or hub id of a reward model"
        )


def _check_code(reward: Reward, path: Path, data: bytes) -> None:
    """Raises: ConfigError for a file that has no such function, or one that cannot take what TRL hands it."""
    try:
        body = ast.parse(data, str(path)).body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{reward.asked}: {path} is no Python ({error})") from error
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    names = {name for node in body for name in _names(node)}
    if reward.name not in names:
        there = ", ".join(functions) or "none"
        raise ConfigError(
            f"{reward.asked}: {path.name} has no {reward.name!r}.{hint(reward.name, list(names))} Its functions: {there}"
        )
    node = functions.get(reward.name)
    if node is not None and node.args.kwarg is None:
        raise ConfigError(
            f"{reward.asked}: takes no other arguments, and TRL gives it prompts, completions, completion_ids, every column of the "
            f"rows and more; write `def {reward.name}(completions, …, **kwargs)`"
        )


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a file gives names to."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _made(reward: Reward) -> Callable[..., Any]:
    """A function of TRL, or one that is made with options there. Raises: ConfigError."""
    known = of_trl()
    if reward.name not in known:
        raise ConfigError(unknown("reward", reward.name, known))
    function = known[reward.name]
    makes = reward.name.startswith("get_")
    if not makes and reward.options:
        raise ConfigError(f"{reward.name}: takes no options; write it by its name alone")
    if not makes:
        return function
    try:
        inspect.signature(function).bind(**(reward.options or {}))
    except TypeError as error:
        takes = ", ".join(f"{name}: …" for name in inspect.signature(function).parameters)
        raise ConfigError(f"{reward.name}: {error}; write {{{reward.name}: {{{takes}}}}}") from error
    return function(**(reward.options or {}))


def ready(setup: Any) -> None:
    """Makes the functions. Code is named, and runs; models are left for later. Raises: RecipeError."""
    for reward in _rewards(setup.recipe):
        if not is_model(reward):
            function = _function(setup.recipe, reward)
            if isinstance(setup.train[0]["prompt"], str) and _reads_turns(function):
                text = f"{reward.asked} reads conversations, and the prompts are text; write them as turns, as in "
                raise wrong(KEY, text + 'columns: {user: "{question}"}')


def given(setup: Any) -> dict[str, Any]:
    """The functions and models, with a tokenizer for each model. Raises: RecipeError."""
    recipe, found = setup.recipe, _rewards(setup.recipe)
    functions = [_model(recipe, reward) if is_model(reward) else _function(recipe, reward) for reward in found]
    readers = [tokenizer(recipe, KEY, reward.asked) if is_model(reward) else None for reward in found]
    return {"reward_funcs": functions, "reward_processing_classes": readers}


def _rewards(recipe: Any) -> list[Reward]:
    return [parsed(item) for item in listed(recipe[KEY])]


def _function(recipe: Any, reward: Reward) -> Callable[..., Any]:
    """Raises: RecipeError."""
    try:
        if not reward.file:
            return _made(reward)
        found = _ran(*code_beside(reward.file, recipe.path.parent, f"{KEY}: {reward.asked}"))
        if not callable(function := getattr(found, reward.name, None)):
            raise ConfigError(f"{reward.asked}: {reward.name} is no function")
        return function
    except ConfigError as error:
        raise wrong(KEY, str(error)) from error


@cache
def _ran(path: Path, data: bytes) -> Any:
    """What a file's code makes; it runs once."""
    return ran(path.name, path, data)


def _reads_turns(function: Any) -> bool:
    """Whether a function of TRL says that answers are lists of turns."""
    if not getattr(function, "__module__", "").startswith("trl."):
        return False
    asked = inspect.signature(function).parameters.get("completions")
    return asked is not None and "dict" in str(asked.annotation)


def _model(recipe: Any, reward: Reward) -> Any:
    """A model with a head of one number; an adapter of such is put into its base."""
    kind, options = transformers.AutoModelForSequenceClassification, {"dtype": recipe["dtype"]}
    place = Path(place_of(reward.asked))
    if (place / "adapter_config.json").is_file():
        found = with_adapter(str(place), **options).merge_and_unload()
    else:
        found = load(recipe, KEY, kind.from_pretrained, reward.asked, **options)
    if found.config.num_labels != 1:
        raise wrong(KEY, f"{reward.asked}: gives {found.config.num_labels} numbers, and a reward is one")
    return found.eval().requires_grad_(False)


def files(recipe: Any) -> list[str]:
    """The files of code that a recipe's rewards lie in, as it names them."""
    found = _rewards(recipe) if recipe.get(KEY) else []
    return list(dict.fromkeys(reward.file for reward in found if reward.file))

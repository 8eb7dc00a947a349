"""The command `layerpeft`: train, plan, score, compare, merge, recipes, env. Errors of ours end in one message and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from layerpeft.errors import LayerpeftError, RecipeError, nearest, unknown
from layerpeft.integrations import hub
from layerpeft.integrations.files import version_of
from layerpeft.quantization.save import is_saved, read_manifest
from layerpeft.recipe.compare import compare, parse_arms
from layerpeft.recipe.measure import measure
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.score import score
from layerpeft.recipe.shipped import find_recipe, recipes
from layerpeft.recipe.surroundings import on_hub
from layerpeft.recipe.train import is_first, run
from layerpeft.tuners.merge import merge

PACKAGES = (
    "layerpeft", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "bitsandbytes", "hqq", "wandb",
)  # fmt: skip


# warnings of libraries about each other, of which somebody with a recipe can change nothing
_NOT_FOR_USERS = (".*gradient_checkpointing.*is deprecated", ".*'pin_memory' argument is set as true")


class UsageError(LayerpeftError):
    """A command line that cannot be read."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for an error that names its cause, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _read(words)
        with warnings.catch_warnings(), contextlib.ExitStack() as args.until_the_end:
            for message in _NOT_FOR_USERS:
                warnings.filterwarnings("ignore", message=message)
            args.command(args)
        return 0
    except LayerpeftError as error:
        print(f"layerpeft: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"layerpeft: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("layerpeft: interrupted", file=sys.stderr)
        return 130


def _read(words: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in commands:
        close = nearest(first, commands)
        if close is None and (first.endswith((".yaml", ".yml")) or first in recipes()):
            close = f"train {first}"
        hint = f" Did you mean `layerpeft {close}`?" if close else ""
        raise UsageError(f"unknown command {first!r}.{hint} Commands: {', '.join(commands)}.")
    args, rest = parser.parse_known_args(words)
    if hasattr(args, "settings"):  # those behind an option, which argparse leaves over
        args.settings += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if "=" not in word or word.startswith("-")]
    if rest:
        raise UsageError(_stray(rest, hasattr(args, "settings")))
    if getattr(args, "recipe", "") is None:
        raise UsageError(f"name a recipe: a path, or one of those that ship ({', '.join(recipes())})")
    if not hasattr(args, "command"):
        parser.print_help()
        args.command = lambda _: None
    return args


def _stray(rest: list[str], takes_settings: bool) -> str:
    word = rest[0]
    if takes_settings and word.startswith("--"):
        name, _, value = word.removeprefix("--").partition("=")
        value = value or (rest[1] if len(rest) > 1 else "VALUE")
        return f"unknown option {word!r}. Settings of the recipe are written key=value: {name}={value}"
    return f"unknown argument {word!r} (see `layerpeft --help`)"


def _parser() -> tuple[_Parser, list[str]]:
    parser = _Parser(prog="layerpeft", description="Fine-tune the layers that matter.")
    parser.add_argument("--version", action="version", version=version_of("layerpeft") or "unknown")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def add(name: str, about: str, command: Callable[[argparse.Namespace], None], recipe: bool = False) -> Any:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(command=command)
        if recipe:
            sub.add_argument(
                "recipe",
                metavar="RECIPE",
                nargs="?",
                help="path of a recipe, or the name of one that ships (layerpeft recipes)",
            )
            sub.add_argument(
                "settings", metavar="key=value", nargs="*", help="settings over the recipe's, as layerpeft.r=8"
            )
        return sub

    add("train", "train a recipe", _train, recipe=True)
    planning = add("plan", "what a recipe will cost, before any weight is loaded", _plan, recipe=True)
    planning.add_argument("--fit", metavar="SIZE", help="find the largest choice that fits into SIZE, as 24GB")
    planning.add_argument(
        "--accelerator", action="store_true", help="count as on a GPU, even where there is none (default: what is here)"
    )
    planning.add_argument(
        "--measure", action="store_true", help="run one real step, and print what was predicted beside what was counted"
    )
    scoring = add("score", "score the layers of a recipe's model, without training", _score, recipe=True)
    comparing = add("compare", "train a recipe beside other choices of as many layers", _compare, recipe=True)
    comparing.add_argument(
        "--arms", default="random:3,last,all", help="random[:N], last, first, all (default: %(default)s)"
    )
    comparing.add_argument(
        "--seeds", type=int, default=3, help="draws of `random` where --arms names no number (default: 3)"
    )
    merging = add("merge", "put an adapter into the weights of its base model, as a full model on disk", _merge)
    merging.add_argument("folder", metavar="FOLDER", help="folder of the adapter")
    merging.add_argument("into", metavar="OUT", help="new folder for the full model")
    merging.add_argument("--base", metavar="MODEL", help="folder or name of the base (default: what the adapter says)")
    merging.add_argument("--dtype", metavar="TYPE", help="of the weights, as bfloat16 (default: the base's)")
    merging.add_argument(
        "--into-quantized", action="store_true", help="merge into a quantized base, whose weights are rounded once more"
    )
    shipped = add("recipes", "list, show or copy the recipes that ship", _recipes)
    shipped.add_argument("action", nargs="?", default="list", help="list (default), show, copy")
    shipped.add_argument("name", nargs="?", help="name of a recipe")
    shipped.add_argument("dest", nargs="?", help="where to copy it (default: NAME.yaml here)")
    environment = add("env", "versions and devices, to paste into an issue", _env)
    for sub in (planning, scoring, comparing, shipped, environment):
        sub.add_argument("--json", action="store_true", help="print JSON on standard output, and nothing else there")
    return parser, list(commands.choices)


# ---- commands -------------------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace, purpose: str) -> Recipe:
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet when they are imported
        recipe = load_recipe(args.recipe, args.settings, purpose)
    _settle(args, recipe)
    return recipe


def _settle(args: argparse.Namespace, recipe: Recipe) -> None:
    """Says what was mapped or left out; until the command ends, a hub that cannot be reached is not asked again."""
    args.until_the_end.enter_context(hub.settled(on_hub(recipe.values)))
    if is_first():
        for notice in recipe.notices:
            print(f"note: {notice}", file=sys.stderr)


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


@contextlib.contextmanager
def _only_json(wanted: bool) -> Iterator[None]:
    """Sends everything that is printed on the way to standard error, so that standard output holds the JSON alone."""
    if not wanted:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _train(args: argparse.Namespace) -> None:
    run(_load(args, "train"), _say)


def _plan(args: argparse.Namespace) -> None:
    with _only_json(args.json):
        found = forecast(args.recipe, args.settings, args.fit, args.accelerator or None)
        _settle(args, found.recipe)
        measured = measure(args.recipe, [*args.settings, *found.changes]) if args.measure else None
    if args.json:
        if is_first():
            print(json.dumps(found.to_dict() | ({"measured": measured.to_dict()} if measured else {})))
        return
    _say(str(found))
    if measured:
        _say(f"\n{measured}")


def _score(args: argparse.Namespace) -> None:
    with _only_json(args.json):
        selection = score(_load(args, "score"), _say)
    if args.json and is_first():
        print(json.dumps(selection.to_dict()))


def _compare(args: argparse.Namespace) -> None:
    arms = parse_arms(args.arms, args.seeds)
    with _only_json(args.json):
        found = compare(_load(args, "compare"), arms, _say)
    if args.json and is_first():
        print(json.dumps(found.to_dict()))


def _merge(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype, None) if args.dtype else None
    if args.dtype and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(unknown("dtype", args.dtype, ("float32", "bfloat16", "float16")))
    with contextlib.redirect_stdout(sys.stderr):
        target = merge(args.folder, args.into, base=args.base, dtype=dtype, into_quantized=args.into_quantized)
    plain = not is_saved(target) or read_manifest(target, verify=False)["plain_transformers"]
    _say(f"{target}: a full model, which {'transformers loads by itself' if plain else 'layerpeft.load_saved loads'}")


def _recipes(args: argparse.Namespace) -> None:
    if args.action not in ("list", "show", "copy"):
        raise UsageError(unknown("action", args.action, ("list", "show", "copy")))
    if args.action == "list":
        _list(args.json)
        return
    if args.name is None:
        raise UsageError(f"name a recipe: {', '.join(recipes())}")
    path = recipes().get(args.name)
    if path is None:
        raise RecipeError(unknown("recipe", args.name, recipes()))
    if args.action == "show":
        print(path.read_text(encoding="utf-8"), end="")
        return
    dest = Path(args.dest or f"{args.name}.yaml")
    dest = dest / f"{args.name}.yaml" if dest.is_dir() else dest
    try:
        with dest.open("x", encoding="utf-8") as file:
            file.write(find_recipe(args.name).read_text(encoding="utf-8"))
    except FileExistsError:
        raise RecipeError(f"{dest} exists already; name another place") from None
    except OSError as error:
        raise RecipeError(f"cannot write {dest}: {error.strerror}") from error
    print(f"{dest}: run it with  layerpeft train {dest}")


def _list(as_json: bool) -> None:
    found = []
    for name, path in recipes().items():
        comments = [
            line.lstrip("# ").rstrip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
        ]
        found.append(
            {"name": name, "about": comments[1] if len(comments) > 1 else "", "command": comments[0], "path": str(path)}
        )
    if as_json:
        print(json.dumps(found))
        return
    width = max(len(item["name"]) for item in found)
    for item in found:
        print(f"{item['name']:<{width}}  {item['about']}")
    print("\nlayerpeft train NAME    layerpeft recipes show NAME    layerpeft recipes copy NAME")


def _env(args: argparse.Namespace) -> None:
    found: dict[str, Any] = {name: version_of(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "platform": platform.platform(), "devices": _devices()}
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<14} {', '.join(value) if isinstance(value, list) else value or 'not installed'}")


def _devices() -> list[str]:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    cpu = f"cpu ({torch.get_num_threads()} threads)"
    if kind is None:
        return [cpu]
    module = getattr(torch, kind.type)
    name = getattr(module, "get_device_name", lambda index: kind.type)
    return [f"{kind.type}:{i} {name(i)}" for i in range(torch.accelerator.device_count())] + [cpu]


if __name__ == "__main__":
    sys.exit(main())

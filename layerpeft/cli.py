"""The command `layerpeft`, and the parser of what follows it.

Errors of ours end in one message and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import itertools
import json
import os
import re
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from layerpeft import __version__
from layerpeft.errors import ElsewhereError, LayerpeftError, RecipeError, UsageError, mentions, nearest, told, unknown
from layerpeft.integrations import code, noise, saying
from layerpeft.planning.engines import ENGINES
from layerpeft.recipe.reading import SAMPLE_BY
from layerpeft.recipe.shipped import find_recipe, launch_files, recipes
from layerpeft.text import is_first, left_behind, on_screen
from layerpeft.using.export.limits import TARGETS

# What runs a command that needs the libraries, as module:function. It is imported once the words have been read, and not at the
# top of this file: help, recipes and every misspelt word would wait seconds for torch.
RUNS = {
    name: f"layerpeft.recipe.commands:{name}"
    for name in ("init", "train", "plan", "preview", "prefill", "score", "advise", "compare", "report", "merge", "env")
}
RUNS |= {name: f"layerpeft.using.commands:{name}" for name in ("generate", "predict", "eval", "export")}
RUNS["import"] = "layerpeft.recipe.commands:import_"  # a word of Python's
MANY = 1_000_000_000  # rows: more than anybody means
# words that people try, and what is meant by them
OF_OTHERS = {
    "chat": "generate FOLDER --chat", "show": "recipes show NAME", "copy": "recipes copy NAME", "list": "recipes",
    "finetune": "train RECIPE", "serve": "export FOLDER --to vllm", "help": "--help", "version": "--version",
}  # fmt: skip
Command = Callable[[argparse.Namespace], None]
REPLACED = "replace an earlier merge or export, and nothing that layerpeft did not write"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def _whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number of a command line within these ends."""

    def read(text: str) -> int:
        if re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most:,}, got {text!r}")

    return read


def _between(low: float, high: float) -> Callable[[str], float]:
    """A number of a command line between these, which do not belong to it."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low < float(text) < high:
                return float(text)
        raise argparse.ArgumentTypeError(f"expected a number between {low:g} and {high:g}, got {text!r}")

    return read


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for an error that names its cause, 130 when interrupted, 141 where whoever
    read what is printed has gone (`| head`)."""
    try:
        try:
            return _main(argv)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
        if not gone:  # another pipe
            raise
        for stream in gone:  # whatever is left in it is flushed at the end, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141


def _is_broken(stream: TextIO) -> bool:
    """Whether nobody reads it any more."""
    try:
        stream.flush()  # what could not be written before is still in it, if it keeps anything
        asked = select.poll()
        asked.register(stream.fileno(), select.POLLOUT)
        return any(flags & (select.POLLERR | select.POLLHUP) for _, flags in asked.poll(0))
    except BrokenPipeError:
        return True
    except (AttributeError, OSError, ValueError):  # no such thing on this system, or no file at all
        return False


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not (is_first() and sys.stderr.isatty()):
        saying.without_bars()
    try:
        args = _read(words)
        if isinstance(args.command, str) and (wrong := left_behind()):
            raise UsageError(wrong)
        with noise.kept_back(args.verbose), contextlib.ExitStack() as args.until_the_end:
            args.until_the_end.callback(code.forget)
            command = _loaded(args.command) if isinstance(args.command, str) else args.command
            command(args)
        return 0
    except ElsewhereError:  # which says why
        return 2
    except LayerpeftError as error:
        return _end(str(error))
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _end(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}")
    except Exception as error:
        if not mentions(error, "os error 28", word=False):  # how safetensors says that the disk is full
            raise
        return _end(told(error))
    except KeyboardInterrupt as stop:
        return _end(f"interrupted: {str(stop) or 'nothing was saved'}", 130, "\n")


def _end(text: str, code: int = 2, before: str = "") -> int:
    """Says why a command ends, once where several processes run it. Returns the exit code."""
    if left_behind() or saying.says(text):  # what is no process of a launch is alone
        print(on_screen(f"{before}layerpeft: {text}", sys.stderr), file=sys.stderr)
    return code


def _read(words: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in commands:
        close = OF_OTHERS.get(first) or nearest(first, commands)
        if close is None and (first.endswith((".yaml", ".yml")) or first in recipes()):
            close = f"train {first}"
        hint = f" Did you mean `layerpeft {close}`?" if close else ""
        raise UsageError(f"unknown command {first!r}.{hint} Commands: {', '.join(commands)}.")
    args, rest = parser.parse_known_args(words)
    if hasattr(args, "settings"):  # those behind an option, which argparse leaves over
        args.settings += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if "=" not in word or word.startswith("-")]
    if rest:
        raise UsageError(_stray(rest, args))
    if getattr(args, "recipe", "") is None:
        raise UsageError(f"name a recipe: a path, or one of those that ship ({', '.join(recipes())})")
    if hasattr(args, "recipe"):
        find_recipe(args.recipe)
    if not hasattr(args, "command"):
        parser.print_help()
        args.command, args.verbose = lambda _: None, False
    return args


def _loaded(place: str) -> Command:
    """What stands at `module:function`; says that it is loading where somebody is waiting for it."""
    if "torch" not in sys.modules and is_first():
        print("layerpeft: loading libraries …", file=sys.stderr, flush=True)
    module, _, name = place.partition(":")
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet when they are imported
        return getattr(importlib.import_module(module), name)


def _stray(rest: list[str], args: argparse.Namespace) -> str:
    word = rest[0]
    options = [f"--{name.replace('_', '-')}" for name in vars(args) if name not in ("recipe", "settings", "command")]
    if word.startswith("--") and (close := nearest(word.partition("=")[0], options)):
        return f"unknown option {word!r}. Did you mean {close!r}?"
    if hasattr(args, "settings") and word.startswith("--"):
        name, _, value = word.removeprefix("--").partition("=")
        value = value or (rest[1] if len(rest) > 1 else "VALUE")
        what = "Settings of the recipe" if hasattr(args, "recipe") or hasattr(args, "fit") else "Options of generation"
        return f"unknown option {word!r}. {what} are written key=value: {shlex.quote(f'{name}={value}')}"
    return f"unknown argument {word!r} (see `layerpeft --help`)"


def _parser() -> tuple[_Parser, list[str]]:
    parser = _Parser(prog="layerpeft", description="Fine-tune the layers that matter.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def add(name: str, about: str, command: Command | None = None, recipe: bool = False) -> Any:
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument("-v", "--verbose", action="store_true", help="show what other libraries warn of, too")
        sub.set_defaults(command=command or RUNS[name])
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

    _starting(add("init", "write a recipe for a model, rows and a task, with layers that fit into memory"))
    _importing(
        add("import", "write a recipe that says what another tool's file says, and what it does not, with reasons")
    )
    add("train", "train a recipe", recipe=True)
    planning = add("plan", "what a recipe will cost, before any weight is loaded", recipe=True)
    _planning(planning)
    looking = add("preview", "rows as the model sees them: text, tokens, what carries loss, what is cut", recipe=True)
    _looking(looking)
    add("prefill", "fill what enters the lowest trained layer ahead, with one layer in memory at a time", recipe=True)
    scoring = add("score", "score the layers of a recipe's model, without training", recipe=True)
    advising = add("advise", "which layers to train, what that spares, and what is known of such choices", recipe=True)
    comparing = add("compare", "train a recipe beside other choices of layers and other methods", recipe=True)
    _comparing(comparing)
    reporting = add("report", "write the page (report.html) and the card of what was trained or compared again")
    reporting.add_argument("folder", metavar="FOLDER", help="what `layerpeft train` or `compare` wrote, or any adapter")
    _using(add)
    merging = add("merge", "put an adapter into the weights of its base model, as a full model on disk")
    _merging(merging)
    exporting = add("export", "what was trained as vLLM, llama.cpp or Ollama take it, and the command that serves it")
    _exporting(exporting)
    shipped = add("recipes", "list, show or copy the recipes that ship", _recipes)
    shipped.add_argument("action", nargs="?", default="list", help="list (default), show, copy")
    shipped.add_argument("name", nargs="?", help="name of a recipe")
    shipped.add_argument("dest", nargs="?", help="where to copy it (default: NAME.yaml here)")
    environment = add("env", "versions and devices, to paste into an issue")
    for sub in (planning, looking, scoring, advising, comparing, exporting, shipped, environment):
        sub.add_argument("--json", action="store_true", help="print JSON on standard output, and nothing else there")
    return parser, list(commands.choices)


def _starting(starting: argparse.ArgumentParser) -> None:
    starting.add_argument("--model", metavar="MODEL", help="folder, or name on the hub")
    starting.add_argument("--data", metavar="ROWS", help="file, folder, or name on the hub")
    starting.add_argument(
        "--task", metavar="NAME", help="a trainer, as sft, dpo, classification (default: told by the rows)"
    )
    starting.add_argument("--held-out", metavar="ROWS", help="held-out rows, or a share of them (default: 5%%)")
    starting.add_argument("--fit", metavar="SIZE", help="memory, as 24GB (default: what is here)")
    starting.add_argument("--out", metavar="FILE", help="where to write it (default: recipe.yaml)")
    starting.add_argument(
        "settings", metavar="key=value", nargs="*", help="settings of the recipe, as learning_rate=1e-4"
    )


def _importing(importing: argparse.ArgumentParser) -> None:
    importing.add_argument(
        "file",
        metavar="FILE",
        help="of axolotl, LLaMA-Factory, ms-swift, torchtune or LMFlow: YAML, JSON or a shell script",
    )
    importing.add_argument(
        "--from",
        metavar="TOOL",
        help="whose it is: axolotl, llamafactory, ms-swift, torchtune, lmflow (default: told by keys)",
    )
    importing.add_argument(
        "--model", metavar="MODEL", help="model of the recipe, by whose config layers are counted (default: the file's)"
    )
    importing.add_argument(
        "--out", metavar="FILE", default="recipe.yaml", help="where to write it (default: %(default)s)"
    )
    importing.add_argument("--force", action="store_true", help="write over a file that is there")


def _comparing(comparing: argparse.ArgumentParser) -> None:
    comparing.add_argument(
        "--arms",
        default="random:3,last,all",
        help="random[:DRAWS], last[:N], first[:N], all, a criterion as snr[:N], a shipped recipe as lisa, a recipe file "
        "(default: %(default)s)",
    )
    comparing.add_argument(
        "--seeds",
        type=_whole(1, 9_999),
        metavar="N",
        help="training seeds of every arm, and draws of `random` where --arms names no number (default: one seed, three draws)",
    )
    comparing.add_argument(
        "--budget",
        metavar="WHAT",
        help="give every arm as much memory, parameters or time as the recipe's own, or as memory=24GB says",
    )
    comparing.add_argument(
        "--rates",
        metavar="RATES",
        action="append",
        help="learning rates to try for each arm on a seed that does not count: 1e-4,1e-3, or x0.3,x1,x3 of its own; "
        "ARM=RATES for one (may be given again)",
    )


def _looking(looking: argparse.ArgumentParser) -> None:
    looking.add_argument("--rows", type=_whole(1, MANY), default=3, metavar="N", help="how many rows (default: 3)")
    looking.add_argument("--full", action="store_true", help="nothing is left out of long rows")
    looking.add_argument("--run-code", action="store_true", help="let code that comes with the model run")


def _planning(planning: argparse.ArgumentParser) -> None:
    planning.add_argument("--fit", metavar="SIZE", help="find the largest choice that fits into SIZE, as 24GB")
    planning.add_argument(
        "--accelerator", action="store_true", help="count as on a GPU, even where there is none (default: what is here)"
    )
    planning.add_argument(
        "--measure", action="store_true", help="run one real step, and print what was predicted beside what was counted"
    )
    planning.add_argument(
        "--processes",
        type=_whole(1, 1_000_000),
        metavar="N",
        help="also what one of N cards holds, and what passes between them",
    )
    planning.add_argument("--engine", metavar="NAME", help=f"of those processes: {', '.join(ENGINES)} (default: ddp)")
    planning.add_argument(
        "--run-code",
        action="store_true",
        help="let code that comes with the recipe or its model run, which it does not here",
    )


def _merging(merging: argparse.ArgumentParser) -> None:
    merging.add_argument("folder", metavar="FOLDER", help="folder of the adapter")
    merging.add_argument("into", metavar="OUT", help="new folder for the full model")
    merging.add_argument("--base", metavar="MODEL", help="folder or name of the base (default: what the adapter says)")
    merging.add_argument("--dtype", metavar="TYPE", help="of the weights, as bfloat16 (default: the base's)")
    merging.add_argument(
        "--into-quantized", action="store_true", help="merge into a quantized base, whose weights are rounded once more"
    )
    merging.add_argument(
        "--weights",
        metavar="W",
        help="how much what was trained counts, by layer: '0-7=0.5,8-11=1', or a YAML or JSON file",
    )
    merging.add_argument(
        "--plus",
        metavar="MODEL",
        help="with --minus: FOLDER is a full model, to which the difference of two others is added",
    )
    merging.add_argument("--overwrite", action="store_true", help=REPLACED)
    merging.add_argument("--minus", metavar="MODEL", help="as --plus an instruction-tuned model, and its base here")


def _exporting(exporting: argparse.ArgumentParser) -> None:
    exporting.add_argument(
        "folder", metavar="FOLDER", help="what `layerpeft train` wrote, any adapter of PEFT, or a whole model"
    )
    exporting.add_argument(
        "--to", choices=TARGETS, required=True, help="for whom; merged: a whole model for transformers"
    )
    exporting.add_argument("--out", metavar="DIR", help="new folder (default: FOLDER-TARGET)")
    exporting.add_argument(
        "--base", metavar="MODEL", help="folder or name of the base (default: what the adapter says)"
    )
    exporting.add_argument("--overwrite", action="store_true", help=REPLACED)
    exporting.add_argument("--whole", action="store_true", help="the whole model, also where an adapter would go")
    exporting.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="for ollama: the base, as a Modelfile's FROM names it (a model of Ollama, a GGUF file, a folder)",
    )


def _using(add: Callable[..., Any]) -> None:
    """The commands on what was trained."""
    folder = "what `layerpeft train` wrote: an adapter, a checkpoint in it, a merged model; or any adapter or model"
    writing = add("generate", "text from what was trained: answers to prompts, or a chat in the terminal")
    writing.add_argument("folder", metavar="FOLDER", help=folder)
    writing.add_argument(
        "settings", metavar="key=value", nargs="*", help="generation: max_new_tokens=64 temperature=0.7 seed=1 …"
    )
    writing.add_argument("--prompt", metavar="TEXT", action="append", help="text to go on from (may be given again)")
    writing.add_argument("--prompts", metavar="FILE", help="prompts, one a line, or JSON lines; - is standard input")
    writing.add_argument("--chat", action="store_true", help="talk in the terminal; with a prompt: it is a turn")
    writing.add_argument("--system", metavar="TEXT", help="what stands before a conversation")
    writing.add_argument("--json", action="store_true", help="a JSON line for each answer")
    saying_what, judging = _asking(add, folder)
    for sub in (writing, saying_what, judging):
        sub.add_argument(
            "--base",
            "--model",
            dest="base",
            metavar="MODEL",
            help="folder or name of the base (default: what the adapter says)",
        )


def _asking(add: Callable[..., Any], folder: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Those that read rows."""
    saying_what = add("predict", "what was trained says of rows: classes, spans, numbers, answers, text")
    judging = add("eval", "loss, accuracy, F1, exact answers or margins of what was trained, on rows with answers")
    for sub in (saying_what, judging):
        sub.add_argument("folder", metavar="FOLDER", help=folder)
        sub.add_argument(
            "rows", metavar="ROWS", help="a file (.csv, .tsv, .jsonl, .json, .parquet, .txt), or a data set"
        )
        sub.add_argument("--sample-by", choices=SAMPLE_BY, help="what a row of a .txt file is")
        sub.add_argument("settings", metavar="key=value", nargs="*", help="generation: max_new_tokens=64 …")
        sub.add_argument("--overwrite", action="store_true", help="replace what lies there")
    judging.add_argument("--out", metavar="FILE", help="JSON, with a picture of the classes beside it")
    judging.add_argument("--answers", action="store_true", help="generate answers, and count the exact ones")
    saying_what.add_argument("--out", metavar="FILE", required=True, help=".csv, .tsv, .jsonl or .parquet")
    saying_what.add_argument("--keep", metavar="COLUMN", action="append", help="a column to copy (may be given again)")
    saying_what.add_argument(
        "--threshold", type=_between(0, 1), default=0.5, help="of several labels (default: %(default)s)"
    )
    for sub in (saying_what, judging):
        sub.add_argument("--split", default="test", help="of a data set (default: %(default)s)")
        sub.add_argument(
            "--batch-size", type=_whole(1, MANY), default=16, metavar="N", help="rows at once (default: %(default)s)"
        )
        sub.add_argument(
            "--column", metavar="NAME='{column}'", action="append", help="what is what, as text='{sentence}'"
        )
    return saying_what, judging


def _recipes(args: argparse.Namespace) -> None:
    if args.action not in ("list", "show", "copy"):
        raise UsageError(unknown("action", args.action, ("list", "show", "copy")))
    if args.action == "list":
        _list(args.json)
        return
    if args.name is None:
        raise UsageError(f"name a recipe: {', '.join(recipes())}")
    known = recipes() | launch_files()
    path = known.get(args.name)
    if path is None:
        raise RecipeError(unknown("recipe", args.name, known))
    if args.action == "show":
        print(path.read_text(encoding="utf-8"), end="")
        return
    dest = Path(args.dest or path.name)
    dest = dest / path.name if dest.is_dir() else dest
    try:
        with dest.open("x", encoding="utf-8") as file:
            file.write(path.read_text(encoding="utf-8"))
        _copy_code(path, dest.parent)
    except FileExistsError:
        raise RecipeError(f"{dest} exists already; name another place") from None
    except OSError as error:
        raise RecipeError(f"cannot write {dest}: {error.strerror}") from error
    command = ["layerpeft", "train", str(dest)]
    if args.name in launch_files():
        command = ["accelerate", "launch", "--config_file", str(dest), "-m", "layerpeft", "train", "RECIPE"]
    print(f"{dest}: run it with  {shlex.join(command)}")


def _copy_code(recipe: Path, folder: Path) -> None:
    """Puts the code that a shipped recipe names beside its copy; what lies there already stays."""
    text = recipe.read_text(encoding="utf-8")
    for path in recipe.parent.glob("*.py"):
        if f"./{path.name}:" in text and not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())


def _list(as_json: bool) -> None:
    found = []
    for name, path in recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line.lstrip("# ").rstrip() for line in lines if line.startswith("#")]
        found.append({"name": name, "about": _about(comments[1:]), "command": comments[0], "path": str(path)})
    if as_json:
        print(json.dumps(found))
        return
    width = max(len(item["name"]) for item in found)
    for item in found:
        print(on_screen(f"{item['name']:<{width}}  {item['about']}", sys.stdout))
    print("\nlayerpeft train NAME    layerpeft recipes show NAME    layerpeft recipes copy NAME")
    print(f"for several processes (accelerate launch --config_file), to show and copy: {', '.join(launch_files())}")


def _about(lines: Sequence[str]) -> str:
    """The first of the lines that say what a recipe is, with the rest of a sentence that goes on behind it."""
    if not lines or lines[0].endswith("."):
        return "".join(lines[:1])
    text = " ".join(itertools.takewhile(bool, lines))
    return next((text[: end.end()].rstrip() for end in re.finditer(r"\.(\s|$)", text)), text)


if __name__ == "__main__":
    sys.exit(main())

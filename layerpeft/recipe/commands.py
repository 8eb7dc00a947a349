"""What the commands do that need torch and its kin: one function a command, given its words as argparse has read them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import sys
from typing import Any

import torch

from layerpeft.errors import ElsewhereError, LayerpeftError, UsageError, unknown
from layerpeft.integrations import hub
from layerpeft.integrations.code import kept_out
from layerpeft.integrations.distributed import first_where, rank
from layerpeft.integrations.files import version_of
from layerpeft.integrations.places import expanded
from layerpeft.planning.engines import Cards, cards
from layerpeft.quantization.save import is_saved, read_manifest
from layerpeft.recipe.advice_text import told as advice_told
from layerpeft.recipe.advise import advise as advise_on
from layerpeft.recipe.asking import asked
from layerpeft.recipe.compare import Fairly
from layerpeft.recipe.compare import compare as compare_arms
from layerpeft.recipe.comparing.arms import parse_arms
from layerpeft.recipe.comparing.budgets import parse_budget
from layerpeft.recipe.comparing.rates import parse_rates
from layerpeft.recipe.importing.convert import import_file
from layerpeft.recipe.importing.trying import note_down, tried
from layerpeft.recipe.init import Wanted
from layerpeft.recipe.init import init as write_recipe
from layerpeft.recipe.launching import suggest_launch
from layerpeft.recipe.measure import measure
from layerpeft.recipe.page.page import report as report_on
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.prefill import prefill as fill_ahead
from layerpeft.recipe.preview import preview as look_at
from layerpeft.recipe.preview_text import Screen, told
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.score import score as score_layers
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.surroundings import on_hub
from layerpeft.recipe.train import run
from layerpeft.text import is_first, on_screen
from layerpeft.tuners.difference import add_difference
from layerpeft.tuners.merge import merge as merge_adapter

PACKAGES = (
    "layerpeft", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "bitsandbytes", "hqq", "wandb",
)  # fmt: skip
RUN_CODE = "a plan runs none without the option --run-code; train, score and compare do"


def train(args: argparse.Namespace) -> None:
    recipe = _load(args, "train")
    suggest_launch(recipe)
    run(recipe, _say)


def prefill(args: argparse.Namespace) -> None:
    fill_ahead(_load(args, "prefill"), _say)


def plan(args: argparse.Namespace) -> None:
    several = _cards(args)
    with _aside(args.json), contextlib.nullcontext() if args.run_code else kept_out(RUN_CODE):
        found = forecast(args.recipe, args.settings, args.fit, args.accelerator or None, several)
        _settle(args, found.recipe)
        recipe = args.recipe if found.changes else found.recipe
        measured = measure(recipe, [*args.settings, *found.changes]) if args.measure else None
    if args.json:
        if is_first():
            print(json.dumps(found.to_dict() | ({"measured": measured.to_dict()} if measured else {})))
        return
    _say(str(found))
    if measured:
        _say(f"\n{measured}")


def init(args: argparse.Namespace) -> None:
    out = args.out or "recipe.yaml"
    given = Wanted(args.model, args.data, args.task, args.held_out, out, args.fit, tuple(args.settings))
    if sys.stdin.isatty() and sys.stdout.isatty() and is_first():
        given = asked(given, args.out is None)
    with _aside(), kept_out(RUN_CODE):
        path, found = write_recipe(given)
    place = shlex.quote(str(path))
    _say(f"{found}\n\n{path}: look at it, then\n  layerpeft preview {place}\n  layerpeft train {place}")


def import_(args: argparse.Namespace) -> None:
    with _aside(), kept_out(RUN_CODE):
        found = import_file(args.file, args.out, vars(args)["from"], args.model, args.force)
        planned = tried(found.path)
    note_down(planned, found.path)
    lines = [f"left out: {key} -- {why}" for key, why in found.left]
    place = shlex.quote(str(found.path))
    what = f"{found.path}: {found.mapped} keys of {found.tool}, with what each was called there"
    told = f"; {len(found.left)} left out, each with the reason" if found.left else ""
    then = "Mend that, then" if planned.problems else "Look at it, then"
    _say(
        "\n".join(
            [
                *lines,
                *[""] * bool(lines),
                f"{what}{told}",
                *planned.told,
                then,
                f"  layerpeft plan {place}",
                f"  layerpeft train {place}",
            ]
        )
    )


def preview(args: argparse.Namespace) -> None:
    with _aside(), contextlib.nullcontext() if args.run_code else kept_out(RUN_CODE):
        found = look_at(_load(args, "preview"), args.rows)
    _say(json.dumps(found.to_dict()) if args.json else told(found, _screen(args.full)))


def _screen(full: bool) -> Screen:
    """The terminal that is written to; without one 120 columns and no colour."""
    tty = sys.stdout.isatty()
    colour = tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    try:
        "⟦⟧…".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return Screen(shutil.get_terminal_size((120, 24)).columns, colour, False, full)
    return Screen(shutil.get_terminal_size((120, 24)).columns, colour, True, full)


def _cards(args: argparse.Namespace) -> Cards | None:
    """Those that a plan is to count; an engine alone runs on the accelerators that are here."""
    if args.processes is None and args.engine is None:
        return None
    there = torch.accelerator.device_count()
    if args.processes is None and there < 2:
        raise UsageError(f"--engine {args.engine}: say on how many cards (--processes 8); there are not several here")
    return cards(args.engine or "ddp", args.processes if args.processes is not None else there)


def score(args: argparse.Namespace) -> None:
    with _aside(args.json):
        selection = score_layers(_load(args, "score"), _say)
    if args.json and is_first():
        print(json.dumps(selection.to_dict()))


def advise(args: argparse.Namespace) -> None:
    with _aside(args.json):
        found = advise_on(_load(args, "score"))
    _say(json.dumps(found.to_dict()) if args.json else advice_told(found))


def compare(args: argparse.Namespace) -> None:
    arms = parse_arms(args.arms, 3 if args.seeds is None else args.seeds)
    rates = parse_rates(args.rates or (), [arm.name for arm in arms])
    fairly = Fairly(args.seeds or 1, parse_budget(args.budget) if args.budget else None, rates)
    with _aside(args.json):
        found = compare_arms(_load(args, "compare"), arms, _say, fairly)
    if args.json and is_first():
        print(json.dumps(found.to_dict()))


def report(args: argparse.Namespace) -> None:
    for path in report_on(expanded(args.folder)):
        _say(str(path))


def merge(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype, None) if args.dtype else None
    if args.dtype and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(unknown("dtype", args.dtype, ("float32", "bfloat16", "float16")))
    if (args.plus is None) != (args.minus is None):
        raise UsageError("--plus and --minus go together: what is added is their difference")
    with _aside():
        if args.plus is not None:
            if args.base or dtype or args.into_quantized:
                raise UsageError(
                    "--base, --dtype and --into-quantized merge an adapter, --plus and --minus add up full models"
                )
            target = add_difference(args.folder, args.into, args.plus, args.minus, args.weights, args.overwrite)
        else:
            quantized, weights, base = args.into_quantized, args.weights, args.base and resolve(args.base)
            target = merge_adapter(
                args.folder,
                args.into,
                base=base,
                dtype=dtype,
                into_quantized=quantized,
                weights=weights,
                overwrite=args.overwrite,
            )
    plain = not is_saved(target) or read_manifest(target, verify=False)["plain_transformers"]
    _say(f"{target}: a full model, which {'transformers loads by itself' if plain else 'layerpeft.load loads'}")


def env(args: argparse.Namespace) -> None:
    found: dict[str, Any] = {name: version_of(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "platform": platform.platform(), "devices": _devices()}
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<14} {', '.join(value) if isinstance(value, list) else value or 'not installed'}")


def _load(args: argparse.Namespace, purpose: str) -> Recipe:
    """The recipe, once every process has checked it: none goes on, and writes, while another still looks at the output folder.
    Raises: RecipeError in the first process that refuses it; ElsewhereError in the others."""
    recipe, refusal = None, None
    with _aside():
        try:
            recipe = load_recipe(args.recipe, args.settings, purpose)
        except LayerpeftError as error:
            refusal = error
    speaker = first_where(refusal is not None)
    if refusal is not None and speaker == rank():
        raise refusal
    if recipe is None or speaker is not None:
        raise ElsewhereError()
    _settle(args, recipe)
    return recipe


def _settle(args: argparse.Namespace, recipe: Recipe) -> None:
    """Says what was mapped or left out; until the command ends, a hub that cannot be reached is not asked again."""
    args.until_the_end.enter_context(hub.settled(on_hub(recipe.values)))
    if is_first():
        for notice in recipe.notices:
            print(on_screen(f"note: {notice}", sys.stderr), file=sys.stderr)


def _say(text: str) -> None:
    if is_first():
        encoding, text = sys.stdout.encoding or "utf-8", on_screen(text, sys.stdout)
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _aside(wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Sends everything that is printed on the way to standard error: the greetings of libraries, and all where JSON is wanted."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def _devices() -> list[str]:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    cpu = f"cpu ({torch.get_num_threads()} threads)"
    if kind is None:
        return [cpu]
    module = getattr(torch, kind.type)
    name = getattr(module, "get_device_name", lambda index: kind.type)
    return [f"{kind.type}:{i} {name(i)}" for i in range(torch.accelerator.device_count())] + [cpu]

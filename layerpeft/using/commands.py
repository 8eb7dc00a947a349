"""What `generate`, `predict` and `eval` do, given their words as argparse has read them."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from layerpeft.errors import UsageError, unknown
from layerpeft.integrations import hub
from layerpeft.using.folder import Trained, find, load_found, tokenizer_of
from layerpeft.using.generate import chat, check_template, check_writes, prompts_of, say_all
from layerpeft.using.incoming import Incoming, incoming, templates
from layerpeft.using.options import read_options
from layerpeft.using.predict import predict as write_predictions
from layerpeft.using.table import check_out
from layerpeft.using.ways import way_of


def generate(args: argparse.Namespace) -> None:
    options = read_options(args.settings)
    found = _found(args)
    check_writes(found)
    tokenizer = tokenizer_of(found)
    prompts = prompts_of(args, found)
    if any(isinstance(prompt, list) for prompt in prompts) or args.chat:
        check_template(tokenizer)
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet
        model = load_found(found)
    if args.chat and not prompts:
        chat(model, tokenizer, options, args.system)
    else:
        say_all(model, tokenizer, prompts, options, args.json)


def predict(args: argparse.Namespace) -> None:
    options, out = read_options(args.settings), check_out(args.out, args.overwrite)
    if args.batch_size < 1 or not 0 < args.threshold < 1:
        raise UsageError("--batch-size is a whole number above zero, --threshold lies between 0 and 1")
    found = _found(args)
    kind = way_of(found)
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet
        rows = _rows(args, found, kind.forms, kind.more)
        have = rows.source.columns
        if strange := [name for name in args.keep or () if name not in have]:
            raise UsageError("; ".join(f"--keep: {unknown('column', name, have)}" for name in strange))
        way = kind(found, load_found(found), tokenizer_of(found, kind.needs), options, args.threshold, rows.homes)
        count = write_predictions(rows, way, out, args.batch_size, args.keep or ())
    print(f"{out}: {count.told(way.cut, way.limit)}")


def _rows(args: argparse.Namespace, found: Trained, forms: Any, more: Any) -> Incoming:
    columns = dict(found.recipe.values.get("columns") or {}) | templates(args.column or ())
    return incoming([args.rows], args.split, found.trainer, forms, more, columns)


def _found(args: argparse.Namespace) -> Trained:
    """The folder that is named; until the command ends, a hub that cannot be reached is not asked again."""
    args.until_the_end.enter_context(hub.settled())
    return find(args.folder, args.model)

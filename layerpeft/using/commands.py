"""What `generate`, `predict`, `eval` and `export` do, given their words as argparse has read them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from layerpeft.errors import UsageError, unknown
from layerpeft.integrations import hub
from layerpeft.integrations.files import replace_file
from layerpeft.recipe.rows import load
from layerpeft.recipe.templates import template_columns
from layerpeft.text import on_screen
from layerpeft.using.evaluate import (
    draw_confusion,
    evaluate_answers,
    evaluate_by_trainer,
    evaluate_text,
    harness_line,
    is_preferred,
    judged_forms,
)
from layerpeft.using.export.export import export as write_export
from layerpeft.using.folder import Trained, find, load_found, tokenizer_of
from layerpeft.using.generate import chat, check_template, check_writes, prompts_of, say_all
from layerpeft.using.incoming import Incoming, check_learned, incoming, source_of, templates
from layerpeft.using.kinds import check_seen, way_of
from layerpeft.using.options import read_options
from layerpeft.using.predict import predict as write_predictions
from layerpeft.using.table import check_new, check_out
from layerpeft.using.vectors import check_there, evaluate_vectors


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
    found = _found(args)
    kind = way_of(found)
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet
        rows = _rows(args, found, kind.forms, kind.more)
        have = rows.source.columns
        check_seen(found, have)
        if strange := [name for name in args.keep or () if name not in have]:
            raise UsageError("; ".join(f"--keep: {unknown('column', name, have)}" for name in strange))
        way = kind(found, load_found(found), tokenizer_of(found, kind.needs), options, args.threshold, rows.homes)
        count = write_predictions(rows, way, out, args.batch_size, args.keep or ())
    print(on_screen(f"{out}: {count.told(way.cut, way.limit)}", sys.stdout))


def eval(args: argparse.Namespace) -> None:
    options = read_options(args.settings)
    out = Path(args.out).expanduser() if args.out else None
    if out is not None:
        check_new(out, args.overwrite)
    found = _found(args)
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet
        there = source_of(args.rows, args.split, _by(args, found)).columns
        columns = _columns(args, found, there)
        have = {*there, *(columns or {})}
        check_seen(found, have)
        by_trainer = is_preferred(found, have) or found.trainer == "masked_lm"
        if found.recipe.row.vectors:
            check_there(found)
        if by_trainer or found.recipe.row.vectors or found.kind.endswith("CausalLM") and not args.answers:
            text = not (by_trainer or found.recipe.row.vectors or found.trainer == "causal_lm")
            check_learned(args.rows, found.recipe, None if text else found.recipe.task, there, columns)
            source = load(args.rows, config=None, split=args.split, by=_by(args, found))
            assert source is not None
            model, tokenizer = load_found(found), tokenizer_of(found)
            measure = evaluate_by_trainer if by_trainer else evaluate_text
            measure = evaluate_vectors if found.recipe.row.vectors else measure
            result = measure(found, source, model, tokenizer, args.batch_size, columns)
        else:
            kind = way_of(found)
            rows = _rows(args, found, judged_forms(kind), (*kind.more, "answer_start"))
            way = kind(found, load_found(found), tokenizer_of(found, kind.needs), options, 0.5, rows.homes)
            result = evaluate_answers(rows, way, args.batch_size)
    print(on_screen(str(result), sys.stdout))
    if out is not None:
        replace_file(out, f"{json.dumps(result.to_dict(), indent=2, ensure_ascii=False)}\n".encode())
        picture = out.with_suffix(".png")
        drawn = bool(result.confusion) and draw_confusion(result, picture)
        print(f"\nwritten to {out}{f' and {picture}' if drawn else ''}")
    if line := harness_line(found):
        print(f"\nbenchmarks of lm-evaluation-harness (pip install 'layerpeft[eval]'):\n  {line}")


def export(args: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet
        more = {"base": args.base, "whole": args.whole, "start": args.start, "overwrite": args.overwrite}
        found = write_export(args.folder, args.to, args.out, **more)
    print(json.dumps(found.to_dict()) if args.json else on_screen(str(found), sys.stdout))


def _columns(args: argparse.Namespace, found: Trained, have: Collection[str]) -> dict[str, str] | None:
    """Templates of the command line, else those of training where the rows have what they name."""
    if args.column:
        return templates(args.column)
    columns = found.recipe.values.get("columns") or {}
    there = all(set(template_columns(template)) <= set(have) for template in columns.values())
    return dict(columns) if columns and there else None


def _rows(args: argparse.Namespace, found: Trained, forms: Any, more: Any) -> Incoming:
    columns = dict(found.recipe.values.get("columns") or {}) | templates(args.column or ())
    return incoming(args.rows, args.split, found.trainer, forms, more, columns, _by(args, found))


def _by(args: argparse.Namespace, found: Trained) -> str | None:
    """What a row of plain text is: as it is said here, else as training read them."""
    return args.sample_by or found.recipe.values.get("sample_by")


def _found(args: argparse.Namespace) -> Trained:
    """The folder that is named; until the command ends, a hub that cannot be reached is not asked again."""
    args.until_the_end.enter_context(hub.settled())
    return find(args.folder, args.base)

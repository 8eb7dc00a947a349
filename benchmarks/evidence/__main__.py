"""`python -m benchmarks.evidence`: runs the experiment of design.yaml from where it stands, and makes its tables."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import advice, charts, chosen, made, page, run, tables, work
from benchmarks.evidence.cell import Cell
from benchmarks.evidence.design import DESIGN, Design, load
from benchmarks.evidence.found import cells
from benchmarks.evidence.store import RESULTS, Store
from layerpeft.errors import ConfigError, LayerpeftError, unknown
from layerpeft.recipe.evidence import FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that names its cause, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        design = load(args.design)
        if args.command == "pretrain":
            for name in args.models or [n for n, m in design.models.items() if m.made]:
                print(made.pretrain(design, name, args.data, args.made))
        elif args.command == "run":
            _run(design, args)
        elif args.command == "table":
            print(tables.table(design, Store(args.results), args.name, args.data, args.made, args.json))
        else:
            founds = cells(design, Store(args.results), args.data, args.made)
            for name in args.names or charts.CHARTS if args.command == "chart" else ():
                print(charts.CHARTS[name](founds, args.out / f"evidence-{name}.png"))
            if args.command == "advice":
                print(advice.write(founds, args.out))
            if args.command == "page":
                print(page.write(founds, args.figures, args.out))
        return 0
    except LayerpeftError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is written stays, and the same command goes on", file=sys.stderr)
        return 130


def _run(design: Design, args: argparse.Namespace) -> None:
    """Makes what is missing, part by part and cell by cell, until there is nothing left or the time is over."""
    wrong = [unknown("cell", name, design.cells) for name in args.cell or () if name not in design.cells]
    if wrong:
        raise ConfigError(*wrong)
    store, end = Store(args.results), time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    parts, cells = args.part or run.PARTS, [Cell(design, n, args.data, args.made) for n in args.cell or design.cells]
    made = -1
    while made:  # what rests on runs of another process comes when those are there
        made = 0
        for group in ([p for p in parts if p != "more"], [p for p in parts if p == "more"]):
            for cell, part in ((cell, part) for cell in cells for part in group):
                for waits in (False, True) if part in run.FIRST else (False,):
                    for one in chosen.runs(design, cell, store, part):
                        if time.monotonic() > end:
                            print("the time is over; the same command goes on")
                            return
                        made += _make(cell, store, part, one, waits)


def _make(cell: Cell, store: Store, part: str, one: run.Run, waits: bool) -> bool:
    """Makes a run that nobody has made or makes; one that somebody makes is waited for on request."""
    with store.claim(one, waits) as mine:
        if mine:
            began = time.monotonic()
            store.write(one, work.made_run(cell, one))
            took = time.monotonic() - began
            print(f"{part} {cell.name} seed {one.seed} {one.select}: {took:.1f} s", flush=True)
        return mine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--design", type=Path, default=DESIGN)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the lines")
    parser.add_argument("--data", type=Path, help="folder of the rows and texts that do not ship")
    parser.add_argument("--made", type=Path, default=made.folder(), help="folder of the models that are made here")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="make what is missing")
    running.add_argument("--part", action="append", choices=run.PARTS)
    running.add_argument("--cell", action="append", metavar="MODEL/TASK")
    running.add_argument("--minutes", type=float, help="end after so many")
    making = commands.add_parser("pretrain", help="make the models that do not ship")
    making.add_argument("models", nargs="*")
    showing = commands.add_parser("table", help="a table of what has run")
    showing.add_argument("name", choices=tables.TABLES)
    showing.add_argument("--json", action="store_true")
    drawing = commands.add_parser("chart", help="pictures of the tables")
    drawing.add_argument("names", nargs="*", choices=[[], *charts.CHARTS], metavar="NAME", default=[])
    drawing.add_argument("--out", type=Path, default=page.PAGE.parent)
    filling = commands.add_parser(
        "page", help="the figures of all tables as JSON, and the tables of the page of the docs"
    )
    filling.add_argument("--figures", type=Path, default=page.FIGURES)
    filling.add_argument("--out", type=Path, default=page.PAGE)
    advising = commands.add_parser("advice", help="what the package ships of it")
    advising.add_argument("--out", type=Path, default=FILE)
    return parser


if __name__ == "__main__":
    sys.exit(main())

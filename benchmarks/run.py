"""Runs cases: `python -m benchmarks.run CASE…` writes one JSON per case; `--list` shows them, `all` takes all that can run here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.case import RESULTS, Case, kind_of, load, names
from benchmarks.machine import provenance
from layerpeft.errors import LayerpeftError

WITHOUT = "needs an accelerator, and there is none here; its counts without times are in the traced cases"


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 for what cannot be run as asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases, paths of case files, or all")
    parser.add_argument("--list", action="store_true", help="show the cases")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    args = parser.parse_args(words)
    try:
        chosen = [load(name) for name in (names() if args.list or args.cases == ["all"] else args.cases)]
        if args.list or not chosen:
            for case in sorted(chosen, key=lambda c: c.place):
                print(f"{case.name:<24} {case.title}" + (f" [needs: {case.needs}]" if case.needs else ""))
            return 0 if args.list else parser.error("name a case, or all")
        for case in chosen:
            run(case, args.out)
    except LayerpeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(case: Case, out: Path) -> Path | None:
    """Measures one case and writes its JSON; None, with a message, where what it needs is not here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if case.needs == "accelerator" and not torch.accelerator.is_available():
        print(f"{case.name}: skipped: {WITHOUT}")
        return None
    print(f"{case.name}: {case.title}", flush=True)
    found = kind_of(case).measure(case, lambda text: print(f"  {text}", flush=True))
    path = out / f"{case.name}.json"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_result(case, found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{case.name}: written {path.name}", flush=True)
    return path


def as_result(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """What a result's JSON holds: the case as given, where it ran, and what was found."""
    head = {"title": case.title, "about": case.about, "place": case.place, "kind": case.kind}
    asked = {key: value for key, value in case.given.items() if key not in (*head, "needs")}
    seed = int(getattr(case.options, "seed", 0))
    return {"name": case.name, **head, "case": asked, "provenance": provenance(seed), **found}


if __name__ == "__main__":
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("LAYERPEFT_QUIET", "1")):
        os.environ.setdefault(name, value)
    raise SystemExit(main())

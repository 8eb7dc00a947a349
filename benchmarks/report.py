"""Renders results as tables and charts: `python -m benchmarks.report` writes `README.md` between its markers, and `charts/`."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.case import CASES, KINDS, RESULTS, load, names
from layerpeft.errors import ConfigError, LayerpeftError
from layerpeft.selection import plugins

HERE = Path(__file__).parent
WIDTH = 120  # of the lines of prose that are written
START, END = "<!-- results -->", "<!-- end of results -->"


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 for results that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="file with the markers")
    args = parser.parse_args(words)
    try:
        found = read_results(args.results)
        charts = args.readme.parent / "charts"
        for result in found:
            plugins.get(KINDS, result["kind"]).draw(result, charts / f"{result['name']}.png")
        text = insert(args.readme.read_text(encoding="utf-8"), render(found, charts))
        args.readme.write_text(text, encoding="utf-8")
    except LayerpeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(found)} results rendered into {args.readme.name}")
    return 0


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results of a folder in the order of the report. Raises: ConfigError for a file that no case wrote."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("name", "title", "kind", "place", "case", "provenance") if key not in result]
        if missing:
            raise ConfigError(f"{path.name} was not written by benchmarks.run: it lacks {', '.join(missing)}")
        found.append(result)
    return sorted(found, key=lambda result: (result["place"], result["name"]))


def render(results: Sequence[Mapping[str, Any]], charts: Path, cases: Path = CASES) -> str:
    """The part of the README between the markers."""
    parts = [section(result, (charts / f"{result['name']}.png").is_file()) for result in results]
    done = {result["name"] for result in results}
    waiting = [load(name, cases) for name in names(cases) if name not in done]
    if waiting:
        lines = [
            f"- `{case.name}`: {case.title}" + (f" (needs an {case.needs})" if case.needs else "")
            for case in sorted(waiting, key=lambda case: case.place)
        ]
        parts.append("### Not run yet\n\n" + "\n".join(lines))
    return "\n".join(_wrapped(line) for line in "\n\n".join(parts).split("\n"))


def _wrapped(line: str) -> str:
    """A long line of prose as several; rows of tables, headings and pictures stay whole."""
    if len(line) <= WIDTH or line.startswith(("|", "#", "!")):
        return line
    inner = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, WIDTH, subsequent_indent=inner, break_long_words=False, break_on_hyphens=False)


def section(result: Mapping[str, Any], has_chart: bool) -> str:
    """One result: title, what was done, chart, table, arms, where it ran."""
    parts = [f"### {result['title']}", f"{result['about']} `python -m benchmarks.run {result['name']}`"]
    if has_chart:
        parts.append(f"![{result['title']}](charts/{result['name']}.png)")
    parts.append(plugins.get(KINDS, result["kind"]).tables(result))
    if "arms" in result:
        parts.append(table.legend(result["arms"]))
    parts.append(origin(result["provenance"]))
    return "\n\n".join(parts)


def origin(found: Mapping[str, Any]) -> str:
    """Commit, versions and machine in one line."""
    machine, versions = found["machine"], dict(found["versions"])
    commit = (found["commit"] or "unknown")[:10] + (" with changes" if found["uncommitted_changes"] else "")
    where = machine["accelerator"] or f"{machine['processor']}, {found['threads']} of {machine['cores']} cores"
    where += f", {found['clock']} time"
    packages = ", ".join(f"{name} {number}" for name, number in versions.items() if name not in ("python", "layerpeft"))
    return f"<sub>commit {commit}; {where}; {packages}; seed {found['seed']}</sub>"


def insert(text: str, rendered: str) -> str:
    """The text with what stands between the markers replaced. Raises: ConfigError where a marker is missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ConfigError(f"the file needs the two lines {START} and {END}")
    return f"{before}{START}\n\n{rendered}\n\n{END}{after}"


def between(text: str) -> str:
    """What stands between the markers."""
    return text.partition(START)[2].partition(END)[0].strip()


if __name__ == "__main__":
    raise SystemExit(main())

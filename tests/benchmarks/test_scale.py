"""The page of sizes that no one card takes: its tables are those of the result, and the result is what a plan says now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.case import RESULTS, load
from benchmarks.kinds import scale
from layerpeft.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
STORED = json.loads((RESULTS / "scale.json").read_text(encoding="utf-8"))


def stored(**wanted) -> dict:
    (found,) = (row for row in STORED["rows"] if all(row[key] == value for key, value in wanted.items()))
    return found


def test_the_page_shows_the_result_of_the_case():
    shown = PAGE.read_text(encoding="utf-8").partition("<!-- table -->")[2].partition("<!-- end of table -->")[0]
    assert shown.strip() == scale.tables(STORED).strip()
    options = load("scale").options
    count = len(options.models) * len(options.engines) * len(options.choices) * len(options.cards)
    assert len(STORED["rows"]) == count


def test_a_row_of_the_page_is_what_is_counted_now():
    found = scale.counted("llama-2-7b", "fsdp2", "last:25%", [1, 8])
    for share in found:
        row = stored(model="llama-2-7b", engine="FSDP2", layers="last:25%", cards=share.processes)
        assert scale.row("llama-2-7b", "last:25%", share) == row
    whole = stored(model="llama-2-7b", engine="FSDP2", layers="all", cards=8)
    assert row["backward"] < 0.3 * whole["backward"] and row["forward"] == pytest.approx(whole["forward"], rel=0.01)


@pytest.mark.slow
def test_the_command_of_the_page_prints_its_row(capsys):
    (line,) = (
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if "model_name_or_path=llama-2-7b" in line
    )
    words = line.replace("'", "").replace("benchmarks/scale", str(scale.RECIPE.parent)).split()[1:]
    assert main([*words, "--json"]) == 0
    share = json.loads(capsys.readouterr().out)["share"]
    row = stored(model="llama-2-7b", engine="FSDP2", layers="last:25%", cards=8)
    assert share["together"] == row["together"] and share["traffic"]["received"] == row["received"]

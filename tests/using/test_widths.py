"""What stands on a screen fits it; where no terminal is, lines are whole and there are no bars."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerpeft.cli import main
from layerpeft.recipe.shipped import resolve
from layerpeft.text import cells, on_screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_long_lines_are_broken_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "[layerpeft] 数数数 is read, and more\n  layerpeft train a/long/path.yaml\nshort"
    found = on_screen(text, Terminal()).split("\n")
    assert found == ["[layerpeft] 数数数", "  is read, and more", *text.split("\n")[1:]]
    assert on_screen(text, io.StringIO()) == text


@pytest.mark.parametrize("columns", [80, 120])
def test_predictions_and_numbers_fit(columns, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    rows = [{"text": f"{'the ' * n}[MASK] {'数' * 30}"} for n in range(6)] + [
        {"text": x} for x in ("", None, "no mask")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["layerpeft://toy-bert", str(tmp_path / "rows.jsonl")]
    monkeypatch.chdir(tmp_path)
    assert main(["predict", *words, "--out", "o.csv"]) == 0
    assert main(["predict", *words, "--out", "p.csv", "--keep", "a", "--keep", "b", "--keep", "c"]) == 2
    assert main(["eval", resolve("layerpeft://toy-bert"), "gone.jsonl", "--column", "text={a}"]) == 2
    out, err = capsys.readouterr()
    said = [line for part in (out, err) for line in part.split("\n") if "%|" not in line and len(line.split()) > 2]
    assert len(said) > 3 and all(cells(line) <= columns for line in said), [
        line for line in said if cells(line) > columns
    ]


@pytest.mark.slow
@pytest.mark.parametrize("verb, more, says", [("predict", ["--out", "o.csv"], "1 predicted\n"), ("eval", [], "loss: ")])
def test_without_a_terminal_there_are_no_bars(verb: str, more: list[str], says: str, tmp_path: Path) -> None:
    """Neither of ours nor of a trainer, by which this kind of model is evaluated."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a [MASK]"}\n')
    words = [verb, "layerpeft://toy-bert", "rows.jsonl", *more]
    given = {"cwd": tmp_path, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-m", "layerpeft", *words], env=here, check=True, **given)
    assert says in found.stdout and (verb == "eval" or found.stdout == "o.csv: 1 row read, 1 predicted\n")
    assert "\r" not in found.stderr and "%|" not in found.stderr and "\x1b" not in found.stderr

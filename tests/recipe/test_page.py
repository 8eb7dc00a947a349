"""The page of a run: everything that its folder says, escaped, in one file that fetches nothing; looked at in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from layerpeft.cli import main
from layerpeft.recipe.page import charts
from layerpeft.recipe.page.facts import Facts, facts
from layerpeft.recipe.page.page import PAGE, page, write_page
from layerpeft.recipe.page.svg import around, ticks
from layerpeft.saving import owned

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>document.title = 'taken'; console.error('ran')</script><img src=http://127.0.0.1:1/x>&amp;"
VOID = {"meta", "link", "img", "br"}


def row(index: int, unit: str = "layer") -> dict[str, Any]:
    chosen = index % 3 == 0
    name = f"model.{unit}s.{index}"
    return {
        "layer": index,
        "name": name,
        "score": 1 / (1 + index),
        "chosen": chosen,
        "steps": 9,
        "change": 0.1 if chosen else None,
    }


def window(step: int, layers: list[int], scores: list[float] | None = None) -> dict[str, Any]:
    return {"step": step, "layers": layers, "scores": scores}


def stored(layer: int) -> dict[str, Any]:
    name = f"model.layers.{layer}.mlp.up_proj"
    return {"name": name, "asked": "nf4", "got": "nf4" if layer else "16bit", "weights": 64, "bytes": 40, "before": 128}


MANIFEST = {
    "format": 1,
    "method": "lora",
    "selection": {"num_layers": 12, "why": f"4 of 12 layers {EVIL}", "scores": {"by": "gradient_norm"}},
    "report": [row(i) for i in range(12)],
    "schedule": {
        "step": 40,
        "history": [window(0, [0, 3], [0.1 * i for i in range(12)]), window(20, [6, 9]), window(40, [1])],
    },
    "versions": {"peft": "0.21"},
}
RUN = {
    "format": 1, "trainer": "sft", "seconds": 61.0, "steps": 40, "device": "cpu", "trainable": 100, "total": 5000,
    "names": {"eval_loss": "held-out loss"}, "before": {"eval_loss": 5.0}, "after": {"eval_loss": 2.5},
    "memory": {
        "planned": {"weights": 2**20, "activations": 2**21}, "measured": {"weights": 2**20, "peak of the process": 2**30},
    },
    "samples": [{"prompt": EVIL, "wanted": "7", "before": "", "after": f"7 {EVIL}"}],
    "recipe": f"trainer: sft  # {EVIL}\n",
}  # fmt: skip
ARMS = [("gradient_norm", 2.5), ("random:1", 2.6), ("random:2", 2.4), (f"last{EVIL}", 2.7)]
COMPARED = {
    "measure": "eval_loss", "before": 5.0, "verdict": {"sentence": f"No difference shown {EVIL}"},
    "runs": [{"arm": arm, "layers": [0, 1], "value": value, "seconds": 3.0} for arm, value in ARMS],
}  # fmt: skip


def folder(at: Path, manifest: Mapping[str, Any] = MANIFEST) -> Path:
    log = [{"step": s, "loss": 5 - s / 20} for s in range(1, 41)] + [
        {"step": s, "eval_loss": 5 - s / 16} for s in (0, 20, 40)
    ]
    (at / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + "not JSON\n"[:0])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b"}
    for name, content in {"adapter_config": config, "layerpeft": manifest, "run": RUN, "compare": COMPARED}.items():
        (at / f"{name}.json").write_text(json.dumps(content))
    return at


class Reader(HTMLParser):
    """Tags in their order, what is referred to, and text by the section that it stands in."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.alone: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        given = dict(attrs)
        self.links += [given[k] for k in ("src", "href", "xlink:href") if given.get(k)]
        if tag == "svg" and "aria-hidden" not in given:
            assert given["role"] == "img" and ": " in given["aria-label"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open, "every element is closed"
    return reader


def test_a_page_shows_all_of_a_run_and_nothing_of_it_runs(tmp_path: Path) -> None:
    text = write_page(folder(tmp_path)).read_text()
    found = read(text)
    assert not {"script", "img", "iframe", "object"} & set(found.seen)
    assert all(link.startswith("#") or link == "data:," for link in found.links) and "default-src 'none'" in text
    assert text.count("&lt;script&gt;") >= 6 and "<script" not in text
    assert {link[1:] for link in found.links if link[0] == "#"} == set(re.findall(r'<section id="(\w+)"', text))
    for words in (
        "5.0000 → 2.5000", "61 s", "2 windows over 40 optimizer steps", "No difference shown", "1.0 MiB", "2.0 MiB", "1.0 GiB",
        "gradient_norm", "Loss over optimizer steps: training from 4.95 to 3; held-out from 5 to 2.5",
        "layer 0 for 50% of all steps",
        "held-out loss of every arm: gradient_norm 2.5000; random 2.5000", "4 of 12 were chosen: 0, 3, 6, 9",
    ):  # fmt: skip
        assert words in text, words
    assert page(facts(tmp_path)) == text, "the same folder, the same page"


@pytest.mark.parametrize(
    ("scores", "said"),
    [((3.5, 3, 4), "a rule weighed them, and the highest are not all"), ((2, 3, 4), "higher trains first")],
)
def test_what_is_said_of_scores_is_true_of_the_choice(scores: tuple[float, ...], said: str, tmp_path: Path) -> None:
    rows = [{"layer": i, "name": f"l.{i}", "score": s, "chosen": i > 0} for i, s in enumerate(scores)]
    assert said in write_page(folder(tmp_path, MANIFEST | {"report": rows})).read_text()


def test_the_command_writes_page_and_card_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder(tmp_path))]) == 0
    assert str(tmp_path / PAGE) in capsys.readouterr().out and "held-out loss" in (tmp_path / "README.md").read_text()
    assert main(["report", str(tmp_path)]) == 0
    (tmp_path / PAGE).write_text("my notes")
    assert main(["report", str(tmp_path)]) == 2
    assert "was not written by layerpeft" in capsys.readouterr().err and (tmp_path / PAGE).read_text() == "my notes"
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "nothing to report" in capsys.readouterr().err


def test_a_checkpoint_has_a_page_that_its_run_may_remove(tmp_path: Path) -> None:
    at = tmp_path / "run" / "checkpoint-3"
    at.mkdir(parents=True)
    folder(at)
    (at / "log.jsonl").unlink()
    (at / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.5}]})
    )
    owned.put_on_record(tmp_path / "run", owned.files_below(tmp_path / "run", "checkpoint-3"))
    for _ in range(2):
        assert main(["report", str(at)]) == 0
    assert "training from 4 to 3.5" in (at / PAGE).read_text() and "<title>run, checkpoint-3" in (at / PAGE).read_text()
    files = owned.files_below(tmp_path / "run", "checkpoint-3")
    assert f"checkpoint-3/{PAGE}" in files and not owned.strangers(tmp_path / "run", files)


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run", "layerpeft", "compare"):
        (folder(tmp_path) / f"{name}.json").write_text(
            '{"report": [1, {"layer": 0}], "schedule": {"history": 3}, "runs": [{}]'
        )
        read(write_page(tmp_path).read_text())
    odd = MANIFEST | {
        "report": [1, {"layer": 0, "score": "high"}],
        "schedule": {"history": [{}]},
        "quant": {"format": 99},
    }
    text = write_page(folder(tmp_path, odd)).read_text()
    assert "Which trained when" not in text and "Precision" not in text
    (tmp_path / PAGE).unlink()
    assert main(["report", str(tmp_path)]) == 2  # a card would say it wrongly
    assert "is not what layerpeft writes" in capsys.readouterr().err
    read(page(Facts("nothing")))
    for name in ("adapter_config", "layerpeft", "compare"):
        (tmp_path / f"{name}.json").write_text("[1")
    assert main(["report", str(tmp_path)]) == 2
    assert "nothing to report" in (said := capsys.readouterr().err) and "cut short" in said


def test_large_runs_stay_small_pages(tmp_path: Path) -> None:
    number, steps = 6000, 20_000
    history = [window(s, [(s * 7 + i) % number for i in range(40)]) for s in range(0, steps, 10)]
    manifest = MANIFEST | {
        "selection": {"num_layers": number, "unit": "expert", "why": "many"},
        "report": [row(i, "expert") for i in range(number)],
        "schedule": {"step": steps, "history": history},
    }
    written = write_page(folder(tmp_path, manifest))
    assert written.stat().st_size < 3_000_000
    assert "512 of 6000" in written.read_text()


def test_a_map_says_when_and_how_strongly() -> None:
    drawn = charts.heatmap([(0, 5, [0], [1.0, 0.5]), (5, 10, [1], [1.0, 0.5])], 2, 10, "layer")
    strong, weak = (float(x) for x in sorted(re.findall(r'fill-opacity="([\d.]+)"', drawn), reverse=True))
    assert strong == 1.0 and weak == pytest.approx(0.65, abs=0.1)
    assert len(re.findall(r"z", "".join(re.findall(r'<path d="([^"]*)" class="fill first"', drawn)))) == 2
    assert not charts.heatmap([], 2, 10, "layer") and not charts.curves([], [])
    assert not charts.bars([None], [True], "layer", "Score")


def test_precisions_are_drawn(tmp_path: Path) -> None:
    quant = {"format": 1, "modules": {}, "storage": {}, "rows": [stored(i) for i in range(3)]}
    text = write_page(folder(tmp_path, MANIFEST | {"quant": quant})).read_text()
    assert "Precision by layer: 1 linears in 16bit, 2 linears in nf4" in text and "5.00 bits a weight" in text


def test_numbers_at_the_ends_of_what_a_number_can_say_are_drawn(tmp_path: Path) -> None:
    folder(tmp_path)
    for values in (
        (1e308, -1e308, 1.7e308),
        (5e-324, 1e-323, 0.0),
        (1e-14, 3e-14, 2e-14),
        (-1.7e308, -1.6e308, 5e-324),
    ):
        rows = [{"layer": i, "name": "a", "score": v, "chosen": i == 0, "change": v} for i, v in enumerate(values)]
        log = [{"step": i, "loss": v, "eval_loss": -v} for i, v in enumerate(values)]
        runs = [{"arm": arm, "value": v, "seconds": 3.0, "layers": [i]} for arm, i, v in zip("aab", range(3), values)]
        ends = {"before": {"eval_loss": values[0]}, "after": {"eval_loss": values[1]}}
        found = Facts(
            "x", manifest=MANIFEST | {"report": rows}, log=log, run=RUN | ends, comparison=COMPARED | {"runs": runs}
        )
        text = page(found)
        read(text)
        places = re.findall(r' (?:points|d|x|y|cx|cy|width|height)="([^"]*)"', text)
        assert places and not re.search("nan|inf", " ".join(places)), values
        assert "Loss over" in text and "of every arm" in text and max(map(len, re.findall(r"\d+", text))) < 40
        wide = [float(x) for x in re.findall(r'<text x="([^"]*)"', text)]
        assert all(-1 < x < 400 for x in wide)
        for drawn in (ticks(min(values), max(values)), ticks(*around(values, 0.05, 0.5))):
            assert 1 < len(drawn) < 12 and len(set(drawn)) == len(drawn)
    (tmp_path / "run.json").write_text(json.dumps(RUN | {"seconds": 10**400, "steps": 10**400}))
    read(write_page(tmp_path).read_text())


def test_a_log_that_was_cut_loses_its_last_line_alone(tmp_path: Path) -> None:
    path = folder(tmp_path) / "log.jsonl"
    for cut in (
        '{"step": 41, "lo',
        '{"step": 41, "loss": 9, "note": "é'.encode()[:-1].decode(errors="surrogateescape"),
        "[41]\n",
    ):
        whole = path.read_bytes()
        path.write_bytes(whole + cut.encode(errors="surrogateescape"))
        assert "training from 4.95 to 3;" in write_page(tmp_path).read_text()
        path.write_bytes(whole)


def test_a_model_that_wrote_nothing_is_said_to_have_written_nothing(tmp_path: Path) -> None:
    text = write_page(folder(tmp_path)).read_text()
    assert "<h3>before training</h3><p class=soft>the model wrote nothing</p>" in text
    bare = RUN | {"samples": [{"prompt": "p", "wanted": "", "after": " \n"}]}
    shown = page(Facts("x", run=bare))
    assert "before training" not in shown and "wanted" not in shown and shown.count("wrote nothing") == 1


@pytest.mark.parametrize(
    ("ends", "found"), [((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]), ((3.3, 5.4), [3.5, 4, 4.5, 5]), ((2, 2), [2])]
)
def test_axes_have_round_numbers(ends: tuple[float, float], found: list[float]) -> None:
    assert ticks(*ends) == pytest.approx(found)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not here")
def test_a_browser_shows_it_without_an_error(tmp_path: Path) -> None:
    written = write_page(folder(tmp_path))
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--enable-logging=stderr", "--v=0", "--window-size=380,800", "--dump-dom", written.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stderr[-2000:]
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1] == tmp_path.name
    shown, drawn = (set(re.findall(r'<section id="(\w+)"', text)) for text in (done.stdout, written.read_text()))
    assert shown == drawn and done.stdout.count("<svg") == written.read_text().count("<svg")

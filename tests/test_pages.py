"""What README.md, the other Markdown and docs/ show works: Python runs, recipes are read, commands are understood."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from layerpeft import cli
from layerpeft.errors import LayerpeftError, UsageError
from layerpeft.recipe.read import examine
from layerpeft.recipe.shipped import recipes
from tests.conftest import LLAMA
from tests.helpers.blocks import PAGES, ROOT, Block, blocks, commands, ours, spoken
from tests.helpers.shown import Names

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
OTHERS = {  # a loop's body is read by itself
    "python", "python3", "pip", ".", "pytest", "accelerate", "torchrun", "lm_eval", "xdg-open", "hf", "for", "done",
    *(f".venv/bin/{name}" for name in ("pip", "python", "pytest", "ruff", "pyright")),
}  # fmt: skip
PYTHON = blocks("python")
# Pages whose blocks are run where others only stand for themselves.
QUICK = ("README.md", "recipes/README.md", "docs/data.md", "docs/schedules.md", "docs/adding-a-scorer.md")
RECIPE = next(block for block in blocks("yaml") if block.page == "README.md").text
REWARD = next(block for block in PYTHON if "def correct_answer" in block.text).text
ROW = {"question": "How many?", "answer": "Two."}
HUB = ("Qwen/Qwen3-0.6B", "org/model-7b", "outputs/base")
EXPERTS = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16,
    "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 4096, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def each(some: list[Block]) -> list[Any]:
    marks = [[] if block.page in QUICK else [pytest.mark.slow] for block in some]
    return [pytest.param(block, id=str(block), marks=marks) for block, marks in zip(some, marks)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what commands on the pages speak of."""
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml", "dpo.yaml"):
        (tmp_path / name).write_text(RECIPE, encoding="utf-8")
    for name in HUB:  # a folder of that name goes before the hub
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(LLAMA)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for name in ("rows.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    Dataset.from_list([ROW]).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "rewards.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "config.json").write_text(json.dumps(EXPERTS), encoding="utf-8")
    for path in LLAMA.glob("tokenizer*"):
        (tmp_path / "experts" / path.name).symlink_to(path)
    return tmp_path


def test_blocks_say_their_language_and_why_they_are_not_run() -> None:
    for block in blocks(""):
        assert not re.search(r"^(layerpeft|pip|python|accelerate|torchrun) ", block.text, re.M), f"{block}: write ```sh"
    known = blocks("", "python", "yaml", "sh", "bash", "toml", "text", "json")
    marks = sum(len(re.findall(r"^ *<!-- not run:", page.read_text(encoding="utf-8"), re.M)) for page in PAGES)
    assert sum(block.why is not None for block in known) == marks, "a mark stands in the line above its block"
    fences = sum(len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.M)) for page in PAGES)
    assert fences == 2 * len(known), "a language that nothing here reads"


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_python_is_python(page: str) -> None:
    for block in PYTHON:
        if block.page == page:
            ast.parse(block.text, str(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path, place: Path) -> None:
    for block in blocks("sh", "bash"):
        if ROOT / block.page == page:
            for words in commands(block.text):
                said = ours(words)
                if said is not None:
                    understood(said, str(block))
                    continue
                assert words[0] in OTHERS, f"{block}: {words[0]}"
                for extra in re.findall(r"(?:layerpeft|\.)\[([\w,]+)\]", " ".join(words)):
                    assert set(extra.split(",")) <= set(EXTRAS), f"{block}: {extra}"


def understood(said: list[str], where: str) -> Any:
    """A command, read as the command line reads it."""
    try:
        return cli._read(["recipe.yaml" if word == "RECIPE" else word for word in said])
    except LayerpeftError as error:
        raise AssertionError(f"{where}: layerpeft {' '.join(said)}: {error}") from error


@pytest.mark.parametrize("block", each(blocks("sh", "bash")))
def test_settings_of_commands_are_sound(block: Block, place: Path) -> None:
    for said in filter(None, map(ours, commands(block.text))):
        args = understood(said, str(block))
        if hasattr(args, "recipe"):
            purpose = said[0] if said[0] in ("plan", "score", "compare") else "train"
            found = examine(args.recipe, args.settings, purpose).problems
            assert not found, f"{block}: layerpeft {' '.join(said)}: {[str(fault) for fault in found]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_prose_are_understood(page: Path, place: Path) -> None:
    _, known = cli._parser()
    for said in spoken(page):
        words = commands(said)[0]
        assert words[0] in known, f"{page.name}: layerpeft {said}"
        if len(words) > 1 and "…" not in said:
            try:
                cli._read(words)
            except UsageError as error:
                if "are required" not in str(error):  # a part of a command
                    raise AssertionError(f"{page.name}: layerpeft {said}: {error}") from error


@pytest.mark.parametrize("block", each(blocks("yaml")))
def test_recipes_are_read(block: Block, place: Path) -> None:
    """A whole one as it stands; of a part, the rest is that of a recipe that ships."""
    given = yaml.safe_load(block.text)
    (place / "outputs" / "reward").symlink_to(LLAMA)
    if "trainer" not in given:
        base = recipes()["grpo" if "rewards" in given else "quickstart"]
        whole = yaml.safe_load(base.read_text(encoding="utf-8")) | {"output_dir": "outputs/run"}
        if "expert" in str(given):
            whole["model_name_or_path"] = "experts"
        given = whole | given
    (place / "shown.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    found = examine("shown.yaml", [], "plan").problems
    assert not found, f"{block}: {[str(fault) for fault in found]}"


@pytest.mark.parametrize("block", each([block for block in PYTHON if block.why is None]))
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = Names(block)
    tree = ast.parse(block.text, str(block))
    for node in tree.body:  # what stands by itself is shown
        if isinstance(node, ast.Expr):
            shown = ast.Call(ast.Name("_shown", ast.Load()), [node.value], [])
            node.value = ast.fix_missing_locations(ast.copy_location(shown, node.value))
    exec(compile(tree, str(block), "exec"), names)
    names.check()

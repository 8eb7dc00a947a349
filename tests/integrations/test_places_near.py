"""Names that a person misspelt: what lies here under a name much like them, part by part, and what may stand on the hub."""

from pathlib import Path

import pytest

from layerpeft.integrations.places import ADDRESS, meant, missing, near, neither


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work/models/llama-6m").mkdir(parents=True)
    (tmp_path / "home/runs/first").mkdir(parents=True)
    (tmp_path / "work/rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("rowz.jsonl", "rows.jsonl"),
        ("./rowz.jsonl", "rows.jsonl"),
        ("rowz", "rows.jsonl"),
        ("modls/lama-6m", "models/llama-6m"),
        ("models/llama-6m/gone", None),
        ("../home/runs/frist", "../home/runs/first"),
        ("rows.jsonl", None),
        ("models", None),
        ("wholly/other", None),
        ("rows.jsonl/x", None),
        ("x" * 5000, None),
        ("a\0b", None),
        ("", None),
    ],
)
def test_every_part_of_a_path_is_looked_for(given: str, found: str | None) -> None:
    assert near(given) == found
    assert meant(given) == (f". Did you mean {found!r}?" if found else "")


def test_it_lies_at_home_beside_the_recipe_or_nowhere(here: Path) -> None:
    assert near("~/rnus/first") == str(here / "home/runs/first") and near(str(here / "wrk")) == str(here / "work")
    assert near("runs/frist") is None and near("runs/frist", here / "home") == "runs/first"
    assert missing("folder", "runs/frist", here / "home") == (
        f"no folder 'runs/frist' (looked for {here / 'work/runs/frist'} and {here / 'home/runs/frist'}). "
        "Did you mean 'runs/first'?"
    )
    assert neither("folder", "lama/x") == (
        f"no folder 'lama/x' (looked for {here / 'work/lama/x'}), and the hub does not give it"
    )
    assert neither("folder", "model/x").endswith("/x), and the hub does not give it")
    assert neither("folder", "modles").endswith(". Did you mean 'models'? The hub does not give it either")


def test_what_is_written_as_a_path_is_no_address() -> None:
    assert all(ADDRESS.fullmatch(name) for name in ("gpt2", "Qwen/Qwen3-0.6B"))
    assert not any(ADDRESS.fullmatch(name) for name in ("./gpt2", "/gpt2", "~/gpt2", "a/b/c", ".", "a\\b"))

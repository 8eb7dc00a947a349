"""The site that MkDocs makes of the pages has all of them, and all public names; it warns of nothing and fetches nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import layerpeft

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
FETCHED = re.compile(r'<(?:script|img|iframe)[^>]* src="https?:|<link[^>]*stylesheet[^>]* href="https?:')


def test_every_page_stands_in_the_site_once():
    listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", SETTINGS.partition("\nnav:\n")[2], re.M)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert sorted(listed) == sorted(set(listed)) and pages <= set(listed), pages - set(listed)
    assert all((ROOT / "docs" / name).is_file() or (ROOT / name).is_file() for name in listed)


def test_the_reference_has_every_public_name_at_its_place():
    listed = re.findall(r"^::: layerpeft\.(\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(f"{place}.{name}" for name, place in layerpeft._PLACES.items())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs pip install 'layerpeft[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    made = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    assert {"index.html", "layers.html", "recipes/index.html", "benchmarks/index.html", "CHANGELOG.html"} <= set(made)
    assert "fine-tuning need not touch all of them" in made["index.html"]
    assert all(f'id="layerpeft.{place}.{name}"' in made["api.html"] for name, place in layerpeft._PLACES.items())
    for name, text in made.items():
        fetched = re.findall(
            r"<(?:script|img|iframe)[^>]* src=\"(https?:[^\"]+)|<link[^>]*stylesheet[^>]* href=\"(https?:[^\"]+)", text
        )
        assert not fetched, (name, fetched)

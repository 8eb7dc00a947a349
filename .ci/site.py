"""A hook of MkDocs: pages outside of docs/ are part of the site, and links between all of them work here as they do on GitHub.

README.md is the first page. Whatever else in the repository is linked to (recipes, results, charts) goes with the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "recipes/README.md", "benchmarks/README.md",
    "benchmarks/evidence/README.md", "benchmarks/MetaMathQA/README.md",
)  # fmt: skip
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#|/)([^)#\s]+)")
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Adds what lies outside of docs/: the pages above, and every file that a page links to."""
    pages = [ROOT / name for name in OUTSIDE] + sorted((ROOT / "docs").glob("*.md"))
    wanted = {name: None for name in OUTSIDE}
    for page in pages:
        for _, link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            path = (page.parent / link).resolve()
            if path.is_file() and path.is_relative_to(ROOT):
                wanted[path.relative_to(ROOT).as_posix()] = None
    known = {file.src_uri for file in files}
    for name in wanted:
        if (uri := _in_site(name)) not in known:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of a page, from where it lies in the repository to where it lies in the site."""
    uri = page.file.src_uri
    inside = (ROOT / "docs" / uri).is_file()
    here = (ROOT / "docs" / uri if inside else ROOT / uri).parent

    def moved(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(here / match[2]))
        if not path.is_relative_to(ROOT):
            return match[0]
        target = _in_site(path.relative_to(ROOT).as_posix())
        return match[1] + os.path.relpath(target, os.path.dirname(uri) or ".").replace(os.sep, "/")

    parts, last = [], 0
    for fence in FENCE.finditer(markdown):  # what stands in code is no link
        parts += [LINK.sub(moved, markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[last:])])


def _in_site(name: str) -> str:
    return name.removeprefix("docs/")

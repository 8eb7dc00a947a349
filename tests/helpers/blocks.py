"""The code in README.md, recipes/README.md, CONTRIBUTING.md and docs/: blocks between fences, and commands between backquotes.

A block that cannot run here stands below `<!-- not run: why -->`. It is read nevertheless.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MARK = r"(?:^ *<!-- not run: (?P<why>[^\n]+) -->\n)?"
BLOCK = re.compile(MARK + r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S)
# What stands for something in a command.
MEANT = {
    "RECIPE": "recipe.yaml", "FOLDER": "outputs/run", "ROWS": "rows.csv", "FILE": "made.csv", "OUT": "merged",
    "NAME": "quickstart", "TEXT": "text", "INSTRUCT": "org/instruct", "BASE": "org/base", "MODEL": "org/base",
    "[key=value …]": "layerpeft.r=8", "DIR": "made",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """`line`: of the page, from 1. `why`: it is not run, if there is any."""

    page: str
    line: int
    language: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages ("" has none), from top to bottom."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            inside = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
            line = text[: match.start("text")].count("\n") + 1
            found.append(Block(str(page.relative_to(ROOT)), line, match["language"], inside, match["why"]))
    return [block for block in found if block.language in languages]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell's text: comments gone, lines that go on joined, `&&` and pipes divided."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|><")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word in ("&&", "|", "||", "&"):
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return [
        words[: next((i for i, word in enumerate(words) if word in (">", "<", ">>")), len(words))] for words in found
    ]


def ours(words: list[str]) -> list[str] | None:
    """What a command says to `layerpeft`, behind accelerate, torchrun or python -m, too."""
    if words[0] == "layerpeft":
        return words[1:]
    place = next((i for i, pair in enumerate(zip(words, words[1:])) if pair == ("-m", "layerpeft")), None)
    return None if place is None else words[place + 2 :]


def spoken(page: Path) -> list[str]:
    """The commands between backquotes in a page's prose and tables, with something for each word that stands for one."""
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = []
    for said in re.findall(r"`((?:layerpeft|…) [a-z][^`\n]*)`", prose):
        for word, meaning in MEANT.items():
            said = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w])", meaning, said)
        found.append(re.sub(r"^(layerpeft|…) ", "", said))
    return list(dict.fromkeys(found))

"""What `plan` says of a recipe that an import has written: in the report, and as a comment at the end of the file.

Model and rows of the hub are not fetched for it: of those no more is held against the recipe than what plan asks without its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerpeft.errors import LayerpeftError
from layerpeft.integrations import hub
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import examine
from layerpeft.recipe.surroundings import on_hub
from layerpeft.recipe.written import wrapped

REFUSES = "`layerpeft plan` refuses it as things are here"


@dataclass(frozen=True)
class Tried:
    """`problems`: what plan refuses; `whole`: whether rows and tokenizer were looked at, too."""

    problems: tuple[str, ...]
    whole: bool = True

    @property
    def told(self) -> list[str]:
        """Lines for a report."""
        if not self.problems:
            return [
                f"`layerpeft plan` takes it{'' if self.whole else ', as far as is known without the rows, which are on the hub'}"
            ]
        return [f"{REFUSES}:", *(f"  - {text}" for text in self.problems)]


def tried(path: Path) -> Tried:
    """Plans a recipe; where it takes something from the hub, it is checked alone."""
    try:
        examined = examine(str(path), (), "plan")
        fetches = on_hub(examined.recipe.values)
        with hub.settled(fetches):
            if fetches:
                examined.sound()
            else:
                forecast(str(path))
    except LayerpeftError as error:
        return Tried(tuple(problem.text for problem in error.problems))
    return Tried((), not fetches)


def note_down(found: Tried, path: Path) -> None:
    """Puts what plan refuses at the end of the recipe."""
    if found.problems:
        lines = ["# what `layerpeft plan` refused when this was written:"]
        lines += [line for text in found.problems for line in wrapped(text, indent="  ")]
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(["", *lines, ""]))

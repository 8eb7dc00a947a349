"""Pictures that no test looks at are drawn once. Importing this puts it in matplotlib's place, once for a process."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


class Pictures:
    """Every save draws a picture, for longer than all else takes: where a test looks at none, the first stands for all."""

    savefig, subplots = Figure.savefig, Figure.subplots
    looked_at = False
    first: bytes | None = None


class Blank:
    """Axes on which nothing is drawn."""

    def __getattr__(self, name: str) -> Blank:
        return self

    def __call__(self, *_: Any, **__: Any) -> Blank:
        return self

    def __getitem__(self, _: Any) -> Blank:
        return self

    def __iter__(self) -> Iterator[Blank]:
        return iter(())


def _subplots(figure: Figure, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    if Pictures.looked_at:
        return Pictures.subplots(figure, rows, columns, **options)
    many = rows * columns if options.get("squeeze", True) else 1
    return [Blank() for _ in range(many)] if many > 1 else Blank()


def _savefig(figure: Figure, path: Any, **options: Any) -> None:
    if Pictures.looked_at:
        return Pictures.savefig(figure, path, **options)
    if Pictures.first is None:
        Pictures.savefig(figure, drawn := io.BytesIO(), format="png")
        Pictures.first = drawn.getvalue()
    if hasattr(path, "write"):
        path.write(Pictures.first)
    else:
        Path(path).write_bytes(Pictures.first)


Figure.savefig, Figure.subplots = _savefig, _subplots

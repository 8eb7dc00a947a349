"""Pictures by matplotlib, which is imported when the first one is drawn: to files alone, never to a screen."""

import functools
import io
import logging
import os
from pathlib import Path
from typing import Any

from layerpeft.errors import told
from layerpeft.integrations.files import replace_file
from layerpeft.text import note

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


def write_figure(figure: Any, path: str | os.PathLike[str], dpi: int = 100) -> bool:
    """Swaps the file for the figure as a PNG, the same bytes for the same picture. False, said, where matplotlib cannot draw it,
    as where an axis spans more than a number can say."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    except (ValueError, ArithmeticError) as error:
        note(f"{path} is left out: {told(error, 200)}")
        return False
    replace_file(Path(path), picture.getvalue())
    return True


def count_whole(axes: Any) -> None:
    """The horizontal axis has whole numbers alone, which are steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


@functools.cache
def warn_no_matplotlib() -> None:
    logger.warning("matplotlib is not installed: no picture of the layers is drawn (pip install matplotlib)")

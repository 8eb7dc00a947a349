"""Trackers of experiments, besides the numbers that Trainer sends them: a table and a picture, each in its own way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerpeft.errors import told
from layerpeft.text import note

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Shown:
    """What a tracker is to show under a name: a table, and a picture where one could be drawn."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    picture: Path | None = None


def _asked(args: Any) -> list[str]:
    said = args.report_to or []
    return list(said) if isinstance(said, list | tuple) else [said]


def show(args: Any, state: Any, shown: Callable[[], AbstractContextManager[Sequence[Shown]]]) -> None:
    """Sends what `shown` gives, which is asked where one of a trainer's trackers can show more than numbers."""
    if state.is_world_process_zero and not WAYS.keys().isdisjoint(_asked(args)):
        with shown() as found:
            for each in found:
                send(args, state.global_step, each)


def send(args: Any, step: int, shown: Shown) -> None:
    """Sends it to those of a trainer's trackers that can show it, and are on. A tracker that fails is named, and left."""
    for tracker in _asked(args):
        if (way := WAYS.get(tracker)) is not None:
            try:
                way(args, step, shown)
            except Exception as error:  # whatever it is, the training is done
                note(f"{tracker} did not take the table of layers: {told(error, 200)}")


def _wandb(args: Any, step: int, shown: Shown) -> None:
    import wandb

    if wandb.run is None:
        return
    logged: dict[str, Any] = {
        f"{shown.name}/table": wandb.Table(columns=[*shown.columns], data=[[*r] for r in shown.rows])
    }
    if shown.picture is not None:
        logged[f"{shown.name}/picture"] = wandb.Image(str(shown.picture))
    wandb.run.log(logged)


def _tensorboard(args: Any, step: int, shown: Shown) -> None:
    """Beside the run of the trainer, which names its folder by the time."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found, no-redef]
    home = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs")
    writer: Any = SummaryWriter(log_dir=os.path.join(os.path.expanduser(home), shown.name))
    rule = "|".join(" --- " for _ in shown.columns)
    lines = ["|".join(shown.columns), rule, *("|".join("" if c is None else str(c) for c in row) for row in shown.rows)]
    writer.add_text(f"{shown.name}/table", "\n".join(f"|{line}|" for line in lines), step)
    if shown.picture is not None:
        from matplotlib.image import imread

        writer.add_image(f"{shown.name}/picture", imread(str(shown.picture))[:, :, :3], step, dataformats="HWC")
    writer.close()


def _trackio(args: Any, step: int, shown: Shown) -> None:
    import pandas
    import trackio  # type: ignore[import-not-found]

    table = pandas.DataFrame([[*row] for row in shown.rows], columns=[*shown.columns])
    logged = {f"{shown.name}/table": trackio.Table(dataframe=table)}
    if shown.picture is not None:
        logged[f"{shown.name}/picture"] = trackio.Image(str(shown.picture))
    trackio.log(logged)


def _mlflow(args: Any, step: int, shown: Shown) -> None:
    import mlflow  # type: ignore[import-not-found]

    if mlflow.active_run() is None:
        return
    columns = {name: [row[place] for row in shown.rows] for place, name in enumerate(shown.columns)}
    mlflow.log_table(columns, f"{shown.name}.json")
    if shown.picture is not None:
        mlflow.log_artifact(str(shown.picture))


WAYS: dict[str, Callable[[Any, int, Shown], None]] = {
    "wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio, "mlflow": _mlflow,
}  # fmt: skip

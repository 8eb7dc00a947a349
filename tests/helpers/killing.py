"""Runs that are killed at any moment, and resumed from their last whole checkpoint: what the processes do, and who kills them.

A test file says what a run is (`Runs`) and, run as a program, calls `main`; its tests read what `main` wrote down.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from layerpeft.saving import checkpoints
from layerpeft.training import pictures
from tests.helpers.processes import in_a_process
from tests.helpers.repeating import some

FEW, MANY = "few", "many"
TIMES = some([FEW, MANY], 1)
ANY, WRITING = "at any time", "while a checkpoint is written"
STEPS, EVERY = 12, 3


class Moments:
    """The moments of every kind that a process has come through, and the one at which it is killed."""

    counts: Counter[str] = Counter()
    last: tuple[str, int] | None = None
    saving = False


class Watched(Trainer):
    """Says while it saves."""

    def _save_checkpoint(self, *args, **kwargs):
        Moments.saving = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            Moments.saving = False


def tick(kind: str) -> None:
    """One moment; the last one where it was so arranged."""
    Moments.counts[kind] += 1
    if Moments.last == (kind, Moments.counts[kind]):
        os.kill(os.getpid(), signal.SIGKILL)


def watch_files() -> None:
    """Counts what is written, moved and removed while a checkpoint is written."""

    def hook(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if Moments.saving and (writes or event in ("os.rename", "os.mkdir", "os.remove")):
            tick(WRITING)

    sys.addaudithook(hook)


def watch_functions(kind: str, module: ModuleType, names: Sequence[str]) -> None:
    """Counts where these functions of a module begin and end."""

    def counted(function):
        def run(*args, **kwargs):
            tick(kind)
            found = function(*args, **kwargs)
            tick(kind)
            return found

        return run

    for name in names:
        setattr(module, name, counted(getattr(module, name)))


def trainer_of(model: Any, folder: Path, rows: Any, accumulate: int, **options: Any) -> Watched:
    """Twelve steps, with a checkpoint after every third."""
    args = TrainingArguments(
        str(folder / "out"),
        max_steps=STEPS,
        save_steps=EVERY,
        save_total_limit=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Watched(model, args, train_dataset=rows, **options)


def losses(trainer: Trainer) -> list[tuple[int, float, float]]:
    """(step, loss, norm of the gradient) of every step."""
    return [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


@dataclass(frozen=True)
class Runs:
    """What is run: `act(case, folder, checkpoint)` gives what came of a run, resumed from a checkpoint where there is one.

    `watches`: kind of moment -> what lets a process count them; `kills`: (case, kind of moment) of each kill.
    """

    act: Callable[[str, Path, str | None], dict[str, Any]]
    watches: dict[str, Callable[[], None]]
    kills: Sequence[tuple[str, str]]
    cases: Sequence[str] = field(default=("run",))


def child(action: Callable[[], Any], watches: Sequence[Callable[[], None]] = (), last: Any = None) -> int:
    """Runs something in a process of its own, which costs no imports; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        Moments.last = last
        for watch in watches:
            watch()
        action()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main(root: Path, runs: Runs) -> None:
    """Runs every case unbroken (the first one also unwatched), then kills and resumes; writes down what came of it."""
    torch.set_num_threads(1)
    pictures.write_png = lambda _rows, path, *_: _picture(path)
    pictures.write_heatmap = lambda _standing, _names, path, *_: _picture(path)
    gc.collect()
    gc.freeze()
    draw, watches = random.Random(0), runs.watches
    counts, seconds, told = {}, {}, []

    def run(case, folder, checkpoint=None):
        found = runs.act(case, folder, checkpoint)
        torch.save(found | {"counts": dict(Moments.counts)}, folder / "found.pt")

    def unbroken(name, case, watching=()):
        folder = root / name
        folder.mkdir()
        began = time.monotonic()
        assert os.waitpid(child(lambda: run(case, folder), watching), 0)[1] == 0, case
        seconds[case] = time.monotonic() - began
        return torch.load(folder / "found.pt")["counts"]

    unbroken("unwatched", runs.cases[0])
    for case in runs.cases:  # which say how many moments there are
        counts[case] = unbroken(f"whole {case}", case, list(watches.values()))
    for number, (case, kind) in enumerate(runs.kills):
        folder = root / f"{number}"
        late = sum(k == kind for _, k in runs.kills) == 1  # where there is something to lose
        moments = counts[case].get(kind, 0)
        last = (kind, draw.randint(moments // 2 if late else 1, moments)) if kind in watches else None
        delay = draw.uniform(0.1, 0.9) * seconds[case]
        one = _killed(lambda case=case, folder=folder: run(case, folder), folder, watches.get(kind), last, delay)
        checkpoint = one.pop("checkpoint")
        resumed = child(lambda case=case, folder=folder, c=checkpoint: run(case, folder, c))
        one["done"] = os.waitpid(resumed, 0)[1] == 0
        told.append(one | {"case": case, "kind": kind, "folder": str(folder)})
    (root / "told.json").write_text(json.dumps({"runs": told, "counts": counts}))


def _killed(action: Callable[[], None], folder: Path, watch: Any, last: Any, delay: float) -> dict[str, Any]:
    """Kills a run at its moment `last`, or after `delay` seconds, and sooner should it have made its last checkpoint by then.

    There is nothing to resume after that: transformers' Trainer makes a step too many from there, with any model.
    """
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        pid = child(action, [watch] if watch is not None else [], last)
        if last is None:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        died = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        checkpoint = checkpoints.last_checkpoint(folder / "out")
        from_step = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
        if died and from_step < STEPS:
            partial = len(list((folder / "out").glob("checkpoint-*"))) if (folder / "out").exists() else 0
            return {"died": died, "from": from_step, "checkpoints": partial, "checkpoint": checkpoint, "last": last}
        assert died or last is None, last
        delay *= 0.7
        last = None if last is None else (last[0], last[1] - 5)


def _picture(path: str | os.PathLike[str]) -> bool:
    Path(path).write_bytes(b"pictures take most of the time")
    return True


def start(file: str, root: Path, times: str) -> tuple[dict[str, Any], str]:
    """Runs a test file as a program that kills few or many; what its `main` wrote down, and what its processes complained of."""
    done = in_a_process(str(Path(file).resolve()), root, times, cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "told.json").read_text()), done.stderr


def differing(one: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """The keys under which two runs left other values, or only one of them left any."""
    return [
        k
        for k in sorted({*one, *whole})
        if k not in one or k not in whole or not torch.equal(torch.as_tensor(one[k]), torch.as_tensor(whole[k]))
    ]

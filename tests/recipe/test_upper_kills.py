"""Runs of an upper part alone that are killed at any moment: what they come to is what one comes to that nobody kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from layerpeft.cli import main
from layerpeft.recipe import train
from layerpeft.saving.checkpoints import last_checkpoint
from layerpeft.training.prefix.disk import Disk
from tests.helpers.killing import child
from tests.helpers.repeating import some
from tests.recipe.test_upper_recipes import plain, rows, same

STEPS = 9
WORDS = [
    "max_train_samples=3", "max_eval_samples=1", "max_length=32", "max_steps=-1", "num_train_epochs=3", "sample_tokens=0",
    "per_device_train_batch_size=1", "warmup_steps=0", "layerpeft.select=last:2", "layerpeft.lora_dropout=0.1",
    "save_strategy=steps", "save_steps=2", "save_total_limit=2", "logging_steps=1", "use_cpu=true",
]  # fmt: skip


def kill_at(kind: str, moment: int, out: Path) -> None:
    """Has this process end when it asks for kept states for the last time of so many, or opens, moves or makes a file in `out`."""
    left = [moment]

    def tick() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def opened(event: str, args: Any) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.rename", "os.mkdir")) and str(args[0]).startswith(str(out)):
            tick()

    if kind == "writing":
        sys.addaudithook(opened)
        return
    get = Disk.get
    Disk.get = lambda self, keys: (tick(), get(self, keys))[1]  # type: ignore[method-assign]


def run(words: list[str], out: Path, resume: bool, last: tuple[str, int] | None = None) -> int:
    """In a process of its own; the signal that ended it."""

    def act() -> None:
        if last is not None:
            kill_at(*last, out)
        found = train.upper_part
        train.upper_part = lambda *a: upper if (upper := found(*a)) is not None else os._exit(3)  # type: ignore[assignment]
        again = ["resume_from_checkpoint=true"] if resume else []
        os._exit(main(["train", "quickstart", *words, f"output_dir={out}", *again]))

    return -os.waitstatus_to_exitcode(os.waitpid(child(act), 0)[1])


@pytest.mark.parametrize("kills", some([1, 20], [1]))
def test_a_killed_run_of_the_upper_part_goes_on_to_the_same_bits(kills: int, tmp_path: Path):
    words = [*rows(tmp_path), *WORDS, f"layerpeft.prefix_cache={tmp_path}/states"]
    assert main(["prefill", "quickstart", *words, f"output_dir={tmp_path}/none"]) == 0
    unbroken = tmp_path / "unbroken"
    assert run(words, unbroken, False) == 0
    draw, done, round_, resumed = random.Random(kills), 0, 0, 0
    while done < kills:
        out, resume, killed = tmp_path / f"run-{round_}", False, True
        while killed and done < kills:
            kind = draw.choice(["reading", "writing"]) if kills > 1 else "reading"
            moment = draw.randint(1, 9 if kind == "reading" else 90) if kills > 1 else 5
            status = run(words, out, resume, (kind, moment))
            assert status in (0, signal.SIGKILL), status
            killed, done = status != 0, done + (status != 0)
            checkpoint = last_checkpoint(out) if out.is_dir() else None
            if killed and (checkpoint is None or checkpoint.endswith(f"-{STEPS}")):  # nothing to go on from, or to do
                shutil.rmtree(out, ignore_errors=True)
                checkpoint = None
            resume = checkpoint is not None
            resumed += killed and resume
        if killed:
            assert run(words, out, resume) == 0
        assert same(out, unbroken)
        ours, theirs = (plain(folder / "layerpeft.json") for folder in (out, unbroken))
        assert ours["report"] == theirs["report"] and ours["selection"] == theirs["selection"]
        round_ += 1
    print("resumed", resumed, "of", kills)
    assert resumed >= kills / 4

"""A run that is killed at any moment, and resumed from its last whole checkpoint, ends as the unbroken one does, bit for bit."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from layerpeft import refresh, report, save, subspace
from tests.loops import make_batches
from tests.projecting import snapshot, wrap

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 12, 3
MANY = os.environ.get("LAYERPEFT_TEST_KILLS") == "all"  # twenty take twice as long
KILLS = {"at any time": 10, "while a checkpoint is written": 5, "within a refresh": 5}
KILLS = KILLS if MANY else {"at any time": 3, "while a checkpoint is written": 4, "within a refresh": 2}
PARTS = ("fold", "rotate", "set_basis")  # of a refresh, in its own module


# what each process runs


class Watched(Trainer):
    """Counts what it writes while it saves, and is killed at one of these moments."""

    moments, last = 0, None

    def _save_checkpoint(self, *args, **kwargs):
        Watched.saving = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            Watched.saving = False

    saving = False


def tick():
    Watched.moments += 1
    if Watched.moments == Watched.last:
        os.kill(os.getpid(), signal.SIGKILL)


def watch_files():
    def hook(event, args):
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if Watched.saving and (writes or event in ("os.rename", "os.mkdir", "os.remove")):
            tick()

    sys.addaudithook(hook)


def watch_refreshes():
    def counted(function):
        def run(*args, **kwargs):
            tick()
            found = function(*args, **kwargs)
            tick()
            return found

        return run

    for name in PARTS:
        setattr(refresh, name, counted(getattr(refresh, name)))
    subspace.strongest = counted(subspace.strongest)


def run(folder, checkpoint=None):
    """Twelve steps, with a checkpoint after every third; writes down all that came of it."""
    torch.manual_seed(0)
    ids = torch.cat([b["input_ids"] for b in make_batches()])
    rows = [{"input_ids": x, "labels": x} for x in ids]
    args = TrainingArguments(
        str(folder / "out"),
        max_steps=STEPS,
        save_steps=EVERY,
        save_total_limit=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = wrap(update_proj_gap=4, moments="project")
    trainer = Watched(model, args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    state = {f"{i}|{k}": v for i, s in trainer.optimizer.state_dict()["state"].items() for k, v in s.items()}
    losses = [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    found = {"model": snapshot(model), "optimizer": state, "losses": losses, "moments": Watched.moments}
    torch.save(found, folder / "found.pt")


def child(action, watch=None, last=None):
    """Runs something in a process of its own, which costs no imports; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        Watched.last = last
        if watch is not None:
            watch()
        action()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main(root):
    torch.set_num_threads(1)
    report.write_png = lambda _rows, path, *_: Path(path).write_bytes(b"pictures take most of the time")
    gc.collect()
    gc.freeze()
    draw, watches, told = random.Random(0), {"while a checkpoint is written": watch_files}, []
    watches["within a refresh"] = watch_refreshes
    counts, began = {}, time.monotonic()
    for name, watch in [("at any time", None), *watches.items()]:  # unbroken ones, which say how many moments there are
        folder = root / f"whole {name}"
        folder.mkdir()
        assert os.waitpid(child(lambda folder=folder: run(folder), watch), 0)[1] == 0
        counts[name] = torch.load(folder / "found.pt")["moments"]
    seconds = (time.monotonic() - began) / 3
    for kind, times in KILLS.items():
        for number in range(times):
            folder = root / f"{kind} {number}"
            folder.mkdir()
            last = draw.randint(1, counts[kind]) if kind in watches else None
            pid = child(lambda folder=folder: run(folder), watches.get(kind), last)
            if last is None:
                time.sleep(draw.uniform(0.1, 0.9) * seconds)
                os.kill(pid, signal.SIGKILL)
            died = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            checkpoint = save.last_checkpoint(folder / "out")
            partial = len(list((folder / "out").glob("checkpoint-*"))) if (folder / "out").exists() else 0
            done = os.waitpid(child(lambda folder=folder, c=checkpoint: run(folder, c)), 0)[1] == 0
            from_step = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
            one = {"kind": kind, "died": died, "from": from_step, "checkpoints": partial, "done": done, "last": last}
            told.append(one | {"folder": str(folder)})
    (root / "told.json").write_text(json.dumps({"runs": told, "counts": counts}))


# what is asked of them


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    settings = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).resolve()), str(root)]
    done = subprocess.run(command, env=settings, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((root / "told.json").read_text())
    return root, told, done.stderr


@pytest.mark.parametrize("kind", KILLS)
def test_a_killed_run_ends_as_the_unbroken_one(killed, kind):
    root, told, errors = killed
    whole = torch.load(root / "whole at any time" / "found.pt")
    assert len(whole["losses"]) == STEPS and whole["optimizer"] and whole["model"]
    runs = [r for r in told["runs"] if r["kind"] == kind]
    assert len(runs) == KILLS[kind] and all(r["died"] or kind == "at any time" for r in runs)
    assert all(r["done"] for r in runs), errors[-3000:]
    for one in runs:
        found = torch.load(Path(one["folder"]) / "found.pt")
        for part in ("model", "optimizer"):
            assert set(found[part]) == set(whole[part]), one
            differ = [k for k, v in whole[part].items() if not torch.equal(torch.as_tensor(v), found[part][k])]
            assert not differ, (one, differ[:3])
        assert found["losses"] == whole["losses"], one


def test_the_kills_were_where_they_should_be(killed):
    _, told, _ = killed
    counts = told["counts"]
    assert counts["while a checkpoint is written"] > 40 and counts["within a refresh"] > 50
    by_kind = {k: [r for r in told["runs"] if r["kind"] == k] for k in KILLS}
    assert sum(r["died"] for r in by_kind["at any time"]) >= 2
    assert any(r["from"] for r in by_kind["within a refresh"])
    # some checkpoint was passed over because it was not whole
    written = by_kind["while a checkpoint is written"]
    assert any(r["checkpoints"] and r["from"] < r["checkpoints"] * EVERY for r in written)


def test_watching_changes_nothing(killed):
    root, _, _ = killed
    runs = [torch.load(root / f"whole {k}" / "found.pt") for k in KILLS]
    assert all(r["losses"] == runs[0]["losses"] for r in runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

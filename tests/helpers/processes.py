"""Processes of their own, forked from ones that have imported what takes seconds: nothing else has run where they begin.

One with the package and one without it (plain PEFT) are started where the first test asks for them, serve all workers of the
test run, and end with it.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
STARTS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# module, and a name of it where it resolves names on use
PEFT = ["torch.distributed", "peft", "transformers:AutoModelForCausalLM", "transformers:LlamaForCausalLM"]
PICTURES = "tests.helpers.pictures"  # drawn once
OURS = [
    *PEFT,
    *["deepspeed"] * (find_spec("deepspeed") is not None),  # which Accelerate imports to unwrap a model
    PICTURES,
    "layerpeft:get_peft_model",
    "layerpeft:load",
    "pytest",
    "transformers:Trainer",
    "trl:SFTTrainer",
]


def in_a_process(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Code, or a file that is run as a program, in a process that has the package."""
    return _ask(_server("ours"), code, arguments, **options)


def without_the_package(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same in a process that has imported PEFT and never the package."""
    return _ask(_server("peft"), code, arguments, **options)


def in_two_ranks(file: str, folder: Path, *scenes: object, imports: Sequence[str] = ()) -> list[Any]:
    """Two processes of a group run these scenes of a test file as torchrun would have them do; what each left in `folder`."""
    import torch

    done = in_a_process(str(Path(file).resolve()), folder, *scenes, cwd=folder, ranks=2, imports=imports)
    assert done.returncode == 0, done.stderr[-12000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in (0, 1)]


@cache
def _server(kind: str) -> TextIO:
    """The connection to a server that another worker of this run may have started."""
    place = Path(tempfile.gettempdir()) / f"forks-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    place.mkdir(exist_ok=True)
    lock = os.open(place, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if not (place / kind).exists():
            _start(kind, place / kind)
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(place / kind))
    finally:
        os.close(lock)
    return link.makefile("rw", encoding="utf-8")


def _start(kind: str, path: Path) -> None:
    """Starts the process that forks others, and waits until it listens."""
    settings = {**os.environ, **STARTS}
    settings.pop("PYTHONPATH", None)
    if kind == "ours":
        settings["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, str(path), *(OURS if kind == "ours" else PEFT)]
    server = subprocess.Popen(command, env=settings, cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert server.stdout is not None and server.stdout.readline(), "the process that forks others has ended"


def _ask(
    server: TextIO,
    code: str,
    arguments: tuple[object, ...],
    cwd: Path | None = None,
    ranks: int = 0,
    imports: Sequence[str] = (),
    timeout: int = 500,
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as said:
        asked = {
            "code": code,
            "arguments": [str(a) for a in arguments],
            "cwd": str(cwd or Path.cwd()),
            "environment": {**os.environ, **STARTS},
            "ranks": ranks,
            "imports": list(imports),
            "seconds": timeout,
            "said": said,
        }
        server.write(json.dumps(asked) + "\n")
        server.flush()
        answer = server.readline()
        assert answer, "the process that forks others has ended"
        out, err = ((Path(said) / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess([code, *arguments], json.loads(answer), out, err)


# what the process that forks others runs


def _serve(path: Path, names: list[str]) -> None:
    listening = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports may print
    sys.path[0] = ""  # as for code that is given on the command line
    for name in names:
        module, _, attribute = name.partition(":")
        found = import_module(module)
        if attribute:
            getattr(found, attribute)
    _warm()
    _keep()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        door.listen()
        door.settimeout(10)
        listening.write("yes\n")
        listening.close()
        _admit(door)
    path.unlink()
    with suppress(OSError):
        path.parent.rmdir()


def _admit(door: socket.socket) -> None:
    """Every worker of the test run has a fork of its own, which forks what it asks for, until the last one has gone."""
    living: set[int] = set()
    while True:
        try:
            link, _ = door.accept()
        except TimeoutError:
            living -= {pid for pid in living if os.waitpid(pid, os.WNOHANG)[0]}
            if not living:
                return
            continue
        pid = os.fork()
        if not pid:
            door.close()
            link.settimeout(None)
            with link.makefile("rw", encoding="utf-8") as asking:
                for line in asking:
                    asking.write(f"{_run(json.loads(line))}\n")
                    asking.flush()
            os._exit(0)
        living.add(pid)
        link.close()


def _warm() -> None:
    """A first adapter is made and saved, for the tables and templates that libraries then have."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        model, options = LlamaForCausalLM(LlamaConfig(**sizes)), {"r": 1, "target_modules": ["q_proj"]}
        if "layerpeft" in sys.modules:
            import pytest

            import layerpeft
            from layerpeft.selection import plugins
            from tests.helpers.brisk import make_brisk

            make_brisk(pytest.MonkeyPatch())
            layerpeft.get_peft_model(model, layerpeft.LayerLoraConfig(select=[0], **options)).save_pretrained(folder)
            for kept in vars(plugins).values():  # which packages bring scorers is still to be seen
                getattr(kept, "cache_clear", int)()
        else:
            import peft

            peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(folder)


def _keep() -> None:
    """What was imported stays; none of the collectors of those that are forked need look at it again."""
    gc.collect()
    gc.freeze()


def _run(asked: dict[str, Any]) -> int:
    """The exit code of what was asked for; what it `imports` besides is imported once, by a process that ranks are forked from."""
    if not asked["imports"]:
        return _ranks(asked)
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.environ.update(asked["environment"])
        for name in asked["imports"]:
            import_module(name)
        _keep()
        code = _ranks(asked)
    except BaseException:
        traceback.print_exc()
    os._exit(code & 0xFF)


def _ranks(asked: dict[str, Any]) -> int:
    """The exit code of all ranks; where one fails, the others are ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    living, found = {_fork(asked, rank, port) for rank in range(asked["ranks"] or 1)}, 0
    while living:
        pid, status = os.wait()
        living.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not found:
            found = code
            for other in living:
                os.kill(other, 9)
    return found


def _fork(asked: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _become(asked, rank, port)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become(asked: dict[str, Any], rank: int, port: int) -> int:
    """Runs the code as Python's own `-c` would, or the file as a program; its exit code."""
    signal.alarm(asked["seconds"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(asked["said"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    if asked["ranks"]:
        size = str(asked["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = asked["code"]
    try:
        if code.endswith(".py"):
            sys.argv, sys.path[0] = [code, *asked["arguments"]], str(Path(code).parent)
            runpy.run_path(code, run_name="__main__")
        else:
            sys.argv = ["-c", *asked["arguments"]]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2:])

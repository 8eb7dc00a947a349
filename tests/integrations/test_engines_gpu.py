"""One process on one card under each engine trains what a plain one trains there: the card's own collectives have run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.engines import ENGINES, train

ROOT = Path(__file__).resolve().parents[2]
CELLS = [("fsdp2", n) for n in ("lora-grad", "lisa", "full")] + [("zero2", "lora-grad"), ("zero3", "lora-depth")]
CELLS += [("zero3", "full"), ("zero2", "lisa")]


def alone(folder: Path, engine: str, name: str) -> dict:
    """A run in a process of its own, as a launcher starts the only one of a machine; without a group where `engine` is empty."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"} if engine else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])} if engine else {}
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    given = {**os.environ, **ENGINES.get(engine, {}), **place, "PYTHONPATH": path, "DS_BUILD_OPS": "0"}
    done = subprocess.run([sys.executable, __file__, str(folder), name], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "name"), CELLS)
def test_a_card_trains_under_an_engine_what_it_trains_without(engine, name, tmp_path):
    (tmp_path / "plain").mkdir()
    one, other = alone(tmp_path / "plain", "", name), alone(tmp_path, engine, name)
    assert other["steps"] == one["steps"] and other["weights"].keys() == one["weights"].keys()
    far = max(float((p.cpu() - other["weights"][n].cpu()).abs().max()) for n, p in one["weights"].items())
    assert far <= 5e-4 and other["losses"] == pytest.approx(one["losses"], abs=5e-4)
    assert "nccl" in other["group"] and one["group"] is None


if __name__ == "__main__":
    at = Path(sys.argv[1])
    found = train(sys.argv[2], at / "run", use_cpu=False)
    group = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
    torch.save(found | {"group": group}, at / "found.pt")
    if group:
        torch.distributed.destroy_process_group()

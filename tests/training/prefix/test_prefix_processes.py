"""Two processes whose rows are dealt anew in every epoch: equal to runs that compute all of them again."""

from __future__ import annotations

import atexit
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.training.prefix import open as open_
from tests.helpers.loops import llama
from tests.helpers.processes import in_two_ranks

ENGINES = ["ddp", "fsdp2"]
EPOCHS = 3


def train(engine: str, kept: str | None, rank: int) -> dict[str, Any]:
    """Two steps an epoch of two rows a process; the shares change places from one epoch to the next."""
    torch.manual_seed(3)
    config = LayerLoraConfig(select="last:2", r=4, task_type="CAUSAL_LM", init_lora_weights=False, prefix_cache=kept)
    model: Any = get_peft_model(llama(), config)
    outer = model
    if engine == "fsdp2":
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        outer = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    rows, losses = torch.randint(0, 60, (8, 8), generator=torch.Generator().manual_seed(0)), []
    for epoch in range(EPOCHS):
        for step in rows.split(4):
            place = 2 * ((rank + epoch) % 2)
            ids = step[place : place + 2]
            loss = outer(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    cache = model.peft_config["default"]._layerpeft.prefix
    found = {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in model.named_parameters()}
    facts = (cache.why, cache.hits, cache.misses) if cache is not None else None
    return {"losses": losses, "weights": found, "cache": facts}


def main(folder: Path, *scenes: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    torch.save({s: [train(s, kept, rank) for kept in (None, "memory")] for s in scenes}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_two_ranks(__file__, tmp_path_factory.mktemp("ranks"), *ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_later_rows_are_found_whichever_process_saw_them_first(ranks: list[Any], engine: str):
    for rank in ranks:
        plain, ours = rank[engine]
        assert ours["losses"] == plain["losses"]
        assert all(torch.equal(ours["weights"][n], p) for n, p in plain["weights"].items())
        assert ours["cache"] == (None, 8, 4)


def test_what_killed_processes_left_in_memory_goes_with_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_, "SHARED", tmp_path)
    own = f"layerpeft-{os.getuid()}-"
    for name in (f"{own}{2**22 + 1}-29500", f"{own}{os.getpid()}-29500", f"{own}notes"):
        (tmp_path / name / "deep").mkdir(parents=True)
    root = open_._shared(1)
    assert root is not None and root.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([root.name, f"{own}{os.getpid()}-29500", f"{own}notes"])
    assert open_._shared(1) == root
    atexit.unregister(shutil.rmtree)


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]), *sys.argv[2:])

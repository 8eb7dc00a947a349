"""The cut in two processes: DistributedDataParallel averages gradients that stop where they stop in one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import in_two_ranks
from tests.training import test_backward
from tests.training.test_backward import ALL, NONE, TOP, llama, traffic

KINDS = {
    "none": lambda model: model.enable_input_require_grads(),
    "default": test_backward.as_trl_does,
    "reentrant": test_backward.reentrant_twice,
}


def rows_of(rank: int) -> torch.Tensor:
    return torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(rank))


def scenes() -> dict[str, Any]:
    """Traffic and gradients of one step in this process, by the kind of checkpointing."""
    found, rows = {}, rows_of(dist.get_rank())
    for kind, switch in KINDS.items():
        model = test_backward.wrap(llama(), lora_dropout=0.1)
        switch(model)
        parallel = DistributedDataParallel(model)

        def step(_: nn.Module, parallel: nn.Module = parallel) -> None:
            torch.manual_seed(7)
            parallel(input_ids=rows, labels=rows).loss.backward()

        found[kind] = traffic(model, step), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.save(scenes(), folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(ranks, kind):
    traffics, gradients = zip(*(rank[kind] for rank in ranks), strict=True)
    assert set(traffics) == {(ALL, TOP, NONE if kind == "none" else TOP)}
    alone = []
    for rank in (0, 1):
        model = test_backward.plain(llama(), lora_dropout=0.1)
        rows = rows_of(rank)
        torch.manual_seed(7)
        model(input_ids=rows, labels=rows).loss.backward()
        alone.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])
        assert torch.allclose(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-5, atol=1e-9)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

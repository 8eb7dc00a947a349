"""Single experts on two processes, as on one with accumulation, also where one of them reaches no picked expert; in plain PEFT."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import layerpeft
from layerpeft.tuners.merge import merge
from tests.helpers.expert_models import build
from tests.helpers.loops import record
from tests.helpers.processes import in_two_ranks, without_the_package
from tests.tuners.full.test_full_saving import PLAIN
from tests.tuners.test_single_experts import KINDS, config, run, wrapped

pytestmark = pytest.mark.slow
SELECT = {"layers": [1, 4, 6], "unit": "expert"}
STEPS = 6


def ids():
    """A few tokens a sequence, so that most batches leave an expert out."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (4, 3), generator=draw) for _ in range(5)]


def train(method, share, micro, parallel=None):
    torch.manual_seed(5)
    options = {} if method == "full" else {"autocast_adapter_dtype": False}
    base = build(how="eager", dtype=torch.float64, num_hidden_layers=2)
    model = layerpeft.get_peft_model(base, config(method, SELECT), **options).train()
    outer = model if parallel is None else parallel(model)
    tensors = record(model).bound.tensors()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for number in range(STEPS):
        for part in ids()[number % 5][share].chunk(micro):
            (outer(input_ids=part, labels=part).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    layerpeft.check_trained(model)
    return {f"{t}.{n}": p.detach().clone() for t, group in tensors.items() for n, p in group.items()}


def main(folder):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    torch.save({m: train(m, share, 1, DistributedDataParallel) for m in KINDS}, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_with_accumulation(tmp_path):
    ranks = in_two_ranks(__file__, tmp_path)
    for method in KINDS:
        ours, theirs = (r[method] for r in ranks)
        alone = train(method, slice(0, 4), 2)
        assert ours.keys() == theirs.keys() == alone.keys() and len(alone) == 6 if method == "full" else 12
        for name, tensor in alone.items():
            assert torch.equal(ours[name], theirs[name])
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_plain_peft_reads_the_folder_and_merges_it(name, tmp_path):
    """Of a base that transformers writes expert by expert and puts together again."""
    base = build(name)
    base.save_pretrained(tmp_path / "base")
    inputs, jobs, wanted = {"input_ids": ids()[0]}, [], []
    for method in KINDS:
        model = wrapped(method, SELECT, type(base).from_pretrained(tmp_path / "base"))
        run(model)
        model.eval().save_pretrained(tmp_path / method)
        with torch.no_grad():
            wanted.append(model(**inputs).logits)
        jobs.append((type(base).__name__, str(tmp_path / "base"), str(tmp_path / method), inputs))
    torch.save(jobs, tmp_path / "jobs.pt")
    done = without_the_package(PLAIN, tmp_path / "jobs.pt", tmp_path / "found.pt")
    assert done.returncode == 0, done.stderr[-4000:]
    for method, want, found in zip(KINDS, wanted, torch.load(tmp_path / "found.pt"), strict=True):
        for logits in found:
            torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-4)
        out = merge(tmp_path / method, tmp_path / f"{method} merged", type(base).from_pretrained(tmp_path / "base"))
        with torch.no_grad():
            torch.testing.assert_close(
                type(base).from_pretrained(out).eval()(**inputs).logits, want, atol=1e-5, rtol=1e-4
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Two processes: every rank measures its own data, and all of them train the layers that the pooled score chooses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

import layerpeft
from layerpeft import LayerLoraConfig, check_trained, score_layers
from tests.helpers.processes import in_two_ranks
from tests.helpers.short import short_llama, shorten

BY_GRADIENT = {"by": "gradient_norm", "keep": 3}
SMALL = {"by": "gradient_norm", "keep": 2}
OUTLIERS = {"by": "outliers", "keep": 2, "M": 2.0}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=5, **sizes)).train()


def batches(rank, count=3):
    draw = torch.Generator().manual_seed(100 + rank)
    ids = [torch.randint(0, 64, (2, 12), generator=draw) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def told(model):
    """What a rank tells of its model."""
    record = model.peft_config["default"]._layerpeft
    return {
        "selection": record.selection.to_dict(),
        "steps": record.steps_trained,
        "checks": record.checks,
        "adapter": {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n},
    }


# what each process runs


def given_batches(rank, folder):
    model = layerpeft.get_peft_model(llama(), LayerLoraConfig(select=SMALL, r=4), batches=batches(rank))
    return told(model)


def bare_loop(select, micro):
    def run(rank, folder):
        model = layerpeft.get_peft_model(llama(), LayerLoraConfig(select=select, r=4))
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        mine = iter(batches(rank, 3 * micro))
        for _ in range(3):
            for last in [False] * (micro - 1) + [True]:
                parallel.require_backward_grad_sync = last
                parallel(**next(mine)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        check_trained(parallel)
        return told(model)

    return run


class Clipped(TrainerCallback):
    """The norm of each tensor's gradient after clipping (which does nothing here), by step."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms.append({n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None})


def sft(rank, folder):
    from trl import SFTConfig, SFTTrainer

    draw = torch.Generator().manual_seed(3)
    rows = Dataset.from_dict({"input_ids": torch.randint(5, 4000, (32, 24), generator=draw).tolist()})
    seen, found, base = [], {}, shorten(folder / f"base {rank}")
    for name in ("whole", "resumed"):
        torch.manual_seed(0)
        shared = {
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "report_to": [],
            "max_steps": 3,
        }
        args = SFTConfig(str(folder / "sft"), disable_tqdm=True, use_cpu=True, ddp_backend="gloo", **shared)
        config = LayerLoraConfig(select=BY_GRADIENT)
        trainer = SFTTrainer(str(base), args=args, train_dataset=rows, peft_config=config)
        trainer.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].clone()), with_kwargs=True)
        clipped = Clipped()
        trainer.add_callback(clipped)
        trainer.train(resume_from_checkpoint=str(folder / "sft" / "checkpoint-2") if name == "resumed" else None)
        norms = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
        found[name] = told(trainer.model) | {"logged": norms, "clipped": clipped.norms}
        found[name]["wrapped"] = type(trainer.model_wrapped).__name__
    return found | {"first": seen[0]}


SCENES = {
    "given": given_batches,
    "bare": bare_loop(SMALL, 1),
    "accumulated": bare_loop(SMALL, 2),
    "several steps": bare_loop({**SMALL, "num_batches": 2}, 1),
    "outliers": bare_loop(OUTLIERS, 1),
    "sft": sft,
}


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    told_by_all = {}
    for name, scene in SCENES.items():
        told_by_all[name] = scene(rank, folder)
    torch.save(told_by_all, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# what is asked of them


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


def alone(select, rank, count, model=None, given=None):
    """The score of one rank's batches, in one process."""
    options = {k: v for k, v in select.items() if k == "M"}
    chosen = batches(rank, count) if given is None else given
    return score_layers(
        model or llama(), select["by"], batches=chosen, num_batches=count, progress=False, **options
    ).values


def pooled(*values):
    """Root mean square over the ranks: each draws the same random directions for its n-th batch."""
    return [(sum(v * v for v in layer) / len(layer)) ** 0.5 for layer in zip(*values, strict=True)]


def best(values, keep):
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:keep])


@pytest.mark.parametrize("scene", ["given", "bare", "accumulated", "several steps", "outliers"])
def test_both_ranks_make_one_choice_from_different_data(ranks, scene):
    ours, theirs = (r[scene]["selection"] for r in ranks)
    assert ours == theirs and len(ours["layers"]) == 2
    count = {"given": 3, "accumulated": 2, "several steps": 2}.get(scene, 1)
    if scene == "outliers":
        together = [*batches(0, 1), *batches(1, 1)]
        expected = list(alone(OUTLIERS, 0, 2, given=together))
    else:
        expected = pooled(alone(SMALL, 0, count), alone(SMALL, 1, count))
        assert expected != pytest.approx(alone(SMALL, 0, count), rel=1e-3)  # one rank alone would have scored otherwise
    assert ours["scores"]["values"] == pytest.approx(expected, rel=1e-5)
    assert ours["layers"] == best(expected, 2)


@pytest.mark.parametrize("scene", ["bare", "accumulated", "several steps", "outliers"])
def test_the_adapters_stay_the_same_on_both_ranks(ranks, scene):
    ours, theirs = (r[scene] for r in ranks)
    assert set(ours["adapter"]) == set(theirs["adapter"])
    assert all(torch.equal(p, theirs["adapter"][n]) for n, p in ours["adapter"].items())
    trained = [p for n, p in ours["adapter"].items() if "lora_B" in n]
    assert len(trained) == 4 and all(bool(p.any()) for p in trained)
    steps = 2 if scene == "several steps" else 3
    assert ours["steps"] == theirs["steps"] == dict.fromkeys(ours["selection"]["layers"], steps)
    assert ours["checks"]["end"] == theirs["checks"]["end"] == "every chosen target moved, and no frozen parameter did"


def test_sft_trainer_in_two_processes(ranks):
    whole, theirs = (r["sft"]["whole"] for r in ranks)
    assert whole["wrapped"] == "DistributedDataParallel"
    assert not torch.equal(ranks[0]["sft"]["first"], ranks[1]["sft"]["first"])
    assert whole["selection"] == theirs["selection"] and whole["steps"] == theirs["steps"]
    assert all(torch.equal(p, theirs["adapter"][n]) for n, p in whole["adapter"].items())
    values = []
    for ids in (r["sft"]["first"] for r in ranks):
        model = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            values.append(alone(BY_GRADIENT, 0, 1, model, [{"input_ids": ids, "labels": ids}]))
    expected = pooled(*values)
    assert whole["selection"]["layers"] == best(expected, 3)
    assert whole["selection"]["scores"]["values"] == pytest.approx(expected, rel=1e-2)


def test_the_first_norm_is_that_of_the_chosen_layers_in_two_processes_too(ranks):
    for found in (r["sft"]["whole"] for r in ranks):
        for logged, clipped in zip(found["logged"], found["clipped"], strict=True):
            assert set(clipped) == set(found["adapter"])
            assert logged == pytest.approx(sum(v * v for v in clipped.values()) ** 0.5, rel=1e-5)
    assert ranks[0]["sft"]["whole"]["logged"] == ranks[1]["sft"]["whole"]["logged"]


def test_a_run_of_two_processes_resumes_with_its_choice(ranks):
    for told_by in ranks:
        whole, resumed = told_by["sft"]["whole"], told_by["sft"]["resumed"]
        assert resumed["selection"] == whole["selection"]
        assert resumed["steps"] == dict.fromkeys(whole["selection"]["layers"], 3)
        assert all(torch.equal(p, whole["adapter"][n]) for n, p in resumed["adapter"].items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

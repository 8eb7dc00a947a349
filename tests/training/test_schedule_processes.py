"""Two processes under DDP train a schedule as one does: the same layers at every switch, and the same weights."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, check_trained, get_peft_model
from layerpeft.cli import main as main_of_cli
from layerpeft.errors import TrainingError
from layerpeft.integrations.engines.fsdp import FSDP2
from layerpeft.integrations.engines.known import asked_for
from layerpeft.training.steps import _built, _train_begin
from tests.helpers.loops import llama
from tests.helpers.processes import in_two_ranks
from tests.helpers.repeating import some, wanted
from tests.helpers.scheduling import pool_tensors, switcher_of, trainer_of

pytestmark = pytest.mark.usefixtures("shallow")

STEPS = 9
UNIFORM = {"pick": "uniform", "keep": 1, "reselect_steps": 2}
# `exact`: sketches draw other directions for the second micro-batch of one process than for the first of another
BY_GRADIENT = {"by": "gradient_norm", "exact": True, "pick": "sample", "keep": 1, "reselect_steps": 2}
SELECTS = {
    "uniform": UNIFORM,
    "gradient": BY_GRADIENT,
    "rescored": BY_GRADIENT | {"reselect_steps": 1, "rescore_steps": 3, "memory": "ema", "state": "clear"},
}
METHODS = {
    "lora": lambda **options: LayerLoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options),
    "galore": lambda **options: LayerGaloreConfig(
        r=4, target_modules=["q_proj", "v_proj"], update_proj_gap=3, **options
    ),
    "full": lambda **options: LayerFullConfig(**options),
}
BARE = [(method, select) for method in METHODS for select in SELECTS]
TRAINED = [("lora", "gradient"), ("full", "uniform")]


def wrap(method, select):
    torch.manual_seed(1)
    dtype = torch.float64 if method == "galore" else torch.float32
    config = METHODS[method](select=SELECTS[select], task_type="CAUSAL_LM")
    return get_peft_model(llama().to(dtype), config).train()


def told(model):
    """What a rank tells of its model."""
    history = [(h["step"], h["layers"], h["scores"]) for h in switcher_of(model).plain()["history"]]
    return {"history": history, "weights": {n: p.detach().clone() for n, p in model.named_parameters()}}


def train(model, outer, share, micro, rate=1e-3):
    """Every step sees `share` of its four sequences, in `micro` parts."""
    rows = torch.randint(0, 60, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for four in rows.split(4):
        parts = four[share].chunk(micro)
        for last, ids in enumerate(parts, 1 - micro):
            outer.require_backward_grad_sync = last == 0
            (outer(input_ids=ids, labels=ids).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    check_trained(outer)
    return told(model)


# what each process runs


def refused(share, **options):
    """What is said where DDP waits for what does not come."""
    model = wrap("lora", "uniform")
    try:
        train(model, DistributedDataParallel(model, **options), share, 1)
    except TrainingError as error:
        return str(error)
    return None


def train_by_trainer(folder, method, select, accumulate, checkpoint=None):
    options = {"learning_rate": 1e-3, "gradient_accumulation_steps": accumulate}
    options |= {"ddp_backend": "gloo"} if dist.is_initialized() else {}
    trainer = trainer_of(wrap(method, select), folder / f"{method} {select}", 7, save_steps=3, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    kind = type(trainer.model_wrapped).__name__
    return told(trainer.model) | {"wrapped": kind, "finds": getattr(trainer.model_wrapped, "find_unused_parameters", 0)}


def main(folder, *scenes):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, found = dist.get_rank(), {}
    share = slice(2 * rank, 2 * rank + 2)
    for method, select in (cell for cell in BARE if " ".join(cell) in scenes):
        model = wrap(method, select)
        found[method, select] = train(model, DistributedDataParallel(model, find_unused_parameters=True), share, 1)
    found["not told"] = refused(share)
    found["static"] = refused(share, find_unused_parameters=True, static_graph=True)
    for method, select in (cell for cell in TRAINED if f"trainer {' '.join(cell)}" in scenes):
        found["trainer", method, select] = train_by_trainer(folder, method, select, 1)
        checkpoint = str(folder / f"{method} {select}" / "checkpoint-3")
        found["resumed", method, select] = train_by_trainer(folder, method, select, 1, checkpoint)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# what is asked of them


def apart(one, other):
    """The largest difference of two sets of weights."""
    assert set(one) == set(other)
    return max(float((p - other[n]).abs().max()) for n, p in one.items())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    scenes = map(" ".join, wanted(request, "method", "select"))
    trained = (f"trainer {' '.join(cell)}" for cell in wanted(request, "by_trainer", "select"))
    return in_two_ranks(__file__, tmp_path_factory.mktemp("ranks"), *scenes, *trained)


@pytest.mark.parametrize(
    ("method", "select"), some(BARE, [("lora", "gradient"), ("full", "rescored"), ("galore", "uniform")])
)
def test_two_processes_equal_one_with_accumulation(ranks, method, select):
    ours, theirs = (r[method, select] for r in ranks)
    assert ours["history"] == theirs["history"] and apart(ours["weights"], theirs["weights"]) == 0
    model = wrap(method, select)
    start = told(model)["weights"]
    alone = train(model, model, slice(0, 4), 2)
    assert [h[:2] for h in ours["history"]] == [h[:2] for h in alone["history"]]
    assert len({tuple(h[1]) for h in ours["history"]}) > 1  # other layers came on
    for (_, _, mine), (_, _, one) in zip(ours["history"], alone["history"], strict=True):
        assert mine == (None if one is None else pytest.approx(one, rel=1e-4))
    assert apart(alone["weights"], start) > 1e-3
    assert apart(ours["weights"], alone["weights"]) <= (1e-6 if method == "galore" else 1e-5)


def test_a_ddp_that_waits_for_every_gradient_is_refused_at_once(ranks):
    for name in ("not told", "static"):
        assert ranks[0][name] == ranks[1][name] and "find_unused_parameters=True" in ranks[0][name]


@pytest.mark.parametrize(("by_trainer", "select"), some(TRAINED, 1))
def test_trainer_in_two_processes_and_resumed(ranks, by_trainer, select, tmp_path):
    method = by_trainer
    ours, theirs = (r["trainer", method, select] for r in ranks)
    assert ours["wrapped"] == "DistributedDataParallel" and ours["finds"] is True
    assert ours["history"] == theirs["history"] and apart(ours["weights"], theirs["weights"]) == 0
    for rank in ranks:
        again = rank["resumed", method, select]
        assert again["history"] == ours["history"] and apart(again["weights"], ours["weights"]) == 0
    alone = train_by_trainer(tmp_path, method, select, 2)
    assert [h[:2] for h in ours["history"]] == [h[:2] for h in alone["history"]]
    assert apart(ours["weights"], alone["weights"]) <= 1e-5


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (SimpleNamespace(deepspeed={"zero_optimization": {"stage": 3}}, fsdp=[]), "DeepSpeed ZeRO-3"),
        (SimpleNamespace(deepspeed=None, fsdp=["full_shard"], fsdp_config={"fsdp_version": 1}, use_cpu=False), "FSDP"),
        (SimpleNamespace(fsdp=True, fsdp_config={"version": 1}), "FSDP"),
        (SimpleNamespace(fsdp=True), "FSDP2"),  # each process steps on its part of every tensor
        (SimpleNamespace(deepspeed=None, fsdp=["full_shard"], use_cpu=True), None),  # accelerate runs DDP then
        (SimpleNamespace(deepspeed=None, fsdp=[]), None),
    ],
)
def test_engines_that_divide_the_optimizer_are_refused_before_training_begins(args, name):
    model = wrap("lora", "uniform")
    engine = asked_for(args)
    if name is None or engine is FSDP2:
        assert name == (engine and engine.name)
        _train_begin(model, None, False, engine)
        assert switcher_of(model).standing.step == 0 and pool_tensors(model)
        return
    assert engine is not None
    for refused in (_built, partial(_train_begin, restored=None, merges=False)):
        with pytest.raises(TrainingError, match=f"(?s)under {name}, .*use DDP .*fully_shard"):
            refused(model, engine=engine)
    plain = get_peft_model(llama(), LayerLoraConfig(select="last:1", target_modules=["q_proj"]))
    _train_begin(plain, None, False, engine)  # a choice that is made once is none of theirs


RECIPE = """\
trainer: sft
model_name_or_path: layerpeft://llama-6m
dataset_name: layerpeft://gsm8k_train.jsonl
columns: {prompt: "{question}", completion: "{answer}"}
output_dir: out
layerpeft: {method: full, select: {pick: uniform, keep: 2, reselect_steps: 20}}
"""


@pytest.mark.parametrize(
    ("line", "environment", "words"),
    [
        (
            "deepspeed: {zero_optimization: {stage: 3}}",
            "",
            "line 7: deepspeed: layers cannot .* under DeepSpeed ZeRO-3",
        ),
        (
            "fsdp: full_shard\nfsdp_config: {version: 1}",
            "",
            "line 7: fsdp: layers cannot change while training under FSDP",
        ),
        (
            "",
            "ACCELERATE_USE_FSDP",
            "line 6: select: layers cannot .* under FSDP.*accelerate launch has asked for FSDP",
        ),
        ("", "ACCELERATE_USE_DEEPSPEED", "line 6: select: layers cannot .* under DeepSpeed"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_recipes_are_refused_with_them_before_weights_load(
    command, line, environment, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("weights loaded"))
    if environment:
        monkeypatch.setenv(environment, "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}{line}\n")
    assert main_of_cli([command, "recipe.yaml"]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and "use DDP" in said
    assert "  - " not in said  # one problem
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Ranks in proportion to scores: as many parameters as one rank for all, by stock PEFT's own patterns."""

from __future__ import annotations

import itertools
import json
import math
import random

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import layerpeft
from layerpeft import LayerGaloreConfig, LayerLoraConfig, layer_map, plan, score_layers
from layerpeft.errors import ConfigError
from layerpeft.model.layers import Target
from layerpeft.tuners import ranks
from layerpeft.tuners.soft import choosing_by
from tests.helpers.loops import LAYERS, llama, loras, make_batches, record
from tests.helpers.models import MODELS

RANDOM = {"by": "random", "keep": "all", "seed": 3}
OPTIONS = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def targets(*shapes: tuple[int, ...], kind: str = "linear") -> list[Target]:
    return [Target(f"layers.{i}.w", i, "w", kind, shape, math.prod(shape)) for i, shape in enumerate(shapes)]


def spent(found, held) -> int:
    return sum(found[t.name] * ranks.cost_of(t) for t in held)


def config(select=RANDOM, **more) -> LayerLoraConfig:
    return LayerLoraConfig(select=select, ranks="by_score", **OPTIONS | more)


def trained(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- sharing out -----------------------------------------------------------------------------------------------------


def test_layers_of_one_shape_have_exactly_as_many_parameters():
    held = targets(*[(64, 32)] * 4)
    assert list(ranks.by_score({0: 1.0, 1: 3.0, 2: 2.0, 3: 2.0}, held, 8).values()) == [4, 12, 8, 8]
    draw = random.Random(0)
    for _ in range(200):
        count, rank = draw.randint(1, 12), draw.randint(1, 16)
        held = targets(*[(64, 80)] * count)
        scores = {i: draw.random() for i in range(count)}
        found = ranks.by_score(scores, held, rank)
        assert spent(found, held) == rank * 144 * count and min(found.values()) >= 1
        order = sorted(range(count), key=lambda i: scores[i])
        assert [found[f"layers.{i}.w"] for i in order] == sorted(found.values())


def test_what_is_spent_is_never_above_and_as_near_as_rounding_comes():
    draw = random.Random(1)
    for _ in range(100):
        shapes = [(draw.randint(8, 40), draw.randint(8, 40)) for _ in range(6)]
        held, rank = targets(*shapes), draw.randint(2, 6)
        scores = {i: draw.choice((0.0, draw.random(), 5 * draw.random())) for i in range(6)}
        scores[0] += 0.1
        found = ranks.by_score(scores, held, rank, 1)
        budget = rank * sum(map(ranks.cost_of, held))
        costs = list(map(ranks.cost_of, held))
        wanted = ranks._wanted([scores[i] for i in range(6)], costs, 1, [min(s) for s in shapes], budget)
        low = [math.floor(w + 1e-9) for w in wanted]
        ways = itertools.product(*[(r, r + 1) if r < min(s) else (r,) for r, s in zip(low, shapes, strict=True)])
        best = max(t for way in ways if (t := sum(r * c for r, c in zip(way, costs, strict=True))) <= budget)
        assert spent(found, held) == best <= budget
        assert all(1 <= r <= min(t.shape) for t, r in zip(held, found.values(), strict=True))


def test_least_and_most():
    held = targets((64, 64), (64, 64), (4, 64), (64, 64))
    found = list(ranks.by_score({0: 0.0, 1: 1.0, 2: 9.0, 3: 1.0}, held, 8, 2).values())
    assert found[0] == 2 and found[2] == 4 and found[1] in (13, 12) and found[3] in (12, 13)
    assert ranks.cost_of(targets((3, 10, 20), kind="experts")[0]) == 3 * 30
    assert ranks.cost_of(targets((10, 6, 3, 3), kind="conv")[0]) == 10 + 54
    many = targets(*[(1009 + i, 4001) for i in range(60)])  # too many sums to tell apart: still never above
    found = ranks.by_score({i: 1.0 + i for i in range(60)}, many, 64)
    assert 0 <= 64 * sum(map(ranks.cost_of, many)) - spent(found, many) < 5 * ranks.cost_of(many[0])
    for scores in ({0: 1.0, 1: -0.5}, {0: 0.0, 1: 0.0}):
        with pytest.raises(ConfigError, match="fall below 0|are all 0"):
            ranks.by_score(scores, held[:2], 8)


# ---- through PEFT ----------------------------------------------------------------------------------------------------


def test_a_wrapped_model_has_them_and_plain_peft_reads_them(tmp_path):
    model = layerpeft.get_peft_model(llama(), config(min_rank=2))
    even = layerpeft.get_peft_model(llama(), LayerLoraConfig(select="all", **OPTIONS))
    assert trained(model) == trained(even)
    scores = score_layers(llama(), "random", seed=3, target_modules="all-linear").values
    found = {n.split(".lora_A")[0]: p.shape[0] for n, p in loras(model).items() if ".lora_A" in n}
    layer = {i: [r for n, r in found.items() if f".layers.{i}." in n] for i in range(LAYERS)}
    means = [sum(layer[i]) / 7 for i in range(LAYERS)]
    assert sorted(range(LAYERS), key=lambda i: means[i]) == sorted(range(LAYERS), key=lambda i: scores[i])
    assert all(max(r) - min(r) <= 1 for r in layer.values()) and len(set(means)) == LAYERS
    modules = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert all(m.scaling["default"] == pytest.approx(2.0) for m in modules) and len(modules) == 28
    for p in loras(model).values():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    batch = make_batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**batch).logits, model.eval()(**batch).logits)
    stored = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert stored["peft_type"] == "LORA" and "ranks" not in stored and len(stored["rank_pattern"]) > 20
    assert json.loads((tmp_path / "layerpeft.json").read_text(encoding="utf-8"))["config"]["ranks"] == "by_score"
    assert record(layerpeft.load(tmp_path, llama())).config["min_rank"] == 2


def test_targets_have_ranks_of_their_own():
    select = {"by": "random", "keep": "all", "unit": "target"}
    model = layerpeft.get_peft_model(llama(), config(select))
    even = layerpeft.get_peft_model(llama(), LayerLoraConfig(select="all", **OPTIONS))
    found = {m.r["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(found) > 4 and trained(even) - 64 < trained(model) <= trained(even)


def test_by_data_and_with_the_scale_of_rslora():
    select = {"by": "fisher", "keep": 3}
    model = layerpeft.get_peft_model(llama(), config(select, use_rslora=True), batches=make_batches()[:2])
    found = {m.r["default"]: m.scaling["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(found) > 1 and all(s == pytest.approx(16 / math.sqrt(r)) for r, s in found.items())
    layers = layer_map(llama())
    cost = sum(sum(t.shape) for t in layers.targets if t.layer == 0)
    assert trained(model) == 3 * 8 * cost


@pytest.mark.slow
def test_a_plan_that_knows_no_score_counts_as_many_parameters():
    select = {"by": "fisher", "keep": 3}
    model = layerpeft.get_peft_model(llama(), config(select), batches=make_batches()[:2])
    assert plan(llama(), config(select)).trainable == trained(model)


def test_experts():
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 4}
    model = layerpeft.get_peft_model(MODELS["mixtral"](), config(**options))
    even = layerpeft.get_peft_model(MODELS["mixtral"](), LayerLoraConfig(select="all", **OPTIONS | options))
    assert trained(even) - 4 * 160 < trained(model) <= trained(even)
    assert len({p.shape for n, p in loras(model).items() if "experts" in n and ".lora_A" in n}) > 1


def train(folder, resume=None, steps=4):
    model = layerpeft.get_peft_model(llama(), config())
    rows = [{k: v[0] for k, v in b.items()} for b in make_batches()]
    given = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        logging_steps=1, disable_tqdm=True, use_cpu=True, seed=1,
    )  # fmt: skip
    trainer = Trainer(model, given, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return loras(model)


def test_a_resumed_run_equals_the_unbroken_one(tmp_path):
    whole = train(tmp_path / "whole")
    again = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.keys() == again.keys() and all(torch.equal(p, again[n]) for n, p in whole.items())


# ---- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "last:2"}, "needs layers that are chosen by their scores"),
        ({"select": {**RANDOM, "pick": "bottom"}}, "pick: bottom wants the lowest"),
        ({"select": {**RANDOM, "keep": 2, "reselect_steps": 5}}, "reselect_steps makes another"),
        ({"rank_pattern": {"q_proj": 2}}, "and so do rank_pattern and alpha_pattern"),
        ({"init_lora_weights": "eva"}, "and so does init_lora_weights='eva'"),
        ({"min_rank": 9}, "min_rank=9, above r=8"),
        ({"ranks": None, "min_rank": 2}, "min_rank=2 is of ranks='by_score'"),
        ({"ranks": "by_scores"}, "ranks='by_scores' is not one of by_score|unknown ranks.*by_score"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LayerLoraConfig(**OPTIONS | {"select": RANDOM, "ranks": "by_score", **options})


def test_refused_where_they_have_no_meaning():
    with pytest.raises(ConfigError, match="is of LoRA"):
        LayerGaloreConfig(select=RANDOM, ranks="by_score")
    with pytest.raises(ConfigError, match="needs the scores when the layers are wrapped|pass batches="):
        layerpeft.get_peft_model(llama(), config({"by": "gradient_norm", "keep": 2}))
    other = choosing_by(config(min_rank=2), {"layers": [0, 2]})  # an arm of a comparison
    assert other.ranks is None and other.min_rank is None
    assert choosing_by(config(min_rank=2), {"by": "random", "keep": 2}).min_rank == 2

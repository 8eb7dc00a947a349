"""Learning rates by layer: against an optimizer built by hand, under a scheduler, resumed, and told."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import layerpeft
from layerpeft import LayerFullConfig, LayerLoraConfig, layer_rates, score_layers
from layerpeft.errors import ConfigError, TrainingError
from layerpeft.integrations.engines.known import ENGINES
from tests.helpers.loops import LAYERS, adamw, llama, loras, make_batches, step

DECAY, RATE = 0.5, 1e-2
OPTIONS = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
BY_SCORE = {"select": {"by": "random", "keep": 3, "seed": 3}, "layer_lr": "by_score"}
WAITS = {"select": {"by": "gradient_norm", "keep": 2}, "layer_lr_decay": DECAY}
AGAIN = {"select": {"pick": "uniform", "keep": 2, "reselect_steps": 2}, "layer_lr_decay": DECAY}
FULL = {"select": "last:2", "layer_lr_decay": DECAY}


def wrap(kind=LayerLoraConfig, **options):
    config = kind(**(OPTIONS if kind is LayerLoraConfig else {"task_type": "CAUSAL_LM"}) | options)
    return layerpeft.get_peft_model(llama(), config)


def layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def factors(options) -> list[float]:
    """Of each layer, by hand."""
    if "layer_lr" not in options:
        return [DECAY ** (LAYERS - 1 - i) for i in range(LAYERS)]
    scores = score_layers(llama(), "random", seed=3).values
    return [s / max(scores) for s in scores]


class Rates(TrainerCallback):
    """What a run's trackers were told, and the rates of its groups."""

    def __init__(self):
        self.told, self.groups = [], []

    def on_step_end(self, args, state, control, optimizer=None, **_):
        self.groups.append({g["layer"]: g["lr"] for g in optimizer.param_groups if g["params"] and "layer" in g})

    def on_log(self, args, state, control, logs=None, **_):
        self.told.append({k: v for k, v in (logs or {}).items() if k.startswith("layers/lr/")})


def run(folder, options, resume=None, kind=LayerLoraConfig, **more):
    torch.manual_seed(5 if resume else 0)
    model = wrap(kind, **options)
    rows = [{k: v[0] for k, v in b.items()} for b in make_batches()]
    given = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=RATE, report_to=["none"],
        logging_steps=1, disable_tqdm=True, use_cpu=True, seed=1, weight_decay=0.1, lr_scheduler_type="linear", **more,
    )  # fmt: skip
    trainer, seen = Trainer(model, given, train_dataset=rows), Rates()
    trainer.args.report_to = ["seen"]
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.mark.parametrize("options", [{"layer_lr_decay": DECAY}, BY_SCORE], ids=["decay", "by_score"])
def test_a_loop_of_ones_own_equals_groups_by_hand(options):
    ours, theirs = wrap(**options), wrap(**{k: v for k, v in options.items() if k == "select"})
    optimizer = adamw(ours, RATE, weight_decay=0.1)
    layer_rates(ours, optimizer)
    layer_rates(ours, optimizer)  # once is enough
    want = factors(options)
    groups = [{"params": [p], "lr": RATE * want[layer_of(n)]} for n, p in loras(theirs).items()]
    by_hand = torch.optim.AdamW(groups, weight_decay=0.1)
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 4) for o in (optimizer, by_hand)]
    for batch in make_batches()[:4]:
        for model, own, scheduler in zip((ours, theirs), (optimizer, by_hand), schedulers, strict=True):
            step(model, own, batch)
            scheduler.step()
    assert len({round(f, 9) for f in want}) == LAYERS
    for (name, p), q in zip(loras(ours).items(), loras(theirs).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)


@pytest.mark.spread(2)
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"layer_lr_decay": DECAY}, LayerLoraConfig),
        (WAITS, LayerLoraConfig),
        pytest.param(BY_SCORE, LayerLoraConfig, marks=pytest.mark.slow),
        pytest.param(AGAIN, LayerLoraConfig, marks=pytest.mark.slow),
        pytest.param(FULL, LayerFullConfig, marks=pytest.mark.slow),
    ],
    ids=["all", "waits", "by_score", "again", "full"],
)
def test_a_trainer_divides_schedules_tells_and_goes_on(tmp_path, options, kind):
    trainer, seen = run(tmp_path / "whole", options, kind=kind)
    want = factors(options)
    for number, groups in enumerate(seen.groups):  # after the scheduler's step, which is linear
        assert groups == {i: pytest.approx(RATE * (3 - number) / 4 * want[i]) for i in groups} and len(groups) >= 2
    assert all(told == {f"layers/lr/{i}": lr for i, lr in g.items()} for told, g in zip(seen.told, seen.groups))
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(RATE)  # the whole one
    again, _ = run(tmp_path / "again", options, str(tmp_path / "whole" / "checkpoint-2"), kind=kind)
    ours, theirs = ({n: p for n, p in t.model.named_parameters()} for t in (again, trainer))
    assert ours.keys() == theirs.keys() and all(torch.equal(p, theirs[n]) for n, p in ours.items())
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "whole" / "checkpoint-4")).eval()
    batch = make_batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


def test_an_optimizer_with_one_rate_is_stopped_at_its_first_step():
    model = wrap(layer_lr_decay=DECAY)
    optimizer = adamw(model)
    with pytest.raises(TrainingError, match=r"layer_lr_decay: 0.5.*layerpeft.layer_rates\(model, optimizer\)"):
        step(model, optimizer, make_batches()[0])
    late = adamw(model)
    torch.optim.lr_scheduler.LinearLR(late)
    with pytest.raises(TrainingError, match="has a scheduler already"):
        layer_rates(model, late)
    with pytest.raises(TrainingError, match="no adapter of this model asks"):
        layer_rates(wrap(), adamw(wrap()))
    zero = wrap(select={"by": "depth", "keep": "all"}, layer_lr="by_score")
    with pytest.raises(TrainingError, match="that of layer 0 is 0, with which it would not train"):
        layer_rates(zero, adamw(zero))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_lr": "by_score"}, "needs layers that are chosen by their scores"),
        ({**BY_SCORE, "layer_lr_decay": 0.9}, "both say the learning rate"),
        ({"layer_lr_decay": 1.5}, "layer_lr_decay=1.5 is not a number above 0 and at most 1"),
        ({"select": {"by": "random", "keep": 2, "reselect_steps": 3}, "layer_lr": "by_score"}, "reselect_steps"),
        (
            {"select": {"by": "random", "keep": 2, "unit": "target"}, "layer_lr_decay": 0.9},
            "rate of whole layers, and unit",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LayerLoraConfig(**options)


def test_refused_where_scores_come_too_late_and_under_engines_that_regroup():
    with pytest.raises(ConfigError, match="layer_lr='by_score' needs the scores when the layers are wrapped"):
        wrap(select={"by": "gradient_norm", "keep": 2}, layer_lr="by_score")
    needs = LayerLoraConfig(select="last:2", layer_lr_decay=0.9).needs(True)
    assert {e.key for e in ENGINES if e.refusals(needs)} == {"fsdp1", "fsdp2", "zero1", "zero2", "zero3"}

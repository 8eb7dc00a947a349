"""A deferred choice scores each micro-batch by its own mean loss, however the loss is multiplied on its way to backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from layerpeft import score_layers
from layerpeft.integrations.losses import loss_of, watch_scale
from tests.helpers.loops import adamw, chosen, llama, make_batches, record, wrap

EXACT = {"by": "gradient_norm", "keep": 2, "exact": True}
SIGNAL = {"by": "gradient_norm", "keep": 2, "signal": True, "k": 32}
LABELS = (3, 22, 9)


@pytest.fixture(scope="module")
def ragged():
    """Three batches of which 3, 22 and 9 labels count."""
    found = []
    for batch, count in zip(make_batches(), LABELS, strict=False):
        labels = torch.full_like(batch["labels"], -100)
        places = torch.cartesian_prod(torch.arange(2), torch.arange(1, 12))[:count]
        labels[places[:, 0], places[:, 1]] = batch["labels"][places[:, 0], places[:, 1]]
        found.append({"input_ids": batch["input_ids"], "labels": labels})
    assert [int((b["labels"][:, 1:] != -100).sum()) for b in found] == list(LABELS)
    return found


def by_log_probs(model, batch):
    return -model(**batch, fused_lm_head=True).log_probs.sum() / sum(LABELS)


WAYS = {
    "its own mean": lambda model, batch: model(**batch).loss,
    "divided by the steps": lambda model, batch: model(**batch).loss / 3,
    "divided inside of the model": lambda model, batch: model(**batch, num_items_in_batch=sum(LABELS)).loss,
    "weighed by hand": lambda m, b: m(**b).loss * int((b["labels"][:, 1:] != -100).sum()) / sum(LABELS),
    "scaled": lambda model, batch: 1024 * model(**batch, num_items_in_batch=torch.tensor(sum(LABELS))).loss,
    "from log-probabilities": by_log_probs,
}


@pytest.mark.matrix
@pytest.mark.parametrize("select", [EXACT, SIGNAL], ids=["exact", "signal"])
@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_score_layers_with_ragged_labels(ragged, way, select):
    base = llama()
    add_fused_lm_head(base)
    model = wrap(select, base)
    optimizer = adamw(model)
    for batch in ragged:
        WAYS[way](model, batch).backward()
    optimizer.step()
    options = {k: v for k, v in select.items() if k not in ("by", "keep")}
    scores = score_layers(llama(), batches=ragged, num_batches=3, progress=False, **options)
    assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)
    assert chosen(model) == tuple(sorted(scores.ranked()[:2]))


def own_loss(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / sum(LABELS)


@pytest.mark.parametrize("known", [(), (1,)], ids=["none", "one"])
def test_where_one_scale_cannot_be_told_every_batch_counts_as_training_weighs_it(ragged, known):
    model = wrap(EXACT)
    optimizer = adamw(model)
    for number, batch in enumerate(ragged):
        (WAYS["weighed by hand"] if number in known else own_loss)(model, batch).backward()
    optimizer.step()
    each = [score_layers(llama(), batches=[b], num_batches=1, exact=True, progress=False).values for b in ragged]
    weights = [n / sum(LABELS) for n in LABELS]
    values = [(sum((w * v[i]) ** 2 for w, v in zip(weights, each, strict=True)) / 3) ** 0.5 for i in range(4)]
    assert record(model).selection.scores.values == pytest.approx(values, rel=1e-5)


def test_preferences_have_no_scale():
    log_probs = torch.zeros(2, 3, requires_grad=True)
    output = type("Output", (), {"log_probs": log_probs, "label_mask": torch.ones(2, 3)})()
    for sign, expected in ((1.0, 6.0), (-1.0, None)):
        scale = watch_scale(torch.nn.Identity(), {"labels": torch.ones(2, 3)}, output)
        (-log_probs[0].sum() - sign * log_probs[1].sum()).backward()
        assert scale() == expected


def test_a_model_that_takes_the_number_of_labels_and_goes_its_own_way_has_no_scale():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.ones(1, 4, dtype=torch.long)}
    found = []
    for inputs in (batch, batch | {"num_items_in_batch": 8}):
        output = model(**batch)
        scale = watch_scale(model, inputs, output)
        (output.loss / 4).backward()
        found.append(scale())
    assert found == [0.25, None]


def test_the_loss_of_an_output():
    loss = torch.tensor(1.0)
    assert loss_of({"loss": loss}) is loss_of((loss, torch.ones(2))) is loss_of(type("O", (), {"loss": loss})()) is loss
    assert loss_of((torch.ones(2),)) is loss_of({"logits": loss}) is loss_of(()) is None


class Keeping(Trainer):
    """Keeps the micro-batches that it trains on."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append({k: v.clone() for k, v in inputs.items()})
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_under_the_trainer_with_accumulation_over_ragged_batches(ragged, tmp_path):
    rows = [{"input_ids": b["input_ids"][r], "labels": b["labels"][r]} for b in ragged for r in (0, 1)]
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.1,
    )
    rows = [r for r in rows if (r["labels"] != -100).any()]
    model = wrap(EXACT)
    trainer = Keeping(model, args=args, train_dataset=rows)
    trainer.train()
    assert len(trainer.seen) == 4 and len({int((b["labels"] != -100).sum()) for b in trainer.seen}) > 2
    scores = score_layers(llama(), batches=trainer.seen, num_batches=4, exact=True, progress=False)
    assert record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-5)
    assert chosen(model) == tuple(sorted(scores.ranked()[:2]))

"""Watching hidden states: only real tokens count, in whatever form blocks take and give them, while training and beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import layerpeft
from layerpeft import LayerLoraConfig, score_layers
from layerpeft.errors import ScoreError
from layerpeft.selection import plugins
from layerpeft.selection.scorers import influence
from layerpeft.selection.states import cosines, with_states
from tests.helpers import loops
from tests.helpers.hidden import llama, padded, request_of
from tests.helpers.models import MODELS, batch
from tests.helpers.repeating import some
from tests.helpers.together import Group

LIVE: dict[str, dict[str, Any]] = {
    "influence": {},
    "cka": {},
    "entropy": {"clusters": 5},
    "lens": {"measure": "kl"},
    "representation": {"measure": "invariance"},
    "linearity": {},
    "intrinsic_dimension": {"tokens": 10_000},
    "removal": {},
}


def rows_of(one: dict[str, Any], mask: torch.Tensor) -> list[dict[str, Any]]:
    """The rows of a padded batch, one by one, without their padding."""
    found = []
    for i, real in enumerate(mask != 0):
        row = {k: v[i : i + 1, real] if v.shape == mask.shape else v[i : i + 1] for k, v in one.items()}
        found.append({k: v for k, v in row.items() if "mask" not in k})
    return found


@pytest.mark.parametrize(
    ("name", "stack"), some([("llama", None), ("bert", None), ("t5", None), ("t5", "encoder"), ("gpt2", None)], 4)
)
def test_padding_does_not_count(name, stack):
    model = MODELS[name]().eval()
    one = padded(name, model)
    mask = one.get("attention_mask")
    if mask is None:  # of the decoder labels say what is real; the encoder's rows are as long
        mask = (one["labels"] != -100).long()
        one["attention_mask"] = torch.ones_like(mask) if stack is None else mask
    alone = rows_of(one, mask)
    if name == "t5" and stack is None:
        for i, row in enumerate(alone):
            row["input_ids"] = one["input_ids"][i : i + 1]
    options: dict[str, Any] = {"stack": stack, "target_modules": "all-linear", "progress": False}
    together = score_layers(model, "influence", batches=[one], **options)
    apart = score_layers(model, "influence", batches=alone, **options)
    assert together.values == pytest.approx(apart.values, rel=1e-4)
    counted = dict(one, attention_mask=torch.ones_like(mask))
    if stack is None and name == "t5":
        counted["labels"] = one["labels"].masked_fill(mask == 0, 5)
    assert score_layers(model, "influence", batches=[counted], **options).values != pytest.approx(
        apart.values, rel=1e-4
    )


def seen_by(model: nn.Module, inputs: dict[str, Any]) -> influence.Influence:
    measurement = influence.start(request_of(model, outer=model), influence.Options())
    measurement.attach()
    with torch.no_grad():
        model(**inputs)
    measurement.next_batch()
    measurement.detach()
    return measurement


def test_texts_packed_into_one_row_are_told_apart():
    model = llama()
    ids = batch("llama", model, rows=1, length=12)["input_ids"]
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    got: list[int] = []

    class Spy(influence.Influence):
        def part(self, passage):
            got.extend(len(t) for t in passage.texts(passage.after))
            assert torch.equal(passage.pooled(passage.after, "last"), passage.after[0, [4, 7, 11]])
            return super().part(passage)

    measurement = Spy(request_of(model, outer=model), influence.Options())
    measurement.attach()
    with torch.no_grad():
        model(input_ids=ids, position_ids=places)
    measurement.detach()
    assert got == [5, 3, 4] * 3


class Block(nn.Module):
    """Changes its input in place, and gives out what else it likes."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(4, 4, bias=False), form

    def forward(self, hidden_states: torch.Tensor) -> Any:
        hidden_states += self.linear(hidden_states)
        return {"tensor": hidden_states, "tuple": (hidden_states, None), "list": [None, hidden_states]}[self.form]


class Looped(nn.Module):
    """A stack of its own form that runs so many times."""

    def __init__(self, form: str = "tensor", times: int = 1, flat: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(form) for _ in range(2))
        self.times, self.flat = times, flat

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = x.clone().flatten(0, 1) if self.flat else x.clone()
        for _ in range(self.times):
            for block in self.blocks:
                out = block(hidden_states=x)
                x = out if isinstance(out, torch.Tensor) else next(v for v in out if v is not None)
        return {"loss": x.sum()}


@pytest.mark.parametrize("form", ["tensor", "tuple", "list"])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_blocks_of_any_form_run_any_number_of_times_and_change_their_input(form, times, flat):
    model = Looped(form, times, flat)
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    state, turned = x[mask != 0].double(), [[], []]
    for number in range(2 * times):
        after = state + state @ model.blocks[number % 2].linear.weight.double().T
        turned[number % 2].append(1 - nn.functional.cosine_similarity(state, after, dim=-1))
        state = after
    want = [float(torch.cat(t).mean().detach()) for t in turned]
    given = [{"x": x, "attention_mask": mask}]
    with torch.no_grad():
        got = score_layers(model, "influence", batches=given, target_modules="all-linear", progress=False)
    assert got.values == pytest.approx(want, rel=1e-5)
    assert torch.equal(given[0]["x"], x)


def test_states_that_cannot_be_compared_are_told_with_a_way_out():
    class Grows(nn.Module):
        def __init__(self, *sizes: int, maps: bool = False) -> None:
            super().__init__()
            pairs = zip(sizes, sizes[1:], strict=False)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Identity()) for a, b in pairs)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            for block in self.blocks:
                x = block(x)
            return {"loss": x.sum()}

    def run(model: nn.Module, *shape: int) -> Any:
        return score_layers(
            model, "influence", batches=[{"x": torch.ones(*shape)}], target_modules="all-linear", progress=False
        )

    with pytest.raises(ScoreError, match=r"blocks.1 takes states \(1, 3, 4\) and gives out \(1, 3, 6\).*exclude"):
        run(Grows(4, 4, 6), 1, 3, 4)
    with pytest.raises(ScoreError, match=r"maps \(1, 2, 3, 4\) and no tokens' states; choose by gradient_norm"):
        run(Grows(4, 4, 4), 1, 2, 3, 4)
    idle = Looped()
    idle.times = 0
    with pytest.raises(ScoreError, match=r"2 layer\(s\) gave out nothing to measure: blocks.0, blocks.1"):
        score_layers(
            idle, "influence", batches=[{"x": torch.ones(1, 2, 4)}], target_modules="all-linear", progress=False
        )


def test_cosines_of_nothing():
    a = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1e-30, 0.0], [torch.nan, 1.0]])
    b = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-2.0, 0.0], [0.0, 1e-30], [1.0, 1.0]])
    assert cosines(a, b).tolist() == pytest.approx([1, 0, -1, 0, float("nan")], nan_ok=True)


def test_other_states_in_the_same_form():
    new, old = torch.ones(1, 2), torch.zeros(1, 2)
    assert with_states(old, new) is new
    assert with_states((None, old, 3), new) == (None, new, 3)
    assert with_states({"a": old, "b": 1}, new) == {"a": new, "b": 1}


# ---- while training, and in several processes ------------------------------------------------------------------------


@pytest.mark.parametrize("by", some(LIVE, {"influence", "entropy", "removal"}))
def test_the_choice_on_the_first_step_is_the_one_made_beforehand(by):
    batches = [padded("llama", loops.llama(), seed=seed) for seed in range(2)]
    for one in batches:
        one["input_ids"] %= 64
        one["labels"] = one["input_ids"]
    select = {"by": by, "keep": 1, **LIVE[by]}
    model = layerpeft.get_peft_model(
        loops.llama(), LayerLoraConfig(select=select, r=2, target_modules="all-linear")
    ).train()
    optimizer = loops.adamw(model)
    loops.step(model, optimizer, *batches)
    scores = score_layers(
        loops.llama(), by, batches=batches, num_batches=2, target_modules="all-linear", progress=False, **LIVE[by]
    )
    assert loops.record(model).selection.scores.values == pytest.approx(scores.values, rel=1e-4)
    assert loops.chosen(model) == scores.ranked()[:1]
    loops.step(model, optimizer, *batches)


@pytest.mark.parametrize("by", some(LIVE, {"influence", "cka", "entropy", "removal"}))
def test_a_batch_that_overflows_while_training_is_left_out(by):
    model = llama()
    kind = plugins.get("layerpeft.scorers", by)
    values = []
    for with_bad in (False, True):
        measurement = kind.start(request_of(model, outer=model, live=True), kind.Options(**LIVE[by]))
        measurement.attach()
        for number in range(1 + with_bad):
            bad = number == 0 and with_bad
            weight = model.model.embed_tokens.weight
            kept = weight.data
            weight.data = weight.data * (float("nan") if bad else 1)
            with torch.no_grad():
                model(**padded("llama", model))
            measurement.next_batch()  # some run the batch once more
            weight.data = kept
        measurement.detach()
        assert measurement.batches == 1
        values.append(measurement.result().values)
    assert values[0] == values[1]


@pytest.mark.parametrize("by", some(LIVE, {"influence", "cka", "entropy", "linearity"}))
def test_processes_make_one_score_of_all_they_have_seen(by, monkeypatch):
    models = [llama() for _ in range(3)]
    batches = [padded("llama", models[0], rows=2, seed=seed) for seed in range(5)]
    kind = plugins.get("layerpeft.scorers", by)

    def run(model: nn.Module, given: list[dict[str, Any]], add: Any = None) -> tuple[float, ...]:
        more = {"entropy": {"tokens": 10_000}, "representation": {"measure": "entropy"}}  # whose draws do not matter
        options = kind.Options(**LIVE[by] | more.get(by, {}))
        measurement = kind.start(request_of(model, outer=model), options)
        measurement.attach()
        with torch.no_grad():
            for one in given:
                model(**one)
                measurement.next_batch()
        measurement.detach()
        if add is not None:
            measurement.combine(add)
        return measurement.result().values

    alone = run(models[2], batches)
    group = Group(monkeypatch, 3)
    parts = [batches[:2], batches[2:], []]
    found = group.run(lambda rank: run(models[rank], parts[rank], group.add))
    assert found[0] == found[1] == found[2]
    if by != "entropy":  # whose clusters begin at other tokens where the keys are others
        assert found[0] == pytest.approx(alone, rel=1e-9)

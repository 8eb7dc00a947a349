"""Wrapping looks once: `select` is parsed once, its file opened once, and the model walked once for its layer map."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import io
import pickle
from collections import Counter
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from layerpeft import (
    LayerFullConfig,
    LayerGaloreConfig,
    LayerLoraConfig,
    Scores,
    Select,
    get_peft_model,
    layer_map,
    plan,
    quantize,
    score_layers,
)
from layerpeft.model import layers as model_layers
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.score import score
from layerpeft.recipe.trainer import batches_for, load_model, prepare, wrap
from layerpeft.training import backward
from tests.helpers.loops import llama, make_batches
from tests.helpers.models import MODELS
from tests.helpers.short import short_llama

pytestmark = pytest.mark.usefixtures("shallow")

KINDS: dict[str, Any] = {"lora": LayerLoraConfig, "galore": LayerGaloreConfig, "full": LayerFullConfig}
SAVED = {"by": "scores.json", "keep": 2}
BY_DATA = {"by": "gradient_norm", "keep": 2}
AGAIN = {"reselect_steps": 3}
ONCE = {"parsed": 1, "walked": 1, "opened": 0}
# what is asked, whether batches are given, and how often the file of scores is opened
CHOICES: dict[str, tuple[dict[str, Any], bool, int]] = {
    "saved": ({"select": SAVED}, False, 1),
    "saved, with batches": ({"select": SAVED}, True, 1),
    "schedule of saved": ({"select": SAVED | AGAIN}, False, 1),
    "schedule": ({"select": BY_DATA | AGAIN}, False, 0),
    "schedule, with batches": ({"select": BY_DATA | AGAIN}, True, 0),
    "deferred": ({"select": BY_DATA}, False, 0),
    "deferred, some layers": ({"select": BY_DATA | {"layers": "last:3"}}, False, 0),
    "batches": ({"select": BY_DATA}, True, 0),
    "place": ({"select": [0, 3]}, False, 0),
    "weights": ({"select": {"by": "snr", "keep": 1}}, False, 0),
    "frozen in int8": ({"select": SAVED, "quantize_frozen": "int8"}, False, 1),
}


@pytest.fixture
def counts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts from here on; `scores.json` is there."""
    monkeypatch.chdir(tmp_path)
    score_layers(llama(), "random").save("scores.json")
    found = Counter(dict.fromkeys(ONCE, 0))
    parse, grow, opened = Select.parse, model_layers._grow, io.open

    def see(name: str, real: Any, when: Any = lambda *_: True) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found[name] += bool(when(*args))
            return real(*args, **kwargs)

        return counted

    monkeypatch.setattr(Select, "parse", see("parsed", parse))
    monkeypatch.setattr(model_layers, "_grow", see("walked", grow, lambda name, *_: not name))
    for place in (io, builtins):
        monkeypatch.setattr(place, "open", see("opened", opened, lambda path, *_: str(path).endswith("scores.json")))
    return found


def config(kind: str, **given: Any) -> LayerLoraConfig:
    return KINDS[kind](**({} if kind == "full" else {"r": 4}), **copy.deepcopy(given))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_wrapping(kind: str, choice: str, counts: Counter[str]) -> None:
    given, with_batches, opened = CHOICES[choice]
    if "quantize_frozen" in given:
        pytest.importorskip("bitsandbytes")
    get_peft_model(llama(), config(kind, **given), batches=make_batches() if with_batches else None)
    assert counts == ONCE | {"opened": opened}


@pytest.mark.parametrize("name", ["t5", "gemma3_vlm"])
def test_wrapping_a_model_of_several_stacks(name: str, counts: Counter[str]) -> None:
    """Where the other stacks are cut and quantized, too."""
    pytest.importorskip("bitsandbytes")
    given = config("lora", select="last:1", target_modules="all-linear", quantize_frozen="int8")
    get_peft_model(MODELS[name](), given)
    assert counts == ONCE


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("select", [SAVED, BY_DATA, BY_DATA | AGAIN | {"layers": "last:3"}])
def test_planning(kind: str, select: dict[str, Any], counts: Counter[str]) -> None:
    plan(llama(), config(kind, select=select, quantize_frozen="nf4"), batch_size=1, length=8)
    assert counts == ONCE | {"opened": int(select is SAVED)}


def test_scoring_and_resolving(counts: Counter[str]) -> None:
    score_layers(llama(), batches=make_batches())
    assert counts == ONCE
    counts.clear()
    config("lora", select=SAVED).resolve(llama())
    assert counts == ONCE | {"opened": 1}


def test_what_stands_in_select_is_what_counts(counts: Counter[str]) -> None:
    """As given, for users and trainers to see; what is put there later is parsed anew, in place or not."""
    asked = config("lora", select=SAVED)
    assert asked.select == SAVED and isinstance(asked.choosing.by, Scores) and asked.choosing is asked.choosing
    twins = [copy.deepcopy(asked), copy.copy(asked), pickle.loads(pickle.dumps(asked)), asked.with_batches([])]
    assert all(t.select == SAVED and t == asked and t.choosing == asked.choosing for t in twins)
    assert counts["parsed"] == counts["opened"] == 1
    asked.select["keep"] = 3
    assert asked.choosing.keep == 3 and twins[0].choosing.keep == 2
    asked.select = "last:1"
    assert asked.choosing == Select(layers="last:1")
    assert dataclasses.replace(asked, select=[1, 2]).choosing == Select(layers=[1, 2])
    assert asked.to_dict()["select"]["layers"] == "last:1"
    given = Select(by=asked.choosing.by, layers=[0])
    twin = copy.deepcopy(config("lora", select=given))
    counts.clear()
    assert twin.select == given == twin.choosing and not counts


def test_the_map_is_of_the_model_as_it_is(counts: Counter[str]) -> None:
    """Nothing is remembered of a model between two questions."""
    model: Any = llama()
    assert len(layer_map(model)) == 4
    del model.model.layers[3]
    assert len(layer_map(model)) == 3 and counts["walked"] == 2


def test_the_cut_moves_without_another_walk(counts: Counter[str]) -> None:
    model: Any = get_peft_model(llama(), config("lora", select=[0, 2], target_modules=["q_proj"]))
    counts.clear()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".layers.2." in name)
    assert backward.install(model, "model.layers").layer == 2 and not counts["walked"]


# ---- recipes, and bits ----------------------------------------------------------------------------------------------

FEW = ["output_dir=out", "max_train_samples=8", "max_eval_samples=2", "layerpeft.select.num_batches=1"]


@pytest.fixture
def built(counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts models that are built, too: without weights, and with them."""
    make = LlamaForCausalLM.__init__

    def counted(*args: Any, **kwargs: Any) -> None:
        counts["built"] += 1
        make(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", counted)
    counts.clear()
    return counts


def test_a_recipe_is_checked_trained_and_scored(built: Counter[str]) -> None:
    """Each model is looked at once: the empty one by the check, the one with weights where it is wrapped, or scored."""
    recipe = load_recipe("quickstart", [*FEW, "layerpeft.select.keep=3"])
    assert +built == {"parsed": 1, "walked": 1, "built": 1}
    setup = prepare(recipe)
    model = load_model(setup, recipe.select)
    batches, setup = batches_for(setup, model, recipe.select)
    wrap(setup, model, recipe.select, batches)
    assert +built == {"parsed": 1, "walked": 2, "built": 2}
    score(recipe, lambda _: None)
    assert +built == {"parsed": 1, "walked": 3, "built": 3}


def test_a_recipe_with_bits_is_loaded(built: Counter[str]) -> None:
    """The bits are found on the model that the recipe was tried on."""
    pytest.importorskip("bitsandbytes")
    recipe = load_recipe("quickstart", [*FEW[:3], "layerpeft.select=last:2", "layerpeft.quantize_frozen=int8"])
    load_model(prepare(recipe), recipe.select)
    assert +built == {"parsed": 1, "walked": 2, "built": 2}


def test_a_recipe_is_planned(built: Counter[str]) -> None:
    assert forecast(
        "quickstart",
        [*FEW, f"model_name_or_path={short_llama()}", "layerpeft.target_modules=[q_proj]", "max_length=128"],
    ).plan.trainable
    assert +built == {"parsed": 1, "walked": 2, "built": 1}


@pytest.mark.spread(2)
@pytest.mark.parametrize(
    "quant", [{"select": "first:2", "bits": "int8"}, {"mean_bits": 9, "choices": [8, 16]}], ids=str
)
def test_bits(quant: dict[str, Any], counts: Counter[str]) -> None:
    pytest.importorskip("bitsandbytes")
    quantize(llama(), quant, progress=False)
    assert counts == ONCE
    counts.clear()
    get_peft_model(llama(), config("lora", select=[3], quant=quant))
    assert +counts == {"parsed": 2, "walked": 1}  # `select`, and that of `quant`
    counts.clear()
    plan(llama(), config("lora", select=[3], quant=quant), batch_size=1, length=8)
    assert +counts == {"parsed": 2, "walked": 1}

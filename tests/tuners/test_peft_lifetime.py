"""Configs that travel, adapters added to live models, and what is left behind when a model is gone."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig
from torch import nn

import layerpeft
from layerpeft import LayerLoraConfig, Select, check_trained, layer_report, score_layers
from layerpeft.errors import LayerpeftError, SelectionError
from tests.helpers.models import MODELS, batch, loss_of

BY_DATA: dict[str, Any] = {"by": "gradient_norm", "keep": 1, "num_batches": 2}
PENDING: dict[str, Any] = {**BY_DATA, "num_batches": 1}
ADAPTER: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def llama() -> Any:
    return MODELS["llama"]()


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [batch("llama", llama(), seed=seed) for seed in range(count)]


def config(select: Any, **options: Any) -> LayerLoraConfig:
    return LayerLoraConfig(select=select, **{**ADAPTER, **options})


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch("llama", model)).logits


def step(model: nn.Module, steps: int = 1, **options: Any) -> torch.optim.Optimizer:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss_of("llama", model, **options).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def layers_of(model: nn.Module, adapter: str = "default") -> set[int]:
    names = (n for n, _ in model.named_parameters() if f"lora_A.{adapter}" in n)
    return {int(n.partition("layers.")[2].partition(".")[0]) for n in names}


def best_layer() -> int:
    scores = score_layers(llama(), batches=batches(), target_modules=ADAPTER["target_modules"], progress=False)
    return scores.ranked()[0]


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_batches_travel_and_are_never_copied_or_written(tmp_path):
    generator = (one for one in batches())
    one = config(BY_DATA, batches=generator)
    twin = copy.deepcopy(copy.deepcopy(one))
    assert twin._batches is generator and twin.to_dict() == one.to_dict()
    assert twin.target_modules is not one.target_modules
    twin.save_pretrained(str(tmp_path))
    assert '"batches"' not in (tmp_path / "adapter_config.json").read_text()
    revived = pickle.loads(pickle.dumps(twin))
    assert revived._batches is None and revived.to_dict() == one.to_dict()
    model = layerpeft.get_peft_model(llama(), twin)  # the first to draw from the generator
    assert layers_of(model) == {best_layer()} and next(generator, None) is None


def test_the_config_of_the_caller_is_left_alone():
    mine = config(BY_DATA)
    before = mine.to_dict()
    for given in (batches(), (one for one in batches())):
        model = layerpeft.get_peft_model(llama(), mine, batches=given)
        assert layers_of(model) == {best_layer()}
    assert mine._batches is None and mine.is_deferred and mine.select == BY_DATA
    after = mine.to_dict()
    assert {k for k in after if after[k] != before[k]} <= {"base_model_name_or_path"}  # PEFT itself fills it in


@pytest.mark.parametrize("select", ["last:1", 2, [0, -1], BY_DATA, Select(layers="first:2"), "first:1+last:1"])
def test_round_trip(select, tmp_path):
    one = config(select, use_rslora=True, train_new=False, exclude_modules=["down_proj"])
    one.save_pretrained(str(tmp_path))
    for loaded in (LayerLoraConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(str(tmp_path))):
        assert type(loaded) is LayerLoraConfig and loaded.train_new is False and loaded.use_rslora
        assert Select.parse(loaded.select) == Select.parse(select)
        assert loaded.to_dict() == one.to_dict()


def test_round_trip_with_scores(tmp_path):
    scores = score_layers(llama(), "random", seed=3)
    one = config({"by": scores, "keep": 2})
    one.save_pretrained(str(tmp_path))
    loaded = LayerLoraConfig.from_pretrained(str(tmp_path))
    chosen = [layers_of(layerpeft.get_peft_model(llama(), c)) for c in (one, loaded)]
    assert chosen[0] == chosen[1] == set(scores.ranked()[:2])


def test_all_layers_save_a_stock_config(tmp_path):
    stock, ours = LoraConfig(**ADAPTER), LayerLoraConfig(**ADAPTER)
    assert ours.to_dict() == stock.to_dict()
    ours.save_pretrained(str(tmp_path))
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is LoraConfig


def test_dataclass_tools_keep_the_choice():
    changed = dataclasses.replace(config("last:1"), r=2)
    assert changed.r == 2 and layers_of(layerpeft.get_peft_model(llama(), changed)) == {2}


def test_batches_need_a_config_that_picks():
    with pytest.raises(LayerpeftError, match="LoraConfig does not"):
        layerpeft.get_peft_model(llama(), LoraConfig(**ADAPTER), batches=batches())
    model = layerpeft.get_peft_model(llama(), LoraConfig(**ADAPTER))
    assert layers_of(model) == {0, 1, 2} and not hasattr(model.peft_config["default"], "_layerpeft")


# ---- live models -----------------------------------------------------------------------------------------------------


def test_add_adapter_takes_a_resolved_config(tmp_path):
    model = layerpeft.get_peft_model(llama(), config("first:1"))
    base = logits(model)
    stock = config(BY_DATA).resolve(model, batches=batches(), progress=False)
    assert isinstance(stock, LoraConfig) and stock.peft_type == "LORA"
    model.add_adapter("second", stock)  # type: ignore[operator]
    assert layers_of(model, "second") == {best_layer()} and layers_of(model) == {0}
    assert torch.equal(logits(model), base)
    model.set_adapter("second")  # type: ignore[operator]
    step(model)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "second"))
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5, rtol=0)
    assert layers_of(loaded) == {best_layer()}


def test_add_adapter_says_what_to_do_about_an_unresolved_config():
    model = layerpeft.get_peft_model(llama(), config("first:1"))
    with pytest.raises(ValueError, match=r"LAYER_LORA.*config\.resolve\(model, batches=…\)"):
        model.add_adapter("second", config("last:1"))  # type: ignore[operator]
    assert set(model.peft_config) == {"default"} and layers_of(model, "second") == set()
    model.add_adapter("third", LayerLoraConfig(**ADAPTER))  # type: ignore[operator]
    assert layers_of(model, "third") == {0, 1, 2}


def test_mixed_models_take_a_resolved_config():
    with pytest.raises(ValueError, match="'LAYER_LORA' is not compatible"):
        layerpeft.get_peft_model(llama(), config("last:1"), mixed=True)
    base = llama()
    mixed = layerpeft.get_peft_model(base, config("last:1").resolve(base), mixed=True)
    mixed.add_adapter("ia3", peft.LoHaConfig(target_modules=["up_proj"], r=2))
    assert type(mixed) is peft.PeftMixedModel and layers_of(mixed) == {2}


def test_resolve_without_batches_says_what_is_missing():
    with pytest.raises(SelectionError, match="pass batches="):
        config(BY_DATA).resolve(llama())
    assert type(LayerLoraConfig(**ADAPTER).resolve(llama())) is LoraConfig


def test_stock_adapters_go_on_top_of_a_choice():
    model = layerpeft.get_peft_model(llama(), config("last:1"))
    model.add_adapter("all", LoraConfig(**ADAPTER))  # type: ignore[operator]
    step(model)
    check_trained(model)
    assert layers_of(model, "all") == {0, 1, 2} and layer_report(model).rows[2].steps == 1


@pytest.mark.parametrize("select", ["last:1", PENDING])
def test_deep_copies_live_their_own_life(select):
    model = layerpeft.get_peft_model(llama(), config(select))
    twin = copy.deepcopy(model)
    for seed in range(3):
        step(twin, seed=seed + 5)
    assert len(layers_of(twin)) == 1
    untouched = layerpeft.get_peft_model(llama(), config(select))
    step(model)
    step(untouched)
    assert layers_of(model) == layers_of(untouched)
    for one in (model, twin):
        check_trained(one)
    assert [layer_report(m).rows[min(layers_of(m))].steps for m in (model, twin)] == [1, 3]


@pytest.mark.parametrize("select", ["last:1", PENDING])
def test_two_models_do_not_disturb_one_another(select):
    made = []
    for one in (select, select, "first:2"):
        torch.manual_seed(0)
        made.append(layerpeft.get_peft_model(llama(), config(one)))
    alone, first, second = made
    step(alone, steps=2)
    step(second, steps=2, seed=7)
    step(first, steps=2)
    step(second)
    for model in (alone, first, second):
        check_trained(model)
    assert layers_of(first) == layers_of(alone) and torch.equal(logits(first), logits(alone))
    assert [layer_report(m).rows[min(layers_of(m))].steps for m in (first, second)] == [2, 3]


@pytest.mark.matrix
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("select", ["last:1", PENDING])
def test_gradient_checkpointing(select, reentrant):
    seen = []
    for on in (False, True):
        torch.manual_seed(0)
        base = llama()
        if on:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            base.enable_input_require_grads()
        model = layerpeft.get_peft_model(base, config(select))
        step(model, steps=2)
        check_trained(model)
        seen.append((layers_of(model), logits(model)))
    assert seen[0][0] == seen[1][0]
    torch.testing.assert_close(seen[0][1], seen[1][1], atol=1e-6, rtol=0)


@pytest.mark.matrix
@pytest.mark.parametrize("road", ["peft", "transformers"])
@pytest.mark.parametrize(("select", "steps"), [("last:1", 0), ("last:1", 1), (PENDING, 0), (PENDING, 1), (BY_DATA, 1)])
def test_nothing_keeps_a_model_alive(select, steps, road):
    base = llama()
    one = config(select, batches=batches() if select is BY_DATA else None)
    if road == "peft":
        model = layerpeft.get_peft_model(base, one)
    else:
        base.add_adapter(one)
        model = base
    optimizer = step(model, steps=steps)
    if not steps:
        loss_of("llama", model).backward()
    gone = [
        weakref.ref(base),
        weakref.ref(model),
        weakref.ref(optimizer),
        weakref.ref(base.model.layers[0].mlp.down_proj),
    ]
    del base, model, optimizer
    gc.collect()
    assert [ref() is None for ref in gone] == [True] * 4

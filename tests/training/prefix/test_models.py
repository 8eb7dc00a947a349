"""Every architecture of the list: equal to the bit when later passes begin at the cut, or switched off with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerpeft import LayerLoraConfig, get_peft_model, layer_map
from tests.helpers.kept import cache_of, equal
from tests.helpers.loops import adamw
from tests.helpers.models import MODELS, batch

# What keeps a model from it, where it is not dropout below the cut alone.
OFF = {"bloom": "more than hidden states", "t5": "position bias"}
# Whose blocks, as they come, drop something in training.
DROPPING = ("bart", "bert", "deberta_v2", "distilbert", "gpt2", "opt", "roberta")
REFUSED = ("albert", "qwen3_next")  # elsewhere: layers that share weights, experts that PEFT cannot wrap


def quiet_below(base: nn.Module) -> None:
    """By hand, what `lower_dropout: off` means: all that comes before the last block of each row is in evaluation mode."""
    modules, last = list(base.named_modules()), layer_map(base).names[-1]
    before = modules[: [n for n, _ in modules].index(last)]
    below = [m for n, m in before if n and not last.startswith(f"{n}.")]
    around = [m for n, m in before if last.startswith(f"{n}.") and isinstance(getattr(m, "dropout", None), float)]
    for module in below + around:
        module.training = False


def trained(name: str, quiet: bool = False, **options: Any) -> tuple[Any, list[float]]:
    """Three epochs of two batches on the last of three layers."""
    made = MODELS[name]()
    if hasattr(made, "config"):
        made.config.use_cache = False  # as Trainer does
    torch.manual_seed(7)
    model: Any = get_peft_model(made, LayerLoraConfig(select="last:1", r=4, target_modules="all-linear", **options))
    factors = [p for n, p in model.named_parameters() if "lora_B" in n]
    for factor in factors:
        nn.init.normal_(factor, std=0.1)
    optimizer = adamw(model)
    losses = []
    torch.manual_seed(5)
    for _ in range(3):
        for seed in range(2):
            model.train()
            if quiet:
                quiet_below(made)
            out = model(**batch(name, made, seed=seed))
            loss = out.last_hidden_state.float().pow(2).mean() if getattr(out, "loss", None) is None else out.loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return model, losses


@pytest.mark.spread(6)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*REFUSED, *DROPPING, *OFF)])
def test_later_epochs_begin_at_the_cut_and_are_equal_to_the_bit(name: str):
    plain, losses = trained(name)
    model, ours = trained(name, prefix_cache="memory")
    cache = cache_of(model)
    assert (cache.why, cache.hits, cache.misses) == (None, 8, 4)
    assert ours == losses
    assert equal(model, plain)


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_below_the_cut_switches_it_off_unless_that_is_left_out(name: str):
    plain, losses = trained(name)
    model, ours = trained(name, prefix_cache="memory")
    assert "dropout" in cache_of(model).why
    assert ours == losses
    assert equal(model, plain)
    quiet, losses = trained(name, quiet=True)
    model, ours = trained(name, prefix_cache="memory", lower_dropout="off")
    cache = cache_of(model)
    assert (cache.why, cache.hits, cache.misses) == (None, 8, 4)
    assert ours == losses
    assert equal(model, quiet)


@pytest.mark.parametrize("name", OFF)
def test_what_goes_upwards_besides_hidden_states_switches_it_off(name: str):
    plain, losses = trained(name)
    model, ours = trained(name, prefix_cache="memory", lower_dropout="off" if name == "t5" else None)
    assert OFF[name] in cache_of(model).why
    if name != "t5":
        assert ours == losses
        assert equal(model, plain)

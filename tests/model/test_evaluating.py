"""A model is left as it was found, whatever happens meanwhile."""

import random

import numpy
import pytest
import torch

from layerpeft.model.evaluating import as_found, evaluating, nothing_trains
from tests.helpers.loops import llama


def state_of(model):
    modes = [m.training for m in model.modules()]
    rates = [m.attention_dropout for m in model.modules() if isinstance(getattr(m, "attention_dropout", None), float)]
    flags = [p.requires_grad for p in model.parameters()]
    return modes, rates, flags, model.config.use_cache


def draws():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def mixed():
    """Some of everything: blocks in both modes, frozen parameters, checkpointing, dropout."""
    model = llama(attention_dropout=0.25)
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    model.model.layers[2].requires_grad_(False)
    return model


@pytest.mark.parametrize("way", [as_found, nothing_trains, evaluating])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(way, fails):
    model = mixed()
    model.config.use_cache = True
    before, random_before = state_of(model), draws()
    try:
        with way(model):
            assert not model.training and model.config.use_cache is False
            random.random(), numpy.random.rand(), torch.rand(1)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            model.train()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert state_of(model) == before and draws() == random_before


def test_where_nothing_trains_checkpointing_goes_on_without_dropout():
    model = mixed()
    with nothing_trains(model):
        assert not any(p.requires_grad for p in model.parameters())
        working = [m for m in model.modules() if m.training]
        assert working and all(m.gradient_checkpointing for m in working)
        assert model.model.layers[1] not in working and model.model.layers[0] in working
    assert model.model.layers[0].self_attn.attention_dropout == 0.25


def test_evaluating_makes_no_graph_and_computes_in_the_type_asked_for():
    model = llama()
    with evaluating(model, torch.bfloat16):
        y = model.model.layers[0].self_attn.q_proj(torch.ones(1, 2, 32))
    assert y.dtype == torch.bfloat16 and not y.requires_grad

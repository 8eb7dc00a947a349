"""Bytes of optimizer state against the optimizers themselves, by transformers' names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from layerpeft.errors import ConfigError
from layerpeft.planning.optimizer_bytes import STATES, problem, state_bytes
from layerpeft.recipe.measure import state_bytes as measured_bytes

NEEDS = {
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_radam": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "stable_adamw": "optimi",
}


class Tensors(nn.Module):
    """One tensor that 8-bit optimizers quantize, and two that are too small for them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.large = nn.Linear(300, 64, dtype=dtype)
        self.small = nn.Linear(8, 300, bias=False, dtype=dtype)


def stepped(
    name: str, dtype: torch.dtype, folder: str, optim_args: str | None = None
) -> tuple[int, list[nn.Parameter]]:
    """Bytes that the real optimizer holds after one step, and the tensors it has trained."""
    model = Tensors(dtype)
    arguments = TrainingArguments(folder, optim=name, optim_args=optim_args, use_cpu=True, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer = kind([{"params": list(model.parameters())}], **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return measured_bytes(optimizer), list(model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", STATES)
def test_the_formula_is_what_the_optimizer_holds(name, dtype, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    elif "8bit" in name or "32bit" in name or "ademamix" in name or "bnb" in name:
        pytest.importorskip("bitsandbytes")
    real, trained = stepped(name, dtype, str(tmp_path))
    scalars = 4 * 2 * len(trained)  # counters and the like
    assert real - scalars <= state_bytes(name, trained) <= real


@pytest.mark.parametrize(
    ("name", "given"), [("sgd", "momentum=0.9"), ("rmsprop", "momentum=0.9, centered=true"), ("sgd", "nesterov=false")]
)
def test_the_options_of_optimizers_count(name, given, tmp_path):
    real, trained = stepped(name, torch.float32, str(tmp_path), given)
    scalars = 4 * 2 * len(trained)
    assert real - scalars <= state_bytes(name, trained, given) <= real


def test_every_name_of_transformers_has_a_formula_or_a_reason():
    for name in OptimizerNames:
        sentence = problem(name.value)
        assert (sentence is None) == (name.value in STATES)
        if sentence:
            assert "unknown optimizer" not in sentence and "the nearest" in sentence
    assert set(STATES) <= {name.value for name in OptimizerNames}


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'adamw_8bit'"):
        state_bytes("adamw_8bits", [])
    with pytest.raises(ConfigError, match="full weights.*'adafactor'"):
        state_bytes("galore_adafactor", [])

"""With all layers selected the live model is plain PEFT's: classes, hooks, parameters, and the calls of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerpeft import LayerLoraConfig, get_peft_model
from tests.helpers.models import MODELS, loss_of
from tests.training import test_backward

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
CALLED_IN_A_STEP = [name for name in HOOKS if "forward" in name or "backward" in name]
SWITCHES = ["none", "TRL's order", "reentrant, asked for twice"]


class Operations(TorchDispatchMode):
    """Every operation of forward and backward in order, with the shapes of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen.append((str(func), getattr(made, "shape", None)))
        return made


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def hooks(model: nn.Module, kinds: list[str]) -> list[tuple[str, str, list[str]]]:
    """Module, kind of hook, and the hooks by name."""
    return [
        (
            name,
            kind,
            [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in getattr(module, kind).values()],
        )
        for name, module in model.named_modules()
        for kind in kinds
        if getattr(module, kind)
    ]


def parameters(model: nn.Module) -> list[tuple[str, tuple[int, ...], bool]]:
    return [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]


def operations(model: nn.Module, step: Callable[[nn.Module], None]) -> list[tuple[str, Any]]:
    step(model)
    model.zero_grad()
    with Operations() as found:
        step(model)
    return found.seen


@pytest.mark.matrix
@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("select", ["all", "0-5", "first:6", "stock"])
def test_the_live_model_is_plain_pefts_and_makes_the_same_calls(name, select):
    options = {"r": 4, "target_modules": test_backward.LINEARS}
    config = peft.LoraConfig(**options) if select == "stock" else LayerLoraConfig(select=select, **options)
    ours, theirs = (
        get_peft_model(test_backward.llama(), config),
        peft.get_peft_model(test_backward.llama(), peft.LoraConfig(**options)),
    )
    for model in (ours, theirs):
        model.train()
        test_backward.SWITCHES[name][0](model)
    assert classes(ours) == classes(theirs)
    assert parameters(ours) == parameters(theirs)
    assert hooks(ours, CALLED_IN_A_STEP) == hooks(theirs, CALLED_IN_A_STEP)
    assert bool(hooks(theirs, CALLED_IN_A_STEP)) == (name != "none")
    # A choice that happens to be everything is still recorded: one hook hears of adapters that are loaded into it.
    besides = [h for h in hooks(ours, HOOKS) if h not in hooks(theirs, HOOKS)]
    assert [kind for _, kind, _ in besides] == ([] if select in ("all", "stock") else ["_load_state_dict_pre_hooks"])
    mine, reference = operations(ours, test_backward.step), operations(theirs, test_backward.step)
    assert mine == reference and len(mine) > 1000


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", ["t5", "bart", "gemma3_vlm"])
def test_other_architectures_with_all_layers(name):
    found = []
    for config, make in ((LayerLoraConfig(), get_peft_model), (peft.LoraConfig(), peft.get_peft_model)):
        config.target_modules = ["q", "v"] if name == "t5" else ["q_proj", "v_proj"]
        model = make(MODELS[name](), config)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        def step(m: nn.Module) -> None:
            torch.manual_seed(7)
            loss_of(name, m).backward()

        step(model)
        reached = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        assert reached == {n for n, p in model.named_parameters() if p.requires_grad} and reached
        found.append((classes(model), parameters(model), hooks(model, HOOKS), operations(model, step)))
    assert found[0][:3] == found[1][:3]
    assert found[0][3] == found[1][3]


def test_the_list_of_operations_sees_the_cut():
    ours, theirs = test_backward.wrap(test_backward.llama()), test_backward.plain(test_backward.llama())
    for model in (ours, theirs):
        test_backward.as_trl_does(model)
    assert len(operations(ours, test_backward.step)) < 0.75 * len(operations(theirs, test_backward.step))
    assert hooks(ours, CALLED_IN_A_STEP) != hooks(theirs, CALLED_IN_A_STEP)

"""What a method that trains chosen layers tells those who follow it, and hears of them; each tuner says it in its `method.py`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.integrations.engines.engine import Need
from layerpeft.model.layers import Target
from layerpeft.model.load import Work

Tensors = dict[str, dict[str, nn.Parameter]]  # target -> the adapter's tensors in it
# a module's name, the module without weights, its tensors by name -> those tensors with what was trained in them
Fold = Callable[[str, nn.Module, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


class Step(NamedTuple):
    """One optimizer's step: `held` are the identities of the adapter's tensors that it holds and that train now.

    `inside`: of a backward pass that is not over, so that not all gradients are there.
    """

    optimizer: Optimizer
    held: set[int]
    inside: bool = False


class Method:
    """One adapter of one model, which it does not keep alive. What a method does not need it leaves as it is here: nothing.

    Around a step: `before_step`, checks, `keep`, `lend`, the step, `take_back`, `after_step`, checks, the schedule.
    """

    partial: ClassVar[bool] = False  # a folder holds only what was ever active
    in_place: ClassVar[bool] = False  # what trains are weights of the model itself
    whole: ClassVar[bool] = False  # what was trained lies in weights of the model, at least in part
    mixes: ClassVar[bool] = True  # what is trained are factors, which PEFT's own ways to mix adapters add up
    restates: ClassVar[bool] = False  # a file beside the stock adapter holds what that one is only come to
    folds: ClassVar[bool] = False  # some of that is in no state dict, but in the folder of an adapter
    needs: ClassVar[frozenset[Need]] = frozenset()  # what an engine must be able to do for it
    # what an engine must be able to do where it trains single experts of a 3-D tensor; None: it does not
    single: ClassVar[Need | None] = None
    masters: Any = None  # float32 copies of 16-bit weights that the optimizer steps on

    def __init__(self, model: nn.Module, adapter: str, config: Any) -> None:
        self._model = weakref.ref(model)
        self.adapter, self.config = adapter, config

    @property
    def model(self) -> nn.Module:
        """The model, which outlives whoever asks."""
        model = self._model()
        assert model is not None
        return model

    @property
    def alive(self) -> bool:
        """Whether the model is still there."""
        return self._model() is not None

    @classmethod
    def ranks(cls, asked: int) -> tuple[int, ...]:
        """The ranks that may be tried, of which the one asked for comes first; none where nothing has a rank."""
        return ()

    @classmethod
    def work(cls, config: Any) -> Work:
        """What it trains of a target, as far as operations go."""
        return Work()

    @classmethod
    def cannot_wait(cls, config: Any) -> list[str]:
        """What of a config does not go with a choice that waits for the first step."""
        return []

    @classmethod
    def fold(cls, folder: Path) -> Fold | None:
        """How what a folder holds goes into one module; None where PEFT's own merging does it. Raises: SaveError."""
        return None

    def tensors(self) -> Tensors:
        """Target -> what trains in it."""
        return {}

    def wrapped(self) -> set[str]:
        """The modules that the adapter trains in, by their names in the unwrapped model."""
        return set(self.tensors())

    def modules(self) -> Mapping[str, nn.Module]:
        """Those that are none of PEFT's tuner layers, by name; each tells of its `trained_change`."""
        return {}

    def originals(self) -> Mapping[str, torch.Tensor]:
        """Weights as they were, by parameter name, where the model holds others that count as frozen."""
        return {}

    def moved(self) -> set[str]:
        """Targets that have moved, by more than their tensors show."""
        return set()

    def told(self) -> list[str]:
        """What is to be said once the model is wrapped."""
        return []

    def assumed(self) -> list[str]:
        """What a plan says of it."""
        return []

    def beside(self) -> list[torch.Tensor]:
        """The weights of which a copy as they were lies on their device."""
        return []

    def found(self, state: Mapping[str, Any], prefix: str) -> set[str]:
        """The modules of which a state dict that is being loaded holds this adapter's tensors."""
        return set()

    def as_stock(self, folder: str) -> dict[str, Any]:
        """Makes of the weights that PEFT has just saved what stock PEFT reads; the fields of the config it reads them by."""
        return {}

    def save(self, folder: str, found: Any) -> dict[str, Any]:
        """Writes what else a resumed run needs; what the manifest says of it."""
        return {}

    def carried(self) -> dict[str, torch.Tensor]:
        """What else a plain `state_dict()` must take along for a run to go on from it."""
        return {}

    def twin(self, model: nn.Module, config: Any, memo: dict[int, Any]) -> Method:
        """That of a deep copy of the model."""
        return type(self)(model, self.adapter, config)

    def covers(self) -> bool:
        """Whether the model's own weights hold what was trained just now."""
        return False

    # ---- what it hears, and does nothing about unless it needs to

    def place(self) -> None: ...  # just before PEFT wraps the model, which may be without storage
    def wrap(self, targets: Iterable[Target]) -> None: ...  # just after it has; `targets`: those that may ever train
    def adopt(self, trains: bool) -> None: ...  # PEFT has read the adapter from a folder, to train it further or not
    def ready(self) -> None: ...  # all is wrapped or loaded, and a forward pass may come
    def close(self) -> None: ...  # its adapter is gone

    def before_step(self, step: Step) -> None: ...  # first of all before a real step
    def skipped(self) -> None: ...  # a loss scaler skips the step that was prepared
    def lend(self, step: Step) -> None: ...  # last of all before a real step
    def take_back(self) -> None: ...  # first of all after any step
    def after_step(self, step: Step) -> None: ...  # after a real step

    # A choice that has waited is made: takes the adapter off every other target.
    def keep_only(self, targets: Set[str]) -> None: ...
    # These targets are about to train, and what always trains too (`always`), unless that has begun before.
    def keep(self, targets: Set[str], always: bool = True) -> None: ...
    # These train from now on (None: all may again); `policy`: what becomes of states of those that rest.
    def switched(self, training: Set[str] | None, policy: str) -> None: ...
    # A run goes on, in which these targets have trained; their weights are loaded next.
    def went_on(self, trained: Set[str]) -> None: ...
    # A state dict is about to be looked through: turns what a folder says of it into this model's own tensors.
    def read(self, state: dict[str, Any], prefix: str, folder: str | None) -> None: ...
    # A state dict as in `found` is taken: `found` says of which modules, `folder` where it lies, where that is known.
    def on_load(self, state: Mapping[str, Any], prefix: str, found: Set[str], folder: str | None) -> None: ...
    def restore(self, carried: Mapping[str, torch.Tensor]) -> None: ...  # of a state dict: takes up what `carried` gave
    def copied(self, adapter: str) -> None: ...  # another adapter by the same config is about to be put on the model
    def swapped(self) -> None: ...  # PEFT's `hotswap_adapter` is about to put another adapter's tensors there

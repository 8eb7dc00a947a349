"""Optimizers inside of DeepSpeed: what steps is torch's, on flat parts of weights, and nobody who holds those is heard of.

So DeepSpeed's own optimizers are watched, as ones that hold the model's parameters. Where layers may come to rest each has a group
of its own, because DeepSpeed steps, counts and keeps states group by group, and a group whose layer rests is not stepped.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from layerpeft.errors import TrainingError
from layerpeft.integrations.distributed import Part
from layerpeft.integrations.engines.deepspeed import FOR_GOOD, LATE, stage
from layerpeft.integrations.torch import instances_of

_ROWS = ("bit16_groups", "fp16_groups", "bf16_groups")  # the model's parameters, as those that step hold them
_RATES = (
    "layers that may rest get groups of their own in DeepSpeed's optimizer, and {name} was made for the groups there were: make it "
    "after accelerator.prepare(model, optimizer) or deepspeed.initialize, from the optimizer that comes back"
)


@dataclass(frozen=True)
class Heard:
    """Who listens. `before` a step gives ids of parameters that it must leave alone; `skipped(optimizer, prepared)`: it is none.

    `resting`: id -> layer, of what may come to rest; `waits`: because a choice is yet to be made. `loading`, `saving`:
    around a checkpoint of DeepSpeed's own; `gathering`: while stage 3 puts together what a folder is to hold.
    """

    before: Callable[[Optimizer], set[int]]
    after: Callable[[Optimizer], None]
    skipped: Callable[[Optimizer, bool], None]
    resting: Callable[[], Mapping[int, int]]
    waits: Callable[[], bool]
    loading: Callable[[nn.Module, str], AbstractContextManager[Any]]
    saving: Callable[[nn.Module], AbstractContextManager[Any]]
    gathering: Callable[[nn.Module], AbstractContextManager[Any]]


class DividedOptimizer(Optimizer):
    """One of DeepSpeed's optimizers, as one that holds the model's own parameters; it does not keep that alive."""

    def __init__(self, zero: Any) -> None:
        # without torch's own, which wants tensors and makes room for their states
        self._zero = weakref.ref(zero)
        rows = next((found for name in _ROWS if (found := getattr(zero, name, None))), [])
        self._own = [{"params": list(row)} for row in rows]
        self.left_alone: set[int] = set()

    @property
    def optimizer(self) -> Any:
        """The one that steps."""
        return getattr(self._zero(), "optimizer", None)

    @property
    def param_groups(self) -> list[Any]:  # type: ignore[override]
        """Those of the one that steps, with the model's parameters in them; what is taken out of them stays out."""
        zero = self._zero()
        if zero is None:
            return []
        groups, numbers = zero.optimizer.param_groups, getattr(zero, "sub_group_to_group_id", None)
        return [_Group(own, groups[numbers[i] if numbers else i]) for i, own in enumerate(self._own)]

    @property
    def state(self) -> Any:  # type: ignore[override]
        """States, as far as they belong to a tensor: those of a whole group to its first."""
        return _States(self)

    def flat(self, parameter: Any, first: bool = True) -> Any:
        """The flat part that steps for the group that a parameter is in, or is the `first` of; None where it is not."""
        zero = self._zero()
        rows = (row[:1] if first else row for row in getattr(zero, _ROWS[0], []))
        found = next((i for i, row in enumerate(rows) if any(p is parameter for p in row)), None)
        return None if found is None else zero.optimizer.param_groups[found]["params"][0]  # type: ignore[union-attr]

    @contextmanager
    def states_of(self, parameter: Any) -> Iterator[dict[str, Any]]:
        """States of one parameter, whole, in its shape; what they are afterwards is put back. Every process must come here."""
        flat, mapped = self.flat(parameter, first=False), parameter._hp_mapping
        held = self.optimizer.state.get(flat) or {}
        if mapped is not None:
            mapped.set_optim_state_fragment(flat, held)
        keys = [k for k, v in held.items() if isinstance(v, torch.Tensor) and v.shape == flat.shape]
        found = {k: parameter.get_full_hp_param(k) for k in keys}
        yield found
        for key, value in found.items():
            parameter.set_full_hp_param(value, key)

    def rests(self, number: int) -> bool:
        """Whether nothing of a group is to step now."""
        row = getattr(self._zero(), _ROWS[0])[number]
        return all(not p.requires_grad or id(p) in self.left_alone for p in row)

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Gradients of what rests count for no norm."""
        zero: Any = self._zero()
        for number, row in enumerate(getattr(zero, _ROWS[0], [])):
            if not self.rests(number):
                continue
            for gradient in zero.averaged_gradients.get(number) or ():
                gradient.zero_()
            if zero.cpu_offload:
                zero.single_partition_of_fp32_groups[number].grad.zero_()
                for parameter in row:
                    zero.norm_for_param_grads.pop(zero.get_param_id(parameter), None)


class _Group(MutableMapping[str, Any]):
    """A group: its parameters, and all else as the optimizer that steps has it."""

    def __init__(self, own: dict[str, Any], theirs: dict[str, Any]) -> None:
        self.own, self.theirs = own, theirs

    def _of(self, key: str) -> dict[str, Any]:
        return self.own if key == "params" else self.theirs

    def __getitem__(self, key: str) -> Any:
        if key == "param_names":
            raise KeyError(key)
        return self._of(key)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: str) -> None:
        del self._of(key)[key]

    def __iter__(self) -> Iterator[str]:
        return iter([k for k in self.theirs if k != "param_names"])

    def __len__(self) -> int:
        return len(list(iter(self)))


class _States(MutableMapping[Any, dict[str, Any]]):
    """States of whole groups, under the first parameter of each. Tensors are this process's parts."""

    def __init__(self, view: DividedOptimizer) -> None:
        self._view = view

    def __getitem__(self, parameter: Any) -> dict[str, Any]:
        flat = self._view.flat(parameter)
        held = None if flat is None else self._view.optimizer.state.get(flat)
        if not held:
            raise KeyError(parameter)
        return {k: _part(v) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in held.items()}

    def __setitem__(self, parameter: Any, state: dict[str, Any]) -> None:
        flat = self._view.flat(parameter)
        self._view.optimizer.state[flat] = {
            k: v.to(flat.device) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in state.items()
        }

    def __delitem__(self, parameter: Any) -> None:
        del self._view.optimizer.state[self._view.flat(parameter)]
        for group in self._view._own:
            if any(p is parameter for p in group["params"]):
                for mapped in (p._hp_mapping for p in group["params"] if p._hp_mapping is not None):
                    mapped.optim_fragment = {}  # views that would keep them alive

    def __iter__(self) -> Iterator[Any]:
        rows = getattr(self._view._zero(), _ROWS[0], [])
        return (row[0] for row in rows if self._view.optimizer.state.get(self._view.flat(row[0])))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _part(t: torch.Tensor) -> Part:
    return Part(t, None, None, t.shape, t.stride())


# ---- watching DeepSpeed's classes

_views: weakref.WeakKeyDictionary[Any, DividedOptimizer] = weakref.WeakKeyDictionary()
_running: list[DividedOptimizer] = []


def is_inner(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps inside of DeepSpeed's, on its behalf."""
    return bool(_running) and optimizer not in _running


def watch(heard: Heard, needed: bool = False) -> None:
    """Lets all of DeepSpeed's optimizers and engines tell, once it is imported; `needed`: it is going to be."""
    if "deepspeed.runtime.engine" in sys.modules or needed or stage():
        _watch(heard)


_WATCHED = (  # the engine, the stages under which layers may rest, and the optimizers under which they may not
    "engine:DeepSpeedEngine",
    "zero.stage_1_and_2:DeepSpeedZeroOptimizer",
    "zero.stage3:DeepSpeedZeroOptimizer_Stage3",
    "bf16_optimizer:BF16_Optimizer",
    "fp16.fused_optimizer:FP16_Optimizer",
    "fp16.unfused_optimizer:FP16_UnfusedOptimizer",
)


@functools.cache
def _watch(heard: Heard) -> None:
    engine, stages, *others = (resolve_name(f"deepspeed.runtime.{name}") for name in _WATCHED)
    for kind in (stages, *others):
        kind.__init__ = _making(kind.__init__, heard, rests=kind is stages)
        kind.step = _stepping(kind.step, heard, kind is stages)
    stages._optimizer_step = _by_group(stages._optimizer_step)
    engine.load_checkpoint = _loading(engine.load_checkpoint, heard)
    engine.save_checkpoint = _around(engine.save_checkpoint, heard.saving)
    name = "_zero3_consolidated_16bit_state_dict"
    setattr(engine, name, _around(getattr(engine, name), heard.gathering))


def _making(init: Any, heard: Heard, rests: bool) -> Any:
    @functools.wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Optimizer)), None)
        layers = heard.resting() if given is not None else {}
        if given is not None and any(id(p) in layers for g in given.param_groups for p in g["params"]):
            if not rests:
                name = {"DeepSpeedZeroOptimizer_Stage3": "DeepSpeed ZeRO-3"}.get(
                    type(self).__name__, type(self).__name__
                )
                raise TrainingError(f"select: {(LATE if heard.waits() else FOR_GOOD).format(name=name)}")
            _split(given, layers)
        init(self, *args, **kwargs)
        _views[self] = DividedOptimizer(self)

    return made


def _split(optimizer: Optimizer, layers: Mapping[int, int]) -> None:
    """A group for each layer that may rest. Raises: TrainingError where a scheduler of learning rates knows the groups already."""
    more = []
    for group in optimizer.param_groups:
        parts: dict[int | None, list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(layers.get(id(parameter)), []).append(parameter)
        group.pop("param_names", None)
        first, *others = parts.values()
        group["params"] = first
        more += [{**group, "params": part} for part in others]
    if not more:
        return
    late = next((o for o in instances_of(LRScheduler) if getattr(o, "optimizer", None) is optimizer), None)
    if late is not None:
        raise TrainingError(_RATES.format(name=type(late).__name__))
    optimizer.param_groups += more


def _stepping(step: Any, heard: Heard, rests: bool) -> Any:
    @functools.wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        view = _views.get(self)
        if view is None or view in _running:
            return step(self, *args, **kwargs)
        _running.append(view)
        try:
            if _overflows(self):
                heard.skipped(view, False)
                return step(self, *args, **kwargs)
            view.left_alone = heard.before(view)
            if rests:
                view.drop_gradients()
            found = step(self, *args, **kwargs)
            if getattr(self, "overflow", False):
                heard.skipped(view, True)
            else:
                heard.after(view)
            return found
        finally:
            _running.remove(view)

    return stepped


def _overflows(zero: Any) -> bool:
    """Whether a loss scaler is going to skip the step, told before it is prepared."""
    if not hasattr(zero, "has_overflow"):
        return False
    checked = getattr(zero, "check_grad_overflow", zero.dtype == torch.float16)
    return bool(checked and zero.has_overflow(getattr(zero, "partition_gradients", True)))


def _by_group(step: Any) -> Any:
    @functools.wraps(step)
    def stepped(self: Any, number: int) -> None:
        view = _views.get(self)
        if view is None or not view.rests(number):
            step(self, number)

    return stepped


def _loading(load: Any, heard: Heard) -> Any:
    @functools.wraps(load)
    def load_checkpoint(self: Any, load_dir: str, *args: Any, **kwargs: Any) -> Any:
        with heard.loading(self.module, load_dir):
            found = load(self, load_dir, *args, **kwargs)
        if found[0] is not None and hasattr(self.optimizer, "update_lp_params"):
            self.optimizer.update_lp_params()  # of what rested, files hold float32 copies alone
        return found

    return load_checkpoint


def _around(method: Any, listens: Callable[[nn.Module], AbstractContextManager[Any]]) -> Any:
    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with listens(self.module):
            return method(self, *args, **kwargs)

    return called

"""What followers hear of DeepSpeed: its optimizers step on flat parts of weights, and its checkpoints are read by nobody else."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from os.path import isfile, join
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.integrations.engines import zero
from layerpeft.integrations.peft import reading
from layerpeft.saving.manifest import MANIFEST
from layerpeft.training.follower import alive, followers_of
from layerpeft.training.scheduled import Scheduled


def heard(before: Callable[[Optimizer], Any], after: Callable[[Optimizer], Any]) -> zero.Heard:
    """Who listens; `before` and `after` are told of every step."""

    def prepare(optimizer: Optimizer) -> set[int]:
        before(optimizer)
        return {i for f in alive() if f.pending is not None for i in f.holdings.ids()}

    return zero.Heard(prepare, after, _skipped, _resting, _waits, _loading, _saving, _gathering)


def _skipped(optimizer: Optimizer, prepared: bool) -> None:
    for follower in alive():
        if follower.holdings.of(optimizer):
            follower.checks.seen += not prepared
            follower.skip()


def _resting() -> dict[int, int]:
    found: dict[int, int] = {}
    for follower in alive():
        schedule = follower.schedule
        waiting = follower.pending.pool if follower.pending is not None else ()
        pool = schedule.switcher.examined.targets if isinstance(schedule, Scheduled) else waiting
        layer_of = {t.name: t.layer for t in pool}
        tensors = follower.holdings.tensors() if layer_of else {}
        found |= {id(p): layer_of[t] for t, group in tensors.items() for p in group.values()}
    return found


def _waits() -> bool:
    return any(f.pending is not None and not f.schedule.switches for f in alive())


@contextmanager
def _loading(model: nn.Module, folder: str) -> Iterator[None]:
    """What lies beside the weights is read with them, where an adapter was saved there; of divided ones originals are kept."""
    for follower in followers_of(model):
        if follower.holdings.is_divided:
            # the file that is loaded holds no weights that would show what is new
            follower.method.keep(set(follower.holdings.tensors()))
    with _opened(_resting_of(model)), reading(folder if isfile(join(folder, MANIFEST)) else None):
        yield


@contextmanager
def _saving(model: nn.Module) -> Iterator[None]:
    """What rests is saved like what trains, with its states."""
    with _opened(_resting_of(model)), ExitStack() as stack:
        for follower in followers_of(model):
            stack.enter_context(follower.schedule.states_here())
        yield


def _resting_of(model: nn.Module) -> list[nn.Parameter]:
    """The pools of schedules."""
    switching = [f for f in followers_of(model) if f.schedule.switches and f.pending is None]
    return [p for f in switching for group in f.holdings.tensors().values() for p in group.values()]


@contextmanager
def _gathering(model: nn.Module) -> Iterator[None]:
    """What a folder holds beside what trains is not left out as frozen (biases, a factor that is fixed)."""
    marks = (".lora_", ".modules_to_save.")
    with _opened(p for n, p in model.named_parameters() if any(mark in n for mark in marks)):
        yield


@contextmanager
def _opened(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)

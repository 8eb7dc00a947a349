"""What followers hear of DeepSpeed: its optimizers step on flat parts of weights, and its checkpoints are read by nobody else."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from os.path import isfile, join
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.integrations.engines import zero
from layerpeft.integrations.engines.known import is_cut
from layerpeft.integrations.peft import reading
from layerpeft.saving.manifest import MANIFEST
from layerpeft.training.follower import Follower, alive, followers_of
from layerpeft.training.scheduled import Scheduled


def heard(before: Callable[[Optimizer], Any], after: Callable[[Optimizer], Any]) -> zero.Heard:
    """Who listens; `before` and `after` are told of every step."""

    def prepare(optimizer: Optimizer) -> set[int]:
        before(optimizer)
        return {i for f in alive() if f.pending is not None for i in f.holdings.ids()}

    return zero.Heard(prepare, after, _skipped, _resting, _waits, _loading, _saving)


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
        tensors = follower.holdings.tensors()
        if any(is_cut(p) for group in tensors.values() for p in group.values()):
            follower.method.keep(set(tensors))  # the file that is loaded holds no weights that would show what is new
    with reading(folder if isfile(join(folder, MANIFEST)) else None):
        yield


@contextmanager
def _saving(model: nn.Module) -> Iterator[None]:
    """What rests is saved like what trains, with its states."""
    with ExitStack() as stack:
        for follower in followers_of(model):
            stack.enter_context(_awake(follower))
        yield


@contextmanager
def _awake(follower: Follower) -> Iterator[None]:
    resting = (
        []
        if follower.pending is not None or not follower.schedule.switches
        else [p for group in follower.holdings.tensors().values() for p in group.values() if not p.requires_grad]
    )
    with follower.schedule.states_here():
        for parameter in resting:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(False)

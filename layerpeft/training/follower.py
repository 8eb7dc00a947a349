"""One adapter of one model, watched: its pending choice is made just before the first update, and around that update, and
at the end, it is checked that what trains is what was asked for."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.errors import SelectionError, TrainingError, differences
from layerpeft.integrations import distributed
from layerpeft.integrations.engines.known import cut_like, is_cut
from layerpeft.integrations.peft import is_saving, loading_folder
from layerpeft.integrations.torch import eager, running_backward
from layerpeft.model.home import home_of, known_of
from layerpeft.model.names import clean
from layerpeft.selection.select import Selection
from layerpeft.text import note
from layerpeft.training import idle, verify
from layerpeft.training.carried import KEY, Carried, go_on, packed, taken, unpacked
from layerpeft.training.checks import NOT_HELD, Checks
from layerpeft.training.gradients import GradientNorms
from layerpeft.training.inside import Inside, refuse_fused
from layerpeft.training.measuring import Pending
from layerpeft.training.method import Method, Step
from layerpeft.training.rates import Rates
from layerpeft.training.scheduled import Once, Scheduled
from layerpeft.training.switching import Switcher, sizes
from layerpeft.training.waiting import Waiting

NEEDS_UNUSED = (
    "layers change while training, and DistributedDataParallel waits for the gradients of all of them: build it with "
    "find_unused_parameters=True and without static_graph (Trainer: ddp_find_unused_parameters=True, and no ddp_static_graph)"
)


SHARED_OUT = "not taken: each gradient is shared out over the processes before it can be seen"


class Follower:
    """Watches the optimizer steps of one adapter of one model, which it does not keep alive."""

    def __init__(self, method: Method, tuner: Any, switcher: Switcher | None = None) -> None:
        self.method, self.config, self.adapter = method, method.config, method.adapter
        self.schedule = Once(method, _on_copy) if switcher is None else Scheduled(method, _on_copy, switcher)
        self.record, self.holdings = self.schedule.record, self.schedule.holdings
        self._tuner = weakref.ref(tuner) if tuner is not None else lambda: None
        self.checks, self.waiting = Checks(self.schedule), Waiting(self.schedule, self._tuner)
        self.inside, self.rates = Inside(self.schedule, self.checks, self.waiting), Rates(self.schedule, self.waiting)
        self._norms: GradientNorms | None = None
        self._step: Step | None = None  # where it is a real one

    @property
    def model(self) -> nn.Module:
        """The model, which outlives its follower."""
        return self.method.model

    @property
    def pending(self) -> Pending | None:
        """A choice that waits for the first step."""
        return self.waiting.pending

    @property
    def live(self) -> bool:
        """False once its adapter is gone: unloaded, deleted, or replaced by another of the same name."""
        return getattr(self.model, "peft_config", {}).get(self.adapter) is self.config

    def follow(self, pending: Pending | None) -> None:
        """Begins, just after wrapping."""
        if pending is not None:
            self.waiting.wait(pending)
        else:
            self.method.ready()
        if isinstance(self.schedule, Scheduled):
            switcher = self.schedule.switcher
            self.model.register_forward_pre_hook(before_forward)
            note(sizes(switcher, self.holdings.tensors()))
            self.holdings.forget()  # PEFT is not done with them yet
            if switcher.waits:
                self.waiting.wait(Pending(self.model, switcher.examined))
        self.checks.wrapped(self.pending is not None)

    def twin(self, memo: dict[int, Any]) -> Follower | None:
        """The follower of the copy of the model that is being made."""
        model, tuner = memo.get(id(self.model)), memo.get(id(self._tuner()))
        if model is None:
            return None
        config, old = copy.deepcopy(self.config, memo), self.record
        method = self.method.twin(model, config, memo)
        config._layerpeft = old.twin(method)
        twin = memo[id(self)] = Follower(method, tuner, copy.deepcopy(old.schedule, memo))
        memo |= {id(self.holdings): twin.holdings, id(self.schedule): twin.schedule}  # whom those that measure ask
        twin.checks.asked = self.checks.asked
        twin.waiting.pending = copy.deepcopy(self.pending, memo)
        twin.schedule.copied(self.schedule, memo)
        return twin

    def measure_anew(self, *call: Any) -> None:
        """In a deep copy, which is called so: puts hooks of its own in the place of those that came along."""
        self.waiting.measure_anew(*call)
        self.schedule.measure_anew()

    def retire(self) -> None:
        """Stops following; a choice that still waited is dropped."""
        model = self.model  # which those that measure may be the last to hold
        self.waiting.drop()
        self.schedule.close()
        self.method.close()
        FOLLOWERS.discard(self)
        home_of(model).tether.followers.remove(self)

    def begin_step(self) -> None:
        """An optimizer is about to step, or to compute its gradients for that."""
        self._step = None
        if running_backward() is None:
            self.checks.passed()

    def again(self) -> None:
        """It has computed its gradients anew, for the same step."""
        if self._step is not None:
            self.method.lend(self._step)

    def before_step(self, optimizer: Optimizer) -> None:
        """Just before a real step, with its gradients. Raises: TrainingError for what would not train, or is not finite."""
        held = self.holdings.of(optimizer)
        if not held:
            waits = self.checks.seen or self.pending is not None
            if not waits and verify.unheld(self.holdings.tensors(), self.model, optimizer):
                raise TrainingError(f"the optimizer {NOT_HELD}")
            return
        refuse_fused(optimizer)
        self.rates.step(optimizer, held)
        number = running_backward()
        if number is not None:
            self._step = self.inside.before_step(optimizer, held, number)
            return
        self.checks.seen += 1
        if verify.skipped(optimizer):
            self.skip()
            return
        if self.pending is not None:
            if not self.waiting.choose(optimizer, self.checks.seen):
                return
            held = self.holdings.of(optimizer)
        self.schedule.before_step()
        self._step = Step(optimizer, self.schedule.active(held))
        self.method.before_step(self._step)
        self.checks.before(self._step)
        self.method.lend(self._step)

    def skip(self) -> None:
        """A loss scaler leaves the step out."""
        self._step = None
        if self.pending is not None:
            self.pending.restart()
        self.schedule.skipped()
        self.method.skipped()

    def after_step(self, optimizer: Optimizer) -> None:
        """Just after a real optimizer step. Raises: TrainingError when a chosen target did not move in its first one."""
        self.method.take_back()
        if self._step is None or self._step.inside:
            return
        step = Step(optimizer, self.schedule.active(self.holdings.of(optimizer)))
        self.method.after_step(step)
        self.checks.after(step.held)
        self.schedule.after_step(optimizer)

    def start(self, inside: bool = False) -> None:
        """Lets a schedule freeze what does not train yet; `inside` a forward pass it may wait."""
        if self.pending is None:
            self.schedule.start(inside)

    def check(self) -> None:
        """What moved since the first step. Raises: TrainingError where a target did not, anything else did, or a choice waits."""
        if self.pending is not None:
            raise TrainingError(f"training ended before the layers were chosen: {self.pending.progress()} came")
        self.checks.end()

    def begin(self, restored: dict[str, Any] | None, merges: bool = False) -> None:
        """A training begins: checks start anew, and it takes over the record of the run that it resumes.

        `merges`: the trainer folds the adapter into the chosen weights and out again, which leaves rounding in them.

        Raises: SelectionError when that run chose otherwise.
        """
        self.holdings.forget()
        idle.refuse_adapter(self.model, self.adapter, (p for g in self.holdings.tensors().values() for p in g.values()))
        self.checks.begin(bool(restored), merges)
        self.schedule.begin()
        if self.pending is not None:
            self.pending.paced = True
        if restored:
            _take_over(self.schedule, restored)
        if self._norms is not None:
            self._norms.close()
        self._norms = _norms(self)
        self.start()

    def end(self, stepped: bool = True) -> None:
        """A training has ended, `stepped`: after steps. Raises: TrainingError as `check`, and where nothing was trained."""
        if not self.checks.seen and not self.checks.resumed and self.pending is None:
            raise TrainingError(f"the optimizer {NOT_HELD}")
        if self.pending is not None and not (self.pending.began or stepped):
            self.checks.end()
        else:
            self.check()
        if self._norms is not None:
            self._norms.close()
            self._norms = None
        self.schedule.rest()

    def news(self) -> dict[str, float]:
        """What trackers are told of the switches since they were last told, and of gradients."""
        norms = self._norms.take() if self._norms is not None else {}
        return self.schedule.news() | self.rates.news() | {f"layers/grad_norm/{i}": norm for i, norm in norms.items()}

    def on_load(self, state: Mapping[str, Any], prefix: str, carried: Carried | None = None) -> None:
        """Keeps the choice of an adapter that is loaded. Raises: SelectionError where it is another one."""
        self.checks.sealed.forget([clean(k.removeprefix(prefix)) for k in state if k.startswith(prefix)])
        self.holdings.forget()  # loading may put new tensors in the place of the old
        found, folder = self.method.found(state, prefix), loading_folder()
        if not found or folder is None and (self.holdings.is_empty or self.waiting.says_nothing(found)):
            return
        kept = self.waiting.kept(found)
        if kept is None and not (self.method.partial and self.schedule.switches):
            waits = self.pending.pool if self.pending is not None else None
            pool = {t.name for t in waits} if waits is not None else self.method.wrapped()
            verify.same_targets("the adapter that is loaded", found, pool)
        if not self.method.in_place:
            verify.same_keys(self.model, self.holdings.ids(), state, prefix, found)
        if kept is not None:
            self.waiting.settle(kept)
        self.method.on_load(state, prefix, found, folder)
        if go_on(self.method, self.schedule, folder, carried):
            self.waiting.drop()
        self.holdings.forget()


def _norms(follower: Follower) -> GradientNorms | None:
    """What watches the gradients of a training's every layer, where `select` asks for it."""
    select = follower.record.config.get("select") or {}
    if not select.get("log_gradients"):
        return None
    if follower.holdings.is_divided:
        follower.record.checks["log_gradients"] = SHARED_OUT
        note(f"log_gradients: {SHARED_OUT}")
        return None
    selection, pending = follower.record.selection, follower.pending
    names = selection.layer_names if selection is not None else pending.layers.names if pending is not None else ()
    return GradientNorms(names, follower.holdings.tensors())


def _take_over(schedule: Once, restored: dict[str, Any]) -> None:
    record = schedule.record
    then = Selection.from_dict(restored["selection"])
    asked, asks = restored.get("select") or {}, json.loads(json.dumps(record.config.get("select") or {}))
    differ = differences(asked, asks)
    if differ:
        raise SelectionError(f"the run that is resumed chose its layers in another way ({'; '.join(differ)})")
    ours = set(record.selection.targets if record.selection is not None else schedule.holdings.tensors())
    verify.same_targets("the run that is resumed", set(then.targets), ours)
    verify.same_precisions(restored.get("quant"), record.precisions)
    record.selection = then
    record.steps_trained = {int(k): v for k, v in restored.get("steps_trained", {}).items()}


def alive() -> list[Follower]:
    """The followers whose model and adapter are still there."""
    found = []
    for follower in [f for f in FOLLOWERS if f.method.alive]:
        if not follower.method.alive:  # the last that held it has gone just now
            continue
        if follower.live:
            found.append(follower)
        else:
            follower.retire()
    return found


def followers_of(model: nn.Module | None) -> list[Follower]:
    """The followers whose model is, or is inside, this one."""
    inside = {id(m) for m in model.modules()} if model is not None else set()
    return [f for f in alive() if id(f.model) in inside]


def _on_copy(model: nn.Module, *call: Any) -> None:
    for follower in followers_of(model):
        follower.measure_anew(*call)


def before_forward(model: nn.Module, *_: Any) -> None:
    """The first forward pass of a loop of one's own, whose optimizer is there by then. Raises: TrainingError under such a DDP."""
    tether = known_of(model).tether
    if tether is not None and model.training and torch.is_grad_enabled():
        for follower in tether.followers:
            if follower.schedule.switches:
                _start_switching(follower)


@eager  # or compiled code would hold all that a switch does
def _start_switching(follower: Follower) -> None:
    if distributed.awaits_every_gradient():
        raise TrainingError(NEEDS_UNUSED)
    follower.start(inside=True)


def _cut_up(model: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Lets whole tensors of a state dict be loaded where the model holds parts of them."""
    if not any(map(is_cut, model.parameters())):
        return
    for name, mine in model.state_dict().items():
        given = state.get(prefix + name)
        if is_cut(mine) and isinstance(given, torch.Tensor) and given.shape == mine.shape:
            state[prefix + name] = cut_like(given.to(mine.dtype), mine)


# ---- what ties followers to the life of their model

FOLLOWERS: weakref.WeakSet[Any] = weakref.WeakSet()


class Tether:
    """Ties followers to the life of their model, and hears of adapters that are loaded into it.

    Pickles of the model do not take it along; a deep copy of the model gets followers of its own.
    """

    def __init__(self, followers: list[Any] | None = None) -> None:
        self.followers = followers or []
        self.carries = False  # whether the model's state dict takes along where a run stands

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        found = state.pop(prefix + KEY, None) if any(f.live for f in self.followers) else None
        carried = unpacked(found) if found is not None else {}
        _cut_up(module, state, prefix)
        for follower in [f for f in self.followers if f.live]:
            follower.method.read(state, prefix, loading_folder())
            follower.on_load(state, prefix, carried.get(follower.adapter))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tether:
        twin = memo[id(self)] = Tether()
        twin.carries = self.carries
        twin.followers += [t for f in self.followers if (t := f.twin(memo)) is not None]
        FOLLOWERS.update(twin.followers)
        return twin

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Tether, ()


class Carrier:
    """Called by torch when the model's state dict has been put together."""

    def __init__(self, tether: Tether) -> None:
        self.tether = tether

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if is_saving():  # a folder keeps them in files of their own, and PEFT would throw this away
            return
        live = [f for f in self.tether.followers if f.live]
        if any(f.checks.running and f.holdings.is_divided for f in live):  # a Trainer's checkpoint has them elsewhere
            return
        found = {f.adapter: carried for f in live if (carried := taken(f.method, f.schedule))}
        if found:
            state.setdefault(prefix + KEY, packed(found))

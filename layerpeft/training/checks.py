"""Whether what trains is what was chosen: asked around the first update of every target, and at the end."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from layerpeft.errors import TrainingError, raise_faults
from layerpeft.integrations import distributed
from layerpeft.integrations.engines.fsdp import give_up
from layerpeft.integrations.engines.known import gradient, is_cut, is_stepped_apart, local
from layerpeft.model.layers import layer_map
from layerpeft.model.targets import is_routed, leave_out
from layerpeft.text import note, some
from layerpeft.training import verify
from layerpeft.training.method import Step
from layerpeft.training.optimizer_states import held_by, holders
from layerpeft.training.scheduled import Once
from layerpeft.training.verify import Sealed

BLANK = "no gradient but zero for anything that was chosen (batches without a label, equal rewards, a stack that did not run)"
UNSEEN = "a finite gradient for every chosen target before its first update: DeepSpeed has divided gradients among the processes"
NOT_HELD = (
    "holds none of the tensors that were chosen, so nothing would train: build it after get_peft_model, from the parameters "
    "that require a gradient"
)
ALIKE = (
    "not made: whether frozen weights changed between wrapping and the first update, when processes may be made alike"
)
OTHERS = "whether {what} since the first update: cast, divided or taken away meanwhile ({names})"
QUIET = "whether chosen targets moved that had no gradient but zero in any of their steps ({names})"
MOVED = "every chosen target moved"


class Checks:
    """Those of one adapter. State is real here: what the weights were, and what has stepped since."""

    def __init__(self, schedule: Once) -> None:
        self.schedule, self.holdings = schedule, schedule.holdings
        self.method, self.record, self.sealed = schedule.method, schedule.record, Sealed(schedule.method)
        self.asked: frozenset[str] = frozenset()  # what PEFT made trainable
        self.seen = 0  # optimizer steps of any kind
        self.running = self.resumed = self.merges = False  # `running`: a Trainer is
        self._stepped: set[int] = set()
        self._rate = 0.0
        self._blank = False  # the running step has nothing to show
        self._blanks = 0
        self._unshown: set[str] = set()  # targets all of whose steps were so

    def wrapped(self, waits: bool) -> None:
        """Writes down, just after wrapping, what the frozen weights are. `waits`: some that are wrapped will not train.

        Packed weights, which the first forward pass may lay out anew, are left for the first step; so is everything where all
        layers train, since wrapping them is to cost no more than in PEFT, and where processes may still be made alike.
        """
        selection = self.record.selection
        partial = waits or selection is None or len(selection.layers) < selection.num_layers
        self.asked = frozenset(n for n, p in self.method.model.named_parameters() if p.requires_grad)
        if partial and distributed.world_size() == 1:
            self.sealed.wrapped()
        elif partial:
            self.record.checks["wrapped"] = ALIKE

    def begin(self, resumed: bool, merges: bool) -> None:
        """A training begins; `merges`: the trainer folds the adapter into the chosen weights and out again."""
        self.seen, self.sealed.start, self.resumed, self.merges, self.running = 0, {}, resumed, merges, True
        self._blanks = 0
        self._stepped.clear()
        self._unshown.clear()

    def passed(self) -> None:
        """A step that is none yet: whatever comes after it is not asked for."""
        self._rate = 0.0

    def before(self, step: Step) -> None:
        """Before a first update. Raises: TrainingError for what would not train, or not be finite."""
        held, optimizer = step.held, step.optimizer
        self._rate = verify.learning_rate(optimizer, held)
        if not self._rate or held <= self._stepped:
            return
        ids, training, model = self.holdings.ids(), self.schedule.training(), self.method.model
        known = set().union(*map(held_by, holders(ids, optimizer)))
        self._blank = not step.inside and self._shows_nothing()
        apart = any(is_stepped_apart(p) for group in training.values() for p in group.values())
        waits = step.inside or self._blank or apart
        faults, idle = verify.before_step(training, known, set() if waits else held - self._stepped)
        others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
        faults += verify.not_asked_for(others, self.asked)
        if not self.sealed.start:
            faults += verify.not_held(self.holdings.tensors(), known) if self.schedule.switches else []
            faults += self.sealed.changed_since_wrapping()
        raise_faults("stopped before the first update, because it would not train what was chosen", faults)
        self._idle(idle)
        if not self.sealed.start:
            self.sealed.begin(self.holdings.tensors(), others)
            self.method.keep(set(training))
            self.record.checks.pop("not_made", None)
            if apart:
                self._not_made(UNSEEN)

    def after(self, held: set[int], blank: bool = False) -> None:
        """After an update; `blank`: it had nothing to show. Raises: TrainingError when a target did not move in its first one."""
        if not self._rate:
            return
        training = self.schedule.training()
        ids = verify.ids_of(training)
        if not ids <= self._stepped:
            fresh = [t for t, group in training.items() if not {id(p) for p in group.values()} <= self._stepped]
            if self._blank or blank:
                self._pass_over(fresh)
            else:
                self._stepped |= held
                self._unshown.difference_update(fresh)
            if ids <= self._stepped:  # where several optimizers share the tensors, all of them have stepped by now
                faults, idle = self._still(fresh)
                raise_faults("the first update left chosen targets as they were", faults)
                self._idle(idle)
                if not self._hidden(fresh):
                    self.record.checks["first_step"] = MOVED
        for layer, targets in self.holdings.by_layer(self.record.selection).items():
            there = [t for t in targets if t in training]
            first = next((p for t in there for p in training[t].values()), None)
            if id(first) in held:  # one tensor stands for the layer, should several optimizers share it
                self.record.steps_trained[layer] = self.record.steps_trained.get(layer, 0) + 1
                self.schedule.count(there)

    def end(self) -> None:
        """What moved since the first step. Raises: TrainingError when a target did not move, or anything else did."""
        self.running = False
        if not self.sealed.start:
            if self.seen and not self.resumed:
                raise TrainingError(
                    f"nothing was trained: all {self.seen} optimizer steps had a learning rate of zero or were skipped"
                )
            return
        give_up(self.method.model)
        tensors, now = self.holdings.tensors(), self.sealed.parameters()
        trained = self.schedule.trained()
        if trained and trained <= self._unshown and not self.resumed:
            raise TrainingError(f"nothing was trained: all {self.seen} optimizer steps had {BLANK}")
        may_rest = self._unshown if self.schedule.switches or self.resumed else set()
        faults, idle = self._still(trained - may_rest)
        rounded = set(tensors) if self.merges else set()
        frozen = verify.changed(self.sealed.frozen, now)
        faults += [f"{n} is frozen and changed" for n in frozen if n.removesuffix(".weight") not in rounded]
        off = {t: s for t, s in self.sealed.start.items() if t not in trained and t not in rounded}
        faults += [f"{t} was never switched on and changed" for t, s in off.items() if verify.changed(s, tensors[t])]
        raise_faults("what trained is not what was chosen", faults)
        self.record.idle_experts = tuple(idle)
        still: dict[str, Any] = self.sealed.still(now)
        for target, names in self._unmoved(trained).items():
            group = tensors[target]
            still |= {f"{target}.{n}": group[n] for n in names if group[n].dtype in verify.LOW and target not in idle}
        for name, parameter in still.items():
            note(f"{name} did not move: {verify.why_unmoved({name: parameter}, self._rate, self.method.in_place)}")
        self.record.checks["unmoved"] = sorted(still)
        self._conclude(trained, may_rest, now)

    def _conclude(self, trained: set[str], may_rest: set[str], now: Mapping[str, torch.Tensor]) -> None:
        """Writes down what was seen to hold in the end, and what could not be seen."""
        quiet, lost = sorted(trained & may_rest), sorted(verify.outdated(self.sealed.frozen, now))
        hidden = self._hidden(trained - may_rest)
        if quiet:
            self._not_made(QUIET.format(names=some(quiet)))
        if lost:
            self._not_made(OTHERS.format(what="frozen parameters changed", names=some(lost)))
        seen = [] if quiet or hidden else [MOVED]
        seen += [] if lost else ["no frozen parameter did" if seen else "no frozen parameter moved"]
        self.record.checks["end"] = ", and ".join(seen) or "nothing could be compared"

    def _not_made(self, check: str) -> None:
        """Writes down a check that cannot be made, once."""
        self.record.checks["not_made"] = list(dict.fromkeys([*self.record.checks.get("not_made", ()), check]))

    def _hidden(self, among: Iterable[str]) -> list[str]:
        """Those targets of which nothing can be compared with what it was, which is written down."""
        tensors, moved = self.holdings.tensors(), self.method.moved()
        seals = {t: s for t in among if (s := self.sealed.start.get(t)) and t not in moved}
        found = sorted(t for t, s in seals.items() if len(verify.outdated(s, tensors[t])) == len(s))
        if found:
            self._not_made(OTHERS.format(what="chosen targets moved", names=some(found)))
        return found

    def _shows_nothing(self) -> bool:
        """Whether the step has no gradient but zero for anything that trains, for a reason that other steps need not have."""
        tensors = [p for group in self.schedule.training().values() for p in group.values()]
        found, apart = [g for p in tensors if (g := gradient(p)) is not None], any(map(is_stepped_apart, tensors))
        if not found and not apart:  # with a stack that need not run (a tower, and a batch without images), or a fault
            selection = self.record.selection
            return selection is not None and layer_map(self.method.model).stack != selection.stack
        blank = not any(bool(local(g).any()) for g in found)
        return distributed.everywhere(blank) if apart or any(map(is_cut, found)) else blank

    def _pass_over(self, fresh: Iterable[str]) -> None:
        self._unshown.update(fresh)
        self._blanks += 1
        if self._blanks & (self._blanks - 1) == 0:  # the first, second, fourth, eighth time
            note(
                f"optimizer step {self.seen} shows nothing: it has {BLANK}; whether what was chosen trains is asked at the next"
            )

    def _idle(self, experts: Iterable[str]) -> None:
        self.record.idle_experts = tuple(sorted({*self.record.idle_experts, *experts}))

    def _still(self, among: Iterable[str]) -> tuple[list[str], list[str]]:
        """(faults, idle experts) among those targets of which no tensor moved."""
        tensors, still = self.holdings.tensors(), self._unmoved(among)
        whole = [t for t, names in still.items() if len(names) == len(tensors[t])]
        named, place = [t for t in whole if not is_routed(t)], self.method.in_place
        faults = [f"{t} did not move: {verify.why_unmoved(tensors[t], self._rate, place)}" for t in named]
        if named and len(named) < len(tensors):
            faults[-1] += f" (without what did not move: {leave_out(named, set(tensors).difference(named))})"
        return faults, [t for t in whole if is_routed(t)]

    def _unmoved(self, among: Iterable[str]) -> dict[str, list[str]]:
        moved = self.method.moved()
        before = {t: self.sealed.start[t] for t in among if t in self.sealed.start}
        return {t: n for t, n in verify.unmoved(self.holdings.tensors(), before).items() if t not in moved}

"""The choice of an adapter that waits for the first step: whom it asks, and what is done once it is made."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from layerpeft.model.names import clean
from layerpeft.selection.select import Selection
from layerpeft.text import note
from layerpeft.training import backward, verify
from layerpeft.training.measuring import Pending
from layerpeft.training.optimizer_states import holders
from layerpeft.training.scheduled import Once, Scheduled


class Waiting:
    """State is real here: `pending`, until the choice is made; None where there is nothing to wait for."""

    def __init__(self, schedule: Once, tuner: Callable[[], Any]) -> None:
        self.schedule, self.method, self.holdings = schedule, schedule.method, schedule.holdings
        self._tuner = tuner
        self.pending: Pending | None = None

    def wait(self, pending: Pending) -> None:
        """From now on, for this."""
        self.pending = self.schedule.watch(pending)
        if isinstance(self.schedule, Scheduled):
            pending.decider = self.schedule.first

    def measure_anew(self, *call: Any) -> None:
        """In a deep copy, which is called so: puts hooks of its own in the place of those that came along."""
        if self.pending is not None:
            self.pending.close()
            self.wait(Pending(self.method.model, self.pending.examined))
            self.pending.begin(self.method.model, *call)

    def drop(self) -> None:
        """No more."""
        if self.pending is not None:
            self.pending.close()
            self.pending = None

    def choose(self, optimizer: Optimizer, number: int) -> bool:
        """Makes it, before the optimizer's `number`th step; False while more batches are wanted than that had."""
        assert self.pending is not None
        pending = self.pending
        selection = pending.decided or pending.decide()
        if selection is not None:
            if self.schedule.switches:
                self.drop()
                self.schedule.start()
            else:
                self.settle(selection, optimizer)
            note(f"chosen before the first update: {selection.why}: {', '.join(map(str, selection.layers))}")
            return True
        pending.go_on()
        note(f"optimizer step {number} only measures ({pending.progress()}); no layer changes")
        return False

    def kept(self, found: set[str]) -> Selection | None:
        """The choice that the adapter that is loaded made, by its modules; None where that chose among others."""
        return self.pending.keep(found) if self.pending is not None and not self.schedule.switches else None

    def says_nothing(self, found: set[str]) -> bool:
        """Whether these are the modules of all that may be chosen, so that they tell of no choice."""
        pool = self.pending.pool if self.pending is not None and not self.schedule.switches else ()
        return bool(pool) and found >= {t.name for t in pool}

    def settle(self, selection: Selection, optimizer: Optimizer | None = None) -> None:
        """Keeps the chosen wrappers, removes the others and takes their tensors out of the optimizers."""
        self.drop()
        chosen, tensors, model = set(selection.targets), self.holdings.tensors(), self.method.model
        removed = {id(p): p for t, group in tensors.items() if t not in chosen for p in group.values()}
        self.method.keep_only(chosen)
        verify.forget(holders(self.holdings.ids() | removed.keys(), optimizer), removed)
        for parameter in removed.values():
            parameter.requires_grad_(False).grad = None
        tuner = self._tuner()
        if tuner is not None and hasattr(tuner, "targeted_module_names"):
            names = tuner.targeted_module_names
            tuner.targeted_module_names = [n for n in names if clean(n) in chosen]
        self.schedule.record.settle(model, selection)
        self.holdings.forget()
        backward.install(model, selection.stack)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not notice that hooks and wrappers are gone

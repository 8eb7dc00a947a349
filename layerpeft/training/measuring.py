"""A choice that waits for training itself: the micro-batches of the first optimizer step are measured as they go by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerpeft.errors import NothingSeenError, TrainingError
from layerpeft.integrations import distributed, trainer
from layerpeft.integrations.engines.known import is_stepped_apart
from layerpeft.integrations.losses import watch_scale
from layerpeft.integrations.torch import tensors_of
from layerpeft.selection import choose, scoring
from layerpeft.selection.draws import window_seed
from layerpeft.selection.examined import Examined
from layerpeft.selection.scoring import Measured
from layerpeft.selection.select import Selection
from layerpeft.training.method import Tensors


class Pending:
    """A choice among wrapped targets (the pool) that is made just before the first optimizer step.

    Under a Trainer the choice falls between the last backward pass and clipping, so that the norm that clips is that of the chosen
    tensors. In other loops the optimizer's hook is the first moment that says a step is complete; who clips by hand in such a
    loop clips the first step by the norm of the whole pool. State is real here: hooks are on the model until `close`. `tensors`,
    `on_copy` and `paced` are set by who follows the steps.
    """

    def __init__(
        self, model: nn.Module, examined: Examined, before: tuple[float | None, ...] = (), turn: int = 0
    ) -> None:
        self.model, self.examined = model, examined
        self.select, self.layers, self.pool = examined.select, examined.layers, examined.targets
        self.wanted = self.select.num_batches or scoring.fewest(self.select)
        self.before, self.turn = before, turn  # what is known of the layers by now, and how often they were measured
        self.decider: Callable[[Measured, int], Selection] = self._by_rule
        self.watches_backward = scoring.needs(self.select) == "backward"
        self.tensors: Callable[[], Tensors] = dict
        self.on_copy: Callable[..., None] = lambda *_: None
        self.paced = False  # a Trainer says which micro-batch is the last of a step
        self.decided: Selection | None = None
        self.began = False  # a forward pass of training was seen
        self.barren: NothingSeenError | None = None  # what the batches before these did not show
        self._forwards = 0  # since the last backward pass
        self._scales: list[Callable[[], float | None]] = []  # one per forward pass of the running batch
        self._unstepped = False  # a backward pass was seen since the last optimizer step
        self._everywhere = 0  # batches that all processes have measured
        self._handles = [
            model.register_forward_pre_hook(_Hook(self.begin), with_kwargs=True),
            model.register_forward_hook(_Hook(self._finish), with_kwargs=True, always_call=True),
        ]
        self._start()

    def restart(self) -> None:
        """Forgets what was measured."""
        self.measurement.detach()
        self._start()

    def close(self) -> None:
        """Takes every hook off the model."""
        self.measurement.detach()
        for handle in self._handles:
            handle.remove()

    def decide(self) -> Selection | None:
        """The choice from what was measured; None while more batches are wanted. Every process must ask.

        Raises: ScoreError, SelectionError.
        """
        found = self.measured()
        return None if found is None else distributed.from_first(self.decider(*found))

    def _by_rule(self, measured: Measured, batches: int) -> Selection:
        scores = scoring.make_scores(self.select, self.layers, measured, batches)
        return choose.make_selection(self.select, self.layers, self.pool, scores, self.examined.costs)

    def measured(self) -> tuple[Measured, int] | None:
        """What was measured, on how many batches; None while more are wanted. Every process must ask. Raises: ScoreError.

        Batches that hold nothing to learn a score from are forgotten, and `barren` says why.
        """
        self._next_batch()
        processes = distributed.world_size()
        batches = self._everywhere = int(distributed.add_up(torch.tensor([self.measurement.batches])))
        if batches < self.wanted * processes:
            return None
        if processes > 1:
            self.measurement.combine(distributed.add_up)
        try:
            return self.measurement.result(), batches
        except NothingSeenError as error:
            self.restart()
            self.barren = error
            return None

    def progress(self) -> str:
        """How many batches were measured, of how many, and why some do not count."""
        why = f" ({self.barren})" if self.barren is not None else ""
        return f"{self.measurement.batches} of {self.wanted} batches{why}"

    def go_on(self) -> None:
        """Says that the optimizer steps without a choice: drops the pool's gradients, so that the step changes none of it.

        Raises: TrainingError where not one batch was seen, and more steps would not help.
        """
        if not self._everywhere and self.barren is None:
            raise TrainingError(
                f"the choice by {self.select.by} has seen no batch with a finite gradient before the first optimizer step "
                "(a model left in evaluation mode, a closure without a backward pass, or a loss computed without calling "
                "the model); pass batches=… to the config or to get_peft_model"
            )
        self._unstepped = False
        for parameter in self._parameters(set()):
            parameter.grad = None

    def keep(self, targets: set[str]) -> Selection | None:
        """The choice that an earlier run made, by its targets; None where they are not of this pool."""
        held = [t for t in self.pool if t.name in targets]
        if len(held) < len(targets):
            return None
        why = "kept from the adapter that was loaded"
        return choose.selection_of(self.layers, held, why, self.select.to_dict())

    def begin(self, model: nn.Module, *call: Any) -> None:
        """Before every forward pass; `call`: the arguments, and those by name."""
        if model is not self.model:
            self.on_copy(model, *call)  # a deep copy, which brought these hooks along
            return
        if not torch.is_grad_enabled() or not (model.training or self.watches_backward):
            return
        if not self._forwards:
            if self._unstepped and self._dropped():
                self.restart()  # the gradients were dropped: a loss scaler skipped that step
            self._next_batch()
        self.began = True
        self._forwards += 1
        if not self.watches_backward:
            # The forward pass alone is watched, so that recomputing blocks in the backward pass counts nothing twice.
            self.measurement.attach()
            if call and isinstance(self.measurement, scoring.Watching):
                self.measurement.called(model, *call)  # which its own hooks come too late for

    def _finish(self, model: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if model is not self.model or not self._forwards:
            return
        if not self.watches_backward:
            self.measurement.detach()
        watched = [t for t in tensors_of(output) if t.requires_grad]
        for tensor in watched:
            tensor.register_hook(self._backward)
        if not watched:
            self._forwards = 0
        elif self.watches_backward:
            self._scales.append(watch_scale(model, kwargs, output))

    def _next_batch(self) -> None:
        # Pairs, whose forward passes share one loss, have no scale of their own.
        self.measurement.next_batch(self._scales[0]() if len(self._scales) == 1 else None)
        self._scales.clear()

    def _backward(self, _gradient: torch.Tensor) -> None:
        # Several forward passes before one backward pass (pairs, contrastive losses) are one batch.
        if self._forwards:
            self._forwards, self._unstepped = 0, True
            if self.paced:
                trainer.at_backward_end(self._backward_ended)

    def _backward_ended(self) -> None:
        """Under a Trainer, before it clips: makes the choice, and drops the gradients of what is not chosen."""
        if self.decided is not None or not trainer.last_micro_batch() or self._apart():
            return
        found = self._gradients()
        if not distributed.everywhere(bool(found) and all(bool(torch.isfinite(g).all()) for g in found)):
            return  # a loss scaler is going to skip this step
        self.decided = self.decide()
        for parameter in self._parameters(set(self.decided.targets) if self.decided is not None else set()):
            # Zeros where nothing is chosen yet: a loss scaler wants to see some gradient in every step.
            parameter.grad = None if self.decided is not None or parameter.grad is None else parameter.grad.zero_()

    def _start(self) -> None:
        seed = window_seed(self.select.seed, self.turn)
        self.measurement = scoring.start(
            self.model, self.select, self.layers, self.pool, live=True, before=self.before, seed=seed
        )
        self.decided, self._unstepped = None, False
        self._scales.clear()
        if self.watches_backward:
            self.measurement.attach()

    def _parameters(self, without: set[str]) -> list[nn.Parameter]:
        return [p for target, group in self.tensors().items() if target not in without for p in group.values()]

    def _dropped(self) -> bool:
        """Whether the gradients of the running step are gone."""
        return not self._apart() and not any(bool(g.any()) for g in self._gradients())

    def _apart(self) -> bool:
        """Whether an engine has taken the gradients, and clips them itself, inside of its step."""
        return any(map(is_stepped_apart, self._parameters(set())))

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters(set()) if p.grad is not None]


class _Hook:
    """A hook of a choice that waits, which a deep copy of the model brings along, and a pickle cannot."""

    def __init__(self, action: Callable[..., None]) -> None:
        self.action = action

    __call__: Any = torch.compiler.disable(
        lambda self, *args: self.action(*args)
    )  # what it writes down would be lost in graphs

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise TrainingError(
            "the layers of this model are not chosen yet, and a pickled copy would train all that may be chosen: pickle it after "
            "the first optimizer step, or choose at once (batches=… for get_peft_model)"
        )

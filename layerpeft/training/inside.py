"""Optimizers that step inside the backward pass, one for each tensor, on a hook that sees its gradient (GaLore's layer-wise ones).

Between two such steps the pass still needs the weights, bases and requires_grad flags as they are. So all steps of one pass are one
step, whose refreshes, switches and checks wait until it is over. Reentrant checkpointing runs a pass of its own for each block.
"""

from dataclasses import dataclass, field
from typing import Any

from torch.optim.optimizer import Optimizer

from layerpeft.errors import TrainingError
from layerpeft.integrations import trainer
from layerpeft.training.checks import Checks
from layerpeft.training.method import Step
from layerpeft.training.scheduled import Once
from layerpeft.training.waiting import Waiting


class _Together:
    """What those who look into an optimizer's states see of several."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.state = {p: state for o in optimizers for p, state in o.state.items()}


def refuse_fused(optimizer: Any) -> None:
    """Raises: TrainingError for one that runs the backward pass itself (LOMO, AdaLomo), and whose steps nobody hears of."""
    if hasattr(optimizer, "fused_backward"):
        raise TrainingError(
            f"{type(optimizer).__name__} changes weights inside a backward pass of its own (fused_backward), where what trains "
            "cannot be followed; use AdamW, or an optimizer for each tensor that steps on register_post_accumulate_grad_hook"
        )


@dataclass
class _Pass:
    """What has stepped in one backward pass, and whether no gradient but zero was among what it stepped by."""

    stepped: list[Optimizer] = field(default_factory=list)
    blank: bool = True


class Inside:
    """Those of one adapter. State is real here: what has stepped in the running passes."""

    def __init__(self, schedule: Once, checks: Checks, waiting: Waiting) -> None:
        self.method, self.holdings = schedule.method, schedule.holdings
        self.schedule, self.checks, self.waiting = schedule, checks, waiting
        self._passes: dict[int, _Pass] = {}

    def before_step(self, optimizer: Optimizer, held: set[int], number: int) -> Step:
        """Just before one of the steps in that pass. Raises: TrainingError where the pass is needed whole, and as any step does."""
        if self.waiting.pending is not None:
            raise TrainingError(
                f"{type(optimizer).__name__} steps inside the backward pass, and this choice of layers waits for the end of the "
                "first one; pass batches=… to the config or to get_peft_model"
            )
        if number not in self._passes:
            self._begin(optimizer, number)
        running = self._passes[number]
        running.stepped.append(optimizer)
        mine = [p for group in optimizer.param_groups for p in group["params"] if id(p) in held]
        running.blank = running.blank and not any(p.grad is not None and bool(p.grad.any()) for p in mine)
        step = Step(optimizer, self.schedule.active(held), inside=True)
        self.method.lend(step)
        return step

    def _begin(self, optimizer: Optimizer, number: int) -> None:
        self.checks.seen += 1
        self.schedule.before_step()
        step = Step(optimizer, self.schedule.active(self.holdings.ids()), inside=True)
        self.method.before_step(step)
        self.checks.before(step)
        self._passes[number] = _Pass()
        trainer.at_backward_end(lambda: self._end(self._passes.pop(number)))

    def _end(self, over: _Pass) -> None:
        held = self.schedule.active(set().union(*map(self.holdings.of, over.stepped)))
        together: Any = _Together(over.stepped)
        self.method.after_step(Step(together, held))
        self.checks.after(held, over.blank)
        for optimizer in over.stepped:
            self.schedule.after_step(optimizer)

"""Learning rates by layer: the groups of an optimizer are divided by layer, each with its share of the rate.

That is done as soon as the optimizer is built, so that a scheduler scales every group, and a checkpoint of the optimizer holds
them all.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import Optimizer

from layerpeft.errors import TrainingError
from layerpeft.model.names import place_among
from layerpeft.selection import scoring
from layerpeft.selection.select import Select
from layerpeft.text import note
from layerpeft.training.method import Tensors
from layerpeft.training.record import Record
from layerpeft.training.scheduled import Once
from layerpeft.training.waiting import Waiting

KEY = "layer"  # of a group: its number; None: of what lies outside of the layers, or is of no adapter
ASKS = ("layer_lr", "layer_lr_decay")  # of a config
UNDIVIDED = (
    "the learning rate goes by layer ({asked}), and this optimizer has one for all of them: call "
    "layerpeft.layer_rates(model, optimizer) just after it is built, before its scheduler (a Trainer does so for an optimizer "
    "that it builds itself)"
)


@dataclass(frozen=True)
class Shares:
    """Of the learning rate: one per layer of the stack, by name. `every`: layers without a tensor have a group, too."""

    names: tuple[str, ...]
    factors: tuple[float, ...]
    every: bool


def shares_of(record: Record, names: tuple[str, ...]) -> Shares | None:
    """Those that a record's config asks for; None where it does not. `names`: of the layers.

    `layer_lr_decay` d: `d^(depth from the top)`, 1 for the last layer (ULMFiT, arXiv 1801.06146, with d = 1 / 2.6). `layer_lr:
    by_score`: the score over the largest one among the chosen; with `by: gradient_norm, normalize: weight` that is Auto-RGN
    (surgical fine-tuning, arXiv 2210.11466), measured once and by whole layers.
    Raises: TrainingError for scores that no rate can be in proportion to.
    """
    config, chosen = record.config, record.selection
    every = scoring.needs_batches(Select.parse(config["select"]))  # one may wait, and be gone when a run goes on
    if decay := config.get("layer_lr_decay"):
        return Shares(names, tuple(decay ** (len(names) - 1 - i) for i in range(len(names))), every)
    if not config.get("layer_lr"):
        return None
    if chosen is None or chosen.scores is None:
        raise TrainingError("layer_lr: by_score needs the scores of the layers, which this adapter does not hold")
    values = {i: chosen.scores.values[i] for i in chosen.layers}
    low = min(values, key=lambda i: values[i])
    if values[low] <= 0:
        raise TrainingError(
            f"layer_lr: by_score gives learning rates in proportion to scores, and that of layer {low} is {values[low]:.4g}, with "
            "which it would not train; choose fewer layers, or by another scorer"
        )
    return Shares(names, tuple(values.get(i, 0.0) / max(values.values()) for i in range(len(names))), every)


def divide(optimizer: Optimizer, tensors: Tensors, shares: Shares) -> None:
    """Gives the tensors of every layer a group of its own; what else a group holds stays, with the whole rate.

    Raises: TrainingError for an optimizer that sets its rate itself, or has a scheduler already.
    """
    place = place_among(shares.names)
    layers = {id(p): place(target) for target, group in tensors.items() for p in group.values()}
    added: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        held: dict[int | None, list[int]] = {}
        for position, parameter in enumerate(group["params"]):
            held.setdefault(layers.get(id(parameter)), []).append(position)
        mine = [i for i in held if i is not None]
        if not mine:
            continue
        if group.get("lr") is None or "initial_lr" in group:
            why = (
                "sets its rate itself" if group.get("lr") is None else "has a scheduler already, which would not follow"
            )
            raise TrainingError(f"the learning rate goes by layer, and {type(optimizer).__name__} {why}")
        numbers = range(len(shares.names)) if shares.every else mine
        added += [_part(group, held.get(i, []), i, shares.factors[i]) for i in sorted(numbers, reverse=True)]
        group.update(_part(group, held.get(None, []), None, 1.0))
    optimizer.param_groups.extend(added)
    used = [shares.factors[g[KEY]] for g in added if g["params"]]
    if used:
        note(f"learning rates by layer: {min(used):.3g} to {max(used):.3g} of the optimizer's own")


def _part(group: Mapping[str, Any], positions: list[int], layer: int | None, factor: float) -> dict[str, Any]:
    listed = {key: [group[key][i] for i in positions] for key in ("params", "param_names") if key in group}
    return {**group, **listed, "lr": group["lr"] * factor, KEY: layer}


class Rates:
    """What the layers of one adapter are trained with. State is real here: the optimizer that stepped last."""

    def __init__(self, schedule: Once, waiting: Waiting) -> None:
        self._schedule, self._waiting = schedule, waiting
        self._seen: weakref.ref[Optimizer] | None = None

    @property
    def asked(self) -> str:
        """What the config says, or nothing."""
        config = self._schedule.record.config
        return ", ".join(f"{key}: {config[key]}" for key in ASKS if config.get(key))

    def divide(self, optimizer: Optimizer) -> bool:
        """Divides an optimizer that has just been built; whether that is asked for. Raises: TrainingError."""
        if not self.asked:
            return False
        record, pending = self._schedule.record, self._waiting.pending
        names = (
            record.selection.layer_names if record.selection is not None else pending.layers.names if pending else ()
        )
        shares, tensors = shares_of(record, names), self._schedule.holdings.tensors()
        if shares is not None and not any(
            KEY in group for group in self._groups(optimizer, self._schedule.holdings.ids())
        ):
            divide(optimizer, tensors, shares)
        return True

    def step(self, optimizer: Optimizer, held: set[int]) -> None:
        """Raises: TrainingError where the optimizer that steps is not divided."""
        if not self.asked or self._seen is not None and self._seen() is optimizer:
            return
        if any(KEY not in group for group in self._groups(optimizer, held)):
            raise TrainingError(UNDIVIDED.format(asked=self.asked))
        self._seen = weakref.ref(optimizer)

    def news(self) -> dict[str, float]:
        """The rate of each layer, for trackers."""
        optimizer = self._seen() if self._seen is not None else None
        groups = self._groups(optimizer, self._schedule.holdings.ids()) if optimizer is not None else []
        return {f"layers/lr/{g[KEY]}": float(g["lr"]) for g in groups if g.get(KEY) is not None}

    @staticmethod
    def _groups(optimizer: Optimizer, held: set[int]) -> list[dict[str, Any]]:
        """Those that hold some of these tensors."""
        return [g for g in optimizer.param_groups if any(id(p) in held for p in g["params"])]

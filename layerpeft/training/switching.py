"""Layers that are switched on and off while training: the running state of one schedule, and what a switch does."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.errors import SelectionError
from layerpeft.integrations import distributed
from layerpeft.integrations.engines.known import is_cut
from layerpeft.saving.manifest import PICTURES
from layerpeft.selection import scoring
from layerpeft.selection.choose import lowest
from layerpeft.selection.examined import Examined
from layerpeft.selection.grammar import how_many
from layerpeft.selection.schedule import Schedule, remembered, schedule_of, scoreless, take, turn_of
from layerpeft.selection.scoring import Measured
from layerpeft.training import optimizer_states as states
from layerpeft.training import pictures
from layerpeft.training.method import Tensors
from layerpeft.training.report import LayerReport
from layerpeft.training.verify import ids_of


@dataclass
class Standing:
    """Where a schedule stands; plain data, and all that a resumed run needs besides offloaded states.

    `step`: updates made; `active`: layers that train now (None: the whole pool, before the first choice); `known`: what the
    scores remember, by layer; `chosen`, `counts`, `rule`: as `Turn` tells the rule; `measured`: how often scores were taken;
    `history`: (step, layers, scores, bytes of optimizer states of the window before) of every switch.
    """

    step: int = 0
    window: int = -1
    active: list[int] | None = None
    known: list[float | None] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    rule: dict[str, Any] = field(default_factory=dict)
    measured: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Switcher:
    """The schedule of one adapter. State is real here: what is on, what is known, and offloaded optimizer states."""

    def __init__(self, examined: Examined, known: Sequence[float] | None) -> None:
        self.examined, self.select, layers = examined, examined.select, examined.layers
        self.schedule: Schedule = schedule_of(self.select, layers, examined.targets)
        self.layer_of = {t.name: t.layer for t in examined.targets}
        self.standing = Standing(
            known=list(known) if known is not None else [None] * len(layers), counts=[0] * len(self.schedule.among)
        )
        self.store: states.Store = {}
        self.started = False  # the whole pool trains until an optimizer holds it
        self.divided = False  # among processes
        self.stated: set[str] = set()  # targets of which there are states, of an optimizer or away

    @property
    def waits(self) -> bool:
        """Whether the first choice needs the batches of training itself."""
        if not self.schedule.measured or self.schedule.warmup or self.standing.active is not None:
            return False
        return all(v is None for v in self.standing.known)

    def is_active(self, target: str) -> bool:
        """Whether a target trains now."""
        active = self.standing.active
        return active is None or self.layer_of[target] in active

    def measures(self) -> bool:
        """Whether the batches of the coming step are to be measured."""
        return self.schedule.measures(self.standing.step)

    def remember(self, measured: Measured) -> None:
        """Takes up what was measured."""
        how, decay = self.schedule.memory, self.schedule.decay
        self.standing.known = list(remembered(self.standing.known, measured.values, how, decay))
        self.standing.measured += 1

    def first(self, measured: Measured) -> list[int]:
        """The first choice, from what the first step has shown; the layers that train from now on.

        Made anew where a loss scaler skipped that step.
        """
        layers = len(self.standing.known)
        self.standing = Standing(known=[None] * layers, counts=[0] * len(self.schedule.among))
        self.remember(measured)
        self._choose(0)
        assert self.standing.active is not None
        return self.standing.active

    def start(self, model: nn.Module, tensors: Tensors) -> list[str]:
        """Freezes what does not train yet, once an optimizer holds the pool; the targets that train now."""
        self.started = True
        if self.standing.active is None and not self.waits and self.schedule.begins(self.standing.step):
            self._choose(0, model)
        return self.apply(tensors, states.holders(ids_of(tensors)))

    def after_step(self, model: nn.Module, tensors: Tensors, optimizers: Sequence[Optimizer]) -> list[str] | None:
        """Counts a step and switches where a window begins: the targets that train from now on; None where nothing changes."""
        standing = self.standing
        standing.step += 1
        self.stated.update(t for t in tensors if self.is_active(t))
        if not self.schedule.begins(standing.step):
            return None
        window = self.schedule.window(standing.step)
        assert window is not None
        used = states.optimizer_bytes(optimizers)
        if standing.history:
            standing.history[-1]["optimizer_bytes"] = used
        self._choose(window, model)
        return self.apply(tensors, optimizers)

    def apply(self, tensors: Tensors, optimizers: Sequence[Optimizer]) -> list[str]:
        """Switches tensors on and off. Returns the targets that train now."""
        self.divided = any(is_cut(p) for group in tensors.values() for p in group.values())
        for target, group in tensors.items():
            named = {f"{target}|{n}": p for n, p in group.items()}
            if self.is_active(target):
                for parameter in group.values():
                    parameter.requires_grad_(True)
                states.bring_back(optimizers, named, self.store)
                continue
            for parameter in group.values():
                parameter.requires_grad_(False).grad = None
            states.put_away(optimizers, named, self.schedule.state, self.store)
            if self.schedule.state == "clear":
                self.stated.discard(target)
        return [t for t in tensors if self.is_active(t)]

    def hold(self, tensors: Tensors) -> None:
        """Keeps resting layers frozen: PEFT lets gradients into all of an adapter that is switched on again (DPO's reference)."""
        for target, group in tensors.items():
            if not self.is_active(target):
                for parameter in group.values():
                    if parameter.requires_grad or parameter.grad is not None:
                        parameter.requires_grad_(False).grad = None

    def thaw(self, tensors: Tensors) -> None:
        """Lets the whole pool require gradients again, for the optimizer of another training."""
        self.started = False
        self.store.clear()
        for group in tensors.values():
            for parameter in group.values():
                parameter.requires_grad_(True)

    def restore(self, standing: Mapping[str, Any], store: states.Store) -> None:
        """Takes over where another run stood. Raises: SelectionError where its schedule was another one."""
        if len(standing["counts"]) != len(self.schedule.among) or len(standing["known"]) != len(self.standing.known):
            raise SelectionError("the run that is resumed chose among other layers")
        known = {f.name for f in fields(Standing)}
        self.standing, self.store = Standing(**{k: v for k, v in standing.items() if k in known}), store
        self.stated = set(standing.get("stated", ()))

    def save(self, folder: str, found: LayerReport) -> dict[str, Any]:
        """Its part in the record: optimizer states that are away, `layers.csv` and `layers.png`, and where it stands."""
        states.save_store(folder, self.store)
        table, picture = (os.path.join(folder, name) for name in PICTURES)
        standing = self.plain()
        pictures.write_switches(standing, found, table)
        pictures.write_heatmap(standing, found, picture)
        return {"schedule": standing}

    def ever(self) -> set[int]:
        """Layers that were on in some step."""
        began = [entry for entry in self.standing.history if entry["step"] < self.standing.step]
        return {layer for entry in began for layer in entry["layers"]}

    def scores(self) -> tuple[float, ...]:
        """What is known of the layers by now; empty where the rule looks at no scores, or none are known."""
        known = self.standing.known
        if scoreless(self.select) or self.select.by == "depth":
            return ()
        return tuple(v for v in known if v is not None) if None not in known else ()

    def news(self, since: int) -> dict[str, float]:
        """What trackers are told of the last switch, where there was one after the step `since`."""
        if not self.standing.history or self.standing.history[-1]["step"] <= since:
            return {}
        active, known = set(self.standing.active or ()), self.scores()
        found: dict[str, float] = {"layers/active": len(active), "layers/lowest": min(active)}
        found |= {f"layers/on/{i}": float(i in active) for i in self.schedule.pool}
        return found | {f"layers/score/{i}": known[i] for i in self.schedule.pool if known}

    def notes(self) -> list[str]:
        """What the report says of it, in words."""
        used = [h["optimizer_bytes"] for h in self.standing.history if h.get("optimizer_bytes")]
        if not used:
            return []
        return [
            f"optimizer states at the end of a window: at most {max(used):,} bytes ({self.schedule.state} on resting layers)"
        ]

    def plain(self) -> dict[str, Any]:
        """Where it stands, as plain data; `divided`: optimizer states that are away are parts, which no folder holds.

        `stated`, where weights are divided: the targets of which the optimizer's checkpoint holds states.
        """
        found = asdict(self.standing) | ({"stated": sorted(self.stated)} if self.divided else {})
        lost = states.divided(self.store) and not states.saved_elsewhere(self.store)
        return found | ({"divided": True} if lost else {})

    def _choose(self, window: int, model: nn.Module | None = None) -> None:
        standing, schedule = self.standing, self.schedule
        self._draw_scores(window, model)
        turn = turn_of(self.select, schedule, window, standing.known, standing.chosen, standing.counts, standing.rule)
        taken = distributed.from_first(take(self.select, schedule, turn))
        standing.window, standing.chosen, standing.rule = window, list(taken.positions), dict(taken.state)
        for position in taken.positions:
            standing.counts[position] += 1
        standing.active = sorted({*(schedule.among[i] for i in taken.positions), *schedule.always})
        known = not scoreless(self.select) and self.select.by != "depth"
        fresh = known and standing.measured != (standing.history[-1]["measured"] if standing.history else -1)
        scores = list(standing.known) if fresh else None  # where they are as they were, the picture goes on with those
        standing.history.append(
            {"step": standing.step, "layers": standing.active, "scores": scores, "measured": standing.measured}
        )

    def _draw_scores(self, window: int, model: nn.Module | None) -> None:
        """Scores that need no batches are made anew: random ones for every window, those of weights on their own clock."""
        made_here = not scoreless(self.select) and not self.schedule.measured and isinstance(self.select.by, str)
        if not made_here or model is None or not window:
            return
        kind = scoring.needs(self.select)
        clock = self.schedule.rescore
        due = clock is not None and (self.standing.step - self.schedule.warmup) % clock == 0
        if kind == "nothing" and self.select.rescore_steps != "never" or kind == "weights" and due:
            self.remember(scoring.measure(model, self.examined, window))


def sizes(switcher: Switcher, tensors: Tensors) -> str:
    """The pool and what trains of it at a time, in numbers of weights."""
    schedule = switcher.schedule
    by_layer = dict.fromkeys(schedule.pool, 0)
    for target, group in tensors.items():
        by_layer[switcher.layer_of[target]] += sum(p.numel() for p in group.values())
    layers = switcher.examined.layers
    text = f"{sum(by_layer.values()):,} weights in a pool of {len(by_layer)} {layers.unit}s"
    keep = len(lowest(switcher.select, layers, schedule.among))
    if how_many(switcher.select.keep, keep) is None:
        return f"{text}, of which train as many at a time as the scores say"
    largest = sorted((by_layer[i] for i in schedule.among), reverse=True)[:keep]
    return f"{text}, at most {sum(largest) + sum(by_layer[i] for i in schedule.always):,} of them train at a time"

"""When layers are chosen again, and which: pure functions of the optimizer step, the seed and what the scores remember.

Steps are counted from 0; "at step 20" means before the twenty-first update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from layerpeft.errors import SelectionError
from layerpeft.model.layers import LayerMap, Target
from layerpeft.selection import plugins
from layerpeft.selection.choose import candidates, groups, lowest
from layerpeft.selection.draws import seed_within, window_seed
from layerpeft.selection.grammar import how_many, layer_numbers
from layerpeft.selection.scoring import needs
from layerpeft.selection.select import PICKS, SCORERS, Select, options_of

DECAY = 0.9


@dataclass(frozen=True)
class Schedule:
    """The clocks of a choice that is made again. `among`: the layers a rule chooses from; `always`: those that are on besides."""

    every: int
    rescore: int | None
    warmup: int
    among: tuple[int, ...]
    always: tuple[int, ...]
    memory: str
    decay: float
    state: str
    measured: bool  # on batches
    groups: Mapping[str, Sequence[int]] = field(
        default_factory=dict
    )  # places in `among`, of what is chosen from at a time

    def window(self, step: int) -> int | None:
        """The window that a step lies in; None during the warm-up, in which the whole pool trains."""
        return None if step < self.warmup else (step - self.warmup) // self.every

    def begins(self, step: int) -> bool:
        """Whether a window begins at this step."""
        return step >= self.warmup and (step - self.warmup) % self.every == 0

    def measures(self, step: int) -> bool:
        """Whether the batches of this step are measured: the last one before the scores' own clock strikes."""
        after = step + 1 - self.warmup
        if not self.measured or after < 0:
            return False
        if after == 0:
            return True  # the last step of the warm-up, whose scores make the first choice
        return self.rescore is not None and after % self.rescore == 0

    @property
    def pool(self) -> tuple[int, ...]:
        """Every layer that may ever train."""
        return tuple(sorted({*self.among, *self.always}))


def schedule_of(select: Select, layers: LayerMap, targets: Sequence[Target]) -> Schedule:
    """The clocks that `select` means in this model.

    Raises: SelectionError for layers out of range, or more of them than there are.
    """
    always = layer_numbers(select.always, len(layers), unit=layers.unit) if select.always is not None else ()
    holding = {t.layer for t in targets}
    bare = sorted(set(always) - holding)
    if bare:
        raise SelectionError(f"always: {layers.unit}(s) {', '.join(map(str, bare))} hold no target")
    among = tuple(i for i in candidates(select, layers, tuple(targets)) if i not in always)
    if not among:
        raise SelectionError(f"always: {select.always!r} leaves no {layers.unit} to choose from")
    lowest(select, layers, among)
    assert select.reselect_steps is not None
    data = needs(select) in ("forward", "backward") and not scoreless(select)
    rescore = select.rescore_steps
    if rescore is None and data:
        rescore = select.reselect_steps
    return Schedule(
        every=select.reselect_steps,
        rescore=rescore if isinstance(rescore, int) else None,
        warmup=select.warmup_steps or 0,
        among=among,
        always=always,
        memory=select.memory or "last",
        decay=DECAY if select.decay is None else float(select.decay),
        state=select.state or "offload",
        measured=data,
        groups={n: [among.index(i) for i in g] for n, g in groups(select, layers, among).items()},
    )


def scoreless(select: Select) -> bool:
    """Whether the rule looks at no scores."""
    return plugins.traits(PICKS, select.rule).scoreless


def unseen(select: Select) -> float:
    """What a layer without a score counts as."""
    return float(plugins.traits(SCORERS, select.by).unseen) if isinstance(select.by, str) else 0.0


def take(select: Select, schedule: Schedule, turn: Turn) -> Taken:
    """The layers of one window, as positions among the candidates, ascending.

    Raises: SelectionError for a rule that cannot be met, or that answers with what was not asked.
    """
    if select.within is None:
        return _take(select, turn)
    positions, state = [], {}
    for name, group in schedule.groups.items():
        taken = _take(select, _part(select, turn, name, group))
        positions += [group[i] for i in taken.positions]
        state |= {name: dict(taken.state)} if taken.state else {}
    return Taken(tuple(sorted(positions)), state)


def _take(select: Select, turn: Turn) -> Taken:
    rule: Any = plugins.get(PICKS, select.rule)
    options = options_of(select, PICKS)
    if hasattr(rule, "again"):
        taken = rule.again(turn, options)
    else:
        taken = Taken(tuple(rule.pick(turn.scores, turn.keep, turn.seed, options)), turn.state)
    positions = tuple(sorted(set(taken.positions)))
    if not positions or positions[-1] >= len(turn.scores):
        raise SelectionError(f"pick: {select.rule} has chosen {taken.positions} of {len(turn.scores)} {select.unit}s")
    return replace(taken, positions=positions)


def _part(select: Select, turn: Turn, name: str, group: Sequence[int]) -> Turn:
    """What a rule is told of one of the groups that it chooses from (`within`)."""
    return replace(
        turn,
        seed=seed_within(turn.seed, name),
        base_seed=seed_within(turn.base_seed, name),
        keep=how_many(select.keep, len(group), select.unit),
        scores=tuple(turn.scores[i] for i in group),
        chosen=tuple(n for n, i in enumerate(group) if i in turn.chosen),
        counts=tuple(turn.counts[i] for i in group),
        state=turn.state.get(name, {}),
    )


def turn_of(
    select: Select,
    schedule: Schedule,
    window: int,
    known: Sequence[float | None],
    chosen: Sequence[int],
    counts: Sequence[int],
    state: Any,
) -> Turn:
    """What the rule is told of a window; `known`: the scores of all layers, `chosen` and `counts` as positions."""
    blank = unseen(select)
    scores = [known[i] if known else None for i in schedule.among]
    if schedule.memory == "counts" and any(counts):
        scores = [1.0 + n for n in counts]  # one more, so that nothing is out for good
    return Turn(
        window=window,
        seed=window_seed(select.seed, window),
        keep=how_many(select.keep, len(schedule.among)),
        scores=tuple(blank if s is None else s for s in scores),
        chosen=tuple(chosen),
        counts=tuple(counts),
        state=dict(state),
        base_seed=select.seed,
    )


# ---- what a rule is told when it chooses again during training, and what scores remember from one measurement to the next


@dataclass(frozen=True)
class Turn:
    """One choice of a schedule. All sequences run over the candidates, in the order of the layers.

    `window`: how many choices came before; `seed`: of this window alone; `keep`: how many to choose (None: the rule decides);
    `scores`: what is known of them by now (zeros for a rule that needs none); `chosen`: positions of the window before;
    `counts`: in how many windows each was chosen; `state`: what the rule gave back last time (plain data, which is saved with
    checkpoints); `base_seed`: of the whole schedule, for what lasts longer than one window.
    """

    window: int
    seed: int
    keep: int | None
    scores: tuple[float, ...]
    chosen: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)
    base_seed: int = 0


@dataclass(frozen=True)
class Taken:
    """What a rule answers: positions among the candidates, and what it wants to be told next time."""

    positions: tuple[int, ...]
    state: Mapping[str, Any] = field(default_factory=dict)


def remembered(
    before: Sequence[float | None], seen: Sequence[float | None], how: str, decay: float
) -> tuple[float | None, ...]:
    """Scores after another measurement: `ema` keeps `decay` of what was, others replace it; None where nothing is known."""
    return tuple(
        old if new is None else new if old is None or how != "ema" else decay * old + (1 - decay) * new
        for old, new in zip(before, seen, strict=True)
    )

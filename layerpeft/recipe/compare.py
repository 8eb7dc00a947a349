"""`layerpeft compare`: is the choice of layers worth anything? The same recipe on as many other layers, rows in the same order."""

from __future__ import annotations

import contextlib
import gc
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from layerpeft.errors import ElsewhereError, Problems, RecipeError, unknown
from layerpeft.integrations.distributed import rank, world_size
from layerpeft.integrations.drawing import new_figure, write_figure
from layerpeft.recipe.page.page import PAGE, write_page
from layerpeft.recipe.recipe import Recipe, layer_config, to_yaml
from layerpeft.recipe.shorter import shortened_apart
from layerpeft.recipe.surroundings import COMPARED, refuse_strangers
from layerpeft.recipe.tasks.metrics import NAMES
from layerpeft.recipe.trainer import (
    Setup,
    batches_for,
    held_out_numbers,
    load_model,
    make_trainer,
    prepare,
    tokenized,
    train,
    wrap,
)
from layerpeft.saving.owned import room, vouch
from layerpeft.selection.choose import choose_among, lowest
from layerpeft.selection.examined import Examined
from layerpeft.selection.schedule import schedule_of
from layerpeft.selection.select import Select, Selection
from layerpeft.text import grid, note
from layerpeft.tuners.precision import batches_wanted

Say = Callable[[str], None]
ARMS = ("random", "last", "first", "all")
AMONG = ("layers", "exclude", "stack", "unit")  # what `select` says of the candidates
# two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom; the last one serves beyond (a little too careful)
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Choose = Callable[..., Selection]  # of a way to choose, and batches
Plan = tuple[str, tuple[int, ...], Mapping[str, Any]]  # name of a run, its layers, and what its `select` says


@dataclass(frozen=True)
class Arm:
    """A choice to compare with: its kind, and for `random` the number of draws."""

    kind: str
    draws: int = 1


@dataclass(frozen=True)
class Run:
    """One trained model: its arm and layers, trainable parameters, numbers on held-out rows, seconds of training."""

    arm: str
    layers: tuple[int, ...]
    trainable: int
    value: float
    seconds: float
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """`kind`: better, no difference, worse, or unknown; and the sentence that says it."""

    kind: str
    sentence: str


HEADS = {
    "better": "Better than random here",
    "no difference": "No difference shown",
    "worse": "Random was better",
    "unknown": "Nothing can be said about the choice",
}


@dataclass(frozen=True)
class Comparison:
    """All runs (the recipe's first), the number they are compared by, its value before training, and the verdict."""

    measure: str
    before: float
    runs: tuple[Run, ...]
    verdict: Verdict
    num_layers: int
    unit: str = "layer"

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "unit" or v != "layer"}


def parse_arms(text: str, seeds: int = 3) -> tuple[Arm, ...]:
    """The arms in "random:3,last,all"; `random` alone draws `seeds` times. Raises: RecipeError naming every problem."""
    problems = Problems("--arms")
    found: list[Arm] = []
    if seeds < 1:
        problems.add(f"--seeds: expected a whole number from 1, got {seeds}")
    for part in filter(None, (p.strip() for p in text.split(","))):
        kind, _, number = part.partition(":")
        if kind not in ARMS:
            problems.add(unknown("arm", kind, ARMS))
        elif number and (kind != "random" or not re.fullmatch(r"[1-9]\d*", number)):
            problems.add(f"{part!r}: only `random` takes a number, that of its draws (random:3)")
        elif kind in [arm.kind for arm in found]:
            problems.add(f"{kind!r} is named twice")
        else:
            found.append(Arm(kind, int(number or seeds) if kind == "random" else 1))
    if not found and not problems.items:
        problems.add(f"no arm is named; there are {', '.join(ARMS)}")
    problems.raise_if_any(RecipeError)
    return tuple(found)


def compare(recipe: Recipe, arms: Sequence[Arm], say: Say = print) -> Comparison:
    """Trains the recipe and every arm from the same weights, rows and order; writes compare.json and compare.png.
    Raises: RecipeError when nothing is held out, or the recipe leaves nothing to choose, and in several processes (ElsewhereError
    in all but the first)."""
    if rank() > 0:
        raise ElsewhereError()
    if world_size() > 1:
        raise RecipeError(
            f"compare runs in one process, and there are {world_size()}: start it without accelerate launch or torchrun; arms that "
            "no one card takes are recipes of their own to train (layerpeft.select=…, one output_dir each)"
        )
    refuse_strangers(recipe.output_dir, COMPARED)
    with contextlib.redirect_stdout(sys.stderr):
        setup = prepare(recipe)
        if setup.held_out is None:
            raise RecipeError("eval_dataset: missing; arms are compared on held-out rows")
        setup = tokenized(setup)
    with shortened_apart(setup) as setup:
        return _compared(recipe, setup, arms, say)


def _compared(asked: Recipe, setup: Setup, arms: Sequence[Arm], say: Say) -> Comparison:
    """Trains every arm of `asked` on the model of the setup."""
    recipe, select = setup.recipe, setup.recipe.config.choosing
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(setup)
        batches, setup = batches_for(setup, model, recipe.select)
        examined = recipe.config.examine(model)
        choose = partial(_choice, model, examined)
        plans = (_scheduled if select.is_scheduled else _plan)(recipe, choose, examined, batches, arms)
        num_layers = len(examined.layers)
        del model
    name = NAMES[setup.measure]
    say(f"{len(plans)} runs, each from the same weights over the same rows in the same order")
    runs: list[Run] = []
    before = math.nan
    for index, (arm, layers, how) in enumerate(plans):
        with contextlib.redirect_stdout(sys.stderr):
            first = select.is_scheduled and not runs
            given = batches if first or batches_wanted(layer_config(recipe)) else None
            trainer, model = _trainer(_unpacked(setup, layers, num_layers), how, given)
            if not runs:  # an untrained adapter changes nothing, so this is the same for every arm
                before = held_out_numbers(trainer)[setup.measure]
            runs.append(run := _train(setup, arm, layers, trainer, model))
            del trainer, model
            gc.collect()
        shown = f"{select.unit}s {_numbers(layers, num_layers)}"
        say(f"[{index + 1}/{len(plans)}] {arm}: {shown}: {name} {run.value:.4f} ({run.seconds:.0f} s)")
    verdict = judge(runs, lower=setup.measure == "eval_loss", what=name)
    found = Comparison(setup.measure, before, tuple(runs), verdict, num_layers, select.unit)
    folder = _write(asked, found)
    say("\n" + table(found) + "\n\n" + verdict.sentence)
    say(f"\nwritten: {folder / 'compare.png'}, compare.json, {PAGE}")
    return found


def judge(runs: Sequence[Run], lower: bool, what: str) -> Verdict:
    """What the runs show, the first being the recipe's.

    It differs from random choice only where it lies outside the 95 % prediction interval of one more random draw,
    mean ± t(n-1) · sd · sqrt(1 + 1/n): the spread between draws is all that is known about chance here.
    """
    ours = runs[0]
    draws = [run.value for run in runs if run.arm.startswith("random:")]
    if len(draws) < 2 or statistics.stdev(draws) == 0:
        few = f"all {len(draws)} random draws gave {draws[0]:.4f}, so there is" if len(draws) > 1 else "there is"
        text = f"{HEADS['unknown']}: {few} no spread between draws to measure by (--arms random:3)."
        return Verdict("unknown", text)
    mean, spread = statistics.fmean(draws), statistics.stdev(draws)
    gain = mean - ours.value if lower else ours.value - mean
    margin = _T[min(len(draws) - 1, len(_T)) - 1] * spread * math.sqrt(1 + 1 / len(draws))
    facts = f"{ours.arm} reached a {what} of {ours.value:.4f} and {len(draws)} random draws {mean:.4f} on average"
    facts += f" ({min(draws):.4f} to {max(draws):.4f}); chance alone explains a gap of up to {margin:.4f}"
    kind = "better" if gain > margin else "worse" if gain < -margin else "no difference"
    alone = ", and all this rests on one run over one set of rows" if kind == "better" else ""
    return Verdict(kind, f"{HEADS[kind]}: {facts}{alone}{_beside(runs, ours, margin, lower)}.")


def _beside(runs: Sequence[Run], ours: Run, margin: float, lower: bool) -> str:
    """How the choice by place did, as a clause: it costs nothing to make."""
    parts = []
    for run in runs[1:]:
        if run.arm in ("last", "first"):
            gain = (run.value - ours.value) if lower else (ours.value - run.value)
            how = "no clear difference" if abs(gain) <= margin else "clearly worse" if gain > 0 else "clearly better"
            parts.append(f"; as many layers from the {'end' if run.arm == 'last' else 'start'}: {run.value:.4f}, {how}")
    return "".join(parts)


def table(found: Comparison) -> str:
    """One line per run, and one for the random draws together."""
    name = NAMES[found.measure]
    rows = [
        ("arm", f"{found.unit}s", "trainable", name, "seconds"),
        ("before training", "", "", f"{found.before:.4f}", ""),
    ]
    for run in found.runs:
        layers = _numbers(run.layers, found.num_layers)
        rows.append((run.arm, layers, f"{run.trainable:,}", f"{run.value:.4f}", f"{run.seconds:.0f}"))
    draws = [run.value for run in found.runs if run.arm.startswith("random:")]
    if len(draws) > 1:
        spread = f"  {min(draws):.4f} to {max(draws):.4f}, sd {statistics.stdev(draws):.4f}"
        rows.append(("random, mean", "", "", f"{statistics.fmean(draws):.4f}", spread))
    return "\n".join(grid(rows, "<<>", (16, 22, 11, 14, 8), " "))


def _plan(recipe: Recipe, choose: Choose, examined: Examined, batches: Any, arms: Sequence[Arm]) -> list[Plan]:
    """Every run, the recipe's first. Raises: RecipeError when there is nothing to choose."""
    select = examined.select
    among = {k: getattr(select, k) for k in AMONG if getattr(select, k) is not None}
    ours = choose(select, batches)
    by_place = select.by == "depth" and select.keep is None
    if by_place:  # the grammar is the choice itself: other arms draw from the whole stack
        among.pop("layers", None)
    keep = len(ours.layers)
    everything = choose({**among, "layers": among.get("layers", f"0-{ours.num_layers - 1}")}).layers
    if keep == len(everything):
        raise RecipeError(
            f"select: the recipe trains all {keep} {select.unit}s that it may choose from, so there is no choice to compare"
        )
    own = str(ours.scores.by if ours.scores else recipe.select if isinstance(recipe.select, str) else "by place")
    plans = [(own, ours.layers)]
    if select.within is not None and select.keep != "auto":  # as many of each kind, or of each layer
        keep, among = select.keep, among | {"within": select.within}
    for arm in arms:
        if arm.kind == "random":
            plans += _draws(choose, {**among, "by": "random", "keep": keep}, arm.draws)
        elif arm.kind == "all":
            plans.append(("all", everything))
        else:
            pick = "top" if arm.kind == "last" else "bottom"
            plans.append((arm.kind, choose({**among, "by": "depth", "keep": keep, "pick": pick}).layers))
    return [(arm, layers, _placed(select, layers)) for arm, layers in plans]


def _placed(select: Select, layers: Sequence[int]) -> dict[str, Any]:
    """What `select` says of a choice by place."""
    return {"layers": list(layers), "stack": select.stack, "unit": select.unit}


def _scheduled(_: Recipe, choose: Choose, examined: Examined, batches: Any, arms: Sequence[Arm]) -> list[Plan]:
    """As `_plan`, of layers that change while training: random arms draw as many of them, as often; others stay as they are.
    Raises: RecipeError where the number of layers at a time is left to the scores."""
    select = examined.select
    if select.keep in (None, "auto"):
        raise RecipeError(
            f"select: with keep: {select.keep or 'none'} the number of layers changes between windows, and the arms need one; "
            "compare with keep: N"
        )
    schedule = schedule_of(select, examined.layers, examined.targets)
    keep: Any = select.keep if select.within else len(lowest(select, examined.layers, schedule.among))
    own = ("by", "pick", "rescore_steps", "memory", "decay", *select.options)
    clock = {k: v for k, v in select.to_dict().items() if k not in own}
    among = {k: clock[k] for k in (*AMONG, "within") if k in clock}
    plans: list[Plan] = [(f"{select.rule} every {select.reselect_steps}", schedule.pool, select.to_dict())]
    for arm in arms:
        if arm.kind == "random":
            uniform = {**clock, "pick": "uniform"}
            for s in range(1, arm.draws + 1):
                plans.append((f"random:{s}", schedule.pool, uniform | {"seed": select.seed + s}))
        elif arm.kind == "all":
            plans.append(("all", schedule.pool, _placed(select, schedule.pool)))
        else:
            pick = "top" if arm.kind == "last" else "bottom"
            layers = choose({**among, "by": "depth", "keep": keep, "pick": pick}).layers
            plans.append((arm.kind, layers, _placed(select, layers)))
    return plans


def _choice(model: Any, examined: Examined, select: Select | Mapping[str, Any], batches: Any = None) -> Selection:
    """What a way to choose means among the recipe's targets."""
    parsed = select if isinstance(select, Select) else Select.parse(select)
    return choose_among(model, parsed, examined.layers, examined.targets, batches, costs=examined.costs)


def _draws(choose: Choose, select: Mapping[str, Any], number: int) -> list[tuple[str, tuple[int, ...]]]:
    """`number` random choices, no two alike. Raises: RecipeError when there are not that many."""
    found: dict[tuple[int, ...], str] = {}
    for seed in range(100 * number):
        found.setdefault(choose({**select, "seed": seed}).layers, f"random:{seed}")
        if len(found) == number:
            return [(name, layers) for layers, name in found.items()]
    raise RecipeError(
        f"--arms: there are only {len(found)} different choices of {select['keep']} {select['unit']}s, not {number}"
    )


def _unpacked(setup: Setup, layers: Sequence[int], num_layers: int) -> Setup:
    """The setup of an arm in which every layer trains: with nothing frozen there is nothing to pack."""
    block = setup.recipe.block
    if len(layers) < num_layers or block.get("quantize_frozen") is None or block.get("quantize_trained") is not None:
        return setup
    note("quantize_frozen: with all layers trained none is left to pack; that arm stays in 16 bit")
    kept = {k: v for k, v in block.items() if k != "quantize_frozen"}
    config = setup.recipe.config.changed(quantize_frozen=None)
    return replace(setup, recipe=replace(setup.recipe, block=kept, config=config))


def _trainer(setup: Setup, select: Mapping[str, Any], batches: Any) -> tuple[Any, Any]:
    """A trainer that saves nothing, and the model it trains, with the adapter on the layers that this means."""
    model = wrap(setup, load_model(setup), dict(select), batches)
    changes: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
    return make_trainer(setup, model, load_best_model_at_end=False, push_to_hub=False, **changes), model


def _train(setup: Setup, arm: str, layers: tuple[int, ...], trainer: Any, model: Any) -> Run:
    seconds = train(trainer)
    numbers = held_out_numbers(trainer)
    trainable, _ = model.get_nb_trainable_parameters()
    return Run(arm, layers, trainable, numbers[setup.measure], round(seconds, 1), numbers)


def _numbers(layers: Sequence[int], count: int) -> str:
    """Layer numbers as a reader wants them: "0, 10, 11", "0-11", shortened where there are many."""
    if list(layers) == list(range(count)):
        return f"0-{count - 1}"
    text = ", ".join(map(str, layers))
    return text if len(text) <= 22 else f"{text[:12]}... ({len(layers)})"


def _write(recipe: Recipe, found: Comparison) -> Path:
    folder = room(recipe.output_dir, COMPARED)
    folder.mkdir(parents=True, exist_ok=True)
    content = {**found.to_dict(), "recipe": to_yaml(recipe)}
    draw(found, folder / "compare.png")
    vouch(folder / "compare.json", content, COMPARED[1:])
    write_page(folder)  # of what stands there by now
    vouch(folder / "compare.json", content, COMPARED[1:])
    return folder


def draw(found: Comparison, path: Path) -> None:
    """One row per arm, one dot per run, the random draws with their mean."""
    groups: dict[str, list[Run]] = {}
    for run in found.runs:
        groups.setdefault(run.arm.partition(":")[0] if run.arm.startswith("random:") else run.arm, []).append(run)
    figure = new_figure(8, 1.6 + 0.5 * len(groups))
    if figure is None:
        return
    axes = figure.subplots()
    labels = []
    for place, (arm, runs) in enumerate(groups.items()):
        values = [run.value for run in runs]
        axes.plot(values, [place] * len(values), "o", color="C1" if place == 0 else "C0", markersize=8, alpha=0.85)
        if len(values) > 1:
            axes.plot([statistics.fmean(values)] * 2, [place - 0.28, place + 0.28], color="C0", linewidth=2)
        layers = runs[0].layers
        drawn = len(runs) > 1
        shown = f"{len(runs)} draws of {len(layers)} {found.unit}s" if drawn else _numbers(layers, found.num_layers)
        labels.append(f"{arm}\n{shown}")
    axes.axvline(found.runs[0].value, color="C1", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    better = "lower" if found.measure == "eval_loss" else "higher"
    axes.set_xlabel(f"{NAMES[found.measure]} after training ({better} is better; {found.before:.3f} before)")
    axes.set_title(f"{HEADS[found.verdict.kind]} ({found.runs[0].arm} against other choices)")
    axes.grid(axis="x", alpha=0.3)
    write_figure(figure, path, dpi=120)

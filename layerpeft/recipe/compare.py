"""`layerpeft compare`: is it worth anything? The same recipe on other layers and by other methods, rows in the same order."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerpeft.errors import RecipeError
from layerpeft.recipe.comparing.apart import trained_on
from layerpeft.recipe.comparing.arms import Arm, arm_recipes
from layerpeft.recipe.comparing.budgets import Budget, Counter, Given, Left, fitted, given, room_of
from layerpeft.recipe.comparing.entries import Entry, entries_of
from layerpeft.recipe.comparing.names import OURS, group_of, is_draw, label_of
from layerpeft.recipe.comparing.rates import SEED, Rates
from layerpeft.recipe.comparing.runs import Kept, Run, key_of
from layerpeft.recipe.comparing.shown import Comparison, arms_table, draw, numbers, table
from layerpeft.recipe.comparing.verdict import Basis, judge, judge_arms, standings
from layerpeft.recipe.launching import refuse_several
from layerpeft.recipe.page.page import PAGE, write_page
from layerpeft.recipe.recipe import Recipe, to_yaml
from layerpeft.recipe.shorter import shortened_apart
from layerpeft.recipe.surroundings import COMPARED, RUNS, refuse_strangers
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
from layerpeft.text import measured

Say = Callable[[str], None]
APART = 1000  # between the seeds of draws that a schedule makes under one training seed and the next


@dataclass(frozen=True)
class Fairly:
    """How arms are compared: training seeds, an equal budget, learning rates that are tried for each."""

    seeds: int = 1
    budget: Budget | None = None
    rates: Rates = Rates()


def compare(recipe: Recipe, arms: Sequence[Arm], say: Say = print, fairly: Fairly = Fairly()) -> Comparison:
    """Trains the recipe and every arm from the same weights, rows and order; writes compare.json, compare.png, and a line of
    compare.jsonl for every run as it ends, by which a comparison that was interrupted goes on (KeyboardInterrupt says so).

    Raises: RecipeError when nothing is held out, an arm cannot be read, or the recipe leaves nothing to choose, and in several
    processes (ElsewhereError in all but the first)."""
    refuse_several(
        "compare",
        "arms that no one card takes are recipes of their own to train (layerpeft.select=…, one output_dir each)",
    )
    refuse_strangers(recipe.output_dir, COMPARED)
    kept = Kept(recipe.output_dir / RUNS)
    with contextlib.redirect_stdout(sys.stderr):
        others = arm_recipes(recipe, arms)
        setup = prepare(recipe)
        if setup.held_out is None:
            raise RecipeError("eval_dataset: missing; arms are compared on held-out rows")
        setup = tokenized(setup)
    try:
        with shortened_apart(setup) as setup:
            return _compared(recipe, setup, arms, others, _Course(kept, say, fairly))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept.told()) from None


@dataclass(frozen=True)
class _Course:
    """What a comparison keeps, says, and goes by."""

    kept: Kept
    say: Say
    fairly: Fairly


def _compared(
    asked: Recipe, setup: Setup, arms: Sequence[Arm], others: Mapping[str, Recipe], course: _Course
) -> Comparison:
    """Trains every arm of `asked` on the model of the setup."""
    fairly, say = course.fairly, course.say
    with contextlib.redirect_stdout(sys.stderr):
        model = load_model(setup)
        entries = entries_of(setup, model, arms, others)
        del model
        several = fairly.seeds > 1 or any(arm.source is not None for arm in arms) or fairly.rates.tried
        amount, left, counted = None, [], {}
        if several or fairly.budget is not None:
            entries, left, counted, amount = _equal(setup, entries, fairly.budget)
    for one in left:
        say(f"left out: {one.arm}: {one.why}")
    entries = _rated(setup, entries, course)
    counted = {
        e.arm: replace(counted[e.arm], rate=float(e.recipe["learning_rate"])) for e in entries if e.arm in counted
    }
    runs, before = _runs(setup, entries, course)
    lower, name = setup.measure == "eval_loss", NAMES[setup.measure]
    assert setup.held_out is not None
    basis = Basis(fairly.seeds, len(setup.held_out), fairly.rates.tried, trained_on(setup))
    verdict = judge(runs, lower, name, basis, alone=not counted)
    found = Comparison(setup.measure, before, tuple(runs), verdict, entries[0].num_layers, entries[0].unit, basis)
    if counted:
        stand = tuple(standings(runs, lower, basis.scant))
        found = replace(found, budget=fairly.budget, room=amount, given=counted, standings=stand, left_out=tuple(left))
        found = replace(found, arms=judge_arms(stand, basis, lower))
    folder = _write(asked, found)
    say("\n" + _told(found))
    say(f"\nwritten: {folder / 'compare.png'}, compare.json, {RUNS}, {PAGE}")
    return found


def _told(found: Comparison) -> str:
    """The table, and what it shows."""
    if found.arms is None:
        return f"{table(found)}\n\n{found.verdict.sentence}"
    text = arms_table(found) + f"\n\n{found.arms.sentence}"
    drawn = any(is_draw(run.arm) for run in found.runs)
    return f"{text}\n\n{found.verdict.sentence}" if drawn else text


def _equal(
    setup: Setup, entries: Sequence[Entry], budget: Budget | None
) -> tuple[list[Entry], list[Left], dict[str, Given], float | None]:
    """The arms at an equal budget, where there is one, what each was given, and those that it does not hold.
    Raises: RecipeError where it does not hold the recipe's own."""
    counter = Counter(setup)
    room = room_of(entries[0], counter, budget) if budget is not None else None
    found: list[Entry] = []
    left: list[Left] = []
    for entry in entries:
        ours = entry is entries[0]
        if budget is None or room is None or ours and budget.amount is None:
            one: Entry | Left = entry
        else:
            one = fitted(entry, counter, budget, room)
        if isinstance(one, Entry):
            found.append(one)
        elif ours:
            raise RecipeError(f"--budget: the recipe's own arm does not fit: {one.why}")
        else:
            left.append(one)
    return found, left, {entry.arm: given(entry, counter, budget, room) for entry in found}, room


def _rated(setup: Setup, entries: Sequence[Entry], course: _Course) -> list[Entry]:
    """The arms, each at the best of the learning rates that are tried for it, on a seed that does not count; draws of one arm share
    what the first of them found."""
    best: dict[str, float] = {}
    found = []
    for entry in entries:
        arm = OURS if entry is entries[0] else group_of(entry.arm)
        tried = course.fairly.rates.of(arm, float(entry.recipe["learning_rate"]))
        if tried and arm not in best:
            values = {}
            for rate in tried:
                run, _ = _run(setup, _seeded(_at_rate(entry, rate), _seed(setup) + SEED, 0), course)
                values[rate] = run.value
                course.say(f"{arm}: rate {rate:g}, on a seed that does not count: {measured(run.value)}")
            lower = setup.measure == "eval_loss"
            best[arm] = min(values, key=lambda r: _worst_last(values[r], lower))
        found.append(_at_rate(entry, best[arm]) if arm in best else entry)
    return found


def _worst_last(value: float, lower: bool) -> float:
    return math.inf if not math.isfinite(value) else value if lower else -value


def _at_rate(entry: Entry, rate: float) -> Entry:
    return replace(entry, recipe=replace(entry.recipe, values={**entry.recipe.values, "learning_rate": rate}))


def _seed(setup: Setup) -> int:
    return int(setup.recipe["seed"])


def _runs(setup: Setup, entries: Sequence[Entry], course: _Course) -> tuple[list[Run], float]:
    """Every arm under every seed, seed by seed; and the number before training."""
    seeds, name = course.fairly.seeds, NAMES[setup.measure]
    asked = [(_seeded(entry, _seed(setup) + index, index), entry.arm) for index in range(seeds) for entry in entries]
    course.say(f"{len(asked)} runs, each from the same weights over the same rows in the same order")
    if there := sum(course.kept.has(key_of(entry, setup)) for entry, _ in asked):
        course.say(f"{there} of them are in {course.kept.path} already")
    runs: list[Run] = []
    first = math.nan
    for entry, arm in asked:
        run, before = _run(setup, entry, course, ask=not runs)
        first = first if runs or before is None else before
        runs.append(run)
        seed = f", seed {run.seed}" if seeds > 1 else ""
        shown = f"{entry.unit}s {numbers(run.layers, entry.num_layers)}"
        done = f"[{len(runs)}/{len(asked)}] {label_of(arm)}{seed}: {shown}: {name} {measured(run.value)}"
        course.say(f"{done} ({run.seconds:.0f} s)")
    return runs, first


def _run(setup: Setup, entry: Entry, course: _Course, ask: bool = False) -> tuple[Run, float | None]:
    """One training, or the same one from before. `ask`: the number before training is wanted."""
    key = key_of(entry, setup)
    if (there := course.kept.get(key)) is not None and not (ask and there[1] is None):
        return replace(there[0], arm=entry.arm), there[1]
    with contextlib.redirect_stdout(sys.stderr):
        trainer, model = _trainer(replace(setup, recipe=entry.recipe), entry.select)
        # an untrained adapter changes nothing, so this is the same for every arm
        before = held_out_numbers(trainer)[setup.measure] if ask else None
        run = _train(setup, entry, trainer, model)
        del trainer, model
        gc.collect()
    course.kept.add(key, run, before)
    return run, before


def _seeded(entry: Entry, seed: int, index: int) -> Entry:
    """The arm under a training seed: rows' order, adapters and dropout are drawn from that, and what a schedule draws with it."""
    recipe = replace(entry.recipe, values={**entry.recipe.values, "seed": seed})
    select = entry.select
    if index and select.get("reselect_steps") is not None:
        select = {**select, "seed": select.get("seed", 0) + APART * index}
    return replace(entry, recipe=recipe, select=select)


def _trainer(setup: Setup, select: Mapping[str, Any]) -> tuple[Any, Any]:
    """A trainer that saves nothing, and the model it trains, with the adapter on the layers that this means."""
    model = load_model(setup)
    batches, setup = batches_for(setup, model, select)
    wrapped = wrap(setup, model, dict(select), batches)
    changes: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
    return make_trainer(setup, wrapped, load_best_model_at_end=False, push_to_hub=False, **changes), wrapped


def _train(setup: Setup, entry: Entry, trainer: Any, model: Any) -> Run:
    began = time.process_time()
    seconds = train(trainer)
    alone = torch.get_num_threads() == 1 and not torch.accelerator.is_available()
    if alone:
        seconds = time.process_time() - began  # which does not grow when others use the machine
    found = held_out_numbers(trainer)
    trainable, _ = model.get_nb_trainable_parameters()
    seed, rate, steps = int(entry.recipe["seed"]), float(trainer.args.learning_rate), int(trainer.state.global_step)
    return Run(
        entry.arm, entry.layers, trainable, found[setup.measure], round(seconds, 1), found, seed, steps, rate, alone
    )


def _write(recipe: Recipe, found: Comparison) -> Path:
    folder = room(recipe.output_dir, COMPARED)
    folder.mkdir(parents=True, exist_ok=True)
    content = {**found.to_dict(), "recipe": to_yaml(recipe)}
    draw(found, folder / "compare.png")
    vouch(folder / "compare.json", content, COMPARED[1:])
    write_page(folder)  # of what stands there by now
    vouch(folder / "compare.json", content, COMPARED[1:])
    return folder

"""`layerpeft advise`: before training, which layers to train, what that spares, and what is known about how well it does.

Layers are scored by the criteria that the shipped evidence judged together, on a few batches. Candidate sets go by the mean of
their ranks; of those the one is recommended that gained most in equal time where it gained least, and `plan` counts what each
takes.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from layerpeft.errors import RecipeError, SelectionError
from layerpeft.planning.plan import plan
from layerpeft.recipe.comparing.arms import AMONG, among_of, arms_beside
from layerpeft.recipe.evidence import Criterion, Evidence, Kept, evidence
from layerpeft.recipe.launching import refuse_several
from layerpeft.recipe.plan import asked, rows_of
from layerpeft.recipe.recipe import Recipe, command_of, is_compared, layer_config, unpacked
from layerpeft.recipe.shorter import shortened_apart
from layerpeft.recipe.trainer import Setup, first_batches, load_model, prepare, tokenized
from layerpeft.selection.choose import candidates, choose_among
from layerpeft.selection.scores import Scores
from layerpeft.selection.scoring import needs_batches
from layerpeft.text import note, ranges
from layerpeft.tuners.soft import BY_SCORE

BATCHES = 8  # that each criterion sees: with two that go through the model both ways 16 passes, no optimizer among them
Sets = Mapping[tuple[int, ...], tuple[str, ...]]
# rules that advice chooses among, by the name that the evidence gives them; by the mean of ranks where they name no criterion
RULES: Mapping[str, Mapping[str, Any]] = {
    "quarter": {"keep": "25%"},
    "half": {"keep": "50%"},
    "time": {"keep": {"time": "75%"}},
    "last": {"by": "depth", "keep": "25%"},
    "last half": {"by": "depth", "keep": "50%"},
}


@dataclass(frozen=True)
class Choice:
    """A set of layers, and the rules that choose it. `flops`: operations of a step; `kept_states`: those of all epochs, where
    states below are kept, beside the same without; None where they cannot be, or no row comes again; `peak`: bytes; `kept`: what
    the evidence says, of the rule that it says most of."""

    rules: tuple[str, ...]
    layers: tuple[int, ...]
    trainable: int
    flops: int
    kept_states: float | None
    peak: int
    kept: Kept | None = None


@dataclass(frozen=True)
class Advice:
    """`ranks`: of every candidate layer (its number) by criterion, from 1; `passes` and `seconds`: what scoring took;
    `recommended`: the layers of one of the choices, of which `agreed` are in the upper half by every criterion; `method`: the
    recipe's; `commands`: to compare and to train it."""

    names: tuple[str, ...]
    ranks: Mapping[int, tuple[int, ...]]
    choices: tuple[Choice, ...]
    recommended: tuple[int, ...]
    agreed: int
    method: str
    evidence: Evidence
    passes: int
    seconds: float
    commands: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def advise(recipe: Recipe) -> Advice:
    """Advice for a recipe that its `select` has no part in, but for which layers may be chosen; trains and writes nothing.

    Raises: RecipeError where smaller units than layers are chosen, or fewer than two layers may be; in several processes
    (ElsewhereError in all but the first); LayerpeftError.
    """
    refuse_several("advise")
    asks = recipe.config.choosing
    if asks.unit != "layer":
        raise RecipeError(f"select.unit: {asks.unit}: advice is about whole layers; leave it out")
    known = evidence()
    places = among_of(asks)
    with contextlib.redirect_stdout(sys.stderr):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, shortened_apart(_within(recipe, folder)) as setup:
            model, scores, passes = _scored(setup, known.criteria, places)
            took = time.perf_counter() - began
            mean, ranks = _together(model, setup, scores, places)
            sets, count = _sets(model, setup, mean, places), len(mean.values)
            del model
        choices = _planned(recipe, sets, known)
    best = _best(choices)
    return Advice(
        tuple(criterion.name for criterion in known.criteria), ranks, choices, best.layers, _agreed(best, ranks),
        recipe.method, known, passes, took, _commands(recipe, best, sorted(ranks), count),
    )  # fmt: skip


def _within(recipe: Recipe, folder: str) -> Setup:
    """Rows as tokens; what trainers make to write into lies in a folder that goes away."""
    setup = tokenized(prepare(recipe))
    values = {**setup.recipe.values, "output_dir": folder}
    return replace(setup, recipe=replace(setup.recipe, values=values))


def _scored(
    setup: Setup, criteria: Sequence[Criterion], places: Mapping[str, Any]
) -> tuple[nn.Module, list[Scores], int]:
    """The model, its scores by every criterion on the same batches, and how many passes forward and back that took."""
    note(f"loading the model {setup.recipe['model_name_or_path']}")
    model = load_model(setup)
    batches, _ = first_batches(setup, model, BATCHES)
    scores, passes = [], 0
    for criterion in criteria:
        config = layer_config(setup.recipe, {**places, **criterion.select, "keep": 1, "num_batches": BATCHES})
        found = config.examine(model)
        measured = needs_batches(found.select)
        chosen = choose_among(model, found.select, found.layers, found.targets, batches if measured else None)
        assert chosen.scores is not None
        scores.append(chosen.scores)
        passes += len(batches) * measured
    return model, scores, passes


def _together(
    model: nn.Module, setup: Setup, scores: Sequence[Scores], places: Mapping[str, Any]
) -> tuple[Scores, dict[int, tuple[int, ...]]]:
    """Scores that are the share of other candidates a layer is ranked before, the mean over criteria; and its ranks, from 1."""
    found = layer_config(setup.recipe, {**places, "by": scores[0], "keep": "all"}).examine(model)
    among = candidates(found.select, found.layers, found.targets)
    if len(among) < 2:
        raise RecipeError(f"select: {len(among)} layer may be chosen, so there is no choice to advise on")
    orders = [[i for i in one.ranked() if i in set(among)] for one in scores]
    ranks = {i: tuple(order.index(i) + 1 for order in orders) for i in among}
    most = len(among)
    values = [0.0] * len(scores[0].values)
    for i, places_of in ranks.items():
        values[i] = sum((most - rank) / (most - 1) for rank in places_of) / len(orders)
    return replace(scores[0], values=tuple(values), by="mean of ranks", options={}, targets={}, overlaps=()), ranks


def _sets(model: nn.Module, setup: Setup, mean: Scores, places: Mapping[str, Any]) -> Sets:
    """Sets of layers, each with the rules that choose it; that of the recipe too, where it names layers."""
    recipe = setup.recipe
    found: dict[tuple[int, ...], tuple[str, ...]] = {}
    wanted = {"all": {"keep": "all"}, **RULES}
    own = recipe.config.choosing
    if own.by == "depth" and not own.is_all and not own.is_scheduled:
        wanted = {"own": {k: v for k, v in own.to_dict().items() if k in (*AMONG, "by", "keep", "pick")}, **wanted}
    for rule, says in wanted.items():
        by = {} if "by" in says or rule == "own" else {"by": mean}
        examined = layer_config(recipe, {**places, **by, **_counted(says, recipe)}).examine(model)
        try:
            chosen = choose_among(model, examined.select, examined.layers, examined.targets, costs=examined.costs)
        except SelectionError as error:  # a share that holds no layer
            note(f"left out: {error}")
            continue
        found[chosen.layers] = (*found.get(chosen.layers, ()), rule)
    return found


def _counted(says: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """With the length of rows, and the epochs over which later ones are cheaper, where a rule weighs time."""
    keep = says.get("keep")
    if not isinstance(keep, Mapping):
        return dict(says)
    length, cached = recipe.get("max_length"), recipe.config.caching is not None
    epochs = {"epochs": float(recipe["num_train_epochs"])} if cached and recipe["max_steps"] <= 0 else {}
    return {**says, "keep": {**keep, **({"length": length} if length else {})}, **epochs}


def _planned(recipe: Recipe, sets: Sets, known: Evidence) -> tuple[Choice, ...]:
    """What every set takes, by a plan."""
    _, empty, options, setup = asked(recipe.source, recipe.settings, None, None)
    count, found = len(recipe.config.examine(empty).layers), []
    for layers, rules in sets.items():
        note(f"planning layers {ranges(layers)}")
        config = layer_config(recipe, {"layers": list(layers), **_stack(recipe)})
        planned = plan(empty, unpacked(config) if len(layers) == count else config, **options)
        states, rows = planned.prefix, rows_of(recipe, setup, options, planned)
        ratio = None
        if states is not None and states.why is None and rows is not None and rows.epochs > 1:
            ratio = rows.ratio(states)
        own = max((one for rule in rules if (one := known.of(rule))), key=_gained, default=None)
        found.append(Choice(rules, layers, planned.trainable, planned.flops, ratio, planned.peak_bytes, own))
    return tuple(found)


def _stack(recipe: Recipe) -> dict[str, Any]:
    stack = recipe.config.choosing.stack
    return {} if stack is None else {"stack": stack}


def _best(choices: Sequence[Choice]) -> Choice:
    """The one whose rule gained most in equal time where it gained least, and then in the mean; where nothing is known, the
    cheapest."""
    judged = [choice for choice in choices if choice.kept is not None]
    if judged:
        return max(judged, key=lambda choice: (*_gained(choice.kept), -choice.flops))
    return min(choices, key=lambda choice: choice.flops)


def _gained(kept: Kept | None) -> tuple[float, float]:
    """In equal time: the least over models and tasks, and the mean."""
    return (0.0, 0.0) if kept is None else (kept.time[1], kept.time[0])


def _agreed(best: Choice, ranks: Mapping[int, tuple[int, ...]]) -> int:
    half = (len(ranks) + 1) // 2
    return sum(all(rank <= half for rank in ranks[layer]) for layer in best.layers if layer in ranks)


def _chosen(recipe: Recipe, best: Choice, among: Sequence[int], count: int) -> dict[str, Any]:
    """Settings that choose it among the same candidates of so many layers, so that arms that are drawn keep to those, too; without
    what goes by scores, or packs what is frozen where nothing is."""
    places, config = among_of(recipe.config.choosing), recipe.config
    layers: Any = ranges(best.layers, ",") if len(best.layers) > 1 else min(best.layers)
    limited = places.get("layers", "all") != "all"
    outside = ranges(set(range(count)) - set(among), ",") if limited else places.get("exclude")
    kept = {k: v for k, v in (("exclude", outside), ("stack", places.get("stack"))) if v not in (None, "")}
    left = [name for name in BY_SCORE if getattr(config, name) is not None]
    left += ["quantize_frozen"] * (len(best.layers) == count and unpacked(config) is not config)
    select = {"layers": layers, **kept} if kept else layers
    return {"layerpeft.select": select, **{f"layerpeft.{name}": None for name in left}}


def _commands(recipe: Recipe, best: Choice, among: Sequence[int], count: int) -> tuple[str, ...]:
    """To compare the choice, where there is something to compare it with and by, and to train it."""
    changed, arms = _chosen(recipe, best, among, count), arms_beside(best.layers, among)
    comparing = [f"{command_of(recipe, changed, 'compare')} --arms {arms}"] * (is_compared(recipe) and bool(arms))
    if best.kept_states is not None and recipe.config.caching is None:
        changed |= {"layerpeft.prefix_cache": "memory"}
    return (*comparing, command_of(recipe, changed))

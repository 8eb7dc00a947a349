"""Which targets of a layer map a config means, with PEFT's own matching rules but nothing matched in part."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from layerpeft.errors import MOST, Problem, Problems, SelectionError, nearest
from layerpeft.integrations.peft import default_targets, refused_leaves
from layerpeft.model.layers import LayerMap, Target, base_of
from layerpeft.model.names import upwards
from layerpeft.model.patterns import check_pattern
from layerpeft.model.stacked import EXPERT
from layerpeft.text import some

Names = str | Iterable[str] | None
# kinds of a target: tensors of a module, which PEFT calls target_parameters; what scorers measure; what is trained and saved whole
PARAMETERS = ("experts", "parameter")
MATRICES = ("linear", "conv1d", "experts", EXPERT)
MODULE = "module"


def is_routed(name: str) -> bool:
    """Whether a target belongs to the routed experts of a mixture, which a batch may leave out."""
    return re.search(r"(^|\.)experts\.", name) is not None


def match_targets(
    layers: LayerMap,
    target_modules: Names,
    exclude_modules: Names = None,
    target_parameters: Sequence[str] | None = None,
) -> tuple[Target, ...]:
    """Targets named by full name, by last segments, by regex (a string) or by "all-linear" (a Linear or Conv1D each).

    Raises: SelectionError naming every pattern that matches nothing inside the layers.
    """
    problems = Problems("target_modules")
    modules = [t for t in layers.targets if t.kind not in PARAMETERS]
    chosen: set[str] = set()
    if target_modules == "all-linear":
        chosen |= {t.name for t in modules if t.kind in ("linear", "conv1d")}
    elif target_modules:
        chosen |= _matching("target_modules", target_modules, [t.name for t in modules], problems, layers)
    if target_parameters:
        names = [t.name for t in layers.targets if t.kind in PARAMETERS]
        chosen |= _matching("target_parameters", list(target_parameters), names, problems, layers)
    if exclude_modules:
        chosen -= _matching("exclude_modules", exclude_modules, [t.name for t in layers.targets], problems, layers)
    problems.raise_if_any(SelectionError)
    if not chosen:
        sentence = f"target_modules={target_modules!r} leaves no target in the layers of {layers.stack!r}"
        raise SelectionError(Problem(("exclude_modules" if exclude_modules else "target_modules",), sentence))
    return tuple(t for t in layers.targets if t.name in chosen)


def exclusions(given: Names, model: nn.Module, layers: LayerMap) -> Names:
    """`exclude_modules` without what lies outside the layers, where nothing is wrapped anyway; None where nothing is left."""
    if not given:
        return None
    blocks = tuple(f"{layer.name}." for layer in layers.layers)
    names = [n for n, _ in base_of(model).named_modules() if n]
    inside, outside = [n for n in names if n.startswith(blocks)], [n for n in names if not n.startswith(blocks)]
    inside += [t.name for t in layers.targets]
    if isinstance(given, str):
        check_pattern("exclude_modules", given, names)
        hits = [any(re.fullmatch(given, n) for n in side) for side in (inside, outside)]
        return None if hits == [False, True] else given

    def only_outside(name: str) -> bool:
        hits = [any(n == name or n.endswith(f".{name}") for n in side) for side in (inside, outside)]
        return hits == [False, True]

    return {n for n in given if not only_outside(n)} or None


def find_targets(
    model: nn.Module,
    layers: LayerMap,
    target_modules: Names = None,
    exclude_modules: Names = None,
    target_parameters: Sequence[str] | None = None,
) -> tuple[Target, ...]:
    """As `match_targets`; without names those of PEFT for the model type, or all linears where PEFT has none.

    What `exclude_modules` names outside of the layers is none of it. Raises: as `match_targets`.
    """
    names = target_modules
    if names is None and not target_parameters:
        names = default_targets(layers.model_type) or "all-linear"
    return match_targets(layers, names, exclusions(exclude_modules, model, layers), target_parameters)


def not_wrapped(model: nn.Module, layers: LayerMap) -> dict[str, str]:
    """The linears of a model's layers that PEFT does not wrap, or whose wrapper would do nothing: name -> why."""
    base, names = base_of(model), [t.name for t in layers.targets if t.kind in ("linear", "conv1d")]
    refused = refused_leaves(base, names)
    found = {n: "PEFT refuses it on this kind of model" for n in names if n.rpartition(".")[2] in refused}
    return found | {n: "the model uses its weight without calling it" for n in names if is_uncalled(n, names)}


def is_uncalled(name: str, names: Sequence[str]) -> bool:
    """Whether this is the step size of a Mamba mixer, which is multiplied by hand; Mamba 2 has none."""
    above, _, leaf = name.rpartition(".")
    return leaf == "dt_proj" and f"{above}.x_proj" in names


def leave_out(idle: Sequence[str], others: Iterable[str]) -> str:
    """What to write so that these targets are left out and the others are not."""
    kept = {n.rpartition(".")[2] for n in others}
    ends = sorted({leaf if (leaf := n.rpartition(".")[2]) not in kept else n for n in idle})
    return f"exclude_modules={ends}"


def measured_for(layers: LayerMap, targets: Sequence[Target]) -> tuple[Target, ...]:
    """The matrices that stand for targets when they are scored: themselves, or, for modules that train whole, those inside.

    A layer of which only other modules train (norms) is scored by all its matrices.
    """
    names = {t.name: t.layer for t in targets if t.kind == MODULE}
    if not names:
        return tuple(targets)
    able = [t for t in layers.targets if t.kind in MATRICES]  # not routers and convolutions, which no scorer measures
    own = {t.name for t in targets} - names.keys()
    inside = [t for t in able if t.name in own or any(a in names for a in upwards(t.name))]
    bare = {*names.values()} - {t.layer for t in inside}
    found = {t.name for t in inside} | {t.name for t in able if t.layer in bare}
    return tuple(t for t in layers.targets if t.name in found)


def like(pattern: str, names: Iterable[str]) -> str:
    """What a name or pattern that matches none of these full names may have meant, as a sentence."""
    ends: dict[str, str] = {}
    for name in names:
        ends.setdefault(name.rpartition(".")[2], name)
    last = next((part for part in reversed(re.findall(r"\w+", pattern)) if not part.isdecimal()), pattern)
    close = ends.get(last) or nearest(last, ends)
    listed = some(sorted(end for end in ends if not end.isdecimal()), 12)
    return f"Did you mean {close!r}?" if close else f"There are {listed}."


def no_match(key: str, sentence: str) -> SelectionError:
    """That a name of this key matches nothing; the title of the whole stands for `target_modules` and `target_parameters`."""
    return SelectionError(Problem((key,), sentence), title=key if key == "exclude_modules" else "")


def _matching(key: str, patterns: Names, names: list[str], problems: Problems, layers: LayerMap) -> set[str]:
    if isinstance(patterns, str):
        check_pattern(key, patterns, names)
        found = {n for n in names if re.fullmatch(patterns, n)}
        if not found:
            sentence = f"the regex '{patterns}' matches no target in the layers. {_offer(patterns, names, layers)}"
            problems.absorb(no_match(key, sentence))
        return found
    found: set[str] = set()
    for pattern in patterns or ():
        hits = {n for n in names if n == pattern or n.endswith(f".{pattern}")}
        if not hits and len(problems.items) < MOST:
            sentence = f"'{pattern}' matches no target in the layers. {_offer(pattern, names, layers)}"
            problems.absorb(no_match(key, sentence))
        found |= hits
    return found


def _offer(pattern: str, names: list[str], layers: LayerMap) -> str:
    ends = sorted({n.rpartition(".")[2] for n in names})
    close = nearest(re.split(r"[^\w-]+", pattern.rstrip("$*)"))[-1], ends)
    experts = sorted({".".join(t.name.split(".")[-3:]) for t in layers.targets if t.kind in PARAMETERS})
    hint = f"Did you mean {close!r}? " if close else ""
    listed = f"Targets there: {', '.join(ends)}." if ends else "There are none of that kind."
    parameters = f" Experts are named by target_parameters: {', '.join(experts)}." if experts else ""
    return f"{hint}{listed}{parameters}"

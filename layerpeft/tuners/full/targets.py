"""Which modules of a model are trained and saved whole: those that hold the chosen parameters, the outermost ones of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import nn

from layerpeft.errors import MOST, ConfigError, Problems, SelectionError, nearest
from layerpeft.integrations.peft import HEADS, AuxiliaryTrainingWrapper, BaseTunerLayer
from layerpeft.model.architectures import stored_shape
from layerpeft.model.experts import SINGLE, check_experts
from layerpeft.model.layers import LayerMap, Target
from layerpeft.model.names import adapted, upwards
from layerpeft.model.patterns import check_pattern
from layerpeft.model.stacked import holder, picked_in
from layerpeft.model.targets import MODULE, PARAMETERS, like, no_match
from layerpeft.tuners.full.layer import Whole, is_bias, whole_of

Names = str | Iterable[str] | None


@dataclass(frozen=True)
class Wanted:
    """What a config asks for: names as in LoRA (None: everything), names to leave out, whether biases train, always-on modules."""

    modules: Names = None
    exclude: Names = None
    biases: bool = True
    always: Sequence[str] = field(default_factory=tuple)


def whole_targets(base: nn.Module, layers: LayerMap, wanted: Wanted) -> tuple[Target, ...]:
    """The modules of every layer that would be trained whole, as targets of the kind "module".

    Raises: SelectionError for names that match nothing; ConfigError where another adapter is in the way.
    """
    _refuse_adapters(base)
    chosen = _chosen(base, layers, wanted)
    hidden = next((p for p in chosen if adapted(p) != p), None)
    if hidden is not None:
        raise ConfigError(
            f"{hidden} lies in a block that was compiled or wrapped by itself, and a folder would hold it under that name; "
            "wrap the model first, and compile or wrap its blocks then"
        )
    always = always_modules(base, wanted)
    kept = [p for p in chosen if not any(p == a or p.startswith(f"{a}.") for a in always)]
    found: dict[str, list[str]] = {}
    layer_of: dict[str, int] = {}
    for path in kept:
        name = _outermost(base, layers.layers[chosen[path]].name, path, set(kept))
        found.setdefault(name, []).append(path)
        layer_of[name] = chosen[path]
    sizes = {n: sum(prod(stored_shape(base.get_parameter(p))) for p in paths) for n, paths in found.items()}
    targets = tuple(Target(n, layer_of[n], _role(n, layers), MODULE, (), sizes[n]) for n in found)
    inside = [a for a in always if any(a.startswith(f"{t.name}.") for t in targets)]
    if inside:
        raise ConfigError(
            f"modules_to_save: {inside[0]} lies inside of a module that is trained whole with its layer; leave it out there, or "
            f"name the modules of the layers one by one in target_modules"
        )
    if not targets:
        raise SelectionError(
            f"target_modules={wanted.modules!r} leaves nothing to train in the layers of {layers.stack!r}"
        )
    return targets


def wholes_of(base: nn.Module, layers: LayerMap, wanted: Wanted, targets: Sequence[Target]) -> tuple[Whole, ...]:
    """What is wrapped for these targets and for always-on modules, in model order, other places of their weights included.

    Raises: ConfigError for weights of their layers that cannot be trained, all named at once, and where PEFT, which goes by the
    ends of names, would take other modules for these.
    """
    chosen = _chosen(base, layers, wanted)
    among = {t.layer for t in targets}
    _refuse_unfit(base, layers, wanted, {p: layer for p, layer in chosen.items() if layer in among})
    found: list[tuple[str, int | None, list[str]]] = []
    order = {n: i for i, (n, _) in enumerate(base.named_modules(remove_duplicate=False))}
    single = picked_in(base, [t.name for t in targets])
    for name, layer in {t.name if t.name in order else holder(t.name): t.layer for t in targets}.items():
        paths = [p for p in chosen if p.startswith(f"{name}.")]
        found.append((name, layer, [p.removeprefix(f"{name}.") for p in paths]))
    for name in always_modules(base, wanted):
        held = base.get_submodule(name).named_parameters()
        found.append((name, None, [n for n, _ in held if wanted.biases or not is_bias(n)]))
    wholes = _with_other_places(base, found, single)
    wholes = sorted(wholes, key=lambda w: order[w.name])
    check_experts(base, [f"{w.name}.{n}" for w in wholes if w.experts for n in _stacks(base, w)], SINGLE)
    refuse_namesakes(list(order), {w.name for w in wholes})
    return tuple(wholes)


def _stacks(base: nn.Module, whole: Whole) -> list[str]:
    """The 3-D tensors among what trains of a module."""
    return [n for n in whole.trains if len(stored_shape(base.get_parameter(f"{whole.name}.{n}"))) == 3]


def always_modules(base: nn.Module, wanted: Wanted) -> tuple[str, ...]:
    """Full names of the always-on modules, the outermost ones. Raises: ConfigError for names that match nothing."""
    problems = Problems("modules_to_save")
    names = [n for n, m in base.named_modules() if n and any(True for _ in m.parameters())]
    found: dict[str, None] = {}
    for pattern in wanted.always:
        # PEFT goes by the ends of names, with or without a point before them: it trains DistilBERT's pre_classifier, too
        hits = [n for n in names if n.endswith(pattern if pattern in HEADS else f".{pattern}") or n == pattern]
        if not hits and pattern not in HEADS:
            problems.add(f"'{pattern}' matches no module of the model. {like(pattern, names)}", "modules_to_save")
        found |= dict.fromkeys(hits)
    problems.raise_if_any(ConfigError)
    return tuple(n for n in names if n in found and not any(n.startswith(f"{o}.") for o in found))


# ---- matching -------------------------------------------------------------------------------------------------------


def _chosen(base: nn.Module, layers: LayerMap, wanted: Wanted) -> dict[str, int]:
    """Full names of the parameters to train in any layer, and their layers; shared ones count in the first layer alone."""
    places: dict[str, int] = {}
    seen: set[int] = set()
    for layer in layers.layers:
        for name, parameter in base.get_submodule(layer.name).named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                places[f"{layer.name}.{name}"] = layer.index
    problems = Problems("target_modules")
    chosen = set(places)
    if wanted.modules is not None:
        chosen = _matching("target_modules", wanted.modules, places, layers, problems)
    if wanted.exclude:
        chosen -= _matching("exclude_modules", wanted.exclude, places, layers, problems)
    problems.raise_if_any(SelectionError)
    return {p: i for p, i in places.items() if p in chosen and (wanted.biases or not is_bias(p))}


def _matching(key: str, names: Names, places: Mapping[str, int], layers: LayerMap, problems: Problems) -> set[str]:
    """The parameters that names mean: a name of the parameter, of its module or of any module around it inside the layer."""
    if names == "all-linear":
        linear = {t.name for t in layers.targets if t.kind in ("linear", "conv1d")}
        return {p for p in places if p.rpartition(".")[0] in linear}
    if isinstance(names, str):
        check_pattern(key, names, places)
        found = {p for p in places if any(re.fullmatch(names, a) for a in _around(p, layers.layers[places[p]].name))}
        if not found:
            sentence = f"the regex '{names}' matches nothing in the layers. {_offer(names, places)}"
            problems.absorb(no_match(key, sentence))
        return found
    found = set()
    ends: dict[str, set[str]] = {}
    for path, index in places.items():
        for around in _around(path, layers.layers[index].name):
            parts = around.split(".")
            for i in range(len(parts)):
                ends.setdefault(".".join(parts[i:]), set()).add(path)
    for name in names or ():
        if name not in ends and len(problems.items) < MOST:
            problems.absorb(no_match(key, f"{name!r} matches nothing in the layers. {_offer(name, places)}"))
        found |= ends.get(name, set())
    return found


def _around(path: str, layer: str) -> list[str]:
    """A parameter's name and those of the modules around it, up to but without its layer."""
    return [name for name in upwards(path) if name.startswith(f"{layer}.")]


def _offer(name: str, places: Iterable[str]) -> str:
    ends = sorted({p.split(".")[-2] for p in places if "." in p})
    close = nearest(name.rpartition(".")[2], ends)
    return f"{f'Did you mean {close!r}? ' if close else ''}Modules there: {', '.join(ends)}."


def _outermost(base: nn.Module, layer: str, path: str, chosen: set[str]) -> str:
    """The outermost module around a parameter, in its layer, that itself holds a chosen parameter."""
    for module in [layer, *reversed(_around(path, layer)[1:])]:
        held = base.get_submodule(module)._parameters
        if any(p is not None and f"{module}.{n}" in chosen for n, p in held.items()):
            return module
    return path.rpartition(".")[0]


def _role(name: str, layers: LayerMap) -> str:
    return next((t.role for t in layers.targets if t.name == name), "other")


# ---- what cannot be --------------------------------------------------------------------------------------------------


def _refuse_adapters(base: nn.Module) -> None:
    taken = [n for n, m in base.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if taken:
        raise ConfigError(
            f"{len(taken)} modules carry another adapter ({taken[0]}{', …' if len(taken) > 1 else ''}), and training the weights "
            "themselves takes a model without other adapters: merge it first (merge_and_unload), or unload it"
        )


def _refuse_unfit(base: nn.Module, layers: LayerMap, wanted: Wanted, chosen: Mapping[str, int]) -> None:
    """Raises: ConfigError naming every module whose weight is packed, in the layers that hold what is `chosen`."""
    unfit = {p.rpartition(".")[0] for p in chosen if not base.get_parameter(p).is_floating_point()}
    pattern, among = Problems(""), {*chosen.values()}
    there = [t for t in layers.targets if t.kind not in PARAMETERS and t.layer in among]
    packed = [t.name for t in there if _is_packed(base.get_submodule(t.name))]
    places = {f"{n}.weight": next(t.layer for t in layers.targets if t.name == n) for n in packed}
    meant = (
        set(places) if wanted.modules is None else _matching("target_modules", wanted.modules, places, layers, pattern)
    )
    if wanted.exclude:
        meant -= _matching("exclude_modules", wanted.exclude, places, layers, pattern)
    unfit |= {p.rpartition(".")[0] for p in meant}
    if unfit:
        raise ConfigError(
            f"target_modules: the weights of {len(unfit)} modules are quantized and cannot be trained themselves: "
            f"{', '.join(sorted(unfit))}. Load the model without quantization, leave these out with exclude_modules, or train "
            "LoRA or a gradient projection over them (method: lora, method: galore)"
        )


def _is_packed(module: nn.Module) -> bool:
    """Whether a linear keeps its weight in another form than as a tensor of numbers."""
    if any(True for _ in module.children()):
        return False
    weight = module._parameters.get("weight")
    return weight is None and not any(p is not None and p.ndim > 1 for p in module._parameters.values())


def refuse_namesakes(names: Sequence[str], chosen: set[str]) -> None:
    """Raises: ConfigError for modules that PEFT would take for chosen ones, because their names end as those do."""
    clash = []
    for name in names:
        if name not in chosen:
            clash += [(name, name[i:]) for i in range(1, len(name)) if name[i:] in chosen]
    if clash:
        other, name = clash[0]
        raise ConfigError(
            f"{name} cannot be trained whole: in the saved folder PEFT would take {other} for it, because that name ends the same "
            f"way{f' ({len(clash) - 1} more are like this)' if len(clash) > 1 else ''}. Wrap the model with its head "
            "(AutoModelForCausalLM, …), whose names begin otherwise, or leave the module out"
        )


# ---- weights in several places --------------------------------------------------------------------------------------


def _with_other_places(
    base: nn.Module, found: Sequence[tuple[str, int | None, list[str]]], single: Mapping[str, tuple[int, ...]]
) -> list[Whole]:
    """Wholes, and beside them the other modules that hold the same weights (tied embeddings), which a folder must hold too."""
    held: dict[int, list[str]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None and name:
                held.setdefault(id(parameter), []).append(name)
    names = {n for n, *_ in found}
    wholes: dict[str, Whole] = {}
    for name, layer, trains in found:
        if name in wholes:
            continue  # another place of what came before
        module = base.get_submodule(name)
        wholes[name] = whole_of(name, layer, {t: module.get_parameter(t) for t in trains}, single.get(name))
        places = {o for p in module.parameters() for o in held[id(p)] if not f"{o}.".startswith(f"{name}.")}
        for other in sorted(places):
            around = next((n for n in names if other.startswith(f"{n}.")), None)
            if around is not None:
                raise ConfigError(f"{around} holds weights of {name} too ({other}): train one of the two")
            wholes[other] = Whole(other, layer, (), 0, owner=name)
    return list(wholes.values())

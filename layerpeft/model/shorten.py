"""A model with fewer layers: its own class, built from a config that says so, around the tensors that stay.

What plain transformers would load from the folder is what is built here, so nothing has to be renumbered by hand; then every
layer is compared with the one that it was. Where the config cannot say what a layer is by its new place (a formula of its number,
weights that layers share, tables over all layers), that is refused by name.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, told
from layerpeft.integrations.empty import twin
from layerpeft.model.layers import Layer, LayerMap, Target, base_of, find_module, layer_map
from layerpeft.text import some

WRITES = ("o", "down", "out")  # by role, the matrices of a part that write its result to the stream
_COUNT = re.compile(r"layers?$|^depth$")  # num_hidden_layers, n_layer, decoder_layers, …
_PLACES = re.compile(
    r"layer|block|(^|_)(idxs?|index|indices|indexes|ids)(_|$)"
)  # keys of lists that name layers by number
_FIRST = (
    "first_k_dense_replace",
    "num_dense_layers",
    "max_window_layers",
    "moe_layer_start_index",
)  # of the first so many
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class _Cut:
    """Which layers stay, of how many."""

    kept: tuple[int, ...]
    total: int

    def below(self, number: int) -> int:
        """How many of the first so many stay."""
        return sum(i < number for i in self.kept)

    def value(self, key: str, value: Any) -> Any:
        """What a key of a config says of the layers that stay."""
        if isinstance(value, bool) or "token_id" in key or "label" in key or key == "architectures":
            return value
        if isinstance(value, int) and value >= 0:
            if key == "moe_layer_end_index":
                return self.below(value + 1) - 1
            if key == "num_kv_shared_layers":
                return len(self.kept) - self.below(self.total - value)
            return self.below(value) if key in _FIRST else value
        if isinstance(value, Mapping):
            return self._by_number(value) if "layer" in key else value
        if isinstance(value, str):
            one_each = "pattern" in key and len(value) == self.total
            return "".join(value[i] for i in self.kept) if one_each else value
        return self.listed(key, value) if isinstance(value, list | tuple) else value

    def _by_number(self, value: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """A mapping from numbers of layers."""
        if not value or not all(str(k).isdecimal() and int(k) < self.total for k in value):
            return value
        places = {old: new for new, old in enumerate(self.kept)}
        return {type(k)(places[int(k)]): v for k, v in value.items() if int(k) in places}

    def listed(self, key: str, value: Sequence[Any]) -> Any:
        """A list with an entry for every layer, or of numbers of layers."""
        numbers = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < self.total for v in value)
        rising = numbers and all(a < b for a, b in zip(value, value[1:]))
        if rising and value and _PLACES.search(key) and (len(value) < self.total or self.total > 2):
            return [new for new, old in enumerate(self.kept) if old in value]
        return [value[i] for i in self.kept] if len(value) == self.total else value


def shortened(model: nn.Module, layers: LayerMap, keep: Iterable[int]) -> nn.Module:
    """The model with these of its layers alone, in their order; it shares their tensors, the config is new.

    Works without weights too. Raises: ConfigError naming what keeps the rest from standing by itself.
    """
    base, cut = base_of(model), _Cut(tuple(sorted(set(keep))), len(layers))
    if not cut.kept or not hasattr(getattr(base, "config", None), "to_dict"):
        what = (
            "no layer is left"
            if not cut.kept
            else f"a {type(base).__name__} has no config that says how many layers it has"
        )
        raise ConfigError(f"{what}, so that nothing would load it")
    if shared := _shared(base, layers):
        raise ConfigError(
            f"layers of {layers.model_type} share weights ({shared}), so none of them can be taken out alone"
        )
    why: list[str] = []
    for config in _configs(base.config, cut):
        try:
            new = twin(base, config())
            found = layer_map(new, layers.stack)
        except Exception as error:  # of a config that does not go together its class says it in its own way
            why.append(told(error, 200))
            continue
        if len(found) != len(cut.kept):
            continue
        names = dict(zip(found.names, (layers.names[i] for i in cut.kept), strict=True))
        if differ := list(_differences(base, new, _renamed(names), cut, found)):
            why.append(some(differ, 2))
            continue
        return _filled(base, new, _renamed(names))
    gone = some([str(i) for i in range(cut.total) if i not in cut.kept], 16)
    raise ConfigError(
        f"a {type(base).__name__} cannot be built without the layers {gone} of {layers.stack or 'the model'}: "
        f"{(why or ['its config does not say how many layers it has'])[-1]}; leave other layers out"
    )


def silence(model: nn.Module, units: LayerMap, gone: Iterable[int]) -> list[str]:
    """Sets to zero what writes the results of these parts of layers to the stream; names the matrices. No shape changes.

    Raises: ConfigError as `writing`.
    """
    found = []
    for target in (t for i in gone for t in writing(units.layers[i])):
        module, leaf = find_module(model, target.name), target.name.rpartition(".")[2]
        own = (leaf, f"{leaf}_bias") if target.kind in ("experts", "parameter") else ("weight", "bias")
        held = [p for n in own if (p := module._parameters.get(n)) is not None]
        if not held or not all(p.is_floating_point() for p in held):
            raise ConfigError(f"{target.name} is stored in fewer bits, and cannot be set to zero; load it in 16 bit")
        with torch.no_grad():
            for parameter in held:
                parameter.zero_()
        found.append(target.name)
    return found


def writing(unit: Layer) -> list[Target]:
    """The matrices of a part of a layer that write its result to the stream. Raises: ConfigError where that is not known."""
    found = [t for t in unit.targets if t.role.rpartition(".")[2] in WRITES]
    if not found:
        raise ConfigError(f"it is not known which matrix of {unit.name} is its last; choose whole layers (unit: layer)")
    return found


def _shared(base: nn.Module, layers: LayerMap) -> str:
    """A parameter that lies in several layers; empty where there is none."""
    owner: dict[int, str] = {}
    for name in layers.names:
        for inner, parameter in find_module(base, name).named_parameters():
            if owner.setdefault(id(parameter), name) != name:
                return f"{name}.{inner} is that of {owner[id(parameter)]}"
    return ""


def _configs(config: Any, cut: _Cut) -> Iterator[Callable[[], Any]]:
    """The configs that may mean the model without the other layers: of each part of it, with all or one of its counts changed."""
    plain = config.to_dict()
    for path in _parts(plain, ()):
        said = _spelt_out(_at(plain, path), cut)
        counts = [k for k, v in said.items() if v == cut.total and type(v) is int and _COUNT.search(k)]
        values = {k: cut.value(k, v) for k, v in said.items()}
        if not counts and values == said:
            continue
        for chosen in dict.fromkeys([tuple(counts), *((name,) for name in counts)]):
            changed = copy.deepcopy(plain)
            _at(changed, path).update(copy.deepcopy(values) | dict.fromkeys(chosen, len(cut.kept)))
            yield lambda given=changed: type(config).from_dict(given)


def _spelt_out(part: Mapping[str, Any], cut: _Cut) -> dict[str, Any]:
    """A part of a config with its formulas as lists, where it has a place for these."""
    said, step = dict(part), part.get("decoder_sparse_step")
    if isinstance(part.get("mlp_only_layers"), list) and isinstance(step, int) and step > 1:
        dense = (i for i in range(cut.total) if (i + 1) % step)
        said |= {"mlp_only_layers": sorted({*dense, *part["mlp_only_layers"]}), "decoder_sparse_step": 1}
    if "attention_types" in part and isinstance(part.get("attention_layers"), list):  # expanded to one each anyway
        said["attention_types"] = [[[part["attention_layers"][i]], 1] for i in cut.kept]
    return said


def _parts(plain: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Where the configs inside of a config stand, itself first."""
    yield path
    for key, value in plain.items():
        if isinstance(value, Mapping) and "model_type" in value:
            yield from _parts(value, (*path, key))


def _at(plain: Any, path: Sequence[str]) -> Any:
    for key in path:
        plain = plain[key]
    return plain


def _renamed(names: Mapping[str, str]) -> Callable[[str], str]:
    """What a module or tensor of the shorter model is called in the whole one."""

    def old(name: str) -> str:
        layer = next((n for n in names if name == n or name.startswith(f"{n}.")), None)
        return name if layer is None else names[layer] + name[len(layer) :]

    return old


def _differences(
    base: nn.Module, new: nn.Module, old: Callable[[str], str], cut: _Cut, found: LayerMap
) -> Iterator[str]:
    """In what the layers that stay, or what stands beside them, would be another than they are."""
    there = dict(base.named_modules(remove_duplicate=False))
    within = {name: place for place, name in enumerate(found.names)}
    for name, module in new.named_modules(remove_duplicate=False):
        was = there.get(old(name))
        if was is None or type(was) is not type(module):
            yield f"{name or 'the model'} would be {_kind(module)}, not {_kind(was)}"
            continue
        for kind in ("_parameters", "_buffers"):
            then, now = _shapes(getattr(was, kind)), _shapes(getattr(module, kind))
            for key in then.keys() | now.keys():
                if then.get(key) != now.get(key):
                    shown = [list(s) if s is not None else "nothing" for s in (now.get(key), then.get(key))]
                    yield f"{name}.{key} would have the shape {shown[0]}, not {shown[1]}"
        place = next((p for n, p in within.items() if name == n or name.startswith(f"{n}.")), None)
        for key, value in vars(module).items():
            before = vars(was).get(key)
            if key[:1] == "_" or key in ("training", "p") or "drop" in key or not (_simple(value) and _simple(before)):
                continue  # dropout is of training, and may have been turned off
            if value != before and not _by_place(before, value, place, cut):
                yield f"{name}.{key} would be {value!r}, not {before!r}"
    left = {old(name) for name, _ in new.named_modules(remove_duplicate=False)}
    for name in there.keys() - left:
        if not name.startswith(f"{found.stack}." if found.stack else ""):
            yield f"{name} would be gone"


def _by_place(before: Any, value: Any, place: int | None, cut: _Cut) -> bool:
    """Whether something only says where a layer stands, or how many there are, or what is so of each of them."""
    if isinstance(before, list | tuple) and isinstance(value, list | tuple):
        return list(value) in ([before[i] for i in cut.kept if i < len(before)], list(cut.listed("layers", before)))
    if type(value) is not int or type(before) is not int:
        return False
    if before in cut.kept and value == cut.kept.index(before):  # its own number, or that of another layer
        return place is None or value <= place
    return place is None and value == cut.below(before)


def _simple(value: Any) -> bool:
    return isinstance(value, _PLAIN) or isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value)


def _kind(module: nn.Module | None) -> str:
    return "nothing" if module is None else f"a {type(module).__name__}"


def _shapes(held: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in held.items() if tensor is not None}


def _filled(base: nn.Module, new: nn.Module, old: Callable[[str], str]) -> nn.Module:
    """The shorter model with the tensors of the whole one."""
    there = dict(base.named_modules(remove_duplicate=False))
    for name, module in new.named_modules(remove_duplicate=False):
        was = there[old(name)]
        module._parameters.update(was._parameters)
        module._buffers.update(was._buffers)
        module.training = was.training
    return new

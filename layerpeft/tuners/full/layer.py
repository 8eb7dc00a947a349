"""Weights that train themselves: PEFT's wrapper of a module that is saved whole, without the copy that PEFT would train.

`modules_to_save[adapter]` and `original_module` are one module, whose weights train in place. What they were goes to the CPU when
the module first becomes active, and is exchanged with what was trained where the base model is asked for. The Parameter objects
stay the same all the while, so that optimizers keep them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, SaveError
from layerpeft.integrations.engines.known import cut_like, is_cut, local, rewritten
from layerpeft.integrations.peft import ModulesToSaveWrapper
from layerpeft.model.architectures import stored_shape
from layerpeft.model.names import clean, place_among
from layerpeft.model.stacked import name_of
from layerpeft.model.weights import change_of
from layerpeft.tuners.full.experts import Picked, run

ONE_ONLY = (
    "a model has one adapter that trains the weights themselves: {name!r} cannot take {module} as well, nor be a copy of it. Where "
    "a trainer wants a copy of what was trained before (DPO without a reference model), merge it first (layerpeft merge, or "
    "merge_and_unload) and train anew, or give the trainer a ref_model"
)

SAVE_WHILE_ON = (
    "the adapter is switched off, and what was trained lies aside in parts; save outside of disable_adapter()"
)
CUT_LATER = "its originals were kept before fully_shard divided the weights; use fully_shard just after get_peft_model"


@dataclass(frozen=True)
class Whole:
    """One module that is trained and saved whole: its name, its layer (None: always on) and its parameters that may train.

    `owner`: the module that holds the same weights and comes first, where this one is only another place of them. `experts`: of a
    module that holds all experts of its layer in 3-D tensors, those that train; None: it trains as a whole.
    """

    name: str
    layer: int | None
    trains: tuple[str, ...]
    params: int = 0
    owner: str | None = None
    experts: tuple[int, ...] | None = None


@dataclass
class Full:
    """The running state of one module whose weights train. `kept`: names of the modules of its adapter that were ever active, which
    all of them share; `aside`: the originals, or what was trained while those are shown."""

    whole: Whole
    adapter: str
    kept: set[str]
    aside: dict[str, torch.Tensor] | None = None
    shows_original: bool = False
    opened: bool = False  # gradients are let in, as far as they are not switched off one by one
    asleep: set[str] = field(default_factory=set)  # parameters that were switched off when gradients were last kept out
    inference: bool = False
    cut: bool = False  # `aside` holds this process's part of weights that are divided among the processes


class FullWrapper(ModulesToSaveWrapper):
    """A module of PEFT's `modules_to_save` that trains in place."""

    _layerpeft: Full
    modules_to_save: Any
    original_module: Any

    def __init__(self, module: nn.Module, state: Full) -> None:
        self.__dict__["_layerpeft"] = state
        super().__init__(module, state.adapter)
        self._modules["original_module"] = self._modules.pop(
            "original_module"
        )  # names go by `modules_to_save`, as in PEFT
        self.register_state_dict_post_hook(_under_one_name)
        self.picked = _picked(module, state.whole)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT does; single experts get their gradients."""
        if self.picked is None or kwargs.get("adapter_names") is not None:
            return super().forward(*args, **kwargs)
        return run(self.original_module, self.picked, args, kwargs)

    def update(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Takes its adapter. Raises: ConfigError for another one."""
        state = self._layerpeft
        if adapter_name != state.adapter:
            raise ConfigError(ONE_ONLY.format(name=adapter_name, module=state.whole.name))
        self._adapters.add(adapter_name)
        if adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = self.original_module

    def enable_adapters(self, enabled: bool) -> None:
        """Shows the trained weights or the original ones."""
        self._disable_adapters = not enabled
        self._settle()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Another adapter than its own finds the original weights. Raises: ValueError, as in PEFT."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"Attempted to set multiple ({names}) adapters at once for modules_to_save.")
        if names and names[0] not in self._adapters:
            raise ValueError(f"Adapter {names[0]} not found in {self._adapters}")
        self._active_adapter = names[0] if names else []
        self._layerpeft.inference = inference_mode
        self._settle()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """The original weights stay."""
        if adapter_name in self._adapters:
            show(self, trained=False)
            self.original_module.requires_grad_(False)
            self.picked = None
        super().delete_adapter(adapter_name, new_active_adapters)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrapper: as it was trained, or as it was."""
        state = self._layerpeft
        if self.picked is not None:
            self.picked.tie()
        show(self, trained=merge and state.adapter in (adapter_names or self.active_adapters))
        if not merge:
            self.original_module.requires_grad_(False)
        return self.original_module

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is saved: nothing of a module that was never active, once another one was.

        Nor of a state dict that is empty, as Trainer gives it where ZeRO-3 is told to gather nothing for a folder.
        """
        if adapter_name not in self._adapters or not _is_saved(self) or not state_dict:
            return {}
        found = {k: state_dict[f"modules_to_save.{adapter_name}.{k}"] for k in self.original_module.state_dict()}
        state = self._layerpeft
        if state.shows_original and state.cut:
            raise SaveError(f"{state.whole.name}: {SAVE_WHILE_ON}")
        return _with_aside(self, found) if state.shows_original else found

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """None: PEFT takes every key of the map for one that the file must have, and a file has what was ever active alone."""
        return {}

    def trained_change(self) -> tuple[float, float]:
        """(‖ΔW‖², ‖W‖²) of what was trained against the original weights."""
        return self.change_in(_tensors(self))

    def change_in(self, tensors: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """The same, of these alone."""
        state = self._layerpeft
        change = weight = 0.0
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.device.type == "meta":
                continue
            now, other = local(tensor), (state.aside or {}).get(name)
            before = now if other is None else now if state.shows_original else other
            after = now if other is None or not state.shows_original else other
            parts = change_of(before, after)
            change, weight = change + parts[0], weight + parts[1]
        return change, weight

    def _mixed_batch_forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise ConfigError(
            "adapter_names= mixes adapters within a batch, and weights that are trained in place are of one kind at a time; call "
            "the model once with the adapter and once within disable_adapter()"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Reads what a folder holds as well, where names go without the adapter's, and keeps what the weights were before."""
        state = self._layerpeft
        if state.adapter not in self.modules_to_save:  # its adapter was deleted
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        inside = f"{prefix}modules_to_save.{state.adapter}."
        names = self.original_module.state_dict()
        for name, mine in names.items():
            if prefix + name in state_dict:
                given = state_dict.pop(prefix + name)
                state_dict[inside + name] = cut_like(given, mine) if given.shape == mine.shape else given
        held = {n: state_dict[inside + n] for n in names if inside + n in state_dict}
        if _brings_other(self, held):
            if state.shows_original:
                raise ConfigError(
                    f"{state.whole.name}: weights are loaded while the adapter is switched off; switch it on before"
                )
            _keep(self)
        state_dict |= {f"{prefix}original_module.{n}": t for n, t in held.items()}  # the same module by its other name
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _settle(self) -> None:
        """Brings weights and gradients into line with what is switched on. Layers that sleep go on sleeping."""
        state = self._layerpeft
        on = not self._disable_adapters and state.adapter in self.active_adapters
        show(self, trained=on)
        opened = on and not state.inference
        if opened == state.opened:
            return
        state.opened = opened
        held = full_parameters(self)
        if opened:
            for name, parameter in held.items():
                parameter.requires_grad_(name not in state.asleep)
        else:
            state.asleep = {n for n, p in held.items() if not p.requires_grad}
            for parameter in held.values():
                parameter.requires_grad_(False)


def place(base: nn.Module, wholes: Iterable[Whole], adapter: str) -> None:
    """Puts wrappers into the unwrapped model before PEFT looks for modules to wrap; it then takes those that are there."""
    kept: set[str] = set()
    for whole in wholes:
        parent, _, child = whole.name.rpartition(".")
        module = base.get_submodule(whole.name)
        if not isinstance(module, FullWrapper):  # one module can have two names
            setattr(base.get_submodule(parent), child, FullWrapper(module, Full(whole, adapter, kept)))


def open_all(model: nn.Module, adapter: str) -> None:
    """Lets gradients into the wrappers of an adapter, just after PEFT has frozen the whole model."""
    for wrapper in wrappers(model, adapter):
        wrapper._layerpeft.opened, wrapper._layerpeft.asleep = False, set()
        wrapper.original_module.requires_grad_(False)
    for wrapper in wrappers(model, adapter):
        wrapper._settle()


def adopt(
    model: nn.Module,
    adapter: str,
    layer_names: Sequence[str],
    biases: bool = True,
    experts: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Turns PEFT's own wrappers of a folder that was loaded into those that train in place; originals go to the CPU.

    `experts`: of modules that hold all experts of their layer in 3-D tensors, those that were picked.
    """
    kept: set[str] = set()
    place = place_among(layer_names)
    for path, module in list(model.named_modules()):
        if type(module) is not ModulesToSaveWrapper or adapter not in module.modules_to_save:
            continue
        name = clean(path)
        inner: Any = module.modules_to_save[adapter]
        picked = (experts or {}).get(name)
        layer = place(name if picked is None else name_of(name, picked[0], whole=True))
        held = dict(inner.named_parameters())
        trains = tuple(n for n, p in held.items() if p.is_floating_point() and (biases or not is_bias(n)))
        whole = whole_of(name, layer, {n: held[n] for n in trains}, picked)
        state = Full(whole, adapter, kept)
        saved = _in_parts(module.original_module.state_dict(), whole)
        state.aside = {n: local(t).to("cpu", copy=True) for n, t in saved.items() if t.device.type != "meta"}
        kept.add(name)
        state.opened = any(p.requires_grad for p in held.values())
        state.inference = not state.opened
        for other, parameter in held.items():
            parameter.requires_grad_(state.opened and picked is None and other in trains)
        module.__class__ = FullWrapper
        module.__dict__["_layerpeft"] = state
        del module._modules["original_module"]
        module._modules["original_module"] = inner
        module.register_state_dict_post_hook(_under_one_name)
        wrapper: Any = module
        wrapper.picked = _picked(inner, whole)
        for parameter in wrapper.picked.parameters() if wrapper.picked is not None else ():
            parameter.requires_grad_(state.opened)


def state_of(wrapper: FullWrapper) -> Full:
    """The running state of a wrapped module."""
    return wrapper._layerpeft


def wrappers(model: nn.Module, adapter: str) -> Iterator[FullWrapper]:
    """All wrappers of an adapter, always-on modules included."""
    for module in model.modules():
        if isinstance(module, FullWrapper) and adapter in module._adapters:
            yield module


def full_layers(model: nn.Module, adapter: str) -> dict[str, FullWrapper]:
    """The wrapped modules of layers, by their name in the unwrapped model; always-on modules are not among them."""
    found = ((w._layerpeft.whole, w) for w in wrappers(model, adapter))
    return {whole.name: w for whole, w in found if whole.layer is not None and whole.owner is None}


def full_parameters(wrapper: FullWrapper) -> dict[str, nn.Parameter]:
    """The parameters of a wrapped module that may train, by their name in it; none where another place of them has them."""
    whole = wrapper._layerpeft.whole
    if whole.owner is not None:
        return {}
    if wrapper.picked is not None:
        return {f"{name}[{e}]": p for (name, e), p in wrapper.picked.items()}
    held = dict(wrapper.original_module.named_parameters())
    return {name: held[name] for name in whole.trains}


def targets_of(name: str, wrapper: FullWrapper) -> dict[str, dict[str, nn.Parameter]]:
    """The targets in a wrapped module of this name, itself or its picked experts, each with the parameters that may train."""
    if wrapper.picked is None:
        return {name: held} if (held := full_parameters(wrapper)) else {}
    found: dict[str, dict[str, nn.Parameter]] = {}
    for (parameter, expert), held in wrapper.picked.items():
        found.setdefault(name_of(name, expert, whole=True), {})[parameter] = held
    return found


class One(nn.Module):
    """One expert of a wrapped module, as a report asks for it: how far it has changed."""

    def __init__(self, wrapper: FullWrapper, expert: int) -> None:
        super().__init__()
        self._of = (wrapper, f"[{expert}]")  # in a tuple, since it is no part of this one

    def trained_change(self) -> tuple[float, float]:
        """(‖ΔW‖², ‖W‖²) of the expert."""
        wrapper, end = self._of
        return wrapper.change_in({n: t for n, t in _tensors(wrapper).items() if n.endswith(end)})


def reported(name: str, wrapper: FullWrapper) -> dict[str, nn.Module]:
    """The targets in a wrapped module of this name, each as a module that tells how far it has changed."""
    picked = wrapper.picked
    if picked is None:
        return {name: wrapper}
    return {name_of(name, e, whole=True): One(wrapper, e) for e in dict.fromkeys(e for _, e in picked.places.values())}


def unpicked(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """By parameter name, of tensors that hold all experts of a layer those that were not picked, in the place of the whole."""
    found: dict[str, torch.Tensor] = {}
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, FullWrapper) and wrapper.picked is not None:
            inside, module = f"{clean(path)}.modules_to_save.{adapter}.", wrapper.original_module
            found |= {f"{inside}{n}": module.get_parameter(n).data[:0] for n in wrapper._layerpeft.whole.trains}
            found |= {f"{inside}{n}": view for n, view in wrapper.picked.others()}
    return found


def tensors_kept(model: nn.Module, adapter: str) -> dict[int, torch.Tensor]:
    """All of which the original may lie on the CPU, by identity."""
    each = (w if w.picked is None else w.picked for w in wrappers(model, adapter))
    return {id(t): t for module in each for t in [*module.parameters(), *module.buffers()]}


def keep_originals(model: nn.Module, adapter: str, names: Iterable[str] | None = None, always: bool = True) -> None:
    """Copies these modules (None: all of them), and always-on ones, to the CPU as they are, unless that was done before."""
    wanted = None if names is None else set(names)
    for wrapper in wrappers(model, adapter):
        whole = wrapper._layerpeft.whole
        own = {whole.owner or whole.name, *targets_of(whole.name, wrapper)}
        if always if whole.layer is None else wanted is None or own & wanted:
            _keep(wrapper)


def saved_modules(model: nn.Module, adapter: str) -> list[str]:
    """Names of the modules that a saved folder holds, in the order of the model."""
    return [w._layerpeft.whole.name for w in wrappers(model, adapter) if _is_saved(w)]


def loaded_modules(model: nn.Module, adapter: str, state: Mapping[str, Any], prefix: str) -> set[str]:
    """Names of the modules of layers of which a state dict, with or without the adapter's name in its keys, holds tensors."""
    keys = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
    held = {clean(k.replace(f".modules_to_save.{adapter}.", ".")) for k in keys}
    found = full_layers(model, adapter).items()
    return {n for n, w in found if any(f"{n}.{k}" in held for k in w.original_module.state_dict())}


@torch.no_grad()
def put_back(model: nn.Module, adapter: str, but: Iterable[str]) -> None:
    """Lets the modules of layers other than these be what they were before they trained, as if they never had."""
    trained = set(but)
    for name, wrapper in full_layers(model, adapter).items():
        state = wrapper._layerpeft
        if name in trained or state.aside is None:
            continue
        single = state.whole.experts or ()
        stays = tuple(f"[{e}]" for e in single if name_of(name, e, whole=True) in trained)
        if not state.shows_original:
            tensors = _tensors(wrapper)
            for part, original in state.aside.items():
                if not part.endswith(stays):
                    local(tensors[part]).copy_(original)
                    rewritten(tensors[part])
        if not stays:
            state.aside = None
            state.kept.discard(name)


def keep_experts(wrapper: FullWrapper, experts: Iterable[int]) -> None:
    """Those of a wrapped module go on as picked ones; the others have never trained."""
    picked, state = wrapper.picked, wrapper._layerpeft
    assert picked is not None
    kept = tuple(experts)
    picked.drop({e for _, e in picked.places.values()} - set(kept))
    state.whole = replace(state.whole, experts=kept)
    ends = tuple(f"[{e}]" for e in kept)
    state.aside = None if state.aside is None else {n: t for n, t in state.aside.items() if n.endswith(ends)}


def unwrap(model: nn.Module, name: str, adapter: str) -> None:
    """Takes the wrapper off a module of this name, and off other places of its weights; they are as they were, and frozen."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, FullWrapper) or adapter not in module._adapters:
            continue
        whole = module._layerpeft.whole
        if name in (whole.name, whole.owner):
            show(module, trained=False)
            module._layerpeft.kept.discard(whole.name)
            module.original_module.requires_grad_(False)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)


@torch.no_grad()
def show(wrapper: FullWrapper, trained: bool) -> None:
    """Exchanges the weights with what lies aside, where the other ones are wanted. Nothing is rounded, no Parameter is new."""
    state = wrapper._layerpeft
    if state.shows_original == (not trained):
        return
    state.shows_original = not trained
    if state.aside is None:
        return
    tensors = _tensors(wrapper)
    if any(local(tensors[n]).shape != other.shape for n, other in state.aside.items()):
        state.shows_original = not state.shows_original
        raise ConfigError(f"{state.whole.name}: {CUT_LATER}")
    for name, other in state.aside.items():
        tensor = tensors[name]
        mine = local(tensor)
        other = other.to(mine.dtype)
        if mine is tensor and other.device == mine.device and wrapper.picked is None:
            state.aside[name], tensor.data = tensor.data, other
        else:  # in place, so that a device holds no second copy of the layers
            state.aside[name] = mine.to("cpu", copy=True)
            mine.copy_(other)
            rewritten(tensor)


def _under_one_name(wrapper: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets state dicts hold the weights once: torch.distributed.checkpoint takes two names of one weight for two weights.

    While the originals are shown they go by both names: PEFT reads the base by one of them.
    """
    if len(wrapper.modules_to_save) and not wrapper._layerpeft.shows_original:
        for key in [k for k in state if k.startswith(f"{prefix}original_module.")]:
            del state[key]


def whole_of(
    name: str, layer: int | None, trains: Mapping[str, nn.Parameter], experts: tuple[int, ...] | None = None
) -> Whole:
    """A module with these parameters; of single experts those tensors of it that hold one matrix or bias for each."""
    if experts is None:
        return Whole(name, layer, tuple(trains), sum(prod(stored_shape(p)) for p in trains.values()))
    shapes = {n: stored_shape(p) for n, p in trains.items()}
    number = next(shape[0] for shape in shapes.values() if len(shape) == 3)
    held = {n: s for n, s in shapes.items() if s[0] == number and (len(s) == 3 or (len(s) == 2 and is_bias(n)))}
    size = sum(prod(s[1:]) for s in held.values()) * len(experts)
    return Whole(name, layer, tuple(held), size, experts=tuple(sorted(experts)))


def _picked(module: nn.Module, whole: Whole) -> Picked | None:
    return None if whole.experts is None else Picked(module, whole.trains, whole.experts)


def _in_parts(state: Mapping[str, torch.Tensor], whole: Whole) -> dict[str, torch.Tensor]:
    """Of a module's tensors what trains of it, where that is single experts."""
    if whole.experts is None:
        return dict(state)
    return {f"{n}[{e}]": state[n][e] for e in whole.experts for n in whole.trains}


def _with_aside(wrapper: FullWrapper, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's tensors with what lies aside in its place."""
    aside, picked = wrapper._layerpeft.aside or {}, wrapper.picked
    if picked is None:
        return dict(found) | aside
    copies = {n: t.clone() for n, t in found.items()}
    for (name, expert), _ in picked.items():
        copies[name][expert] = aside.get(f"{name}[{expert}]", copies[name][expert])
    return copies


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by its name."""
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias")


def _keep(wrapper: FullWrapper) -> None:
    state = wrapper._layerpeft
    state.kept.add(state.whole.name)
    if state.aside is None:
        tensors = _tensors(wrapper)
        state.cut = any(map(is_cut, tensors.values()))
        held = {n: local(t).detach() for n, t in tensors.items() if t.device.type != "meta"}
        state.aside = {n: t.to("cpu", copy=True) for n, t in held.items()}


def _is_saved(wrapper: FullWrapper) -> bool:
    state = wrapper._layerpeft
    return not state.kept or state.whole.name in state.kept or state.whole.layer is None


def _brings_other(wrapper: FullWrapper, incoming: Mapping[str, torch.Tensor]) -> bool:
    """Whether these tensors are other ones than are there."""
    tensors = wrapper.original_module.state_dict()
    for name, tensor in incoming.items():
        mine = tensors[name]
        if mine.device.type == "meta":
            continue
        if mine.shape != tensor.shape or type(mine) is not type(tensor):
            return True
        if not torch.equal(mine, tensor.to(mine.device, mine.dtype)):
            return True
    return False


def _tensors(wrapper: FullWrapper) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers, the objects themselves, by name; none where another place of them has them."""
    if wrapper._layerpeft.whole.owner is not None:
        return {}
    if wrapper.picked is not None:
        return {f"{name}[{e}]": p for (name, e), p in wrapper.picked.items()}
    module = wrapper.original_module
    saved: Sequence[str] = list(module.state_dict())  # first, because it lets FSDP2 give up what it has gathered
    found: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {n: found[n] for n in saved if n in found}

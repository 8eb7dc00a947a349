"""What a method that unlocks linears and norms tells those who follow it."""

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, SaveError
from layerpeft.integrations.peft import BASE_BIAS, let_rest, loading_folder, lora_layers, watch_states
from layerpeft.model.biases import biased
from layerpeft.model.layers import Target
from layerpeft.model.load import Work
from layerpeft.model.names import clean
from layerpeft.training.method import Fold, Tensors
from layerpeft.tuners.beside import read_beside, written_beside, zero_factors
from layerpeft.tuners.lora.method import LoraMethod
from layerpeft.tuners.unlock import layer
from layerpeft.tuners.unlock.layer import GROUP, Unlocked, norms, place, trained, unlocked

FILE = "layerpeft_scales.safetensors"
SERVED = "plain PEFT loads the saved folder, as DoRA with biases and norms"
BARE = (
    "plain PEFT loads the saved folder over a base whose linears have biases (from_pretrained(…, {keys}) gives the base some that "
    "are zero) and passes over the learned ones where they have none; layerpeft.load and layerpeft merge take the base as it is"
)
ONE_ONLY = (
    "a model has one adapter that unlocks it: {name!r} cannot be another, nor a copy of it. Where a trainer wants a copy of "
    "what was trained before (DPO without a reference model), merge it first (layerpeft merge) and train a new adapter over that, "
    "or give the trainer a ref_model"
)


class UnlockMethod(LoraMethod):
    """Trains a scale and a bias of each chosen linear, and norms."""

    mixes = False
    restates = True
    needs = frozenset(("scales",))
    single = None

    @classmethod
    def ranks(cls, asked: int) -> tuple[int, ...]:
        """None: nothing has a rank."""
        return ()

    @classmethod
    def work(cls, config: Any) -> Work:
        """Next to nothing, but for the way down to a layer's first norm."""
        return Work(1, fixed=True, norms=config.norms)

    @classmethod
    def fold(cls, folder: Path) -> Fold:
        """Scales and biases into weights and biases."""
        saved = saved_in(folder)
        return lambda name, linear, state: layer.folded(
            linear, saved[f"{name}.scale"], saved.get(f"{name}.shift"), state
        )

    def wrap(self, targets: Iterable[Target]) -> None:
        """Turns LoRA modules of rank 1 into scales and biases, and lets norms rest that are told to."""
        record = self.config._layerpeft
        asked = record.selection.targets if record.selection is not None else [t.name for t in targets]
        for module in lora_layers(self.model, self.adapter).values():
            place(module, self.adapter, record.asked.biases, self.config.inference_mode)
        layer.adopt(self.model, self.adapter, asked)
        self.watch()

    def watch(self) -> None:
        """Lets PEFT's own ways to read an adapter find a stock one, in this process."""
        watch_states(_as_stock)

    def tensors(self) -> Tensors:
        """Linear -> its scale and bias; norm -> its weights."""
        found = {clean(n): trained(m, self.adapter) for n, m in norms(self.model, self.adapter).items()}
        return super().tensors() | found

    def wrapped(self) -> set[str]:
        """Linears and norms."""
        return super().wrapped() | set(map(clean, norms(self.model, self.adapter)))

    def modules(self) -> Mapping[str, nn.Module]:
        """The norms."""
        return {clean(n): m for n, m in norms(self.model, self.adapter).items()}

    def told(self) -> list[str]:
        """Where the saved folder will do."""
        return [self._served()]

    def _served(self) -> str:
        keys = self._places()
        return BARE.format(keys=", ".join(f"{k}=True" for k in keys)) if keys else SERVED

    def _places(self) -> tuple[str, ...]:
        """Keys of the base's config by which it gets places for learned biases that it has none for."""
        held = unlocked(self.model, self.adapter).items()
        shifted = [(n, m) for n, m in held if m.lora_magnitude_vector[self.adapter].shift is not None]
        bare = [clean(n) for n, m in shifted if getattr(m.get_base_layer(), "bias", None) is None]
        found = biased(self.model, bare) if bare else None
        return found[0] if found is not None else ()

    def keep_only(self, targets: Set[str]) -> None:
        """Other linears and norms are what they were."""
        held = {**unlocked(self.model, self.adapter), **norms(self.model, self.adapter)}
        gone = [n for n in held if clean(n) not in targets]
        layer.take_off(self.model, self.adapter, gone)
        lost = {clean(n) for n in gone}
        self.config.target_modules = set(map(clean, unlocked(self.model, self.adapter)))
        self.config.modules_to_save = [n for n in self.config.modules_to_save or () if clean(n) not in lost] or None

    def switched(self, training: Set[str] | None, policy: str) -> None:
        """Lets linears and norms rest that do not train, whatever PEFT switches off and on meanwhile."""
        for name, module in unlocked(self.model, self.adapter).items():
            let_rest(module, self.adapter, training is not None and clean(name) not in training)
        for name, norm in norms(self.model, self.adapter).items():
            norm.rests = training is not None and clean(name) not in training

    def found(self, state: Mapping[str, Any], prefix: str) -> set[str]:
        """Linears and norms by any tensor of theirs, since a checkpoint may leave out what is frozen.

        Of a folder also those that have no place here.
        """
        mark, own = f".modules_to_save.{self.adapter}.", f".{GROUP}.{self.adapter}."
        keys = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
        held = {clean(k.partition(mark)[0]) for k in keys if mark in k} & set(self.modules())
        held |= {clean(k.partition(own)[0]) for k in keys if own in k}
        folder = loading_folder() is not None
        lost = {clean(k.rpartition(".")[0]) for k in keys if ".lora_" not in k and ".modules_to_save." not in k}
        return super().found(state, prefix) | held | (lost if folder else set())

    def read(self, state: dict[str, Any], prefix: str, folder: str | None) -> None:
        """In the place of a stock adapter's tensors: zero as factors, and the scales and biases that lie beside it.

        Raises: SaveError for a stock adapter alone, of which only what they come to over its base could be told.
        """
        keys = [k for k in state if k.startswith(prefix)]
        own = any(k.endswith(f".{GROUP}.{self.adapter}.scale") for k in keys)
        if own or not any(f".lora_B.{self.adapter}." in k for k in keys):
            return
        path = os.path.join(folder, FILE) if folder is not None else None
        if path is None or not os.path.isfile(path):
            raise SaveError(
                f"{folder or 'this state'} holds no {FILE}: scales cannot go on from what they come to in a stock adapter. Load a "
                "folder that layerpeft has saved, with model.load_adapter(folder, adapter_name), or the whole state_dict()"
            )
        saved = saved_in(folder or "")
        for key in [k for k in keys if f".{GROUP}" in k or k.endswith(BASE_BIAS)]:
            del state[key]
        for name, norm in norms(self.model, self.adapter, always=True).items():
            for part in trained(norm, self.adapter):
                if f"{prefix}{name}.{part}" in state:
                    inside = f"{prefix}{name}.modules_to_save.{self.adapter}.{part}"
                    state[inside] = state.pop(f"{prefix}{name}.{part}")
        for name, module in unlocked(self.model, self.adapter).items():
            state |= zero_factors(module, self.adapter, f"{prefix}{name}")
            for part, parameter in module.lora_magnitude_vector[self.adapter].named_parameters():
                given = saved.get(f"{clean(name)}.{part}")
                if given is not None and given.shape != parameter.shape:
                    raise SaveError(f"{folder}: {clean(name)} has {len(given)} outputs, and here {len(parameter)}")
                if given is not None:
                    state[f"{prefix}{name}.{GROUP}.{self.adapter}.{part}"] = given

    def as_stock(self, folder: str) -> dict[str, Any]:
        """DoRA, which a scale of a weight is, and the biases of its linears."""
        own = [m.lora_magnitude_vector[self.adapter] for m in unlocked(self.model, self.adapter).values()]
        return stock_options(any(o.shift is not None for o in own))

    def save(self, folder: str, found: Any) -> dict[str, Any]:
        """The scales, biases and norms themselves; what can read the rest of the folder."""
        held: dict[str, torch.Tensor] = {}
        for name, module in unlocked(self.model, self.adapter).items():
            own: Unlocked = module.lora_magnitude_vector[self.adapter]
            held |= {f"{clean(name)}.{n}": p for n, p in own.named_parameters()}
        for name, norm in norms(self.model, self.adapter, always=True).items():
            held |= {f"{clean(name)}.{n}": p for n, p in trained(norm, self.adapter).items()}
        written_beside(folder, FILE, held)
        return {"unlock": {"file": FILE, "served": self._served()}, "places": list(self._places())}

    def copied(self, adapter: str) -> None:
        """Raises: ConfigError, as PEFT would put plain LoRA in the place of a copy."""
        raise ConfigError(ONE_ONLY.format(name=adapter))

    def swapped(self) -> None:
        """Raises: ConfigError, as PEFT swaps factors alone."""
        raise ConfigError(
            f"hotswap_adapter exchanges LoRA factors, and {self.adapter!r} is scales and biases: model.load_adapter(folder, "
            "adapter_name) on a model that is wrapped the same way takes another folder's"
        )


def stock_options(shifted: bool) -> dict[str, Any]:
    """The fields by which PEFT reads such a folder; `shifted`: with biases."""
    return {"use_dora": True, "bias": "lora_only" if shifted else "none"}


def saved_in(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """`name.scale` and `name.shift` of linears, and the weights of norms, of a saved folder. Raises: SaveError."""
    return read_beside(folder, FILE)


def _as_stock(model: nn.Module, config: Any, adapter: str, found: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """For PEFT's own ways to read an adapter: magnitudes of DoRA, and biases, which the scales and biases come to."""
    stock: dict[str, Any] = {}
    for name, module in unlocked(model, adapter).items():
        inside, linear = f"{name}.{GROUP}.{adapter}", module.get_base_layer()
        own = {n: p.detach() for n, p in module.lora_magnitude_vector[adapter].named_parameters()}
        given = {n: found.get(f"{inside}.{n}", p) for n, p in own.items()}
        stock |= {f"{inside}.{n}": None for n in own} | {inside: layer.magnitude(linear, given["scale"])}
        if "shift" in given:
            stock[name + BASE_BIAS] = layer.bias_of(given["scale"], given["shift"], getattr(linear, "bias", None))
    return stock

"""What a method that trains the weights themselves tells those who follow it; float32 masters behind 16-bit weights."""

import os
import weakref
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.errors import ConfigError, LayerMapError
from layerpeft.integrations.engines.known import is_cut
from layerpeft.integrations.files import replacing
from layerpeft.integrations.peft import loading_folder
from layerpeft.model.experts import SHARED_OUT
from layerpeft.model.layers import Target, base_of
from layerpeft.model.stacked import holder, place_of
from layerpeft.saving.manifest import MANIFEST, read_manifest
from layerpeft.text import size_text
from layerpeft.training import backward
from layerpeft.training.method import Method, Step, Tensors
from layerpeft.training.record import record_of
from layerpeft.tuners.full import layer
from layerpeft.tuners.full.layer import full_layers, full_parameters, state_of, wrappers
from layerpeft.tuners.full.masters import Masters

FILE = "layerpeft_masters.safetensors"


class FullMethod(Method):
    """Trains weights in place. State is real here: masters, where they are asked for, and the optimizers that step on them."""

    partial = True
    in_place = whole = True
    needs = frozenset(("in_place",))
    single = "expert_views"

    def __init__(self, model: nn.Module, adapter: str, config: Any) -> None:
        super().__init__(model, adapter, config)
        record = record_of(config)
        asked = record.asked if record is not None else None
        self.masters = Masters() if asked is not None and asked.master_weights else None
        self._steppers: weakref.WeakKeyDictionary[Optimizer, None] = weakref.WeakKeyDictionary()  # the last one last
        self._saved: dict[str, torch.Tensor] | None = None

    def tensors(self) -> Tensors:
        """Target -> the weights in it that train."""
        found: Tensors = {}
        for name, wrapper in full_layers(self.model, self.adapter).items():
            found |= layer.targets_of(name, wrapper)
        return found

    def wrapped(self) -> set[str]:
        """The modules of layers, and single experts; always-on ones are none of the choice."""
        return set(self.modules())

    def modules(self) -> Mapping[str, nn.Module]:
        """Their wrappers, and those of single experts."""
        found: dict[str, nn.Module] = {}
        for name, wrapper in full_layers(self.model, self.adapter).items():
            found |= layer.reported(name, wrapper)
        return found

    def originals(self) -> Mapping[str, torch.Tensor]:
        """Of tensors that hold all experts of a layer those that were not picked, in the place of the whole."""
        return layer.unpicked(self.model, self.adapter)

    def place(self) -> None:
        """Puts the wrappers where PEFT will look for modules to copy."""
        layer.place(base_of(self.model), self.config._layerpeft.wholes, self.adapter)

    def wrap(self, targets: Iterable[Target]) -> None:
        """Lets gradients into what is to train, of which PEFT has frozen all."""
        layer.open_all(self.model, self.adapter)

    def told(self) -> list[str]:
        """What always-on modules cost."""
        record = self.config._layerpeft
        always = [w for w in record.wholes if w.layer is None and w.owner is None]
        asked = {w.name for w in always} - set(record.new_tensors)
        if not asked:
            return []
        mine = [w for w in wrappers(self.model, self.adapter) if state_of(w).whole.name in asked]
        trained = [p for w in mine for p in w.parameters()]
        count, held = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
        try:
            stop = backward.where(self.model, record.selection.stack if record.selection else None)
            below = f"; the backward pass runs to the bottom ({stop.why})" if stop.bottom else ""
        except LayerMapError:
            below = ""
        return [
            f"trained besides, whatever is chosen: {', '.join(w.name for w in always if w.name in asked)}: {count:,} weights, "
            f"{size_text(held)} of gradients, {size_text(2 * held)} of AdamW's states, {size_text(held)} of originals on the "
            f"CPU{below}"
        ]

    def assumed(self) -> list[str]:
        """Where the originals are."""
        held = layer.tensors_kept(self.model, self.adapter)
        size = size_text(sum(t.nbytes for t in held.values()))
        said = [f"the original weights of what was ever trained are kept on the CPU (up to {size})"]
        single = any(w.picked is not None for w in wrappers(self.model, self.adapter))
        return [*said, SHARED_OUT] if single else said

    def moved(self) -> set[str]:
        """Targets that have moved, by less than shows in 16 bits."""
        return {n.partition("|")[0] for n in self.masters.ahead(self._named())} if self.masters is not None else set()

    def keep_only(self, targets: Set[str]) -> None:
        """The modules are as they were, and frozen."""
        for name, wrapper in full_layers(self.model, self.adapter).items():
            kept = layer.reported(name, wrapper).keys() & targets
            if not kept:
                layer.unwrap(self.model, name, self.adapter)
            elif wrapper.picked is not None:
                layer.keep_experts(wrapper, sorted(place_of(t)[1] for t in kept))

    def keep(self, targets: Set[str], always: bool = True) -> None:
        """Their originals, on the CPU."""
        layer.keep_originals(self.model, self.adapter, targets, always)

    def went_on(self, trained: Set[str]) -> None:
        """Of those, and what is always on, the originals are what the weights are now; the others never trained."""
        layer.put_back(self.model, self.adapter, trained)
        layer.keep_originals(self.model, self.adapter, trained)

    def lend(self, step: Step) -> None:
        """The optimizer sees float32 masters in the place of 16-bit weights."""
        if self.masters is None:
            return
        self._steppers.pop(step.optimizer, None)
        self._steppers[step.optimizer] = None
        named = self._named()
        if self._saved is not None:
            self.masters.restore(self._saved, named, [step.optimizer])
            self._saved = None
        self.masters.before_step({n: p for n, p in named.items() if p.requires_grad})

    def take_back(self) -> None:
        """The weights are what the masters round to."""
        if self.masters is not None:
            self.masters.after_step()

    def switched(self, training: Set[str] | None, policy: str) -> None:
        """Masters of what rests go where its optimizer's states go."""
        if self.masters is None or training is None:
            return
        for target, group in self.tensors().items():
            if target not in training:
                self.masters.rest([f"{target}|{n}" for n in group], policy)

    def found(self, state: Mapping[str, Any], prefix: str) -> set[str]:
        """By any tensor of theirs; which experts of a module trained is said by the folder that is loaded."""
        folder, modules = loading_folder(), full_layers(self.model, self.adapter)
        told = folder is not None and os.path.isfile(os.path.join(folder, MANIFEST))
        said = (read_manifest(folder).get("selection") or {}).get("targets") if folder and told else None
        found: set[str] = set()
        for name in layer.loaded_modules(self.model, self.adapter, state, prefix):
            if said is not None and modules[name].picked is not None:
                found |= {t for t in said if holder(t) == name}
            else:
                found |= set(layer.reported(name, modules[name]))
        return found

    def on_load(self, state: Mapping[str, Any], prefix: str, found: Set[str], folder: str | None) -> None:
        """Masters are taken up as soon as there is an optimizer to give their states to; what is not there never trained."""
        if folder is None:
            return
        path = os.path.join(folder, FILE)
        if self.masters is not None and os.path.isfile(path):
            self._saved = load_file(path)
        layer.put_back(self.model, self.adapter, found)

    def covers(self) -> bool:
        """While trained weights are shown."""
        found = [state_of(w) for w in wrappers(self.model, self.adapter)]
        return any(state.aside is not None and not state.shows_original for state in found)

    def swapped(self) -> None:
        """Raises: ConfigError, as PEFT swaps factors alone."""
        raise ConfigError(
            f"hotswap_adapter exchanges LoRA factors, and {self.adapter!r} trains the weights themselves: "
            "model.load_adapter(folder, adapter_name) on a model that is wrapped the same way takes another folder's weights"
        )

    def as_stock(self, folder: str) -> dict[str, Any]:
        """PEFT's file names the modules whose weights are there."""
        return {"modules_to_save": layer.saved_modules(self.model, self.adapter)}

    def save(self, folder: str, found: Any) -> dict[str, Any]:
        """The masters, and the states that a plain load would round."""
        if self.masters is None:
            return {}
        path = Path(folder, FILE)
        held = self.masters.tensors(self._named(), list(self._steppers))
        if held:
            with replacing(path) as file:
                save_file({k: t.detach().cpu().contiguous() for k, t in held.items()}, file)
        else:
            path.unlink(missing_ok=True)
        return {}

    def carried(self) -> dict[str, torch.Tensor]:
        """The masters, whole."""
        held = self.masters.tensors(self._named(), list(self._steppers)) if self.masters is not None else {}
        return {} if any(map(is_cut, held.values())) else held

    def restore(self, carried: Mapping[str, torch.Tensor]) -> None:
        """As from a folder: as soon as there is an optimizer."""
        if self.masters is not None and carried:
            self._saved = dict(carried)

    def _named(self) -> dict[str, nn.Parameter]:
        inside = {f"{t}|{n}": p for t, group in self.tensors().items() for n, p in group.items()}
        known = {id(p) for p in inside.values()}
        always = ((state_of(w).whole.name, w) for w in wrappers(self.model, self.adapter))
        return inside | {
            f"{name}|{n}": p for name, w in always for n, p in full_parameters(w).items() if id(p) not in known
        }

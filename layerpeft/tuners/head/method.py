"""What a method that trains offsets of heads tells those who follow it."""

import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, SaveError
from layerpeft.integrations.files import header_of
from layerpeft.integrations.peft import loading_folder, lora_layers, unwrap_layer, watch_states
from layerpeft.model.heads import HEAD, holder, name_of, place_of
from layerpeft.model.layers import Target
from layerpeft.model.load import Work
from layerpeft.model.names import clean
from layerpeft.selection.draws import seed_of
from layerpeft.training.method import Method, Tensors
from layerpeft.tuners.beside import read_beside, written_beside, zero_factors
from layerpeft.tuners.head.layer import GROUP, head_layers, offsets_of, parts, place

FILE = "layerpeft_heads.safetensors"
SERVED = (
    "plain PEFT loads the saved folder (lora_bias); it does not merge it where the projection has no bias, which layerpeft merge "
    "does for architectures whose config has a place for one, and vLLM does not serve biases of adapters: merge for it"
)
ONE_ONLY = (
    "a model has one adapter that is offsets of heads: {name!r} cannot be another, nor a copy of it. Where a trainer wants a copy "
    "of what was trained before (DPO without a reference model), merge it first (layerpeft merge) and train a new adapter over "
    "that, or give the trainer a ref_model"
)


class HeadMethod(Method):
    """Trains a vector for each chosen head."""

    mixes = False
    needs = frozenset(("heads",))

    @classmethod
    def work(cls, config: Any) -> Work:
        """Next to nothing."""
        return Work(1, fixed=True)

    @classmethod
    def cannot_wait(cls, config: Any) -> list[str]:
        """What it would be measured with."""
        said = f"init_std={config.init_std!r} would change what heads give out that are not chosen yet"
        return [said] if config.init_std else []

    def wrap(self, targets: Iterable[Target]) -> None:
        """Turns LoRA modules of rank 1 into offsets of the heads that may train."""
        selection, heads = self.config._layerpeft.selection, {}
        targets = list(targets)
        sizes = {holder(t.name): t.shape[1] // (t.heads or 1) for t in targets if t.kind == HEAD or t.heads}
        asked = [t.name for t in targets] if selection is None else selection.targets
        for projection, head in filter(None, map(place_of, asked)):
            heads.setdefault(projection, []).append(head)
        for name, layer in lora_layers(self.model, self.adapter).items():
            projection = clean(name)
            held = sorted(heads[projection])
            offsets = place(layer, self.adapter, held, sizes[projection], self.config.inference_mode)
            self._begin(projection, offsets)
        self.watch()

    def watch(self) -> None:
        """Lets PEFT's own ways to read an adapter find a stock one, in this process."""
        watch_states(_as_stock)

    def _begin(self, projection: str, offsets: Any) -> None:
        """Small random values, where these are asked for, equal on every device and in every process."""
        asked = self.config._layerpeft.asked
        if asked is None or not asked.init_std:
            return
        for head, offset in offsets.items():
            draw = torch.Generator().manual_seed(seed_of(f"{asked.seed}|{name_of(projection, head)}|offset"))
            if offset.device.type != "meta":
                offset.data.copy_(torch.randn(offsets.size, generator=draw) * asked.init_std)

    def tensors(self) -> Tensors:
        """Head -> its offset."""
        found: Tensors = {}
        for name, layer in head_layers(self.model, self.adapter).items():
            found |= {name_of(clean(name), h): {"offset": v} for h, v in offsets_of(layer)[self.adapter].items()}
        return found

    def modules(self) -> Mapping[str, nn.Module]:
        """Each head by itself."""
        return parts(self.model, self.adapter)

    def told(self) -> list[str]:
        """Where the saved folder will do."""
        return [SERVED]

    def keep_only(self, targets: Set[str]) -> None:
        """Other heads lose theirs, and projections without a head come back."""
        kept = set()
        for name, layer in head_layers(self.model, self.adapter).items():
            offsets, projection = offsets_of(layer)[self.adapter], clean(name)
            offsets.drop([h for h, _ in offsets.items() if name_of(projection, h) not in targets])
            if any(True for _ in offsets.items()):
                kept.add(projection)
            else:
                unwrap_layer(self.model, name, self.adapter)
        self.config.target_modules = kept

    def switched(self, training: Set[str] | None, policy: str) -> None:
        """Lets heads rest that do not train, whatever PEFT switches off and on meanwhile."""
        for name, layer in head_layers(self.model, self.adapter).items():
            offsets, projection = offsets_of(layer)[self.adapter], clean(name)
            rest = [h for h, _ in offsets.items() if training is not None and name_of(projection, h) not in training]
            offsets.resting = frozenset(rest)

    def found(self, state: Mapping[str, Any], prefix: str) -> set[str]:
        """Heads by their own tensors; of a folder, whose weights are a stock adapter's, by the file beside them.

        Raises: SaveError for a stock adapter alone, which says nothing of heads.
        """
        keys = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
        mark = f".{GROUP}.{self.adapter}."
        own = {clean(k.replace(mark, ".")) for k in keys if mark in k}
        if own or not any(".lora_B." in k and self.adapter in k for k in keys):
            return own
        folder = loading_folder()
        path = os.path.join(folder, FILE) if folder is not None else None
        if path is None or not os.path.isfile(path):
            raise SaveError(
                f"{folder or 'this state'} holds no {FILE}: offsets of heads cannot go on from the constants that they come to. "
                "Load a folder that layerpeft has saved, with model.load_adapter(folder, adapter_name), or the whole state_dict()"
            )
        return set(header_of(Path(path)))

    def on_load(self, state: Mapping[str, Any], prefix: str, found: Set[str], folder: str | None) -> None:
        """Takes over the offsets that lie beside the stock adapter, whose own factors and constants are let go."""
        if folder is None or not os.path.isfile(os.path.join(folder, FILE)):
            return
        given: Any = state
        saved = read_beside(folder, FILE)
        for name, layer in head_layers(self.model, self.adapter).items():
            for head, offset in offsets_of(layer)[self.adapter].items():
                vector = saved[name_of(clean(name), head)]
                if vector.shape != offset.shape:
                    raise SaveError(
                        f"{folder}: head {head} of {clean(name)} has {len(vector)} numbers, and here {len(offset)}"
                    )
                given[f"{prefix}{name}.{GROUP}.{self.adapter}.head_{head}"] = vector
            given.update(zero_factors(layer, self.adapter, f"{prefix}{name}"))

    def save(self, folder: str, found: Any) -> dict[str, Any]:
        """The offsets themselves; what can read the rest of the folder."""
        written_beside(folder, FILE, {n: group["offset"] for n, group in self.tensors().items()})
        return {"heads": {"file": FILE, "served": SERVED}}

    def copied(self, adapter: str) -> None:
        """Raises: ConfigError, as PEFT would put plain LoRA in the place of a copy."""
        raise ConfigError(ONE_ONLY.format(name=adapter))

    def swapped(self) -> None:
        """Raises: ConfigError, as PEFT swaps factors alone."""
        raise ConfigError(
            f"hotswap_adapter exchanges LoRA factors, and {self.adapter!r} is offsets of heads: model.load_adapter(folder, "
            "adapter_name) on a model that is wrapped the same way takes another folder's offsets"
        )


def _as_stock(model: nn.Module, config: Any, adapter: str, found: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """For PEFT's own ways to read an adapter: factors of zero, and as their bias what the offsets add to the output."""
    stock: dict[str, Any] = {}
    for name, layer in head_layers(model, adapter).items():
        offsets, bias = offsets_of(layer)[adapter], layer.lora_B[adapter].bias
        given = {h: found.get(f"{name}.{GROUP}.{adapter}.head_{h}", v) for h, v in offsets.items()}
        with torch.no_grad():
            stock[f"{name}.lora_B.{adapter}.bias"] = offsets.constant(layer.get_base_layer(), given).to(bias)
    return stock | {k: None for k in found if f".{GROUP}." in k}

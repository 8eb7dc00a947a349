"""An adapter of LoRA factors as it lies on disk: its modules with rank and scale, and all that makes it more than that."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig

from layerpeft.integrations.files import as_written
from layerpeft.integrations.peft import scale_of
from layerpeft.saving.manifest import WEIGHTS
from layerpeft.saving.shards import Checkpoint, entries_of
from layerpeft.text import some
from layerpeft.using.export.limits import STARTS, Limits

PREFIX = "base_model.model."  # of PEFT's names
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# options of PEFT's LoRA that are read here, or say nothing of a saved adapter; any other one that is set means something to PEFT
READ = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size", "megatron_core", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True)
class Factor:
    """What an adapter adds to the weight of a linear is `scale`·B·A, with A (rank, in) and B (out, rank)."""

    rank: int
    scale: float
    into: int
    out: int


@dataclass(frozen=True)
class Adapter:
    """`factors` by the names of modules in the base; `saved`: modules that were saved whole, by the names that the config has for
    them, each with its tensors; `others`: tensors that are neither."""

    folder: Path
    said: Mapping[str, Any]
    config: Any
    weights: Checkpoint
    factors: Mapping[str, Factor]

    @cached_property
    def listed(self) -> tuple[str, ...]:
        """Names of the modules that are saved whole."""
        return tuple(self.config.modules_to_save or ())

    @cached_property
    def saved(self) -> tuple[str, ...]:
        """The tensors of those."""
        return tuple(k for k in self._rest if any(f".{name}." in k for name in self.listed))

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Tensors that are neither factors nor of those."""
        return tuple(k for k in self._rest if k not in self.saved)

    @cached_property
    def _rest(self) -> tuple[str, ...]:
        own = {key(name, side) for name in self.factors for side in "AB"}
        return tuple(k for k in self.weights.entries if k not in own)

    @property
    def rank(self) -> int:
        """The largest."""
        return max((f.rank for f in self.factors.values()), default=0)

    def read(self, name: str, side: str, times: float = 1.0) -> torch.Tensor:
        """A or B of a module, as it was saved; multiplied in float32."""
        found = self.weights.read(key(name, side))
        return found if times == 1.0 else found.float() * times

    def evened(self, of: Callable[[Factor], float]) -> tuple[float, dict[str, float]]:
        """For a server that knows one number for all modules, where each has its own: the one that most of them have, and by what B
        of each is multiplied so that it holds for that module as well."""
        own = {name: of(factor) for name, factor in self.factors.items()}
        common = Counter(value for value in own.values() if value).most_common(1)
        common = common[0][0] if common else 1.0
        return common, {name: value / common for name, value in own.items()}


def key(name: str, side: str) -> str:
    """What PEFT calls a factor."""
    return f"{PREFIX}{name}.lora_{side}.weight"


def is_plain(folder: Path) -> bool:
    """Whether PEFT takes it for LoRA of some kind."""
    return isinstance(PeftConfig.from_pretrained(str(folder.absolute())), LoraConfig)


def read_adapter(folder: Path, said: Mapping[str, Any]) -> Adapter | None:
    """None where the weights are not in safetensors. Raises: SaveError for a damaged file."""
    path = folder / WEIGHTS[0]
    if not path.is_file():
        return None
    config: Any = PeftConfig.from_pretrained(str(folder.absolute()))
    weights = Checkpoint(folder, entries_of(path))
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in weights.entries.items():
        if found := FACTOR.fullmatch(name):
            sides.setdefault(found[1], {})[found[2]] = entry.shape
    factors = {}
    with as_written(f"{path} holds no pairs of factors"):
        for name, pair in sides.items():
            (rank, into), (out, _) = pair["A"], pair["B"]
            factors[name] = Factor(rank, scale_of(config, name, rank), into, out)
    return Adapter(folder, said, config, weights, factors)


def faults(adapter: Adapter, limits: Limits) -> list[str]:
    """What of an adapter a server does not take: what was given, and what is allowed."""
    config, found = adapter.config, []
    for name, value, usual in _unread(config):
        found.append(f"{name}={value!r}: {limits.name} does not do this; allowed: {usual!r}")
    if config.bias != "none":
        found.append(f"bias={config.bias!r}: {limits.name} takes no biases with an adapter; allowed: 'none'")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() not in STARTS:
        found.append(
            f"init_lora_weights={start!r}: PEFT changes the base when such an adapter is loaded, and {limits.name} "
            f"does not; allowed: {', '.join(STARTS)}"
        )
    if wrong := [name for name in adapter.listed if name.rpartition(".")[2] not in limits.saved]:
        allowed = f"allowed: {', '.join(limits.saved)}" if limits.saved else "allowed: none"
        found.append(f"modules_to_save={wrong}: {limits.name} takes no such modules with an adapter; {allowed}")
    if adapter.others and not found:
        found.append(f"{some(adapter.others)}: {limits.name} takes factors of linears, and nothing else")
    if not adapter.factors:
        found.append(f"it has no factors, which is all that {limits.name} reads of an adapter")
    if limits.ranks and adapter.rank > limits.ranks[-1]:
        found.append(f"rank {adapter.rank}: allowed: up to {limits.ranks[-1]}")
    if experts := [name for name in adapter.factors if ".experts" in name]:
        found.append(f"{some(experts)}: {limits.name} keeps experts in other pieces; allowed: linears outside of them")
    return found


def _unread(config: Any) -> list[tuple[str, Any, Any]]:
    """Options that are set, and mean something that is not read here."""
    found = []
    for field in fields(LoraConfig):
        usual = field.default if field.default is not MISSING else None
        value = getattr(config, field.name, usual)
        if field.name not in READ and (value or usual) and value != usual:
            found.append((field.name, value, usual))
    return found

"""Config classes: PEFT's own, plus how the layers are picked."""

from __future__ import annotations

import copy
import enum
from collections.abc import Collection, Iterable
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from peft import LoraConfig
from torch import nn

from layerpeft.errors import ConfigError, LayerMapError, LayerpeftError, Problem, Problems
from layerpeft.integrations.engines.engine import Need
from layerpeft.integrations.peft import LayerPeftType, default_targets
from layerpeft.model.heads import HEAD
from layerpeft.model.layers import LayerMap, Stacks, Target, base_of, stacks_of
from layerpeft.model.patterns import check_patterns
from layerpeft.model.stacked import picked_in, stack_of
from layerpeft.model.targets import MODULE, find_targets, not_wrapped
from layerpeft.model.units import in_units
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.config import LayerQuantConfig, frozen_precision
from layerpeft.selection.budget import Budget, Counts
from layerpeft.selection.choose import choose_among, weighed
from layerpeft.selection.chooses import Chooses
from layerpeft.selection.examined import Examined
from layerpeft.selection.scoring import HANDED, live_only, needs, needs_batches
from layerpeft.selection.select import Select, Selection
from layerpeft.selection.typecheck import check, checked
from layerpeft.text import some
from layerpeft.training.method import Method
from layerpeft.tuners.cached import CACHED, Cached, check_cached
from layerpeft.tuners.lora.method import LoraMethod
from layerpeft.tuners.soft import SOFT, Soft, check_soft
from layerpeft.tuners.stock import Recorded, RecordedLoraConfig, lora_fields, stock_config
from layerpeft.tuners.taught import Taught, check_taught

QUANT_FIELDS = ("quantize_frozen", "quantize_trained", "quant")
OWN_FIELDS = ("select", "train_new", "distill", *QUANT_FIELDS, *SOFT, *CACHED)
INIT_WITHOUT_TRACE = (True, "gaussian")  # initialisations that leave the wrapped model's output as it was


@dataclass
class LayerLoraConfig(Chooses, Soft, Taught, Cached, LoraConfig):
    """LoRA on chosen layers. Takes every field of `peft.LoraConfig`; with `select="all"` (the default) it is one.

    `select`: a layer grammar, a dict or a `Select`. `train_new`: also train tensors without pre-trained values (a new head).
    `quantize_frozen`, `quantize_trained`: precision of linears in layers that do not train, and that do; `quant`: bits by a choice
    of its own. Fields of `Soft`: how much each layer trains; of `Taught`: what is learned from a teacher; of `Cached`: what is kept
    of rows. `batches`: model inputs with labels, used at run time, never written. Raises: ConfigError naming every problem at once.
    """

    select: Any = checked(
        "all", "Which layers: 'last:3', [3, 7], '8-15', or {by: gradient_norm, keep: 0.25, …}. Default: all of them."
    )
    train_new: bool = checked(True, "Train tensors that have no pre-trained values, such as a new classification head.")
    quantize_frozen: Any = checked(
        None, "Precision of the linears in layers that do not train: nf4, fp4, int8, or bits. Default: as loaded."
    )
    quantize_trained: Any = checked(
        None, "The same for layers that train, under their adapters (QLoRA). Default: as loaded."
    )
    quant: Any = checked(None, "Bits by a choice of its own: {select: …, bits: …} or {mean_bits: 4.5, …}.")
    batches: InitVar[Iterable[Any] | None] = None
    kind: ClassVar[enum.Enum] = LayerPeftType.LAYER_LORA
    method: ClassVar[str] = "lora"
    works_by: ClassVar[type[Method]] = LoraMethod
    seen_as: ClassVar[type[Recorded]] = RecordedLoraConfig  # by PEFT, in a folder too
    units: ClassVar[tuple[str, ...]] = ("layer", "sublayer", "target", "expert")  # what can be chosen
    derived: ClassVar[tuple[str, ...]] = ("peft_type",)  # fields that follow from others

    def __post_init__(self, batches: Iterable[Any] | None = None) -> None:
        problems = Problems(type(self).__name__)
        select = Select()
        try:
            select = self.choosing
        except LayerpeftError as error:
            problems.absorb(error, "select")
        _check_unit(select.unit, self.units, problems)
        if not select.is_all or _asks_more(self):
            for name in ("layers_to_transform", "layers_pattern", "layer_replication"):
                if getattr(self, name) is not None:
                    problems.add(
                        f"{name}={getattr(self, name)!r} is PEFT's own way to choose layers; say it in select alone",
                        name,
                    )
        check(type(self), vars(self), problems)
        self.refuse(problems)
        _check_quant(self, problems)
        check_taught(self, self.works_by.in_place, problems)
        check_cached(self, problems)
        check_soft(self, select, self.kind is LayerLoraConfig.kind, problems)
        problems.raise_if_any(ConfigError)
        super().__post_init__()
        self._batches = batches
        if not self.is_plain:
            self.peft_type = self.kind  # type: ignore[assignment]

    def refuse(self, problems: Problems) -> None:
        """Adds what else is wrong with a config of this kind."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; PEFT's own keys alone where nothing is chosen."""
        plain = super().to_dict()
        if self.is_plain:
            return {k: v for k, v in plain.items() if k not in OWN_FIELDS}
        plain |= {"select": self.choosing.to_dict()} | self.taught() | self.cached()
        return plain if self.quantizing is None else plain | {"quant": self.quantizing.plain()}

    @property
    def quantizing(self) -> LayerQuantConfig | None:
        """`quant`, parsed. Raises: ConfigError."""
        return self._parsed("quant", LayerQuantConfig.parse) if self.quant is not None else None

    @property
    def stored(self) -> Quantized | None:
        """The precisions of a run that this one goes on with, in the place of a choice of its own."""
        return self.__dict__.get("_stored")

    def with_stored(self, found: Quantized | None) -> LayerLoraConfig:
        """A copy that keeps to these precisions."""
        twin = copy.deepcopy(self)
        twin.__dict__["_stored"] = found
        return twin

    def bare(self) -> Self:
        """A copy without batches, which shares all else."""
        return copy.copy(self)

    def changed(self, **changes: Any) -> Self:
        """A copy, made anew, of which these fields say something else. Raises: ConfigError."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in self.derived}
        return type(self)(**given | changes, batches=self._batches)

    def at_rank(self, rank: int) -> dict[str, Any]:
        """The fields that say this rank, as a recipe writes them; the scale stays where whole numbers allow it."""
        return _at_rank(self, rank)

    def resolve(self, model: nn.Module, batches: Iterable[Any] | None = None, *, progress: bool = True) -> LoraConfig:
        """The stock LoRA config this means on that model, with full target names; for `add_adapter` on a live model.

        Raises: SelectionError, ScoreError, LayerMapError, ConfigError.
        """
        if self.quantizes:
            raise ConfigError(
                "a stock config quantizes nothing: call layerpeft.quantize(model, …) first, and resolve a config without "
                "quantize_frozen, quantize_trained and quant"
            )
        return self.settled(model, batches, progress=progress)

    def settled(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        *,
        examined: Examined | None = None,
        progress: bool = True,
    ) -> Any:
        """What PEFT will be given to wrap that model by. `examined`: what `examine` has found, or another choice in its place.

        Raises: as `resolve`.
        """
        if self.is_plain:
            return _plain(self, model)
        if self.is_scheduled and examined is None:
            raise ConfigError(
                "select: layers that are chosen again during training have no stock config that means the same; give the config "
                "itself to get_peft_model or to a trainer's peft_config="
            )
        given = batches if batches is not None else self._batches
        found = examined or self.examine(model)
        selection = choose_among(model, found.select, found.layers, found.targets, given, progress, found.costs)
        return self.stock_for(model, selection, found)

    def examine(self, model: nn.Module, stacks: Stacks | None = None) -> Examined:
        """How this config chooses, and among what in that model; `stacks`: what a walk over it has found.

        Raises: LayerMapError, SelectionError, ConfigError.
        """
        check_patterns(self, (name for name, _ in model.named_modules()))
        seen = stacks or stacks_of(model)
        layers = seen.layers(self.choosing.stack)
        blocks = tuple(dict.fromkeys([*seen.blocks(), layers.names]))
        targets = self.targets_in(model, layers)
        units, costs = _in_units(self, model, layers, targets), _costs(self, model, layers, targets)
        self.check_taught_layers(base_of(model), layers.whole)
        return Examined(self.choosing.placed(units[0]), *units, blocks, costs)

    def targets_in(self, model: nn.Module, layers: LayerMap) -> tuple[Target, ...]:
        """All targets that this config would train in any layer. Raises: SelectionError, ConfigError."""
        found = find_targets(model, layers, target_names(self, layers), self.exclude_modules, self.target_parameters)
        left = left_out(self, model, layers)
        return tuple(t for t in found if t.name not in left)

    def stock_for(self, model: nn.Module, selection: Selection, examined: Examined) -> Recorded:
        """The config that PEFT sees for a choice, with its record. Raises: ConfigError."""
        return stock_config(self, model, selection, examined.targets)

    @property
    def is_plain(self) -> bool:
        """True where this is a stock LoRA config: all layers, nothing to record."""
        return self.kind is LayerLoraConfig.kind and self.choosing.is_all and not _asks_more(self)

    @property
    def quantizes(self) -> bool:
        """True where some of the model is to be stored in fewer bits."""
        return any(getattr(self, name) is not None for name in QUANT_FIELDS)

    def stock(self, given: dict[str, Any], targets: Iterable[Target]) -> Recorded:
        """The config that PEFT sees, from LoRA's own options; `targets` are the chosen ones."""
        return self.seen_as(**given)

    @classmethod
    def loaded(cls, model: nn.Module, adapter: str, live: Any, trains: bool, folder: Path) -> Method:
        """The method of an adapter that PEFT has read from a folder; `trains`: it is to be trained further. Raises: SaveError."""
        return cls.works_by(model, adapter, live)

    def needs(self, batches: bool) -> frozenset[Need]:
        """What an engine must be able to do for it; `batches`: whether some are there before training, for scores."""
        found: set[Need] = {*self.works_by.needs, *(("rates",) if self.is_rated else ()), *_of_single(self)}
        found |= {"distill"} if self.distill is not None else set()
        if self.quantizes:
            found.add("packed")
        if self.is_scheduled:
            found.add("schedule")
        elif needs_batches(self.choosing):
            waits = not batches or live_only(self.choosing)
            found.add("wait" if waits else "batches")
            if waits and self.quantizes:
                found.add("packed_later")
        elif needs(self.choosing) == "weights":
            found.add("weights")
        return frozenset(found)

    @property
    def is_scheduled(self) -> bool:
        """True where layers are chosen again during training."""
        return self.choosing.is_scheduled

    @property
    def is_deferred(self) -> bool:
        """True when the choice has to wait for the batches of the first optimizer step."""
        return self._batches is None and needs_batches(self.choosing)


# A property of the finished class, so that `dataclasses.replace` finds the batches and hands them on.
LayerLoraConfig.batches = property(lambda self: self._batches)  # type: ignore[assignment,misc]


def left_out(config: LayerLoraConfig, model: nn.Module, layers: LayerMap) -> dict[str, str]:
    """What "all-linear" does not mean in this model, and why."""
    if config.target_modules != "all-linear" or config.works_by.in_place:
        return {}
    return not_wrapped(model, layers.whole)


def _asks_more(config: LayerLoraConfig) -> bool:
    """Whether more than a choice is asked for that LoRA does not know."""
    return config.quantizes or config.is_rated or config.distill is not None or config.prefix_cache is not None


def _costs(config: LayerLoraConfig, model: nn.Module, layers: LayerMap, targets: tuple[Target, ...]) -> Counts | None:
    def traced(budget: Budget | None) -> Counts:
        if "costs" not in HANDED:
            raise LayerMapError("import layerpeft.planning.layers, which counts it")
        return HANDED["costs"](config, model, layers, budget)

    whole = config.share_whole(base_of(model), layers)
    return weighed(model, config.choosing, layers, targets, config.works_by.work(config), traced, whole)


def _in_units(
    config: LayerLoraConfig, model: nn.Module, layers: LayerMap, targets: tuple[Target, ...]
) -> tuple[LayerMap, tuple[Target, ...]]:
    """What is chosen from, and the targets in it. Raises: ConfigError for targets asked for by name that no unit holds."""
    units, held = in_units(layers, config.choosing.unit, targets)
    asked = (t for t in targets if config.works_by.in_place or t.kind != MODULE)  # norms come along
    left = sorted({t.name for t in asked} - {n for t in held for n in (t.name, stack_of(t.name))})
    if left and config.target_modules not in (None, "all-linear"):
        sentence = f"{some(left)} lie in no {units.unit}, and would never train; leave them out, or choose another unit"
        raise ConfigError(Problem(("target_modules",), f"target_modules: {sentence}"))
    _refuse_single(config, model, held)
    return units, held


def _of_single(config: LayerLoraConfig) -> tuple[Need, ...]:
    """What an engine must be able to do for single experts that are named as parameters."""
    single = config.works_by.single if config.choosing.unit == "expert" and config.target_parameters else None
    return () if single is None else (single,)


def _refuse_single(config: LayerLoraConfig, model: nn.Module, targets: tuple[Target, ...]) -> None:
    """Raises: ConfigError where single experts of a tensor are meant, and the method trains all that are in one together."""
    if config.choosing.unit != "expert" or config.works_by.single is not None:
        return
    if single := picked_in(model, (t.name for t in targets)):
        raise ConfigError(
            Problem(
                ("unit",),
                f"unit: expert: method {config.method} keeps what it trains of all experts of a layer together, as they are one "
                f"tensor here ({next(iter(single))}); choose such tensors (unit: target), or another method (lora, full)",
            )
        )


def target_names(config: LayerLoraConfig, layers: LayerMap) -> Any:
    """`target_modules`, or what PEFT would put in its place. Raises: ConfigError where PEFT has no default for the model."""
    if config.target_modules is not None or config.target_parameters:
        return config.target_modules
    names = default_targets(layers.model_type)
    if names is None:
        ends = sorted({t.name.rpartition(".")[2] for t in layers.targets})
        sentence = (
            f"PEFT has no default for model type {layers.model_type!r}; give some of {', '.join(ends)}, or 'all-linear'"
        )
        raise ConfigError(Problem(("target_modules",), sentence), title="target_modules")
    return names


def _plain(config: LayerLoraConfig, model: nn.Module) -> LoraConfig:
    check_patterns(config, (name for name, _ in model.named_modules()))
    return LoraConfig(**lora_fields(config))


def _at_rank(config: LayerLoraConfig, rank: int) -> dict[str, Any]:
    def scaled(alpha: int) -> int:  # that of rsLoRA is meant to follow the rank
        return alpha if config.use_rslora or alpha * rank % config.r else alpha * rank // config.r

    ranks = {k: max(1, v * rank // config.r) for k, v in (config.rank_pattern or {}).items()}
    alphas = {k: scaled(v) for k, v in (config.alpha_pattern or {}).items()}
    return {"r": rank, "lora_alpha": scaled(config.lora_alpha), "rank_pattern": ranks, "alpha_pattern": alphas}


def _check_unit(unit: str, allowed: Collection[str], problems: Problems) -> None:
    if unit not in allowed:
        why = f"{unit}s are not what trains here"
        why = "attention heads are chosen with method: head alone (LayerHeadConfig)" if unit == HEAD else why
        problems.add(f"unit: {why}. Allowed: {', '.join(allowed)}.", "select", "unit")


def _check_quant(config: LayerLoraConfig, problems: Problems) -> None:
    for name in ("quantize_frozen", "quantize_trained"):
        frozen_precision(name, getattr(config, name), problems)
    if config.quant is None:
        return
    if config.quantize_frozen is not None or config.quantize_trained is not None:
        problems.add(
            "quant, and quantize_frozen or quantize_trained: two ways to say the same; write quant alone "
            "(quant={'bits': 4, 'apply_to': 'frozen'} is quantize_frozen=4)",
            "quant",
        )
    try:
        config.quantizing  # noqa: B018 - for what it refuses
    except LayerpeftError as error:
        problems.absorb(error, "quant")


def options_given(config: LoraConfig, shared: Collection[str]) -> list[str]:
    """LoRA's own options, besides the `shared` ones, that are not left at their defaults."""
    plain = LoraConfig()
    own = [f.name for f in fields(LoraConfig) if f.name not in shared]
    return [name for name in own if getattr(config, name) != getattr(plain, name)]

"""Config classes: PEFT's own, plus how the layers are picked."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import MISSING, InitVar, dataclass, field, fields
from typing import Any, ClassVar

from peft import LoraConfig
from torch import nn

from layerpeft import bits_map, heatmap, report, save
from layerpeft.choose import choose, needs_batches
from layerpeft.errors import ConfigError, LayerpeftError, Problems
from layerpeft.integrations.peft import LayerPeftType, default_targets, renamed_leaves
from layerpeft.layers import LayerMap, Target, base_of, layer_map
from layerpeft.newborn import new_modules
from layerpeft.notes import note
from layerpeft.quant_config import LayerQuantConfig, frozen_precision
from layerpeft.quantizing import Quantized
from layerpeft.selection import LiveRecord, Select, Selection
from layerpeft.targets import PARAMETERS, exclusions, match_targets

QUANT_FIELDS = ("quantize_frozen", "quantize_trained", "quant")
OWN_FIELDS = ("select", "train_new", *QUANT_FIELDS)
INIT_WITHOUT_TRACE = (True, "gaussian")  # initialisations that leave the wrapped model's output as it was


@dataclass
class LayerLoraConfig(LoraConfig):
    """LoRA on chosen layers. Takes every field of `peft.LoraConfig`; with `select="all"` (the default) it is one.

    `select`: a layer grammar, a dict or a `Select`. `train_new`: also train tensors without pre-trained values (a new head).
    `quantize_frozen`, `quantize_trained`: precision of the linears in layers that do not train, and that do; `quant`: a
    `LayerQuantConfig` (or a dict), bits by a choice of its own. `batches`: model inputs with labels for data-driven choices; used
    at run time, never written, never copied deep. Raises: ConfigError naming every problem at once.
    """

    select: Any = field(
        default="all",
        metadata={
            "help": "Which layers: 'last:3', [3, 7], '8-15', or {by: gradient_norm, keep: 0.25, …}. Default: all of them."
        },
    )
    train_new: bool = field(
        default=True,
        metadata={"help": "Train tensors that have no pre-trained values, such as a new classification head."},
    )
    quantize_frozen: Any = field(
        default=None,
        metadata={
            "help": "Precision of the linears in layers that do not train: nf4, fp4, int8, or bits. Default: as loaded."
        },
    )
    quantize_trained: Any = field(
        default=None,
        metadata={"help": "The same for layers that train, under their adapters (QLoRA). Default: as loaded."},
    )
    quant: Any = field(
        default=None, metadata={"help": "Bits by a choice of its own: {select: …, bits: …} or {mean_bits: 4.5, …}."}
    )
    batches: InitVar[Iterable[Any] | None] = None
    kind: ClassVar[LayerPeftType] = LayerPeftType.LAYER_LORA
    method: ClassVar[str] = "lora"

    def __post_init__(self, batches: Iterable[Any] | None = None) -> None:
        problems = Problems("LayerLoraConfig")
        select = Select()
        try:
            select = Select.parse(self.select)
        except LayerpeftError as error:
            problems.add(str(error))
        if not select.is_all or self.quantizes:
            for name in ("layers_to_transform", "layers_pattern", "layer_replication"):
                if getattr(self, name) is not None:
                    problems.add(
                        f"{name}={getattr(self, name)!r} is PEFT's own way to choose layers; say it in select alone"
                    )
        if not isinstance(self.train_new, bool):
            problems.add(f"train_new={self.train_new!r} is not true or false")
        _check_quant(self, problems)
        problems.raise_if_any(ConfigError)
        super().__post_init__()
        self._batches = batches
        if not self.is_plain:
            self.peft_type = self.kind  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerLoraConfig:
        twin = copy.copy(self)
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value if name == "_batches" else copy.deepcopy(value, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_batches"} | {"_batches": None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data; PEFT's own keys alone where nothing is chosen."""
        plain = super().to_dict()
        if self.is_plain:
            return {k: v for k, v in plain.items() if k not in OWN_FIELDS}
        plain |= {"select": Select.parse(self.select).to_dict()}
        return plain if self.quant is None else plain | {"quant": LayerQuantConfig.parse(self.quant).plain()}

    @property
    def stored(self) -> Quantized | None:
        """The precisions of a run that this one goes on with, in the place of a choice of its own."""
        return self.__dict__.get("_stored")

    def with_stored(self, found: Quantized | None) -> LayerLoraConfig:
        """A copy that keeps to these precisions."""
        twin = copy.deepcopy(self)
        twin.__dict__["_stored"] = found
        return twin

    def with_batches(self, batches: Iterable[Any] | None) -> LayerLoraConfig:
        """A copy that carries these batches."""
        twin = copy.deepcopy(self)
        twin._batches = batches
        return twin

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

    def settled(self, model: nn.Module, batches: Iterable[Any] | None = None, *, progress: bool = True) -> LoraConfig:
        """What PEFT will be given to wrap that model by. Raises: as `resolve`."""
        if self.is_plain:
            return LoraConfig(**_lora_fields(self))
        if self.is_scheduled:
            raise ConfigError(
                "select: layers that are chosen again during training have no stock config that means the same; give the config "
                "itself to get_peft_model or to a trainer's peft_config="
            )
        given = batches if batches is not None else self._batches
        layers = layer_map(model, Select.parse(self.select).stack)
        selection = choose(
            model,
            self.select,
            batches=given,
            target_modules=target_names(self, layers),
            exclude_modules=self.exclude_modules,
            target_parameters=self.target_parameters,
            progress=progress,
        )
        return self.stock_for(model, selection)

    def targets_in(self, model: nn.Module, layers: LayerMap) -> tuple[Target, ...]:
        """All targets that this config would train in any layer. Raises: SelectionError, ConfigError."""
        names, exclude = target_names(self, layers), exclusions(self.exclude_modules, model, layers)
        return match_targets(layers, names, exclude, self.target_parameters)

    def stock_for(self, model: nn.Module, selection: Selection) -> RecordedLoraConfig:
        """The config that PEFT sees for a choice, with its record. Raises: ConfigError."""
        return stock_config(self, model, selection)

    @property
    def is_plain(self) -> bool:
        """True where this is a stock LoRA config: all layers, nothing to record."""
        return Select.parse(self.select).is_all and not self.quantizes

    @property
    def quantizes(self) -> bool:
        """True where some of the model is to be stored in fewer bits."""
        return any(getattr(self, name) is not None for name in QUANT_FIELDS)

    def stock(self, given: dict[str, Any], targets: Iterable[Target]) -> RecordedLoraConfig:
        """The config that PEFT sees, from LoRA's own options; `targets` are the chosen ones."""
        return RecordedLoraConfig(**given)

    @property
    def is_scheduled(self) -> bool:
        """True where layers are chosen again during training."""
        return Select.parse(self.select).is_scheduled

    @property
    def is_deferred(self) -> bool:
        """True when the choice has to wait for the batches of the first optimizer step."""
        return self._batches is None and needs_batches(Select.parse(self.select))


# A property of the finished class, so that `dataclasses.replace` finds the batches and hands them on.
LayerLoraConfig.batches = property(lambda self: self._batches)  # type: ignore[assignment,misc]


@dataclass
class RecordedLoraConfig(LoraConfig):
    """A stock LoRA config whose folder also keeps the record of what was chosen, and why."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's file, then `layers.csv`, `layers.png`, and last `layerpeft.json`."""
        super().save_pretrained(save_directory, **kwargs)
        record: LiveRecord | None = getattr(self, "_layerpeft", None)
        model = getattr(self, "_layerpeft_model", lambda: None)()
        if record is None:
            return
        if record.selection is None:
            note(
                f"{save_directory}: saved before the choice was made; it holds an adapter on every candidate, and no record"
            )
        elif model is not None and save.has_weights(save_directory):
            write_record(save_directory, model, record, getattr(self, "_layerpeft_adapter", "default"))

    def with_record(self, **changes: Any) -> Any:
        """A copy to be saved in the place of this one: other values in some fields, and the record, which copies leave behind."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__.update(changes)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedLoraConfig:
        twin = copy.copy(self)
        shared = ("_layerpeft", "_layerpeft_model")
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_layerpeft")}


def write_record(folder: str | os.PathLike[str], model: nn.Module, record: LiveRecord, adapter: str) -> None:
    """`layers.csv`, `layers.png`, then the manifest `layerpeft.json` over all files of the adapter."""
    assert record.selection is not None
    found = report.layer_report(model, adapter)
    table, picture = (os.path.join(folder, name) for name in save.PICTURES)
    if record.masters is not None:
        record.masters.save(folder)
    scheduled, names, why = {}, record.selection.layer_names, record.selection.why
    if record.schedule is None:
        report.write_csv(found.rows, table)
        report.write_png(found.rows, picture, why)
    else:
        record.schedule.save(folder)
        scheduled = {"schedule": record.schedule.plain()}
        heatmap.write_switches(scheduled["schedule"], names, found.rows, table)
        heatmap.write_heatmap(scheduled["schedule"], names, picture, why)
    stored: dict[str, Any] = {}
    if record.quantized is not None:
        bits_map.write_bits(record.quantized, os.path.join(folder, save.BITS))
        stored = {"quant": record.quantized.to_dict()}
    save.write_manifest(
        folder,
        scheduled
        | stored
        | {
            "method": record.method,
            "selection": record.selection.to_dict(),
            "config": record.config,
            "report": [vars(r) if hasattr(r, "__dict__") else r for r in found.rows],
            "new_tensors": list(record.new_tensors),
            "idle_experts": list(record.idle_experts),
            "checks": record.checks,
        },
    )


def stock_config(config: LayerLoraConfig, model: nn.Module, selection: Selection) -> RecordedLoraConfig:
    """The config that PEFT sees: full names of the chosen targets, new heads among the modules to save, and a record."""
    targets = layer_map(model, selection.stack).targets
    kinds = {t.name: t.kind for t in targets}
    given = _lora_fields(config)
    born = new_modules(model) if config.train_new else ()
    if born:
        listed = [] if config.modules_to_save is None else list(config.modules_to_save)
        given["modules_to_save"] = listed + [n for n in born if not any(n == k or n.endswith(f".{k}") for k in listed)]
    parameters = [n for n in selection.targets if kinds[n] in PARAMETERS]
    modules = {n for n in selection.targets if kinds[n] not in PARAMETERS}
    _refuse_saved_targets(given["modules_to_save"], selection.targets)
    _refuse_renamed_targets(model, modules)
    given |= {
        "target_modules": modules or [],
        "target_parameters": parameters or None,
        "exclude_modules": _namesakes(model, modules) or None,
    }
    stock = config.stock(given, [t for t in targets if t.name in set(selection.targets)])
    record = LiveRecord(config=plain_config(config), method=config.method, selection=selection, new_tensors=born)
    stock._layerpeft = record  # type: ignore[attr-defined]
    return stock


def target_names(config: LayerLoraConfig, layers: LayerMap) -> Any:
    """`target_modules`, or what PEFT would put in its place. Raises: ConfigError where PEFT has no default for the model."""
    if config.target_modules is not None or config.target_parameters:
        return config.target_modules
    names = default_targets(layers.model_type)
    if names is None:
        ends = sorted({t.name.rpartition(".")[2] for t in layers.targets})
        raise ConfigError(
            f"target_modules: PEFT has no default for model type {layers.model_type!r}; "
            f"give some of {', '.join(ends)}, or 'all-linear'"
        )
    return names


def _refuse_saved_targets(modules_to_save: Any, targets: tuple[str, ...]) -> None:
    """Raises: ConfigError for chosen targets inside `modules_to_save`: PEFT would copy them whole and wrap nothing."""
    problems = Problems("modules_to_save")
    for name in modules_to_save or ():
        held = [t for t in targets if re.match(rf"(^|.*\.){name}($|\..*)", t)]
        if held:
            problems.add(
                f"{name!r} holds {len(held)} of the chosen targets ({held[0]}{', …' if len(held) > 1 else ''}); PEFT trains "
                "such modules as whole copies, in every layer, and puts no LoRA in them. Leave them out of target_modules "
                "(exclude_modules), or out of modules_to_save (train_new=False where they are new)"
            )
    problems.raise_if_any(ConfigError)


def _refuse_renamed_targets(model: nn.Module, chosen: set[str]) -> None:
    """Raises: ConfigError for modules whose names PEFT would turn into the experts of all layers."""
    leaves = renamed_leaves(base_of(model), chosen)
    lost = sorted(n for n in chosen if n.rpartition(".")[2] in leaves)
    if lost:
        ends = sorted({".".join(n.split(".")[-2:]) for n in lost})
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ConfigError(
            f"target_modules: on this kind of model PEFT takes the names {', '.join(sorted(leaves))} for the experts of every "
            f"layer, so it cannot wrap {lost[0]}{more} by themselves. Leave them out with "
            f"exclude_modules={ends}; the experts of the chosen layers are named by target_parameters"
        )


def _namesakes(model: nn.Module, chosen: set[str]) -> set[str]:
    """Modules that PEFT would match too, because their names end with the full name of a chosen one."""
    found = set()
    for name, _ in base_of(model).named_modules():
        parts = name.split(".")
        if name not in chosen and any(".".join(parts[i:]) in chosen for i in range(1, len(parts))):
            found.add(name)
    return found


def plain_config(config: LayerLoraConfig) -> dict[str, Any]:
    """The config as JSON takes it, without what is empty."""
    plain = config.to_dict()
    kept = {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items() if v not in (None, {}, [], set())}
    return kept | {"peft_type": config.kind.value}


def _check_quant(config: LayerLoraConfig, problems: Problems) -> None:
    for name in ("quantize_frozen", "quantize_trained"):
        frozen_precision(name, getattr(config, name), problems)
    if config.quant is None:
        return
    if config.quantize_frozen is not None or config.quantize_trained is not None:
        problems.add(
            "quant, and quantize_frozen or quantize_trained: two ways to say the same; write quant alone "
            "(quant={'bits': 4, 'apply_to': 'frozen'} is quantize_frozen=4)"
        )
    try:
        LayerQuantConfig.parse(config.quant)
    except LayerpeftError as error:
        problems.add(str(error))


def options_given(config: LoraConfig, shared: Collection[str]) -> list[str]:
    """LoRA's own options, besides the `shared` ones, that are not left at their defaults."""
    found = []
    for option in fields(LoraConfig):
        default = option.default if option.default is not MISSING else None
        if option.default is MISSING and option.default_factory is not MISSING:
            default = option.default_factory()
        if option.name not in shared and getattr(config, option.name, default) != default:
            found.append(option.name)
    return found


def _lora_fields(config: LoraConfig) -> dict[str, Any]:
    return {
        f.name: copy.deepcopy(getattr(config, f.name))
        for f in fields(LoraConfig)
        if f.init and f.name not in ("peft_type",)
    }

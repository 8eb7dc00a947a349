"""What training will cost, before any weight is loaded: the model is built without storage, and one step of it is traced."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

from layerpeft.errors import ConfigError, LayerMapError, LayerpeftError, Problems, told
from layerpeft.integrations.empty import empty_model, hollow
from layerpeft.integrations.peft import BaseTunerLayer, is_traced
from layerpeft.integrations.torch import counted
from layerpeft.integrations.tracing import add_head, as_quantized, as_traced, weight_bytes
from layerpeft.model.architectures import text_config
from layerpeft.model.costs import costs_of
from layerpeft.model.layers import LayerMap, Stacks, base_of, stacks_of
from layerpeft.model.load import Load
from layerpeft.model.names import lying_in
from layerpeft.model.precisions import Storage, stored_bytes
from layerpeft.model.units import kind_of
from layerpeft.planning import optimizer_bytes
from layerpeft.planning.parts import Teacher, Wrapped, half, put_to_sleep, store, training
from layerpeft.planning.prefix import Apart, Prefix, apart, prefix
from layerpeft.planning.share import Share, share, shares
from layerpeft.planning.text import plan_lines
from layerpeft.planning.trace import Pass, Step, _passes, batch_text, recompute, trace
from layerpeft.planning.writing import Held, held
from layerpeft.text import size_text
from layerpeft.training import backward
from layerpeft.training.distilling import paired, teacher_of
from layerpeft.training.method import Method
from layerpeft.training.record import record_of
from layerpeft.tuners.assume import fixed
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.precision import asked, decides_early


@dataclass(frozen=True)
class PlanRow:
    """One layer: whether it trains, with how many tensors' elements, and its weights in bytes.

    `units`: how many of the smaller units in it train, and of how many, where such were chosen.
    """

    layer: int
    name: str
    trains: bool
    trainable: int
    weight_bytes: int
    units: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {k: v for k, v in vars(self).items() if k != "units" or v is not None}


class _Unit(NamedTuple):
    layer: int
    kind: str
    trains: bool


@dataclass(frozen=True)
class Plan:
    """Bytes by part, operations of one step, where the backward pass stops and why.

    `kept`: a pass that keeps its activations; `recomputed`: one with checkpointing (None where the model has none);
    `everything`: operations of training all weights, in the same order. `checkpointing` says which of the two applies.
    `share`: what one of several cards holds, where there are several. `prefix`: what keeping states below the cut brings.
    `beside`: a teacher, models that reward and answers that are written; both passes have what they take at the highest.
    """

    rows: tuple[PlanRow, ...]
    trainable: int
    total: int
    weights: int
    gradients: int
    states: int
    optimizer: str
    kept: Pass
    recomputed: Pass | None
    everything: tuple[int, int | None]
    checkpointing: bool
    stop: backward.Stop
    assumed: tuple[str, ...]
    share: Share | None = None
    prefix: Prefix | None = None
    beside: Held = Held()

    @property
    def applies(self) -> Pass:
        """The pass that training will make."""
        return self.recomputed if self.checkpointing and self.recomputed else self.kept

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by part."""
        return {
            "weights": self.weights,
            **({"beside": self.beside.weights} if self.beside.weights else {}),
            "gradients": self.gradients,
            "optimizer": self.states,
            "activations": self.applies.peak,
        }

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward and backward pass."""
        return self.applies.flops

    @property
    def flops_full(self) -> int:
        """Those of the same pass with every weight trained."""
        return self.everything[1] if self.checkpointing and self.everything[1] else self.everything[0]

    @property
    def peak_bytes(self) -> int:
        """Weights, those beside the model included, gradients, optimizer states and activations together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return "\n".join(plan_lines(self))


def plan(
    model: nn.Module | str | Path,
    config: peft.PeftConfig,
    *,
    batch_size: int = 8,
    length: int = 512,
    optimizer: str = "adamw_torch",
    checkpointing: bool = False,
    step: Step | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """What one training step costs, without loading a weight.

    `model`: a transformers model (only its config and dtype are read), or the folder or name of a language model;
    `batch_size` rows of `length` tokens, or the shapes of an example batch (`inputs`) for models that read something else.
    Activations count the peak of what one forward and backward pass makes. Raises: LayerpeftError with every problem at once.
    """
    step = step or Step()
    if inputs is not None:
        inputs = {k: v for k, v in inputs.items() if k != "attention_mask" or not _masks_nothing(v)}
    found, bare = wrapped(model, config, _arguments(batch_size, length, optimizer), step)
    full = copy.deepcopy(bare).train()
    besides = held(found.model, batch_size, length, step)
    divided = share(found, optimizer, step, (batch_size, length), checkpointing, inputs) if step.cards else None
    kept, recomputed = _taught(
        found, _passes(found.model, batch_size, length, step, inputs), (batch_size, length), inputs
    )
    kept, recomputed = besides.on(kept), recomputed and besides.on(recomputed)
    if checkpointing and recomputed is None:
        raise ConfigError(f"{type(base_of(found.model)).__name__} has no gradient checkpointing")
    everything = _everything(full, found.layers, batch_size, length, step, inputs)
    cost = training(found, optimizer, step.optim_args)
    applies = recomputed if checkpointing and recomputed else kept
    spared = prefix(found, config, applies.flops, (batch_size, length), step, inputs)
    if spared is not None and spared.lasts and step.cards is None:
        assert spared.layer is not None
        both = apart(found, bare, spared.layer, optimizer, step, (batch_size, length), checkpointing, inputs)
        spared = replace(spared, apart=both)
    shape = batch_text(found.model, batch_size, length) if inputs is None else "the example batch"
    passes = f", {step.accumulation} passes to an optimizer step" if step.accumulation > 1 else ""
    return Plan(
        rows=_rows(found),
        trainable=cost.trainable,
        total=sum(t.numel() for t in counted(found.model).values() if isinstance(t, nn.Parameter)),
        weights=found.weights + cost.masters,
        gradients=cost.gradients,
        states=cost.states,
        optimizer=optimizer,
        kept=kept,
        recomputed=recomputed,
        everything=everything,
        checkpointing=checkpointing,
        stop=found.stop,
        assumed=(*found.assumed, f"{shape}, {optimizer}{passes}"),
        share=divided,
        prefix=spared,
        beside=besides,
    )


def _masks_nothing(mask: Any) -> bool:
    """Which a step sees by its values, of which a trace has none."""
    seen = isinstance(mask, torch.Tensor) and mask.dim() == 2 and not is_traced(mask)
    return seen and bool(mask.all())


def for_cards(
    model: nn.Module | str | Path,
    config: peft.PeftConfig,
    processes: Sequence[int],
    *,
    batch_size: int,
    length: int,
    optimizer: str,
    checkpointing: bool,
    step: Step,
) -> list[Share]:
    """`plan(...).share` alone, for each of these numbers of cards: one trace instead of five. Raises: as `plan`."""
    found, _ = wrapped(model, config, _arguments(batch_size, length, optimizer), step)
    return shares(found, optimizer, step, (batch_size, length), checkpointing, None, processes)


@dataclass(frozen=True)
class Cost:
    """Of a step on one card: bytes at the peak, operations of a pass, elements that train at once."""

    peak_bytes: int
    flops: int
    trainable: int


def cost(
    model: nn.Module | str | Path,
    config: peft.PeftConfig,
    *,
    batch_size: int,
    length: int,
    optimizer: str,
    checkpointing: bool,
    step: Step,
) -> Cost:
    """`plan`'s `peak_bytes`, `flops` and `trainable` alone: one trace instead of four. Raises: as `plan`."""
    found, _ = wrapped(model, config, _arguments(batch_size, length, optimizer), step)
    return _cost(found, batch_size, length, optimizer, checkpointing, step)


def _cost(found: Wrapped, batch_size: int, length: int, optimizer: str, checkpointing: bool, step: Step) -> Cost:
    besides = held(found.model, batch_size, length, step)
    with as_traced(found.model):
        if checkpointing:
            recompute(found.model, step)
        one = trace(found.model, batch_size, length, step)
    kept, operations = found.taught(batch_size, length)
    one = besides.on(Pass(one.peak + kept, one.flops + operations))
    own = training(found, optimizer, step.optim_args)
    fixed = found.weights + besides.weights + own.masters + own.gradients + own.states
    return Cost(fixed + one.peak, one.flops, own.trainable)


def trainable(model: nn.Module | str | Path, config: peft.PeftConfig, step: Step) -> int:
    """`plan(...).trainable` alone, without a trace. Raises: as `plan`."""
    found, _ = wrapped(model, config, [], step)
    return sum(p.numel() for p in found.model.parameters() if p.requires_grad)


def peak_bytes(
    model: nn.Module | str | Path,
    config: peft.PeftConfig,
    *,
    batch_size: int,
    length: int,
    optimizer: str,
    checkpointing: bool,
    step: Step,
) -> int:
    """`plan(...).peak_bytes` alone, of one card where there are several: one trace instead of four. Raises: as `plan`."""
    found, _ = wrapped(model, config, _arguments(batch_size, length, optimizer), step)
    if step.cards is not None:
        return share(found, optimizer, step, (batch_size, length), checkpointing).together
    return _cost(found, batch_size, length, optimizer, checkpointing, step).peak_bytes


def apart_bytes(
    model: nn.Module | str | Path,
    config: peft.PeftConfig,
    *,
    batch_size: int,
    length: int,
    optimizer: str,
    checkpointing: bool,
    step: Step,
) -> Apart | None:
    """`plan(...).prefix.apart` alone; None where the upper part cannot train alone. Raises: as `plan`."""
    found, plain = wrapped(model, config, _arguments(batch_size, length, optimizer), step)
    lasting = prefix(found, config, 0, (batch_size, length), step)
    if lasting is None or not lasting.lasts or lasting.layer is None:
        return None
    return apart(found, plain, lasting.layer, optimizer, step, (batch_size, length), checkpointing)


def layers_that_train(
    model: nn.Module | str | Path, config: peft.PeftConfig, step: Step
) -> tuple[list[int], bool, int, bool]:
    """Without tracing a step: the layers (or smaller units; of those that are kept within groups, as many as of one), whether the
    model can recompute its activations, bytes of weights, and whether others rest. Raises: as `plan`."""
    found, _ = wrapped(model, config, [], step)
    units = _units(found)
    trains = [u.trains for u in units] or [row.trains for row in _rows(found)]
    trained = [i for i, on in enumerate(trains) if on]
    if isinstance(config, LayerLoraConfig) and (within := config.choosing.within) is not None:
        kept = Counter(u.kind if within == "kind" else u.layer for u in units if u.trains)
        trained = list(range(max(kept.values())))
    return trained, recompute(found.model, step), found.weights, not all(trains)


def _everything(
    full: nn.Module, layers: LayerMap | None, batch_size: int, length: int, step: Step, inputs: Mapping[str, Any] | None
) -> tuple[int, int | None]:
    """Operations of training all weights, as it is and with checkpointing: in closed form where there is one, otherwise traced."""
    try:
        if inputs is not None or layers is None:
            raise LayerMapError("shapes of a batch say nothing of tokens")
        loads = [Load(batch_size, length, again, step.fused_head) for again in (False, True)]
        kept, again = (costs_of(full, layers, layers.targets, load).everything for load in loads)
        return kept, again if recompute(full, step) else None
    except LayerMapError:
        kept, recomputed = _passes(full, batch_size, length, step, inputs)
        return kept.flops, recomputed and recomputed.flops


def _arguments(batch_size: int, length: int, optimizer: str) -> list[str]:
    """What is wrong with the numbers and the optimizer's name."""
    found = [f"{name}={n!r}: at least 1" for name, n in (("batch_size", batch_size), ("length", length)) if n < 1]
    return found + [s for s in [optimizer_bytes.problem(optimizer)] if s]


def wrapped(
    model: nn.Module | str | Path, config: peft.PeftConfig, wrong: list[str], step: Step
) -> tuple[Wrapped, nn.Module]:
    """The adapter on a model without storage, and that model as it was.
    Raises: the one LayerpeftError that there is, or ConfigError with all of them and what is `wrong` besides."""
    problems = Problems("plan")
    for sentence in wrong:
        problems.add(sentence)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of names that transformers gives up
            bare = _built(model)
            found = _wrap(config, _packed(copy.deepcopy(bare), step.quantization), step)
    except LayerpeftError as error:
        if not problems.items:
            raise
        problems.absorb(error)
    except (ValueError, TypeError) as error:  # PEFT's own
        problems.add(told(error))
    problems.raise_if_any(ConfigError)
    if step.fused_head:
        add_head(base_of(found.model))
    return found, bare


def _wrap(config: peft.PeftConfig, empty: nn.Module, step: Step) -> Wrapped:
    """As training would: what is to be packed is, and the method has its say before PEFT and after it."""
    stacks = stacks_of(empty)
    resolved = fixed(config, empty, stacks)
    live, assumed = resolved.config, resolved.assumed
    layers = _layers(stacks, live)
    if isinstance(config, LayerLoraConfig) and config.quantizes:
        wanted = asked(config, empty, resolved.layers, known=False, stacks=stacks)
        assumed += store(empty, wanted, decides_early(config))
    chosen = record_of(live) is not None
    method = live.bind(empty, "default") if chosen else Method(empty, "default", live)
    method.place()
    wrapped: Any = peft.get_peft_model(empty, live).train()
    method.wrap(layers.targets if layers is not None else ())
    resting = put_to_sleep(wrapped, resolved.asleep, method.tensors())
    if step.fused_head and step.quantization is not None:
        half(wrapped)
    stop = backward.Stop(None, "the model has no repeated blocks")
    if layers is not None:
        record = record_of(live)
        within = record is not None and record.selection is not None and record.selection.in_parts
        stop = backward.install(wrapped, layers.stack, stacks.blocks(), within)
    teacher = _teacher(config, base_of(wrapped), layers)
    said = (*assumed, *method.assumed(), *((_of_teacher(teacher),) if teacher is not None else ()))
    return Wrapped(wrapped, method, layers, said, stop, resting, resolved.keeps_states, teacher)


def _teacher(config: peft.PeftConfig, base: Any, layers: LayerMap | None) -> Teacher | None:
    """Raises: ConfigError for one that cannot be had, or whose layers cannot teach those of the model."""
    asked = config.distilling if isinstance(config, LayerLoraConfig) else None
    if asked is None or layers is None:
        return None
    teacher = teacher_of(asked, base)
    others, pairs = paired(asked, base, layers.whole, teacher)
    text = text_config(base)
    return Teacher(
        asked,
        0 if teacher is None else weight_bytes(teacher),
        len(pairs),
        int(getattr(text, "hidden_size", 0)),
        int(getattr(text, "vocab_size", 0)),
        next(base.parameters()).element_size(),
        sum(t.params for t in others.targets),
    )


def _of_teacher(teacher: Teacher) -> str:
    whose = f"has weights of its own, {size_text(teacher.weights)}" if teacher.weights else "is the model itself"
    return f"a teacher {whose}, and runs once more in every step; of {teacher.layers} layers states are held"


def _taught(
    found: Wrapped, passes: tuple[Pass, Pass | None], shape: tuple[int, int], inputs: Mapping[str, Any] | None
) -> tuple[Pass, Pass | None]:
    """The passes with what a teacher takes."""
    shapes = [tuple(v.shape[:2]) for v in (inputs or {}).values() if len(getattr(v, "shape", ())) > 1]
    held, operations = found.taught(*(shapes[0] if shapes else shape))
    kept, recomputed = (p and Pass(p.peak + held, p.flops + operations) for p in passes)
    assert kept is not None
    return kept, recomputed


def _built(model: nn.Module | str | Path) -> nn.Module:
    """The model without storage or adapters: itself, where it is that."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    if isinstance(model, str | Path):
        try:
            found = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no model config at {model!s}: {told(error, 200)}") from error
        return empty_model(AutoModelForCausalLM, found)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"plan takes a model or the folder or name of one, not {type(model).__name__}")
    base = base_of(model)
    config = getattr(base, "config", None)
    empty = all(t.is_meta for t in (*base.parameters(), *base.buffers()))
    adapted = any(isinstance(m, BaseTunerLayer) for m in base.modules())
    if empty and not adapted:
        return base
    if not isinstance(config, PretrainedConfig):
        if adapted:
            raise ConfigError(f"{type(base).__name__} has adapters, and no config to plan it without them by")
        return hollow(base)
    return type(base)(copy.deepcopy(config)).to(next(base.parameters()).dtype)


def bare(model: nn.Module | str | Path) -> nn.Module:
    """It without storage or adapters, for more than one plan. Raises: ConfigError."""
    with torch.device("meta"):
        return _built(model)


def _packed(built: nn.Module, quantization: Any) -> nn.Module:
    """It, as a BitsAndBytesConfig stores it."""
    if quantization is not None:
        kind = "int8" if quantization.load_in_8bit else quantization.bnb_4bit_quant_type
        storage = Storage(double_quant=quantization.bnb_4bit_use_double_quant)
        as_quantized(built, quantization, lambda rows, columns: stored_bytes(kind, rows, columns, storage))
    return built


def _layers(stacks: Stacks, config: peft.PeftConfig) -> LayerMap | None:
    """The layers of the stack that was chosen from; None for a model without repeated blocks."""
    record = record_of(config)
    try:
        return stacks.layers(record.selection.stack if record is not None and record.selection is not None else None)
    except LayerMapError:
        return None


def _rows(wrapped: Wrapped) -> tuple[PlanRow, ...]:
    base, layers, units = base_of(wrapped.model), wrapped.layers, _units(wrapped)
    found = []
    for layer in layers.layers if layers is not None else ():
        block: Any = base.get_submodule(layer.name)
        held = list(block.parameters())
        trained = sum(p.numel() for p in held if p.requires_grad)
        beside = [p for p in held if p.requires_grad] if not wrapped.method.in_place else []
        added = sum(p.numel() * p.element_size() for p in beside)
        own = [u.trains for u in units if u.layer == layer.index]
        size, part = weight_bytes(block) - added, (sum(own), len(own)) if units else None
        found.append(PlanRow(layer.index, layer.name, trained > 0, trained, size, part))
    return tuple(found)


def _units(wrapped: Wrapped) -> list[_Unit]:
    """The units that were chosen from, below layers; none where layers were."""
    record, layers = record_of(wrapped.method.config), wrapped.layers
    if layers is None or record is None or record.selection is None or not record.selection.in_parts:
        return []
    tensors = wrapped.method.tensors().items()
    training = [t for t, group in tensors if any(p.requires_grad for p in group.values())]
    found = []
    for layer in layers.layers:
        inside = lying_in([layer.name])
        own = list(filter(inside, training))
        for name in filter(inside, record.selection.layer_names):
            trains = any(map(lying_in([name]), own))
            found.append(_Unit(layer.index, kind_of(name[len(layer.name) + 1 :]), trains))
    return found

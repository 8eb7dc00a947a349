"""What a training config says about precision, and when it is done: before wrapping, or once the layers are chosen."""

import re
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Any

from torch import nn

from layerpeft.errors import ConfigError, Problems, QuantizationError
from layerpeft.model.home import known_of
from layerpeft.model.layers import LayerMap, Stacks, base_of, stacks_of
from layerpeft.model.names import lying_in
from layerpeft.model.precisions import PRECISIONS, named
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.assign import allot, by_training, decided_early, wants_batches
from layerpeft.quantization.quantize import applied
from layerpeft.selection.scoring import needs
from layerpeft.selection.select import DEFAULT_BATCHES, Selection
from layerpeft.tuners.config import LayerLoraConfig


def before_wrapping(
    config: LayerLoraConfig, model: nn.Module, selection: Selection | None, stacks: Stacks
) -> Quantized | None:
    """The precisions to be stored before wrapping; None where nothing is asked, or where that has to wait for the choice.

    `selection`: the layers that train or ever may; None: not chosen yet. Raises: ConfigError, SelectionError, ScoreError.
    """
    if not config.quantizes or (selection is None and waits(config)):
        return None
    return asked(config, model, selection.names if selection is not None else (), stacks=stacks)


def stored(config: LayerLoraConfig, model: nn.Module, wanted: Quantized | None) -> Quantized | None:
    """Quantizes so, and says what came of it. Raises: QuantizationError."""
    if not config.quantizes:
        return known_of(base_of(model)).quantized  # by `quantize`, of which the record is to tell
    if wanted is None:
        return None
    return applied(model, wanted, marked=False)


def asked(
    config: LayerLoraConfig,
    model: nn.Module,
    training: Collection[str],
    *,
    known: bool = True,
    stacks: Stacks | None = None,
) -> Quantized:
    """The precision of every linear, before anything is changed. `known`: False for a model without weights.

    `stacks`: what a walk over the model has found. Raises: as `before_wrapping`.
    """
    if config.stored is not None:
        return config.stored
    spec, stacks = config.quantizing, stacks or stacks_of(model)
    if spec is not None:
        batches = spec._batches if spec._batches is not None else config._batches
        wanted = allot(spec, model, batches, training, known=known, stacks=stacks)
    else:
        frozen, trained = config.quantize_frozen, config.quantize_trained
        wanted = by_training(model, frozen, trained, training, config.choosing.stack, stacks)
    _refuse(config, wanted, training)
    return wanted


def _refuse(config: LayerLoraConfig, wanted: Quantized, training: Collection[str]) -> None:
    """Raises: ConfigError for what PEFT would refuse, or do wrongly, once the weights are packed."""
    problems = Problems("packed layers")
    trains = lying_in(training)
    under = {p for n, p in wanted.assignment.items() if trains(n)}  # packed, and to be wrapped
    by_hqq = any(PRECISIONS[p].package == "hqq" for p in under)
    if not config.works_by.in_place and (not isinstance(config.r, int) or config.r < 1):
        problems.add(f"r={config.r!r} is not a whole number above 0")
    starts = (True, False, "gaussian", "eva", *(() if by_hqq else ("olora",)))
    if under and config.init_lora_weights not in starts:
        problems.add(
            f"init_lora_weights={config.init_lora_weights!r} takes something out of weights that are packed "
            f"({', '.join(sorted(under))}); start with {', '.join(map(repr, starts))}, or keep layers that train in 16 bit"
        )
    if by_hqq and config.lora_bias:
        problems.add("lora_bias=True: PEFT does not do that over HQQ's layers")
    for name in config.modules_to_save or ():
        held = [n for n in wanted.assignment if re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", n)]
        if held:
            problems.add(
                f"modules_to_save: {name!r} trains whole, and {held[0]} in it would be packed; name it in quant's skip_modules"
            )
    problems.raise_if_any(ConfigError)


def decides_early(config: LayerLoraConfig) -> bool:
    """Whether the precisions can be known from the architecture alone, before a weight is loaded."""
    if config.quantizing is not None and not decided_early(config.quantizing):
        return False
    select = config.choosing
    return select.is_scheduled or needs(select) == "nothing" or not _hangs(config)[0]


def wish(config: LayerLoraConfig) -> dict[str, Any]:
    """What a config asks for, as plain data: the same that `Quantized.choice` keeps."""
    if config.quantizing is not None:
        return config.quantizing.plain()
    return {n: v for n in ("quantize_frozen", "quantize_trained") if (v := getattr(config, n)) is not None}


def batches_wanted(config: LayerLoraConfig) -> int:
    """How many batches the choice of precisions looks at; 0 where it needs none, or has its own."""
    spec = config.quantizing
    if spec is None or config.stored is not None:
        return 0
    return (spec.choosing.num_batches or DEFAULT_BATCHES) if spec._batches is None and wants_batches(spec) else 0


def after_choice(config: LayerLoraConfig) -> Callable[[nn.Module, Selection], Quantized] | None:
    """What is to be done once a choice that waits for the first optimizer step is made; None where nothing is."""
    if not config.quantizes or not waits(config):
        return None

    def quantize(model: nn.Module, selection: Selection) -> Quantized:
        try:
            return applied(model, asked(config, model, selection.names), marked=False)
        except QuantizationError as error:
            raise QuantizationError(
                f"{error}\n(the choice of layers has waited for this step: pass batches=… with the config, and it is made, and the "
                "rest packed, before anything else is wrapped)"
            ) from error

    return quantize


def waits(config: LayerLoraConfig) -> bool:
    """Whether precisions hang on a choice that is made at the first optimizer step.

    Raises: ConfigError where layers that train are to be quantized then, under adapters that are there by now.
    """
    hangs, under = _hangs(config)
    if hangs and under:
        raise ConfigError(
            "this choice of layers waits for the first optimizer step, and layers that train cannot be quantized any more then; "
            "pass batches=… with the config, or give all layers the same precision"
        )
    return hangs


def _hangs(config: LayerLoraConfig) -> tuple[bool, bool]:
    """Whether precisions differ between layers that train and others, and whether those that train are packed."""
    if config.quantizing is not None:
        part = config.quantizing.apply_to
        return part != "all", part == "trained"
    frozen, trained = (named(16 if v is None else v) for v in (config.quantize_frozen, config.quantize_trained))
    return frozen != trained, config.quantize_trained is not None


def check_schedule(config: LayerLoraConfig, layers: LayerMap, pool: Collection[int]) -> None:
    """Raises: ConfigError where layers that train by turns are to be quantized while they rest."""
    frozen_only = config.quantize_frozen is not None and config.quantize_trained is None
    if config.quantizing is not None:
        frozen_only = config.quantizing.apply_to == "frozen"
    both = config.quantize_frozen is not None and config.quantize_trained is not None
    if both and len(pool) == len(layers) and named(config.quantize_frozen) != named(config.quantize_trained):
        raise ConfigError(
            f"quantize_frozen={config.quantize_frozen!r} would do nothing: all {len(layers)} {layers.unit}s may train, and have "
            f"the precision of quantize_trained; give {config.quantize_trained!r} for both"
        )
    if frozen_only and len(pool) == len(layers):
        raise ConfigError(
            "layers that change while training, and quantizing those that rest, do not go together: every one of the "
            f"{len(layers)} {layers.unit}s may train, and a {layers.unit} that is switched on needs its original 16-bit "
            "weights, all of which would have to wait on the CPU. Give quantize_trained the same precision (adapters over "
            'quantized layers), or let fewer layers take part (select={"layers": "last:8", …}): those outside are quantized'
        )


def with_lasting_batches(config: LayerLoraConfig) -> LayerLoraConfig:
    """A config whose batches can be gone through twice, where both choices look at them."""
    wanted = batches_wanted(config)
    if not isinstance(config._batches, Iterator) or not wanted:
        return config
    most = max(wanted, config.choosing.num_batches or DEFAULT_BATCHES)
    return config.with_batches(list(islice(config._batches, most)))

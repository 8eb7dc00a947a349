"""The largest choice that fits into a given memory, and what it gives up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from layerpeft.errors import ConfigError, LayerpeftError
from layerpeft.model.layers import layer_map
from layerpeft.planning.plan import Plan, apart_bytes, bare, layers_that_train, peak_bytes, plan
from layerpeft.planning.prefix import Apart
from layerpeft.planning.trace import Step
from layerpeft.selection.scoring import needs
from layerpeft.selection.select import PICKS, options_of
from layerpeft.text import no_size, size_of, size_text
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.soft import BY_SCORE

# What was traced before: other limits ask for the same again.
_SIZES: dict[tuple[Any, ...], int] = {}
MOST = 1000


def _size(model: nn.Module, shape: tuple[Any, ...], config: LayerLoraConfig, how: Mapping[str, Any]) -> int:
    key = (*shape, type(config), str(config.to_dict()), str(how))
    if key not in _SIZES:
        if len(_SIZES) >= MOST:
            _SIZES.pop(next(iter(_SIZES)))
        _SIZES[key] = peak_bytes(model, config, **how)
    return _SIZES[key]


def _shape(model: nn.Module) -> tuple[Any, ...]:
    """All of a model without numbers that a trace hangs on."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = hash(tuple((name, t.shape, t.dtype, t.requires_grad) for name, t in held))
    modules = hash(tuple((name, type(m), m.training) for name, m in model.named_modules()))
    return tensors, modules, str(getattr(model, "config", None))


@dataclass(frozen=True)
class Fit:
    """A config that fits, its plan, in words what was given up, and the recipe's settings that say the same.

    `apart`: it fits where nothing below the lowest trained layer is loaded; what enters that is filled before."""

    config: LayerLoraConfig
    plan: Plan
    batch_size: int
    accumulation: int
    checkpointing: bool
    gave_up: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    apart: Apart | None = None

    def __str__(self) -> str:
        lines = [f"gives up: {text}" for text in self.gave_up] or ["fits as it is"]
        return f"{self.plan}\n" + "\n".join(lines)


@dataclass(frozen=True)
class _Trial:
    """One choice: so many layers (None: as asked), rank, rows at a time, whether frozen layers are packed and blocks recomputed.
    `each`: so many of the rows are one of the recipe's, and stay together."""

    layers: int | None
    rank: int
    rows: int
    checkpointing: bool
    packed: bool = False
    each: int = 1

    @property
    def batch(self) -> int:
        """Rows of the recipe at a time."""
        return self.rows // self.each


def fit(
    model: nn.Module | str | Path,
    config: LayerLoraConfig,
    limit: int | str,
    *,
    batch_size: int = 8,
    length: int = 512,
    optimizer: str = "adamw_torch",
    checkpointing: bool = False,
    step: Step | None = None,
    packing: str | None = None,
    each: int = 1,
) -> Fit:
    """The largest choice within `limit` bytes (or "24GB"): as many layers as fit at all, then the highest rank, then frozen layers
    in their own precision instead of `packing` ("nf4"; None: they stay as they are), then the most rows at a time, and activations
    are recomputed only where they must be. Accumulation makes the same step of fewer rows. `each`: so many of the rows stay
    together, as the two of a preference, and count as one in the settings.

    Where nothing fits that needs the whole model, as many of its top layers as train with nothing below them loaded, and can be
    filled ahead (`apart`).
    Raises: ConfigError when one layer at the lowest rank, one row at a time, is still too large; it says by how much.
    """
    step, room, model = step or Step(), _bytes(limit), bare(model)
    given: dict[str, Any] = {"length": length, "optimizer": optimizer}
    asked = _Trial(None, config.r, batch_size, checkpointing, each=each)
    chosen: list[int] = []
    shape = _shape(model)

    def size(trial: _Trial) -> int:
        how = given | {"batch_size": trial.rows, "checkpointing": trial.checkpointing, "step": step}
        return _size(model, shape, _config(config, trial, chosen, packing), how)

    if size(asked) <= room:
        whole = plan(model, config, batch_size=batch_size, checkpointing=checkpointing, step=step, **given)
        return Fit(config, whole, asked.batch, step.accumulation, checkpointing, ())
    layers, can_recompute, weights, frozen = layers_that_train(model, config, step)
    chosen += layers
    able = packing is not None and step.quantization is None and not (config.quantizes or config.is_scheduled)
    able = able and _packs(
        model, partial(_config, config, replace(asked, layers=1, packed=True), chosen, packing), step
    )
    ranks = config.works_by.ranks(config.r)
    most = replace(asked, checkpointing=checkpointing or can_recompute, packed=able)
    found = _largest(asked, most, chosen, frozen, ranks or (config.r,), lambda trial: size(trial) <= room)
    if found is None:
        top = _top_part(model, config, room, replace(most, packed=False), asked, chosen, given, step)
        if top is not None:
            return top
        least = replace(most, layers=1, rank=(config.r, *ranks)[-1], rows=each)
        rank = f"{config.choosing.unit} at rank {least.rank}" if ranks else config.choosing.unit
        again, others = ", with checkpointing" * most.checkpointing, f", the others in {packing}" * able
        raise _nothing(room, f"{rank}, one row at a time{again}{others}", size(least), weights)
    final = _config(config, found, chosen, packing)
    passes = step.accumulation * batch_size // found.rows
    given |= {"batch_size": found.rows, "checkpointing": found.checkpointing}
    last = plan(model, final, step=replace(step, accumulation=passes), **given)
    gave_up, settings = _said(config, final, asked, found, passes, len(chosen))
    return Fit(final, last, found.batch, passes, found.checkpointing, gave_up, settings)


def _packs(model: nn.Module, packed: Callable[[], LayerLoraConfig], step: Step) -> bool:
    """Whether frozen layers can be packed: what cannot be is told by the config and the model."""
    try:
        layers_that_train(model, packed(), step)
    except LayerpeftError:
        return False
    return True


def _nothing(room: int, least: str, takes: int, weights: int) -> ConfigError:
    return ConfigError(
        f"nothing fits into {size_text(room)}: one {least}, takes {size_text(takes)} (the weights as they are loaded: "
        f"{size_text(weights)}). Shorten the rows (max_length), load the base in a smaller type (dtype: bfloat16), or in 4 bit "
        "(model_init_kwargs: {quantization_config: {load_in_4bit: true}})."
    )


def _top_part(
    model: nn.Module,
    config: LayerLoraConfig,
    room: int,
    most: _Trial,
    asked: _Trial,
    chosen: Sequence[int],
    given: Mapping[str, Any],
    step: Step,
) -> Fit | None:
    """The largest top part that fits with nothing below it loaded, of no more layers than were asked for; None where none does.

    `most`: what is asked with all that saves bytes besides.
    """
    if config.is_scheduled or config.distill is not None or step.quantization is not None or config.quantizes:
        return None
    whole = layer_map(model, config.choosing.stack)
    units, stays = config.choosing.unit == "layer", needs(config.choosing) == "nothing"
    top = list(range(1, len(whole)))[-len(chosen) if units else 0 :]
    inside = tuple(f"{name}." for name in whole.names)
    if sum(p.nbytes for name, p in model.named_parameters() if not name.startswith(inside)) > room:
        return None  # embeddings and head alone
    lasts = config.caching is not None and config.caching.where != "memory"
    disk = config if lasts else config.changed(prefix_cache="disk")
    stays = stays and units and top == list(chosen)  # the choice itself is a top part
    own = {"stack": config.choosing.stack} if config.choosing.stack else {}
    start = disk if stays else disk.changed(select={"layers": f"last:{len(top)}"} | own, **dict.fromkeys(BY_SCORE))

    def takes(trial: _Trial) -> int | None:
        how = dict(given) | {"batch_size": trial.rows, "checkpointing": trial.checkpointing, "step": step}
        found = apart_bytes(model, _config(start, trial, top, None), **how)
        return None if found is None else found.most

    def fits(trial: _Trial) -> bool:
        found = takes(trial)
        return found is not None and found <= room

    ranks = config.works_by.ranks(config.r)
    found = _largest(asked, most, top, True, ranks or (config.r,), fits) if top else None
    if found is None:
        return None
    count = len(top) if found.layers is None else found.layers
    final = _config(start, replace(found, layers=None), top, None)
    select = {} if stays and found.layers is None else {"layerpeft.select": {"layers": f"last:{count}"} | own}
    final = final.changed(select=select["layerpeft.select"]) if select else final
    passes = step.accumulation * asked.rows // found.rows
    how = dict(given) | {"batch_size": found.rows, "checkpointing": found.checkpointing}
    last = plan(model, final, step=replace(step, accumulation=passes), **how)
    words, settings = _said(start, final, asked, replace(found, layers=None), passes, len(top))
    below = f"what lies below layer {len(whole) - count}: it is filled ahead, a layer at a time, and never loaded"
    by = [f"the choice of layers: the last {count} train"] if select else []
    places = {} if lasts else {"layerpeft.prefix_cache": "disk"}
    said = select if own or not select else {"layerpeft.select": f"last:{count}"}
    both = last.prefix.apart if last.prefix is not None else None
    gave_up = (below, *by, *words)
    return Fit(final, last, found.batch, passes, found.checkpointing, gave_up, said | places | settings, both)


def _largest(
    asked: _Trial,
    most: _Trial,
    chosen: Sequence[int],
    frozen: bool,
    ranks: Sequence[int],
    fits: Callable[[_Trial], bool],
) -> _Trial | None:
    """Layers first, with everything else at its least; then rank, precision, rows and time are won back as far as there is room.

    `most`: what is asked with all that saves bytes besides; `frozen`: some layer rests even if all that were asked for train.
    """
    rows = [n * asked.each for n in range(asked.batch, 0, -1) if asked.batch % n == 0]
    least = replace(most, rank=ranks[-1], rows=asked.each)
    if not fits(replace(least, packed=least.packed and frozen)):
        low, high = 0, len(chosen)  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(replace(least, layers=middle)) else (low, middle)
        if low == 0:
            return None
        least = replace(least, layers=low)
    else:
        least = replace(least, packed=least.packed and frozen)
    trials = [replace(least, rank=rank) for rank in ranks]
    least = next((t for t in trials[:-1] if fits(t)), trials[-1])
    bare = replace(least, packed=False)
    least = bare if bare != least and fits(bare) else least
    trials = [replace(least, rows=n) for n in rows]
    least = next((t for t in trials[:-1] if fits(t)), trials[-1])
    kept = replace(least, checkpointing=asked.checkpointing)
    return kept if kept != least and fits(kept) else least


def _config(config: LayerLoraConfig, trial: _Trial, chosen: Sequence[int], packing: str | None) -> LayerLoraConfig:
    """The config at a lower rank, on fewer layers, with the others packed."""
    changes = config.at_rank(trial.rank) if trial.rank != config.r else {}
    if trial.layers is not None:
        changes |= {"select": _fewer(config, chosen, trial.layers)}
    if trial.packed:
        changes |= {"quantize_frozen": packing}
    return config.changed(**changes) if changes else config


def _fewer(config: LayerLoraConfig, chosen: Sequence[int], count: int) -> Any:
    """The same choice with `count` layers: the score's best, or those nearest to the output."""
    select = config.choosing
    if select.keep is None:
        own = {"stack": select.stack} if select.stack else {}
        return {"layers": list(chosen[-count:])} | own | ({"unit": select.unit} if select.unit != "layer" else {})
    plain = dict(config.select) if isinstance(config.select, Mapping) else select.to_dict()
    if select.rule == "split":  # decides the number itself, so the best take its place
        own = {"pick", *vars(options_of(select, PICKS))}
        plain = {k: v for k, v in plain.items() if k not in own}
    return plain | {"keep": count}


def _said(
    config: LayerLoraConfig, final: LayerLoraConfig, asked: _Trial, found: _Trial, passes: int, layers: int
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What is given up, in words and as settings of a recipe."""
    words: list[str] = []
    settings: dict[str, Any] = {}
    if found.layers is not None:
        of = f" of each {config.choosing.within}" if config.choosing.within else ""
        words.append(f"{found.layers} instead of {layers} {config.choosing.unit}s{of}")
        keeps = isinstance(config.select, Mapping) and dict(config.select) | {"keep": found.layers} == final.select
        place = isinstance(final.select, dict) and set(final.select) == {"layers"}  # a plain list says it
        short = final.select["layers"] if place else final.select
        settings |= {"layerpeft.select.keep": found.layers} if keeps else {"layerpeft.select": short}
    if found.rank != asked.rank:
        said = config.at_rank(found.rank)
        settings |= {f"layerpeft.{name}": value for name, value in said.items() if value != getattr(config, name)}
        same = final.lora_alpha * asked.rank == config.lora_alpha * found.rank
        alpha = f"with lora_alpha {final.lora_alpha} " if "lora_alpha" in said else ""
        scale = f"{alpha}the scale stays" if same else "the scale of the update changes"
        words.append(f"rank {found.rank} instead of {asked.rank} ({scale})")
    if found.packed:
        settings["layerpeft.quantize_frozen"] = final.quantize_frozen
        words.append(f"the precision of frozen layers: {final.quantize_frozen} (quantize_frozen)")
    if found.rows != asked.rows:
        settings |= {"per_device_train_batch_size": found.batch, "gradient_accumulation_steps": passes}
        words.append(f"{found.batch} instead of {asked.batch} rows at a time ({passes} passes make the same step)")
    if found.checkpointing != asked.checkpointing:
        settings["gradient_checkpointing"] = True
        words.append("time: blocks are recomputed in the backward pass (gradient_checkpointing)")
    return tuple(words), settings


def _bytes(limit: int | str) -> int:
    found = limit if isinstance(limit, int) else size_of(limit)
    if found is None:
        raise ConfigError(no_size(limit))
    return found

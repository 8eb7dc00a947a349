"""Model + how to select + batches -> Selection: the one place where scorers and rules meet, for tuners and runner alike."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from layerpeft import registry
from layerpeft.errors import ScoreError, SelectionError
from layerpeft.evaluating import to_model
from layerpeft.integrations import distributed
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.losses import loss_of
from layerpeft.integrations.peft import default_targets
from layerpeft.layers import LayerMap, Target, base_of, layer_map
from layerpeft.scores import Measured, Measurement, Request, Scores, origin_of
from layerpeft.selection import (
    DEFAULT_BATCHES,
    PICKS,
    SCORERS,
    Select,
    Selection,
    how_many,
    layer_numbers,
    options_of,
)
from layerpeft.targets import Names, exclusions, match_targets, measured_for
from layerpeft.turns import window_seed

Batches = Iterable[Any]


def score_layers(
    model: nn.Module,
    by: str = "gradient_norm",
    *,
    batches: Batches | None = None,
    target_modules: Names = None,
    exclude_modules: Names = None,
    target_parameters: list[str] | None = None,
    num_batches: int = DEFAULT_BATCHES,
    seed: int = 0,
    stack: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Scores:
    """One score per layer; the model is left as it was found (weights, gradients, modes, hooks, random state).

    `batches`: any iterable of model inputs with labels; the first `num_batches` are used. `target_modules` as in LoRA: None
    means PEFT's default for the model type, or "all-linear" where PEFT has none. `options` are the scorer's own.
    Raises: ScoreError, SelectionError, LayerMapError.
    """
    select = Select.parse({"by": by, "keep": 1, "num_batches": num_batches, "seed": seed, "stack": stack, **options})
    layers = layer_map(model, select.stack)
    names = target_modules if target_modules is not None or target_parameters else _default_names(layers)
    targets = match_targets(layers, names, exclusions(exclude_modules, model, layers), target_parameters)
    return _score(model, select, layers, targets, batches, progress)


def choose(
    model: nn.Module,
    select: Any,
    *,
    batches: Batches | None = None,
    target_modules: Names = None,
    exclude_modules: Names = None,
    target_parameters: list[str] | None = None,
    progress: bool = True,
) -> Selection:
    """The layers that `select` means in this model. In several processes the first one's choice is everybody's.

    Raises: SelectionError when batches are needed and none are given, or when nothing can be chosen as asked.
    """
    select = Select.parse(select)
    layers = layer_map(model, select.stack)
    names = target_modules if target_modules is not None or target_parameters else _default_names(layers)
    targets = match_targets(layers, names, exclusions(exclude_modules, model, layers), target_parameters)
    return choose_among(model, select, layers, targets, batches, progress)


def choose_among(
    model: nn.Module,
    select: Select,
    layers: LayerMap,
    targets: tuple[Target, ...],
    batches: Batches | None = None,
    progress: bool = True,
) -> Selection:
    """The choice among targets that are known already. Raises: as `choose`."""
    if select.by == "depth" and select.keep is None:
        return make_selection(select, layers, targets, None)
    scores = select.by if isinstance(select.by, Scores) else _score(model, select, layers, targets, batches, progress)
    return distributed.from_first(make_selection(select, layers, targets, scores))


def needs_batches(select: Select) -> bool:
    """Whether the scorer watches batches go through the model."""
    return isinstance(select.by, str) and needs(select) in ("forward", "backward")


def live_only(select: Select) -> bool:
    """Whether the scorer watches training itself, and cannot score a model before it."""
    return isinstance(select.by, str) and bool(getattr(registry.get(SCORERS, select.by), "LIVE_ONLY", False))


def needs(select: Select) -> str:
    """What the scorer needs: "nothing", "weights", "forward" or "backward"."""
    if not isinstance(select.by, str):
        return "nothing"
    return registry.get(SCORERS, select.by).needs(options_of(select, SCORERS))


def start(
    model: nn.Module,
    select: Select,
    layers: LayerMap,
    targets: tuple[Target, ...],
    *,
    live: bool = False,
    before: tuple[float | None, ...] = (),
    seed: int | None = None,
) -> Measurement:
    """A measurement that waits for batches (`live`: those of training itself); `before`: what is known of the layers by now."""
    among = measured_for(layers, targets)
    request = Request(base_of(model), layers, among, select.seed if seed is None else seed, live, before, model)
    return registry.get(SCORERS, str(select.by)).start(request, options_of(select, SCORERS))


def make_scores(select: Select, layers: LayerMap, measured: Measured, num_batches: int) -> Scores:
    """The measured numbers with all that says where they came from."""
    options = options_of(select, SCORERS)
    plain = {f.name: getattr(options, f.name) for f in fields(options)} if is_dataclass(options) else {}
    return Scores(
        tuple(math.nan if v is None else v for v in measured.values),  # a layer that was not seen is an error here
        by=str(select.by),
        fingerprint=layers.fingerprint,
        stack=layers.stack,
        options=plain,
        targets=dict(measured.targets),
        origin=origin_of(layers, seed=select.seed, num_batches=num_batches),
    )


def measure(model: nn.Module, select: Select, targets: tuple[Target, ...], window: int = 0) -> Measured:
    """What a scorer that needs no batches says of the model as it is now; `window` gives random ones another seed."""
    layers = layer_map(model, select.stack)
    request = Request(base_of(model), layers, measured_for(layers, targets), window_seed(select.seed, window))
    return registry.get(SCORERS, str(select.by)).score(request, options_of(select, SCORERS))


def score_targets(model: nn.Module, select: Select, targets: tuple[Target, ...], batches: Batches) -> Scores:
    """The scores of `select` over targets that are known already. Raises: ScoreError."""
    return _score(model, select, layer_map(model, select.stack), targets, batches, True)


def candidates(select: Select, layers: LayerMap, targets: tuple[Target, ...]) -> list[int]:
    """Layers that may be chosen: those of the grammar that are not excluded and hold a target.

    Raises: SelectionError when none is left.
    """
    allowed = set(layer_numbers(select.layers, len(layers)))
    if select.exclude is not None:
        allowed -= set(layer_numbers(select.exclude, len(layers)))
    holding = {t.layer for t in targets}
    found = sorted(allowed & holding)
    if not found:
        raise SelectionError(
            f"no layer is left to choose from: layers={select.layers!r} without exclude={select.exclude!r}, "
            f"of the {len(holding)} layers that hold a target"
        )
    return found


def make_selection(select: Select, layers: LayerMap, targets: tuple[Target, ...], scores: Scores | None) -> Selection:
    """Applies the rule to the scores of the candidates (None: takes all of them).

    Raises: ScoreError for scores of another architecture; SelectionError for a rule that cannot be met.
    """
    among = candidates(select, layers, targets)
    chosen = among
    if scores is not None:
        scores.check(layers)
        keep = how_many(select.keep, len(among))
        rule = registry.get(PICKS, select.rule)
        picked = rule.pick([scores.values[i] for i in among], keep, select.seed, options_of(select, PICKS))
        chosen = sorted(among[i] for i in picked)
    return Selection(
        layers=tuple(chosen),
        targets=tuple(t.name for t in targets if t.layer in set(chosen)),
        num_layers=len(layers),
        layer_names=tuple(layer.name for layer in layers.layers),
        stack=layers.stack,
        fingerprint=layers.fingerprint,
        why=_why(select, scores, len(chosen), len(layers)),
        scores=scores,
        select={k: v for k, v in select.to_dict().items() if k != "by"} | {"by": scores.by if scores else "depth"},
    )


def _why(select: Select, scores: Scores | None, chosen: int, count: int) -> str:
    if scores is None:
        return f"{chosen} of {count} layers, by place: {select.layers!r}" + (
            f" without {select.exclude!r}" if select.exclude is not None else ""
        )
    batches = scores.origin.get("num_batches")
    data = f", {batches} batch{'es' if batches != 1 else ''}" if batches else ""
    return f"{chosen} of {count} layers, by {scores.by} (pick: {select.rule}{data})"


def _default_names(layers: LayerMap) -> Names:
    return default_targets(layers.model_type) or "all-linear"


def _score(
    model: nn.Module,
    select: Select,
    layers: LayerMap,
    targets: tuple[Target, ...],
    batches: Batches | None,
    progress: bool,
) -> Scores:
    scorer = registry.get(SCORERS, str(select.by))
    if getattr(scorer, "LIVE_ONLY", False):
        raise ScoreError(
            f"by: {select.by} is measured on adapters while they train, and cannot be measured beforehand; write it with "
            "reselect_steps and let a trainer measure it, or choose by gradient_norm"
        )
    options = options_of(select, SCORERS)
    needed = scorer.needs(options)
    if needed in ("nothing", "weights"):
        request = Request(base_of(model), layers, measured_for(layers, targets), select.seed)
        return make_scores(select, layers, scorer.score(request, options), 0)
    if batches is None:
        raise SelectionError(
            f"by: {select.by} is measured on data; pass batches=… (any iterable of model inputs with labels), "
            "or train without them through a trainer, which then measures its first step"
        )
    measurement = start(model, select, layers, targets)
    used = _run(
        model, measurement, batches, select.num_batches or DEFAULT_BATCHES, needed, f"score {select.by}", progress
    )
    if distributed.world_size() > 1:
        measurement.combine(distributed.add_up)
        used = int(distributed.add_up(torch.tensor([used])))
    return make_scores(select, layers, measurement.result(), used)


def _run(
    model: nn.Module, measurement: Measurement, batches: Batches, count: int, needed: str, title: str, progress: bool
) -> int:
    """Sends the batches through the model; returns how many there were.

    Raises: ScoreError when there are none, or a batch gives no loss.
    """
    used = 0
    with ExitStack() as stack:
        keep_cpu_layout(model)
        stack.enter_context(_untouched(model))
        stack.callback(measurement.detach)
        measurement.attach()
        bar = tqdm(total=count, desc=title, unit="batch", leave=False, disable=None if progress else True)
        stack.callback(bar.close)
        for batch in islice(iter(batches), count):
            with torch.set_grad_enabled(needed == "backward"):
                loss = _loss(model(**to_model(model, batch)), needed)
            if loss is not None:
                loss.backward()
                del loss
            measurement.next_batch()
            used += 1
            bar.update()
    if not used:
        raise ScoreError(f"{title}: batches is empty (a generator can be used only once)")
    return used


def _loss(output: Any, needed: str) -> torch.Tensor | None:
    if needed != "backward":
        return None
    loss = loss_of(output)
    if loss is None:
        raise ScoreError("the model returned no loss: the batches need labels")
    return loss if loss.dim() == 0 else loss.mean()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, nothing trainable, no cache; all of it, and every random state, put back afterwards.

    Where gradient checkpointing is on, the flag that turns it on (training, on the block itself) stays on.
    """
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    config = getattr(base_of(model), "config", None)
    cache = getattr(config, "use_cache", None)
    devices, kind = distributed.random_devices({p.device for p in model.parameters()})
    rates: list[tuple[nn.Module, str, float]] = []
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            model.eval()
            for module, mode in modes:
                if mode and getattr(module, "gradient_checkpointing", False):
                    module.training = True
                    rates += [
                        (module, n, v) for n, v in vars(module).items() if "dropout" in n and isinstance(v, float)
                    ]
            for module, name, _ in rates:
                setattr(module, name, 0.0)  # blocks that call F.dropout themselves go by their own flag
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            if cache:
                config.use_cache = False  # type: ignore[union-attr]
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, rate in rates:
                setattr(module, name, rate)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            if cache:
                config.use_cache = cache  # type: ignore[union-attr]
            random.setstate(python_state)
            if numpy and numpy_state:
                numpy.random.set_state(numpy_state)

"""Scores of layers: what a scorer is given and gives back, and the batches that are run through the model for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from layerpeft.errors import ScoreError, SelectionError
from layerpeft.integrations import distributed
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.engines.gathers import layer_by_layer, without_engine
from layerpeft.integrations.files import version_of
from layerpeft.integrations.losses import loss_of
from layerpeft.integrations.torch import eager
from layerpeft.model.evaluating import nothing_trains, to_model
from layerpeft.model.heads import HEAD
from layerpeft.model.layers import LayerMap, Target, base_of, find_module, layer_map
from layerpeft.model.targets import Names, find_targets, measured_for
from layerpeft.model.units import heads_in, in_units
from layerpeft.selection import plugins
from layerpeft.selection.draws import window_seed
from layerpeft.selection.examined import Examined
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import DEFAULT_BATCHES, PICKS, SCORERS, Select, least_batches, options_of

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
    unit: str = "layer",
    progress: bool = True,
    **options: Any,
) -> Scores:
    """One score per layer; the model is left as it was found (weights, gradients, modes, hooks, random state).

    `batches`: any iterable of model inputs with labels; the first `num_batches` are used. `target_modules` as in LoRA: None
    means PEFT's default for the model type, or "all-linear" where PEFT has none. `options` are the scorer's own.
    `unit`: what is scored (layer, sublayer, target, head, expert). Raises: ScoreError, SelectionError, LayerMapError, ConfigError.
    """
    _refuse_live(by)
    given = {"by": by, "keep": 1, "num_batches": num_batches, "seed": seed, "stack": stack, "unit": unit, **options}
    select = Select.parse(given)
    layers = layer_map(model, select.stack)
    if unit == HEAD:
        if named := [n for n in (target_modules, exclude_modules, target_parameters) if n is not None]:
            raise SelectionError(
                f"unit: head scores all heads there are, and {named[0]!r} names other weights; leave it out"
            )
        targets = heads_in(layers)
    else:
        targets = find_targets(model, layers, target_modules, exclude_modules, target_parameters)
    layers, targets = in_units(layers, select.unit, targets)
    return score(model, select, layers, targets, batches, progress)


def _refuse_live(by: Any) -> None:
    if isinstance(by, str) and by in plugins.names(SCORERS) and plugins.traits(SCORERS, by).live_only:
        raise ScoreError(
            f"by: {by} is measured on adapters while they train, and cannot be measured beforehand; write it with "
            "reselect_steps and let a trainer measure it, or choose by gradient_norm"
        )


def needs_batches(select: Select) -> bool:
    """Whether the scorer watches batches go through the model."""
    return isinstance(select.by, str) and needs(select) in ("forward", "backward")


def live_only(select: Select) -> bool:
    """Whether the scorer watches training itself, and cannot score a model before it."""
    return isinstance(select.by, str) and plugins.traits(SCORERS, select.by).live_only


def needs(select: Select) -> str:
    """What the scorer needs: "nothing", "weights", "forward" or "backward"."""
    if not isinstance(select.by, str):
        return "nothing"
    return plugins.get(SCORERS, select.by).needs(options_of(select, SCORERS))


def fewest(select: Select) -> int:
    """How many batches the scorer takes at least."""
    return least_batches(options_of(select, SCORERS)) if isinstance(select.by, str) else 1


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
    among, wanted = measured_for(layers, targets), plugins.traits(PICKS, select.rule).overlaps
    request = Request(
        base_of(model), layers, among, select.seed if seed is None else seed, live, before, model, overlaps=wanted
    )
    return plugins.get(SCORERS, str(select.by)).start(request, options_of(select, SCORERS))


def make_scores(select: Select, layers: LayerMap, measured: Measured, num_batches: int) -> Scores:
    """The measured numbers with all that says where they came from."""
    versions = {package: version_of(package) for package in ("layerpeft", "torch", "transformers")}
    return Scores(
        tuple(math.nan if v is None else v for v in measured.values),  # a layer that was not seen is an error here
        by=str(select.by),
        fingerprint=layers.fingerprint,
        stack=layers.stack,
        options=asdict(options_of(select, SCORERS)),
        targets=dict(measured.targets),
        overlaps=measured.overlaps,
        origin={"model_type": layers.model_type, **versions, "seed": select.seed, "num_batches": num_batches}
        | dict(measured.facts),
        unit=layers.unit,
    )


def measure(model: nn.Module, examined: Examined, window: int = 0) -> Measured:
    """What a scorer that needs no batches says of the model as it is now; `window` gives random ones another seed."""
    select, layers = examined.select, examined.layers
    request = Request(base_of(model), layers, measured_for(layers, examined.targets), window_seed(select.seed, window))
    return plugins.get(SCORERS, str(select.by)).score(request, options_of(select, SCORERS))


def score(
    model: nn.Module,
    select: Select,
    layers: LayerMap,
    targets: tuple[Target, ...],
    batches: Batches | None,
    progress: bool = True,
) -> Scores:
    """The scores of `select` over targets that are known already, or those that it holds. Raises: ScoreError, SelectionError."""
    if isinstance(select.by, Scores):
        select.by.check(layers)
        return select.by
    scorer = plugins.get(SCORERS, str(select.by))
    _refuse_live(select.by)
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
    apart = without_engine(model)
    with (
        layer_by_layer(model, [find_module(base_of(model), n) for n in layers.whole.names]) if apart else nullcontext()
    ):
        given = _alike(batches) if apart else batches
        count, title = select.num_batches or DEFAULT_BATCHES, f"score {select.by}"
        used = _run(model, measurement, given, count, needed, title, progress)
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
        stack.enter_context(nothing_trains(model))
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


def _alike(batches: Batches) -> Iterator[Any]:
    """As they come. Raises: ScoreError where the processes, which put weights together with each other, have not as many."""
    for batch in chain(batches, (None,)):
        there = int(distributed.add_up(torch.tensor(int(batch is not None))))
        if batch is None and not there:
            return
        if there < distributed.world_size():
            raise ScoreError(
                "batches: the weights are divided among the processes, and each of them needs as many batches"
            )
        yield batch


def _loss(output: Any, needed: str) -> torch.Tensor | None:
    if needed != "backward":
        return None
    loss = loss_of(output)
    if loss is None:
        raise ScoreError("the model returned no loss: the batches need labels")
    return loss if loss.dim() == 0 else loss.mean()


# what packages above hand in: for scorers by the field of a request; `costs`
HANDED: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Request:
    """What a scorer is asked: the targets of one model, and a seed of its own; `live`: training itself is being watched.

    `layers`: what is scored, of the kind `layers.unit`; of units below a layer `layers.whole` is the map of the layers.
    `before`: what is known of every layer by now (empty: nothing yet); `outer`: the model as training calls it, with what wraps
    `model`. `run_steps`: trains adapters on all targets for some steps and leaves no trace; `change_of`: scores of a run's folder.
    `overlaps`: what layers do the same is wanted besides.
    """

    model: nn.Module
    layers: LayerMap
    targets: tuple[Target, ...]
    seed: int = 0
    live: bool = False
    before: tuple[float | None, ...] = ()
    outer: nn.Module | None = None
    run_steps: Callable[..., Any] | None = field(default_factory=lambda: HANDED.get("run_steps"))
    change_of: Callable[..., Scores] | None = field(default_factory=lambda: HANDED.get("change_of"))
    overlaps: bool = False


@dataclass(frozen=True)
class Measured:
    """What a scorer answers: one number per layer of the map, the parts they were made from, what else is to be known of
    them, and, where they were asked for, overlaps (layers, layers)."""

    values: tuple[float | None, ...]
    targets: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # plain data
    overlaps: tuple[tuple[float, ...], ...] = ()


class Measurement(Protocol):
    """A data-driven score while batches are going through the model."""

    batches: int

    def attach(self) -> None:
        """Puts the hooks on."""

    def next_batch(self, scale: float | None = None) -> None:
        """Says that the batch before is complete; `scale`: by what its loss was multiplied, where that is known."""

    def detach(self) -> None:
        """Takes every hook off."""

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Adds up what the processes of a group have seen; `add` sums a tensor over them."""

    def result(self) -> Measured:
        """Raises: ScoreError when a target was never reached."""
        ...


class Watching:
    """What most measurements share: the batches that were seen, and hooks that `detach` takes off again."""

    def __init__(self, request: Request, options: Any) -> None:
        self.request, self.options = request, options
        self.batches = 0
        self._running = False  # something of the batch came through
        self._model = request.outer or request.model
        self._handles: list[Any] = []

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward pass, with these arguments; also where that has begun already when hooks are put on."""

    def next_batch(self, scale: float | None = None) -> None:
        """Counts the batch, if anything came through."""
        self.batches += self._running
        self._running = False

    def detach(self) -> None:
        """Takes every hook off."""
        while self._handles:
            self._handles.pop().remove()


class WatchingCalls(Watching):
    """Remembers with what the model was called last, and in which type of mixed precision."""

    _seen: tuple[tuple[Any, ...], dict[str, Any], torch.dtype | None] | None = None

    def attach(self) -> None:
        """Puts the hook on: before all others, since one of those may take it off again."""
        self._handles.append(self._model.register_forward_hook(eager(self._see), with_kwargs=True, prepend=True))

    def _see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        kind = next((p.device.type for p in self._model.parameters()), "cpu")
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._seen = args, {k: v for k, v in kwargs.items() if k != "num_items_in_batch"}, dtype


def per_layer(layers: LayerMap, targets: Iterable[Target], parts: Mapping[str, float]) -> list[float]:
    """Sums of `parts` over the targets of each layer."""
    sums = [0.0] * len(layers)
    for target in targets:
        sums[target.layer] += parts.get(target.name, 0.0)
    return sums


def over(sums: Iterable[float], sizes: Iterable[float]) -> list[float]:
    """Each over its size, 0 where that is 0."""
    return [s / n if n else 0.0 for s, n in zip(sums, sizes, strict=True)]


def per_weight(layers: LayerMap, targets: Sequence[Target], parts: Mapping[str, float]) -> list[float]:
    """Sums of `parts` over the targets of each layer, over the number of their weights."""
    sizes = per_layer(layers, targets, {t.name: float(t.params) for t in targets})
    return over(per_layer(layers, targets, parts), sizes)

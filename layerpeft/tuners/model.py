"""An adapter on the chosen layers: a type of our own up to the moment of injection, PEFT's own tuner ever after."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from layerpeft.errors import ConfigError, Problems
from layerpeft.integrations.bitsandbytes import keep_cpu_layout
from layerpeft.integrations.engines.engine import Need
from layerpeft.integrations.engines.known import asked_for
from layerpeft.integrations.peft import BaseTuner, become_stock, stock_of
from layerpeft.model.layers import Stacks, base_of, stacks_of
from layerpeft.model.names import clean, lying_in
from layerpeft.model.stacked import picked_in
from layerpeft.quantization.apply import Quantized
from layerpeft.selection import choose, schedule, scoring
from layerpeft.selection.examined import Examined
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import SCORERS, Select, Selection, only_before, options_of
from layerpeft.text import note
from layerpeft.training import backward, measuring, steps, switching
from layerpeft.training.distill import BASE, Distill
from layerpeft.training.distilling import Distilling
from layerpeft.training.method import Method
from layerpeft.training.record import Record
from layerpeft.tuners import doors
from layerpeft.tuners.cached import keep_states
from layerpeft.tuners.config import INIT_WITHOUT_TRACE, LayerLoraConfig, left_out
from layerpeft.tuners.precision import after_choice, before_wrapping, check_schedule, stored, with_lasting_batches
from layerpeft.tuners.stock import Recorded

# initialisations that take a random or data-dependent part out of the base weights, which no later load finds again
INIT_NOT_REPEATABLE = ("pissa_niter", "corda", "lora_ga")


@dataclass(frozen=True)
class Prepared:
    """What an adapter comes to, known before anything of the model is touched.

    `examined`: with the targets of the pool, where layers are chosen later or again; `known`: the scores that a schedule begins
    with; `wanted`: the precisions that are stored before wrapping.
    """

    stock: Recorded
    examined: Examined
    known: list[float] | None = None
    wanted: Quantized | None = None

    def apart(self, model: nn.Module) -> frozenset[Need]:
        """What an engine must be able to do besides, where single experts of a 3-D tensor may train."""
        need, among = self.stock._layerpeft.asked.works_by.single, self.examined
        single = (
            need is not None and among.layers.unit == "expert" and picked_in(model, (t.name for t in among.targets))
        )
        return frozenset((need,)) if single and need is not None else frozenset()


def prepare(config: LayerLoraConfig, model: nn.Module) -> Prepared:
    """Looks at the model once, and chooses its layers or the pool of a choice that is made later. Raises: as `resolve`."""
    stacks, known = stacks_of(model), None
    if config.is_scheduled:
        examined = scheduled_pool(config, model, stacks)
        known = first_scores(config, model, examined)
        stock = pool_config(config, model, examined)
    elif config.is_deferred:
        examined = waiting_pool(config, model, stacks)
        stock = pool_config(config, model, examined)
    else:
        examined = config.examine(model, stacks)
        stock: Any = config.settled(model, examined=examined)
    return Prepared(stock, examined, known, before_wrapping(config, model, stock._layerpeft.selection, stacks))


@cache
def tuner_for(seen_as: type[Recorded]) -> type[BaseTuner]:
    """PEFT's tuner for such configs, which makes the choice before it injects anything, and then turns into PEFT's own."""
    stock = stock_of(seen_as)[1]
    return type(f"Layer{stock.__name__}", (_Choosing, stock), {})


class _Choosing(BaseTuner):
    """Resolves the choice before PEFT injects anything, and then turns into PEFT's tuner, which stands beside it."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PeftModel hands over a dict of configs; transformers' `add_adapter` one config, and leaves 16-bit factors as they are."""
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if isinstance(peft_config, LayerLoraConfig):
            self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Around PEFT's own: what the method needs before and after, and then it is followed."""
        given: Any = self.peft_config[adapter_name]
        if not isinstance(given, LayerLoraConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        keep_cpu_layout(model)
        config = with_lasting_batches(given)
        needs = _possible(config)
        found = prepare(config, model)
        if apart := found.apart(model):
            needs |= _possible(config, apart)
        live = self.peft_config[adapter_name] = found.stock
        method, record = live.bind(model, adapter_name), live._layerpeft
        record.needs, record.quantized = needs, stored(config, model, found.wanted)
        record.quantize = after_choice(config) if record.selection is None else None
        method.place()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        method.wrap(found.examined.targets)
        doors.watch()
        _tell([*_left_out(config, model, found.examined), *method.told()], live, record)
        if getattr(live, "bias", None) == "all" and record.selection is not None:
            _freeze_biases_elsewhere(model, record.selection.layer_names, record.selection.layers)
        _follow(method, self, found)
        if (asked := config.distilling) is not None:
            _learn(asked, config, model, record, found.examined)
        keep_states(config, record, model, found.examined.layers.stack)
        become_stock(self, *stock_of(type(live)))


def _possible(config: LayerLoraConfig, besides: frozenset[Need] = frozenset()) -> frozenset[Need]:
    """What an engine must be able to do for it, and `besides`.

    Raises: ConfigError where `accelerate launch` has asked for one that cannot.
    """
    problems, engine = Problems("the layers cannot be trained this way"), asked_for()
    needs = config.needs(batches=not config.is_deferred) | besides
    for sentence in engine.refusals(needs) if engine is not None else ():
        problems.add(sentence, "select")
    problems.raise_if_any(ConfigError)
    return needs


def _left_out(config: LayerLoraConfig, model: nn.Module, examined: Examined) -> list[str]:
    left = left_out(config, model, examined.layers)
    reasons = {why: {n.rpartition(".")[2] for n, own in left.items() if own == why} for why in left.values()}
    return [f"all-linear leaves out {', '.join(sorted(ends))}: {why}" for why, ends in reasons.items()]


def _tell(told: list[str], live: Recorded, record: Record) -> None:
    """What the user should know of what was wrapped."""
    start, ranks = getattr(live, "init_lora_weights", None), getattr(live, "rank_pattern", {})
    if record.config.get("ranks") and ranks:
        note(f"ranks by score: {min(ranks.values())} to {max(ranks.values())}, in the place of {getattr(live, 'r', 0)}")
    for sentence in told:
        note(sentence)
    if record.new_tensors:
        note(f"trained besides, for want of pre-trained values: {', '.join(record.new_tensors)}")
    if str(start).startswith(INIT_NOT_REPEATABLE):
        note(
            f"init_lora_weights={start!r} cannot be repeated when the adapter is loaded: save it now, "
            "untrained, and later with path_initial_model_for_weight_conversion=<that folder>"
        )


def _follow(method: Method, tuner: nn.Module, found: Prepared) -> None:
    """Whoever trains the model is followed from now on, and its backward pass is cut."""
    examined, pending, switcher = found.examined, None, None
    if examined.select.is_scheduled:
        switcher = switching.Switcher(examined, found.known)
    elif found.stock._layerpeft.selection is None:
        pending = measuring.Pending(method.model, examined)
    steps.follow(method, tuner, pending, switcher)
    within = examined.layers.of is not None
    backward.install(method.model, examined.layers.stack, examined.blocks, within)


def _learn(asked: Distill, config: LayerLoraConfig, model: nn.Module, record: Record, examined: Examined) -> None:
    """A teacher runs beside training from now on. Raises: ConfigError, SelectionError."""
    if (
        asked.teacher == BASE
        and scoring.needs(examined.select) == "forward"
        and (config.is_deferred or config.is_scheduled)
    ):
        raise ConfigError(
            f"distill: by: {examined.select.by} watches forward passes of training, and a teacher that is the model itself takes "
            "some; pass batches=… with the config, choose by gradients, or name the folder of a teacher"
        )
    record.distilling = Distilling(asked, model, examined.layers.whole, config.is_scheduled)
    record.distilling.install(model)


def waiting_pool(config: LayerLoraConfig, model: nn.Module, stacks: Stacks) -> Examined:
    """All targets of all candidate layers. Raises: ConfigError for options that cannot wait for the first step."""
    problems = Problems(
        "this choice waits for the first optimizer step, and these options cannot; pass batches=… with the config"
    )
    if config.init_lora_weights not in INIT_WITHOUT_TRACE:
        problems.add(f"init_lora_weights={config.init_lora_weights!r} changes what the unchosen layers compute")
    if config.target_parameters:
        problems.add("target_parameters: experts are measured before they are wrapped")
    if config.bias != "none":
        problems.add(f"bias={config.bias!r} means biases in layers that are not chosen yet")
    for name in (n for n in ("ranks", "layer_lr") if getattr(config, n) is not None):
        problems.add(f"{name}={getattr(config, name)!r} needs the scores when the layers are wrapped")
    for sentence in config.works_by.cannot_wait(config):
        problems.add(sentence)
    if config.kasa_config is not None:
        problems.add("kasa_config takes something out of the weights of the unchosen layers")
    problems.raise_if_any(ConfigError)
    found = config.examine(model, stacks)
    return found.among(choose.candidates(found.select, found.layers, found.targets))


def scheduled_pool(config: LayerLoraConfig, model: nn.Module, stacks: Stacks) -> Examined:
    """All targets of all layers that a schedule may ever train. Raises: ConfigError, SelectionError."""
    problems = Problems("layers that change while training, and these options, do not go together")
    if config.bias == "all":
        problems.add("bias='all' means biases outside of what is switched; use bias='lora_only'")
    if config.target_parameters and scoring.needs_batches(config.choosing):
        problems.add(
            "target_parameters: experts are not measured once they are wrapped; choose by something other than "
            f"{config.choosing.by}"
        )
    problems.raise_if_any(ConfigError)
    found = config.examine(model, stacks)
    allowed = schedule.schedule_of(found.select, found.layers, found.targets).pool
    check_schedule(config, found.layers, allowed)
    return found.among(allowed)


def pool_config(config: LayerLoraConfig, model: nn.Module, examined: Examined) -> Recorded:
    """What PEFT sees of a pool. Its record has a selection where that is all there is to choose: under a schedule."""
    select, layers, pool = examined.select, examined.layers, examined.targets
    whole = Select(layers=sorted({t.layer for t in pool}), stack=layers.stack, unit=select.unit)
    selection = choose.make_selection(whole, layers, pool, None)
    stock = config.stock_for(base_of(model), selection, examined)
    record = stock._layerpeft
    record.selection = pool_selection(select, selection) if select.is_scheduled else None
    return stock


def first_scores(config: LayerLoraConfig, model: nn.Module, examined: Examined) -> list[float] | None:
    """The scores of a schedule before anything trains; None where they wait for the first step's batches."""
    select, layers = examined.select, examined.layers
    if isinstance(select.by, Scores):
        select.by.check(layers)
        return list(select.by.values)
    if not scoring.needs_batches(select):
        return [0.0 if v is None else v for v in scoring.measure(model, examined).values]
    if (
        config._batches is None
        and not schedule.scoreless(select)
        and only_before(select.by, options_of(select, SCORERS))
    ):
        scoring.start(model, select, layers, examined.targets, live=True)  # which says what it needs
    if config._batches is None or scoring.live_only(select):
        return None
    return list(scoring.score(model, select, layers, examined.targets, config._batches).values)


def pool_selection(select: Select, selection: Selection) -> Selection:
    """The record of a schedule: every layer that it may ever train, and how it chooses among them."""
    name = select.by.by if isinstance(select.by, Scores) else select.by
    by = "" if schedule.scoreless(select) else f" by {name}"
    every = f"every {select.reselect_steps} steps" if select.reselect_steps != 1 else "every step"
    keep = "as many as the scores say" if select.keep in (None, "auto") else select.keep
    within = f" within each {select.within}" if select.within else ""
    how = f", and {keep} more {every}" if choose.joins(select) else f" at a time, chosen again {every}"
    why = f"{keep} of {len(selection.layers)} {select.unit}s{within}{how}{by} (pick: {select.rule})"
    return replace(selection, why=why, select=select.to_dict() | {"by": name})


def _freeze_biases_elsewhere(model: nn.Module, names: tuple[str, ...], chosen: tuple[int, ...]) -> None:
    """`bias="all"` means all biases of the chosen layers; PEFT has just opened those of the whole model.

    The copies that PEFT trains of `modules_to_save` are whole, biases included.
    """
    inside = lying_in(names[i] for i in chosen)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] != "bias" or ".modules_to_save." in name:
            continue
        if not inside(clean(name)):
            parameter.requires_grad_(False)

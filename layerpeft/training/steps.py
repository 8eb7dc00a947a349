"""Following optimizer steps without any trainer's help: torch's global step hooks, and a callback where there is a Trainer."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from layerpeft.errors import TrainingError
from layerpeft.integrations import distributed, trainer
from layerpeft.integrations.engines import zero
from layerpeft.integrations.engines.deepspeed import ZERO
from layerpeft.integrations.engines.engine import Engine
from layerpeft.integrations.engines.known import is_cut
from layerpeft.integrations.files import unused
from layerpeft.integrations.peft import watch_saving, whole_state
from layerpeft.integrations.trackers import Shown
from layerpeft.integrations.trainer import Seeing
from layerpeft.model.home import home_of, known_of
from layerpeft.model.layers import base_of
from layerpeft.training import divided, idle
from layerpeft.training import optimizer_states as states
from layerpeft.training.follower import FOLLOWERS, Carrier, Follower, Tether, alive, followers_of
from layerpeft.training.inside import refuse_fused
from layerpeft.training.measuring import Pending
from layerpeft.training.method import Method
from layerpeft.training.prefix.cache import PrefixCache
from layerpeft.training.prefix.reading import read_ahead
from layerpeft.training.resuming import resume
from layerpeft.training.switching import Switcher
from layerpeft.training.tracked import shown

_installed: list[Any] = []
_HOLLOW: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # whose states were begun by torch alone
_USED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def follow(
    method: Method, tuner: nn.Module, pending: Pending | None = None, switcher: Switcher | None = None
) -> Follower:
    """Begins to follow one adapter; the follower lives as long as the model."""
    model, follower = method.model, Follower(method, tuner, switcher)
    follower.follow(pending)
    home = home_of(model)
    if home.tether is None:
        home.tether = Tether()
        model.register_load_state_dict_pre_hook(home.tether)
    if not home.tether.carries and (switcher is not None or type(method).carried is not Method.carried):
        home.tether.carries = True
        model.register_state_dict_post_hook(Carrier(home.tether))
    home.tether.followers.append(follower)
    FOLLOWERS.add(follower)
    _install()
    return follower


def watch(model: nn.Module) -> None:
    """Of a model whose adapter was loaded to be used: a training in which nothing of it would train is stopped."""
    _USED.add(model)
    _install()


def _install() -> None:
    if not _installed:
        _installed.extend((register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)))
    zero.watch(_HEARD)
    watch_saving(is_cut)
    hooks = trainer.Hooks(_built, _train_begin, _train_end, _state, _news, _packed, _resume, _made, _sharded, _shown)
    trainer.install(hooks)


def check_trained(model: nn.Module) -> None:
    """Checks, after training, that every chosen target moved and that no frozen parameter did.

    Trainers do this by themselves; call it at the end of a loop of your own. Raises: TrainingError.
    """
    for follower in followers_of(model):
        follower.check()


def layer_rates(model: nn.Module, optimizer: Optimizer) -> None:
    """Divides an optimizer into a group for every layer, with the share of its learning rate that the config asks for.

    Trainers do this by themselves; in a loop of your own call it just after the optimizer is built, before its scheduler.
    Raises: TrainingError where no adapter of the model asks for it, and for an optimizer that sets its rate itself.
    """
    if not _made(model, optimizer):
        raise TrainingError("no adapter of this model asks for learning rates by layer (layer_lr, layer_lr_decay)")


def _made(model: nn.Module | None, optimizer: Optimizer) -> bool:
    return any([follower.rates.divide(optimizer) for follower in followers_of(model)])


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if zero.is_inner(optimizer):
        return None
    if states.is_hollow(optimizer):
        _HOLLOW.add(optimizer)
        return None
    if optimizer in _HOLLOW:
        _HOLLOW.discard(optimizer)
        states.drop_hollow(optimizer)
    for model in list(_USED):
        idle.refuse(model, optimizer)
    followers = alive()
    for follower in followers:
        follower.begin_step()
    closure = next((a for a in (*args[1:], *kwargs.values()) if callable(a)), None)
    if closure is not None:
        then: Any = _evaluated(closure, optimizer, followers)
        return tuple(then if a is closure else a for a in args), {
            k: then if v is closure else v for k, v in kwargs.items()
        }
    for follower in followers:
        follower.before_step(optimizer)
    return None


def _evaluated(closure: Callable[..., Any], optimizer: Optimizer, followers: list[Follower]) -> Callable[..., Any]:
    """The closure in which some loops (Lightning's) run the backward pass; what comes before a step comes once it has run."""
    begun = False

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        for follower in followers:
            follower.method.take_back()
        found = closure(*args, **kwargs)
        for follower in followers:
            follower.again() if begun else follower.before_step(optimizer)
        begun = True
        return found

    return evaluate


def _after(optimizer: Optimizer, *_: Any) -> None:
    for follower in alive() if not zero.is_inner(optimizer) and optimizer not in _HOLLOW else ():
        follower.after_step(optimizer)


def _news(model: nn.Module | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for follower in followers_of(model):
        taught = follower.record.distilling
        kept = follower.record.prefix
        found |= follower.news() | (taught.news() if taught is not None else {})
        found |= kept.news() if kept is not None else {}
    return found


def _shown(model: nn.Module | None) -> AbstractContextManager[list[Shown]]:
    return shown(followers_of(model))


def _ready(caches: list[PrefixCache], batch: Any) -> None:
    for cache in caches:
        read_ahead(cache, batch)


def _packed(model: nn.Module | None) -> bool:
    return model is not None and bool(known_of(base_of(model)).marks)


def _built(model: nn.Module | None, engine: Engine | None) -> None:
    """A trainer is. Raises: TrainingError for what cannot be right under its engine."""
    zero.watch(_HEARD, engine in ZERO)
    found = [s for f in followers_of(model) for s in engine.refusals(f.record.needs)] if engine is not None else []
    if found:
        raise TrainingError("select: " + "\n".join(dict.fromkeys(found)))


def _train_begin(
    model: nn.Module | None,
    restored: dict[str, Any] | None,
    merges: bool,
    engine: Engine | None = None,
    optimizer: Any = None,
    rows: Seeing | None = None,
) -> None:
    _built(model, engine)
    for follower in followers_of(model):
        refuse_fused(getattr(optimizer, "optimizer", optimizer))
        follower.begin((restored or {}).get(follower.adapter), merges)
    caches = [f.record.prefix for f in followers_of(model) if f.record.prefix is not None]
    if rows is not None and caches:
        for cache in caches:
            cache.begin(rows)
        trainer.announced(rows.loader, partial(_ready, caches))
    if model is not None:
        idle.refuse(model)


def _resume(model: nn.Module | None, folder: str) -> bool:
    return resume(followers_of(model), model, folder)


def _sharded(model: Any, folder: str) -> None:
    """Of what is in no state dict every checkpoint has the adapter's folder; every process must come here."""
    if any(f.method.folds and f.holdings.is_divided for f in followers_of(model)):
        state = whole_state(model)
        if distributed.rank() == 0:
            model.save_pretrained(folder, state_dict=state)


def _train_end(model: nn.Module | None, output_dir: str, stepped: bool) -> None:
    followers = followers_of(model)
    for pending in (f.pending for f in followers if f.pending is not None):
        pending.paced = False
    try:
        for follower in followers:
            follower.end(stepped)
            if follower.record.prefix is not None:
                follower.record.prefix.end()
    except TrainingError as error:
        inner: Any = getattr(model, "module", model)
        rescue = unused(output_dir, "unverified")
        if hasattr(inner, "save_pretrained") and distributed.rank() == 0:
            inner.save_pretrained(str(rescue))
        raise TrainingError(f"{error}\nThe adapter as it is now was saved to {rescue}.") from error


def _state(model: nn.Module | None) -> dict[str, Any]:
    return {
        f.adapter: {
            "select": f.record.config.get("select"),
            "selection": f.record.selection.to_dict(),
            "steps_trained": f.record.steps_trained,
        }
        | ({"quant": f.record.precisions} if f.record.quantized is not None else {})
        | ({"schedule": f.schedule.carried()} if f.schedule.switches and f.holdings.is_divided else {})
        for f in followers_of(model)
        if f.record.selection is not None
    }


_HEARD = divided.heard(lambda view: _before(view, (view,), {}), _after)

"""Following optimizer steps without any trainer's help: making a pending choice just before the first one, and checking
around it, and at the end, that what trains is what was asked for."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from layerpeft import choose, verify
from layerpeft.errors import Problems, SelectionError, TrainingError
from layerpeft.integrations import distributed, trainer
from layerpeft.integrations.peft import adapter_parameters, lora_layers, unwrap_layer
from layerpeft.layers import Target, layer_map
from layerpeft.notes import note
from layerpeft.selection import LiveRecord, Select, Selection

_followers: weakref.WeakSet[Follower] = weakref.WeakSet()
_installed: list[Any] = []


class Tether:
    """Ties a follower's life to its model; copies and pickles of the model do not take it along."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Tether:
        return Tether()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Tether, ()


class Pending:
    """A choice that waits for the micro-batches of the first optimizer step."""

    def __init__(self, model: nn.Module, select: Select, pool: tuple[Target, ...]) -> None:
        self.select, self.pool = select, pool
        self.layers = layer_map(model, select.stack)
        self.watches_backward = choose.needs(select) == "backward"
        self.measurement = choose.start(model, select, self.layers, pool, live=True)
        begin: Any = torch.compiler.disable(self._begin)  # pyright: ignore[reportArgumentType]
        finish: Any = torch.compiler.disable(self._finish)  # pyright: ignore[reportArgumentType]
        self._handles = [model.register_forward_pre_hook(begin)]
        if self.watches_backward:
            self.measurement.attach()
        else:
            # The forward pass alone is watched, so that recomputing blocks in the backward pass counts nothing twice.
            self._handles.append(model.register_forward_hook(finish, always_call=True))

    def close(self) -> None:
        """Takes every hook off the model."""
        self.measurement.detach()
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, *_: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self.measurement.next_batch()
            if not self.watches_backward:
                self.measurement.attach()

    def _finish(self, *_: Any) -> None:
        self.measurement.detach()


class Follower:
    """Watches the optimizer steps of one adapter of one model."""

    def __init__(self, model: nn.Module, adapter: str, config: Any, tuner: nn.Module, pending: Pending | None) -> None:
        self.model, self.adapter, self.config = model, adapter, config
        self.record: LiveRecord = config._layerpeft
        self.pending = pending
        self._tuner = weakref.ref(tuner)
        self._concerned: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._tensors: dict[str, dict[str, nn.Parameter]] = {}
        self._start: dict[str, dict[str, torch.Tensor]] = {}
        self._frozen: dict[str, int] = {}
        self._first_step_of: Optimizer | None = None
        self._rate = 0.0
        self.steps = 0
        model.register_load_state_dict_pre_hook(self._on_load)

    def tensors(self) -> dict[str, dict[str, nn.Parameter]]:
        """Target -> the adapter's tensors in it."""
        if not self._tensors:
            for name, layer in lora_layers(self.model, self.adapter).items():
                parameter = getattr(layer, "parameter_name", None)
                target = ".".join(p for p in name.split(".") if p != "base_layer") + (
                    f".{parameter}" if parameter else ""
                )
                self._tensors[target.removeprefix("_orig_mod.")] = adapter_parameters(layer, self.adapter)
        return self._tensors

    def before_step(self, optimizer: Optimizer) -> None:
        """Just before a real optimizer step. Raises: TrainingError for what would not train, or not be finite."""
        if not self._concerns(optimizer):
            return
        if self.pending is not None and not self._choose(optimizer):
            return
        ids = {id(p) for group in self.tensors().values() for p in group.values()}
        self._rate = verify.learning_rate(optimizer, ids)
        if self.steps or not self._rate:
            return
        known = {id(p) for o in self._optimizers(optimizer, ids) for g in o.param_groups for p in g["params"]}
        faults, idle = verify.before_step(self.tensors(), known)
        problems = Problems("stopped before the first update, because it would not train what was chosen")
        for fault in faults:
            problems.add(fault)
        problems.raise_if_any(TrainingError)
        self.record.idle_experts = tuple(idle)
        self._frozen = verify.checksums(self.model)
        self._start = verify.snapshot(self.tensors())
        self._first_step_of = optimizer

    def after_step(self, optimizer: Optimizer) -> None:
        """Just after a real optimizer step. Raises: TrainingError when a chosen target did not move in the first one."""
        if self.pending is not None or not self._rate or not self._concerns(optimizer):
            return
        if self._first_step_of is optimizer:
            self._first_step_of = None
            problems = Problems("the first update left chosen targets as they were")
            for target in verify.unmoved(self.tensors(), self._start):
                if "expert" in target:
                    self.record.idle_experts = tuple(sorted({*self.record.idle_experts, target}))
                else:
                    problems.add(f"{target}: {verify.why_unmoved(self.tensors()[target], self._rate)}")
            problems.raise_if_any(TrainingError)
            self.record.checks["first_step"] = "every chosen target moved"
        self.steps += 1
        for layer in self.record.selection.layers if self.record.selection else ():
            self.record.steps_trained[layer] = self.record.steps_trained.get(layer, 0) + 1

    def check(self) -> None:
        """What moved since the first step. Raises: TrainingError when a target did not move, or anything else did."""
        if not self._start:
            return
        problems = Problems("what trained is not what was chosen")
        idle = []
        for target in verify.unmoved(self.tensors(), self._start):
            if "expert" in target:
                idle.append(target)
            else:
                problems.add(f"{target} did not move: {verify.why_unmoved(self.tensors()[target], self._rate)}")
        self.record.idle_experts = tuple(idle)
        for name, before in self._frozen.items():
            parameter = dict(self.model.named_parameters()).get(name)
            if parameter is not None and verify.checksum(parameter) != before:
                problems.add(f"{name} is frozen and changed")
        problems.raise_if_any(TrainingError)
        self.record.checks["end"] = "every chosen target moved, and no frozen parameter did"

    def pin(self, restored: dict[str, Any] | None) -> None:
        """Takes over the record of a resumed run. Raises: SelectionError when that run chose other targets."""
        if not restored:
            return
        then = Selection.from_dict(restored["selection"])
        asked, asks = restored.get("select") or {}, self.record.config.get("select") or {}
        differ = [
            f"{k}: {asked.get(k)!r} then, {asks.get(k)!r} now" for k in {**asked, **asks} if asked.get(k) != asks.get(k)
        ]
        if differ:
            raise SelectionError(f"the run that is resumed chose its layers in another way ({'; '.join(differ)})")
        self._refuse_other(set(then.targets), "the run that is resumed")
        self.record.selection = then
        self.record.steps_trained = {int(k): v for k, v in restored.get("steps_trained", {}).items()}

    def _concerns(self, optimizer: Optimizer) -> bool:
        if optimizer not in self._concerned:
            ids = {id(p) for group in self.tensors().values() for p in group.values()}
            self._concerned[optimizer] = any(id(p) in ids for g in optimizer.param_groups for p in g["params"])
        return self._concerned[optimizer]

    def _optimizers(self, stepping: Optimizer, ids: set[int]) -> list[Optimizer]:
        """The stepping optimizer, and, where it lacks some tensors, any other live one that may hold them."""
        if ids <= {id(p) for g in stepping.param_groups for p in g["params"]}:
            return [stepping]
        return [o for o in gc.get_objects() if isinstance(o, Optimizer) and hasattr(o, "param_groups")]

    def _choose(self, optimizer: Optimizer) -> bool:
        """Makes the pending choice; False while more batches are wanted than this step had."""
        assert self.pending is not None
        pending, measurement = self.pending, self.pending.measurement
        measurement.next_batch()
        wanted = pending.select.num_batches or 1
        if not measurement.batches:
            raise TrainingError(
                f"the choice by {pending.select.by} has seen no batch before the first optimizer step (an optimizer that calls "
                "a closure, or a loss computed elsewhere); pass batches=… to the config or to get_peft_model"
            )
        if measurement.batches < wanted:
            note(f"measuring {measurement.batches} of {wanted} batches; this optimizer step changes no layer yet")
            for group in self.tensors().values():
                for parameter in group.values():
                    parameter.grad = None
            return False
        used = measurement.batches
        if distributed.world_size() > 1:
            measurement.combine(distributed.add_up)
        scores = choose.make_scores(pending.select, pending.layers, measurement.result(), used)
        selection = distributed.from_first(choose.make_selection(pending.select, pending.layers, pending.pool, scores))
        self._settle(selection, optimizer)
        note(f"chosen before the first update: {selection.why}: {', '.join(map(str, selection.layers))}")
        return True

    def _settle(self, selection: Selection, optimizer: Optimizer | None) -> None:
        """Keeps the chosen wrappers, removes the others and takes their tensors out of the optimizer."""
        assert self.pending is not None
        self.pending.close()
        chosen = set(selection.targets)
        removed = {id(p) for t, group in self.tensors().items() if t not in chosen for p in group.values()}
        for name in list(lora_layers(self.model, self.adapter)):
            if name.removeprefix("_orig_mod.") not in chosen:
                unwrap_layer(self.model, name, self.adapter)
        for group in optimizer.param_groups if optimizer is not None else ():
            for parameter in [p for p in group["params"] if id(p) in removed]:
                optimizer.state.pop(parameter, None)  # type: ignore[union-attr]
            group["params"] = [p for p in group["params"] if id(p) not in removed]
        tuner = self._tuner()
        if tuner is not None and hasattr(tuner, "targeted_module_names"):
            tuner.targeted_module_names = [
                n for n in tuner.targeted_module_names if n.removeprefix("_orig_mod.") in chosen
            ]
        self.config.target_modules = set(chosen)
        self.record.selection = selection
        self.pending = None
        self._tensors = {}
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not notice that hooks and wrappers are gone

    def _on_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        mark = f".lora_A.{self.adapter}.weight"
        found = {k.removeprefix(prefix).removesuffix(mark) for k in state if k.startswith(prefix) and k.endswith(mark)}
        found = {".".join(p for p in n.split(".") if p not in ("base_layer", "_orig_mod")) for n in found}
        if not found or any("lora_embedding" in n for n in found):
            return
        if self.pending is None:
            self._refuse_other(found, "the adapter that is loaded")
            return
        pool = {t.name: t for t in self.pending.pool}
        if not found <= set(pool):
            self._refuse_other(found, "the adapter that is loaded")
        layers = self.pending.layers
        self._settle(
            Selection(
                layers=tuple(sorted({pool[n].layer for n in found})),
                targets=tuple(n for n in pool if n in found),
                num_layers=len(layers),
                layer_names=tuple(layer.name for layer in layers.layers),
                stack=layers.stack,
                fingerprint=layers.fingerprint,
                why="kept from the adapter that was loaded",
                select=self.pending.select.to_dict(),
            ),
            None,
        )

    def _refuse_other(self, theirs: set[str], what: str) -> None:
        mine = {t for t in self.tensors() if "." in t} if self.pending is None else {t.name for t in self.pending.pool}
        if theirs == mine or (self.pending is not None and theirs <= mine):
            return
        missing, extra = sorted(theirs - mine), sorted(mine - theirs)
        raise SelectionError(
            f"{what} trains other targets than this model. Only there: {_some(missing)}; only here: {_some(extra)}. "
            "To go on with that choice, pass its record: select={'layers': [...]} with the layers of its layerpeft.json."
        )


def follow(model: nn.Module, adapter: str, config: Any, tuner: nn.Module, pending: Pending | None) -> Follower:
    """Begins to follow one adapter; the follower lives as long as the model."""
    follower = Follower(model, adapter, config, tuner, pending)
    attributes: dict[str, Any] = model.__dict__
    earlier = attributes.get("_layerpeft", Tether())
    attributes["_layerpeft"] = Tether([*(earlier.value or []), follower])
    _followers.add(follower)
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(lambda o, *_: _each("before_step", o)))
        _installed.append(register_optimizer_step_post_hook(lambda o, *_: _each("after_step", o)))
    trainer.install(_train_begin, _train_end, _state)
    return follower


def followers_of(model: nn.Module) -> list[Follower]:
    """The followers whose model is, or is inside, this one."""
    inside = {id(m) for m in model.modules()}
    return [f for f in _followers if id(f.model) in inside]


def check_trained(model: nn.Module) -> None:
    """Checks, after training, that every chosen target moved and that no frozen parameter did.

    Trainers do this by themselves; call it at the end of a loop of your own. Raises: TrainingError.
    """
    for follower in followers_of(model):
        follower.check()


def _each(what: str, optimizer: Optimizer) -> None:
    for follower in list(_followers):
        getattr(follower, what)(optimizer)


def _train_begin(model: nn.Module | None, optimizer: Any, restored: dict[str, Any] | None) -> None:
    for follower in followers_of(model) if model is not None else ():
        follower.pin((restored or {}).get(follower.adapter))


def _train_end(model: nn.Module | None, output_dir: str) -> None:
    if model is None:
        return
    try:
        check_trained(model)
    except TrainingError as error:
        inner: Any = getattr(model, "module", model)
        rescue = os.path.join(output_dir, "unverified")
        if hasattr(inner, "save_pretrained") and distributed.rank() == 0:
            inner.save_pretrained(rescue)
        raise TrainingError(f"{error}\nThe adapter as it is now was saved to {rescue}.") from error


def _state() -> dict[str, Any]:
    return {
        f.adapter: {
            "select": f.record.config.get("select"),
            "selection": f.record.selection.to_dict(),
            "steps_trained": f.record.steps_trained,
        }
        for f in _followers
        if f.record.selection is not None
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"

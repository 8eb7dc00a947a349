"""One adapter of one model, watched: its pending choice is made just before the first update, and around that update, and
at the end, it is checked that what trains is what was asked for."""

from __future__ import annotations

import copy
import json
import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft import backward, verify
from layerpeft.errors import Problems, SelectionError, TrainingError
from layerpeft.integrations import distributed
from layerpeft.integrations.peft import adapter_parameters, lora_layers, unwrap_layer
from layerpeft.notes import note
from layerpeft.pending import Pending, Tensors
from layerpeft.projection import folded, originals
from layerpeft.projection_state import on_load as on_load_projection
from layerpeft.refresh import Refresher
from layerpeft.selection import LiveRecord, Selection
from layerpeft.targets import is_routed
from layerpeft.tether import FOLLOWERS

NOT_HELD = (
    "holds none of the tensors that were chosen, so nothing would train: build it after get_peft_model, from the parameters "
    "that require a gradient"
)


class Follower:
    """Watches the optimizer steps of one adapter of one model, which it does not keep alive."""

    def __init__(self, model: nn.Module, adapter: str, config: Any, tuner: Any, pending: Pending | None) -> None:
        self.adapter, self.config = adapter, config
        self.pending: Pending | None = None
        self.refresher: Refresher | None = None  # of an adapter that is trained by projection
        self.record: LiveRecord = config._layerpeft
        self.seen = 0  # optimizer steps of any kind
        self._model, self._tuner = weakref.ref(model), weakref.ref(tuner) if tuner is not None else lambda: None
        self._held: weakref.WeakKeyDictionary[Optimizer, tuple[int, set[int]]] = weakref.WeakKeyDictionary()
        self._tensors: Tensors = {}
        self._start: dict[str, dict[str, torch.Tensor]] = {}
        self._frozen: dict[str, verify.Seal] = {}
        self._others: dict[str, verify.Seal] = {}
        self._stepped: set[int] = set()
        self._asked: frozenset[str] = frozenset()  # what PEFT made trainable
        self._beside: set[str] = set()  # adapters there were when the weights were written down
        self._rate, self._real = 0.0, False
        self._resumed = self._merges = False
        if pending is not None:
            self._await(pending)

    @property
    def model(self) -> nn.Module:
        """The model, which outlives its follower."""
        model = self._model()
        assert model is not None
        return model

    def tensors(self) -> Tensors:
        """Target -> the adapter's tensors in it, with the bias that it trains."""
        if not self._tensors:
            for name, layer in lora_layers(self.model, self.adapter).items():
                parameter = getattr(layer, "parameter_name", None)
                target = f"{_clean(name)}.{parameter}" if parameter else _clean(name)
                group = adapter_parameters(layer, self.adapter)
                bias = getattr(layer.get_base_layer(), "bias", None) if self.config.bias == "lora_only" else None
                self._tensors[target] = group | ({"bias": bias} if isinstance(bias, nn.Parameter) else {})
        return self._tensors

    def ids(self) -> set[int]:
        """Identities of the adapter's tensors."""
        return {id(p) for group in self.tensors().values() for p in group.values()}

    def twin(self, memo: dict[int, Any]) -> Follower | None:
        """The follower of the copy of the model that is being made."""
        model, tuner = memo.get(id(self.model)), memo.get(id(self._tuner()))
        if model is None:
            return None
        config, old = copy.deepcopy(self.config, memo), self.record
        config._layerpeft = replace(old, steps_trained=dict(old.steps_trained), checks=dict(old.checks))
        config._layerpeft_model = weakref.ref(model)
        twin = memo[id(self)] = Follower(model, self.adapter, config, tuner, None)
        twin._asked = self._asked
        twin.pending, twin.refresher = copy.deepcopy((self.pending, self.refresher), memo)
        return twin

    def measure_anew(self) -> None:
        """In a deep copy: puts hooks of its own in the place of those that came along."""
        if self.pending is not None:
            self.pending.close()
            self._await(Pending(self.model, self.pending.select, self.pending.pool))
            self.pending.begin(self.model)

    @property
    def live(self) -> bool:
        """False once its adapter is gone: unloaded, deleted, or replaced by another of the same name."""
        return getattr(self.model, "peft_config", {}).get(self.adapter) is self.config

    def retire(self) -> None:
        """Stops following; a choice that still waited is dropped."""
        if self.pending is not None:
            self.pending.close()
        if self.refresher is not None:
            self.refresher.disarm()
        FOLLOWERS.discard(self)
        self.model.__dict__["_layerpeft"].followers.remove(self)

    def before_step(self, optimizer: Optimizer, closure: bool = False) -> None:
        """Just before a real optimizer step (one with a closure has no gradients yet).

        Raises: TrainingError for what would not train, or not be finite.
        """
        self._rate, self._real = 0.0, False
        held = self._holds(optimizer)
        if not held:
            if not self.seen and self.pending is None and verify.unheld(self.tensors(), self.model, optimizer):
                raise TrainingError(f"the optimizer {NOT_HELD}")
            return
        self.seen += 1
        if verify.skipped(optimizer):
            for measuring in filter(None, (self.pending, self.refresher)):
                measuring.restart()
            return
        if self.pending is not None:
            if not self._choose(optimizer):
                return
            held = self._holds(optimizer)
        self._real = True
        if self.refresher is not None:
            self.refresher.before_step(self.model, self.adapter, optimizer, held, closure)
        self._rate = verify.learning_rate(optimizer, held)
        if not self._rate or held <= self._stepped:
            return
        ids = self.ids()
        known = {id(p) for o in verify.holders(optimizer, ids) for g in o.param_groups for p in g["params"]}
        faults, idle = verify.before_step(self.tensors(), known, set() if closure else held - self._stepped)
        others = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in ids]
        faults += verify.not_asked_for(others, self._asked)
        if not self._start:
            faults += self._changed_since_wrapping()
        _raise("stopped before the first update, because it would not train what was chosen", faults)
        self.record.idle_experts = tuple(sorted({*self.record.idle_experts, *idle}))
        if not self._start:
            now = self._parameters()
            gone = verify.outdated(self._frozen, now)
            self._frozen = {n: s for n, s in self._frozen.items() if n not in gone}
            self._frozen |= {n: verify.seal(p) for n, p in self._frozen_now().items() if n not in self._frozen}
            self._others = {_clean(n): verify.seal(now[_clean(n)]) for n in others}
            self._start = verify.snapshot(self.tensors())

    def after_step(self, optimizer: Optimizer) -> None:
        """Just after a real optimizer step. Raises: TrainingError when a chosen target did not move in the first one."""
        if self.refresher is not None and self._real:
            self.refresher.after_step(self.model, self.adapter, optimizer, self._holds(optimizer))
        if self.pending is not None or not self._rate:
            return
        held, ids = self._holds(optimizer), self.ids()
        if not ids <= self._stepped:
            self._stepped |= held
            if ids <= self._stepped:  # where several optimizers share the tensors, all of them have stepped by now
                faults, idle = self._still()
                _raise("the first update left chosen targets as they were", faults)
                self.record.idle_experts = tuple(sorted({*self.record.idle_experts, *idle}))
                self.record.checks["first_step"] = "every chosen target moved"
        selection = self.record.selection
        for layer in selection.layers if selection is not None else ():
            inside = f"{selection.layer_names[layer]}."  # type: ignore[union-attr]
            first = next(
                (p for t, group in self.tensors().items() if t.startswith(inside) for p in group.values()), None
            )
            if id(first) in held:  # one tensor stands for the layer, should several optimizers share it
                self.record.steps_trained[layer] = self.record.steps_trained.get(layer, 0) + 1

    def check(self) -> None:
        """What moved since the first step. Raises: TrainingError when a target did not move, or anything else did."""
        if self.pending is not None and self.pending.began:
            raise TrainingError(f"training ended before the layers were chosen: {self.pending.progress()} batches came")
        if not self._start:
            if self.seen and not self._resumed:
                raise TrainingError(
                    f"nothing was trained: all {self.seen} optimizer steps had a learning rate of zero or were skipped"
                )
            return
        faults, idle = self._still()
        now = self._parameters()
        rounded = set(self.tensors()) if self._merges else set()
        differ = verify.changed(self._frozen, now)
        faults += [f"{n} is frozen and changed" for n in differ if n.removesuffix(".weight") not in rounded]
        _raise("what trained is not what was chosen", faults)
        self.record.idle_experts = tuple(idle)
        moved = {*verify.changed(self._others, now), *verify.outdated(self._others, now)}
        still = {n: now[n] for n in self._others if n not in moved}
        for target, names in self._unmoved().items():
            group = self.tensors()[target]
            still |= {f"{target}.{n}": group[n] for n in names if group[n].dtype in verify.LOW and target not in idle}
        for name, parameter in still.items():
            note(f"{name} did not move: {verify.why_unmoved({name: parameter}, self._rate)}")
        self.record.checks["unmoved"] = sorted(still)
        self.record.checks["end"] = "every chosen target moved, and no frozen parameter did"

    def begin(self, restored: dict[str, Any] | None, merges: bool = False) -> None:
        """A training begins: checks start anew, and it takes over the record of the run that it resumes.

        `merges`: the trainer folds the adapter into the chosen weights and out again, which leaves rounding in them.

        Raises: SelectionError when that run chose otherwise.
        """
        self._forget()
        self.seen, self._start, self._resumed, self._merges = 0, {}, bool(restored), merges
        self._stepped.clear()
        if self.pending is not None:
            self.pending.paced = True
        if not restored:
            return
        then = Selection.from_dict(restored["selection"])
        asked, asks = restored.get("select") or {}, json.loads(json.dumps(self.record.config.get("select") or {}))
        differ = [
            f"{k}: {asked.get(k)!r} then, {asks.get(k)!r} now" for k in {**asked, **asks} if asked.get(k) != asks.get(k)
        ]
        if differ:
            raise SelectionError(f"the run that is resumed chose its layers in another way ({'; '.join(differ)})")
        now = self.record.selection
        verify.same_targets(
            "the run that is resumed", set(then.targets), set(now.targets if now is not None else self.tensors())
        )
        self.record.selection = then
        self.record.steps_trained = {int(k): v for k, v in restored.get("steps_trained", {}).items()}

    def on_load(self, state: Mapping[str, Any], prefix: str) -> None:
        """Keeps the choice of an adapter that is loaded. Raises: SelectionError where it is another one."""
        self.unseal([_clean(k.removeprefix(prefix)) for k in state if k.startswith(prefix)])
        # PEFT writes the adapter's name only into the keys of modules that it finds.
        ends = [".lora_A.weight", f".lora_A.{self.adapter}.weight"]
        if any(".lora_A." in k and not k.endswith(tuple(ends)) for k in state):
            ends = ends[1:]
        keys = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
        found = {_clean(k.removesuffix(end)) for end in ends for k in keys if k.endswith(end)}
        if not found or any(".lora_embedding" in k for k in keys):
            return
        kept = self.pending.keep(found) if self.pending is not None else None
        if kept is not None:
            self._settle(kept, None)
            return
        pool = (
            [t.name for t in self.pending.pool] if self.pending is not None else lora_layers(self.model, self.adapter)
        )
        verify.same_targets("the adapter that is loaded", found, {_clean(n) for n in pool})
        if self.refresher is not None:
            identity = self.config._layerpeft_projection.identity
            on_load_projection(self.model, self.adapter, state, prefix, identity)
            self.refresher.arm(self.model, self.adapter)
        self._forget()  # loading may put new tensors in the place of the old

    def seal(self) -> None:
        """Writes down, just after wrapping, what the frozen weights are.

        Packed weights, which the first forward pass may lay out anew, are left for the first step; so is everything where all
        layers train, since wrapping them is to cost no more than in PEFT, and where processes may still be made alike.
        """
        selection = self.record.selection
        partial = self.pending is not None or (selection is not None and len(selection.layers) < selection.num_layers)
        if partial and distributed.world_size() == 1:
            self._frozen = {n: verify.seal(p) for n, p in self._frozen_now().items() if p.is_floating_point()}
            self._beside = self._adapters()

    def unseal(self, names: Iterable[str] | None = None) -> None:
        """Forgets what these frozen weights were (None: all of them), because they change for a good reason."""
        for name in list(self._frozen if names is None else names):
            self._frozen.pop(name, None)

    def _parameters(self) -> dict[str, torch.Tensor]:
        """All parameters, by names that wrapping and unwrapping does not change."""
        return {_clean(n): p for n, p in self.model.named_parameters()} | originals(self.model, self.adapter)

    def _adapters(self) -> set[str]:
        return {self.adapter, *(getattr(self.model, "peft_config", None) or {})}

    def _frozen_now(self) -> dict[str, torch.Tensor]:
        return {n: p for n, p in self._parameters().items() if not p.requires_grad and ".lora_" not in n}

    def _changed_since_wrapping(self) -> list[str]:
        if distributed.world_size() > 1 or self._adapters() != self._beside:
            self.unseal()  # some ways of starting another adapter take something out of the weights
        return [
            f"{n} is frozen and changed after the model was wrapped; wrap it when its weights are what they should be"
            for n in verify.changed(self._frozen, self._parameters())
        ]

    def _await(self, pending: Pending) -> None:
        pending.tensors, pending.on_copy = self.tensors, _copied
        self.pending = pending

    def _forget(self) -> None:
        """Tensors are looked up anew."""
        self._tensors = {}
        self._held.clear()

    def _holds(self, optimizer: Optimizer) -> set[int]:
        """Identities of this adapter's tensors that the optimizer holds."""
        count = sum(len(g["params"]) for g in optimizer.param_groups)
        if self._held.get(optimizer, (None,))[0] != count:
            ids = self.ids()
            self._held[optimizer] = count, {id(p) for g in optimizer.param_groups for p in g["params"]} & ids
        return self._held[optimizer][1]

    def _still(self) -> tuple[list[str], list[str]]:
        """(faults, idle experts) among targets of which no tensor moved."""
        still = self._unmoved()
        whole = [t for t, names in still.items() if len(names) == len(self.tensors()[t])]
        faults = [
            f"{t} did not move: {verify.why_unmoved(self.tensors()[t], self._rate)}" for t in whole if not is_routed(t)
        ]
        return faults, [t for t in whole if is_routed(t)]

    def _unmoved(self) -> dict[str, list[str]]:
        moved = folded(self.model, self.adapter)  # what a projection has trained may lie in the weights by now
        return {t: n for t, n in verify.unmoved(self.tensors(), self._start).items() if t not in moved}

    def _choose(self, optimizer: Optimizer) -> bool:
        """Makes the pending choice; False while more batches are wanted than this step had."""
        assert self.pending is not None
        pending = self.pending
        selection = pending.decided or pending.decide()
        if selection is not None:
            self._settle(selection, optimizer)
            note(f"chosen before the first update: {selection.why}: {', '.join(map(str, selection.layers))}")
            return True
        pending.go_on()
        note(f"optimizer step {self.seen} only measures ({pending.progress()} batches); no layer changes")
        return False

    def _settle(self, selection: Selection, optimizer: Optimizer | None) -> None:
        """Keeps the chosen wrappers, removes the others and takes their tensors out of the optimizers."""
        assert self.pending is not None
        self.pending.close()
        chosen, tensors = set(selection.targets), self.tensors()
        removed = {id(p): p for t, group in tensors.items() if t not in chosen for p in group.values()}
        for name in list(lora_layers(self.model, self.adapter)):
            if name.removeprefix("_orig_mod.") not in chosen:
                unwrap_layer(self.model, name, self.adapter)
        if optimizer is not None:
            verify.forget(verify.holders(optimizer, self.ids()), removed)
        for parameter in removed.values():
            parameter.requires_grad_(False).grad = None
        tuner = self._tuner()
        if tuner is not None and hasattr(tuner, "targeted_module_names"):
            names = tuner.targeted_module_names
            tuner.targeted_module_names = [n for n in names if n.removeprefix("_orig_mod.") in chosen]
        self.config.target_modules = chosen
        self.record.selection = selection
        self.pending = None
        self._forget()
        backward.install(self.model, selection.stack)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled code does not notice that hooks and wrappers are gone


def alive() -> list[Follower]:
    """The followers whose model and adapter are still there."""
    present = [f for f in FOLLOWERS if f._model() is not None]
    for gone in (f for f in present if not f.live):
        gone.retire()
    return [f for f in present if f.live]


def followers_of(model: nn.Module | None) -> list[Follower]:
    """The followers whose model is, or is inside, this one."""
    inside = {id(m) for m in model.modules()} if model is not None else set()
    return [f for f in alive() if id(f.model) in inside]


def _copied(model: nn.Module) -> None:
    for follower in followers_of(model):
        follower.measure_anew()


def _raise(title: str, faults: list[str]) -> None:
    problems = Problems(title)
    for fault in faults:
        problems.add(fault)
    problems.raise_if_any(TrainingError)


def _clean(name: str) -> str:
    """A module's name in the unwrapped model."""
    return ".".join(p for p in name.split(".") if p not in ("base_layer", "_orig_mod"))

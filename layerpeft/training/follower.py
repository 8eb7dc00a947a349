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

from layerpeft.errors import SelectionError, TrainingError, differences, raise_faults
from layerpeft.integrations import distributed
from layerpeft.integrations.peft import loading_folder
from layerpeft.model.names import clean
from layerpeft.model.targets import is_routed
from layerpeft.selection.select import Selection
from layerpeft.text import note
from layerpeft.training import backward, verify
from layerpeft.training.measuring import Pending, Tensors
from layerpeft.training.optimizer_states import held_by, holders
from layerpeft.training.record import LiveRecord
from layerpeft.training.scheduled import Scheduled
from layerpeft.training.verify import Sealed
from layerpeft.tuners.full.layer import keep_originals, loaded_modules, put_back
from layerpeft.tuners.full.method import Mastered, masters_for
from layerpeft.tuners.galore.projection import folded
from layerpeft.tuners.galore.refresh import Refresher
from layerpeft.tuners.galore.saving import on_load as on_load_projection
from layerpeft.tuners.lora.method import trained_tensors, unwrap_others, wrapped_names

NOT_HELD = (
    "holds none of the tensors that were chosen, so nothing would train: build it after get_peft_model, from the parameters "
    "that require a gradient"
)


class Follower(Scheduled, Mastered):
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
        self._layers: dict[int, list[str]] = {}  # layer -> the targets in it
        self._sealed = Sealed(adapter)
        self._stepped: set[int] = set()
        self._since: set[str] = set()  # targets that trained since this training began
        self._asked: frozenset[str] = frozenset()  # what PEFT made trainable
        self._rate, self._real = 0.0, False
        self._resumed = self._merges = False
        self.masters = masters_for(config)
        self.record.masters = self if self.masters is not None else None
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
            self._tensors = trained_tensors(self.model, self.adapter, self.config.bias)
        return self._tensors

    def ids(self) -> set[int]:
        """Identities of the adapter's tensors."""
        return verify.ids_of(self.tensors())

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
        twin.gauge, twin.switcher = copy.deepcopy((self.gauge, self.switcher), memo)
        twin.record.schedule = twin.switcher
        return twin

    def measure_anew(self) -> None:
        """In a deep copy: puts hooks of its own in the place of those that came along."""
        if self.pending is not None:
            self.pending.close()
            self._await(Pending(self.model, self.pending.examined))
            self.pending.begin(self.model)
        if self.gauge is not None:
            self.gauge.close()
            self._measure()

    @property
    def live(self) -> bool:
        """False once its adapter is gone: unloaded, deleted, or replaced by another of the same name."""
        return getattr(self.model, "peft_config", {}).get(self.adapter) is self.config

    def retire(self) -> None:
        """Stops following; a choice that still waited is dropped."""
        for measuring in filter(None, (self.pending, self.gauge)):
            measuring.close()
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
            for measuring in filter(None, (self.pending, self.gauge, self.refresher)):
                measuring.restart()
            return
        if self.pending is not None:
            if not self._choose(optimizer):
                return
            held = self._holds(optimizer)
        if self.switcher is not None:
            self._take_measure()
            self.start()
            held = self._active(held)
        self._real = True
        if self.refresher is not None:
            self.refresher.before_step(self.model, self.adapter, optimizer, held, closure)
        self._rate = verify.learning_rate(optimizer, held)
        if not self._rate or held <= self._stepped:
            return
        ids = self.ids()
        known = set().union(*map(held_by, holders(ids, optimizer)))
        faults, idle = verify.before_step(self.training(), known, set() if closure else held - self._stepped)
        others = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in ids]
        faults += verify.not_asked_for(others, self._asked)
        if not self._sealed.start:
            faults += verify.not_held(self.tensors(), known) if self.switcher is not None else []
            faults += self._sealed.changed_since_wrapping(self.model)
        raise_faults("stopped before the first update, because it would not train what was chosen", faults)
        self.record.idle_experts = tuple(sorted({*self.record.idle_experts, *idle}))
        if not self._sealed.start:
            self._sealed.begin(self.model, self.tensors(), others)
            keep_originals(self.model, self.adapter, self.training())

    def after_step(self, optimizer: Optimizer) -> None:
        """Just after a real optimizer step. Raises: TrainingError when a chosen target did not move in its first one."""
        held = self._active(self._holds(optimizer)) if self._real else set()
        if self.refresher is not None and self._real:
            self.refresher.after_step(self.model, self.adapter, optimizer, held)
        if self.pending is None and self._rate:
            self._stepped_with(held)
        if self.switcher is not None and self._real:
            self._advance(optimizer)

    def _stepped_with(self, held: set[int]) -> None:
        training = self.training()
        ids = verify.ids_of(training)
        if not ids <= self._stepped:
            fresh = [t for t, group in training.items() if not {id(p) for p in group.values()} <= self._stepped]
            self._stepped |= held
            if ids <= self._stepped:  # where several optimizers share the tensors, all of them have stepped by now
                faults, idle = self._still(fresh)
                raise_faults("the first update left chosen targets as they were", faults)
                self.record.idle_experts = tuple(sorted({*self.record.idle_experts, *idle}))
                self.record.checks["first_step"] = "every chosen target moved"
        if not self._layers and self.record.selection is not None:
            self._layers = self.record.selection.by_layer(self.tensors())
        for layer, targets in self._layers.items():
            there = [t for t in targets if t in training]
            first = next((p for t in there for p in training[t].values()), None)
            if id(first) in held:  # one tensor stands for the layer, should several optimizers share it
                self.record.steps_trained[layer] = self.record.steps_trained.get(layer, 0) + 1
                self._since.update(there)

    def check(self) -> None:
        """What moved since the first step. Raises: TrainingError when a target did not move, or anything else did."""
        if self.pending is not None and self.pending.began:
            raise TrainingError(f"training ended before the layers were chosen: {self.pending.progress()} batches came")
        if not self._sealed.start:
            if self.seen and not self._resumed:
                raise TrainingError(
                    f"nothing was trained: all {self.seen} optimizer steps had a learning rate of zero or were skipped"
                )
            return
        tensors, now = self.tensors(), self._sealed.parameters(self.model)
        trained = set(tensors) if self.switcher is None else self._since
        faults, idle = self._still(trained)
        rounded = set(tensors) if self._merges else set()
        faults += [
            f"{n} is frozen and changed" for n in self._sealed.changed(now) if n.removesuffix(".weight") not in rounded
        ]
        off = {t: s for t, s in self._sealed.start.items() if t not in trained and t not in rounded}
        faults += [f"{t} was never switched on and changed" for t, s in off.items() if verify.changed(s, tensors[t])]
        raise_faults("what trained is not what was chosen", faults)
        self.record.idle_experts = tuple(idle)
        still = self._sealed.still(now)
        for target, names in self._unmoved(trained).items():
            group = tensors[target]
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
        self.seen, self._sealed.start, self._resumed, self._merges = 0, {}, bool(restored), merges
        self._stepped.clear()
        self._since.clear()
        if self.pending is not None:
            self.pending.paced = True
        if restored:
            self._take_over(restored)
        self.watch_gradients()
        if self.switcher is not None and self.pending is None:
            self.start()

    def _take_over(self, restored: dict[str, Any]) -> None:
        then = Selection.from_dict(restored["selection"])
        asked, asks = restored.get("select") or {}, json.loads(json.dumps(self.record.config.get("select") or {}))
        differ = differences(asked, asks)
        if differ:
            raise SelectionError(f"the run that is resumed chose its layers in another way ({'; '.join(differ)})")
        now = self.record.selection
        verify.same_targets(
            "the run that is resumed", set(then.targets), set(now.targets if now is not None else self.tensors())
        )
        verify.same_precisions(restored.get("quant"), self.record.precisions)
        self.record.selection = then
        self.record.steps_trained = {int(k): v for k, v in restored.get("steps_trained", {}).items()}

    def on_load(self, state: Mapping[str, Any], prefix: str) -> None:
        """Keeps the choice of an adapter that is loaded. Raises: SelectionError where it is another one."""
        self.unseal([clean(k.removeprefix(prefix)) for k in state if k.startswith(prefix)])
        # PEFT writes the adapter's name only into the keys of modules that it finds.
        ends = [".lora_A.weight", f".lora_A.{self.adapter}.weight"]
        if any(".lora_A." in k and not k.endswith(tuple(ends)) for k in state):
            ends = ends[1:]
        keys = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
        whole = loaded_modules(self.model, self.adapter, state, prefix)
        found = whole | {clean(k.removesuffix(end)) for end in ends for k in keys if k.endswith(end)}
        if not found or any(".lora_embedding" in k for k in keys):
            return
        kept = self.pending.keep(found) if self.pending is not None and self.switcher is None else None
        if kept is not None:
            self._settle(kept, None)
            return
        if not (whole and self.switcher is not None):
            waits = self.pending.pool if self.pending is not None else None
            pool = [t.name for t in waits] if waits is not None else wrapped_names(self.model, self.adapter)
            verify.same_targets("the adapter that is loaded", found, set(pool))
        if self.refresher is not None:
            identity = self.config._layerpeft_projection.identity
            on_load_projection(self.model, self.adapter, state, prefix, identity)
            self.refresher.arm(self.model, self.adapter)
        folder = loading_folder()
        if folder is not None:
            self.read_masters(folder)
            if self.switcher is not None:
                put_back(self.model, self.adapter, whole)
                self.restore(folder)
        self._forget()  # loading may put new tensors in the place of the old

    def seal(self) -> None:
        """Writes down, just after wrapping, what the frozen weights are.

        Packed weights, which the first forward pass may lay out anew, are left for the first step; so is everything where all
        layers train, since wrapping them is to cost no more than in PEFT, and where processes may still be made alike.
        """
        selection = self.record.selection
        partial = self.pending is not None or (selection is not None and len(selection.layers) < selection.num_layers)
        if partial and distributed.world_size() == 1:
            self._sealed.wrapped(self.model)

    def unseal(self, names: Iterable[str] | None = None) -> None:
        """Forgets what these frozen weights were (None: all of them), because they change for a good reason."""
        self._sealed.forget(names)

    def _on_copy(self, model: nn.Module) -> None:
        for follower in followers_of(model):
            follower.measure_anew()

    def _await(self, pending: Pending) -> None:
        pending.tensors, pending.on_copy = self.tensors, self._on_copy
        if self.switcher is not None:
            pending.decider = self._first
        self.pending = pending

    def _forget(self) -> None:
        """Tensors are looked up anew."""
        self._tensors, self._layers = {}, {}
        self._held.clear()

    def _holds(self, optimizer: Optimizer) -> set[int]:
        """Identities of this adapter's tensors that the optimizer holds."""
        count = sum(len(g["params"]) for g in optimizer.param_groups)
        if self._held.get(optimizer, (None,))[0] != count:
            ids = self.ids()
            self._held[optimizer] = count, held_by(optimizer) & ids
        return self._held[optimizer][1]

    def _still(self, among: Iterable[str]) -> tuple[list[str], list[str]]:
        """(faults, idle experts) among those targets of which no tensor moved."""
        still = self._unmoved(among)
        whole = [t for t, names in still.items() if len(names) == len(self.tensors()[t])]
        faults = [
            f"{t} did not move: {verify.why_unmoved(self.tensors()[t], self._rate)}" for t in whole if not is_routed(t)
        ]
        return faults, [t for t in whole if is_routed(t)]

    def _unmoved(self, among: Iterable[str]) -> dict[str, list[str]]:
        # what a projection has trained may lie in the weights by now, and small updates in the masters alone
        moved = folded(self.model, self.adapter) | self.ahead()
        before = {t: self._sealed.start[t] for t in among if t in self._sealed.start}
        return {t: n for t, n in verify.unmoved(self.tensors(), before).items() if t not in moved}

    def _choose(self, optimizer: Optimizer) -> bool:
        """Makes the pending choice; False while more batches are wanted than this step had."""
        assert self.pending is not None
        pending = self.pending
        selection = pending.decided or pending.decide()
        if selection is not None:
            if self.switcher is None:
                self._settle(selection, optimizer)
            else:
                pending.close()
                self.pending = None
                self.start()
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
        whole = unwrap_others(self.model, self.adapter, chosen)
        if optimizer is not None:
            verify.forget(holders(self.ids() | removed.keys(), optimizer), removed)
        for parameter in removed.values():
            parameter.requires_grad_(False).grad = None
        tuner = self._tuner()
        if tuner is not None and hasattr(tuner, "targeted_module_names"):
            names = tuner.targeted_module_names
            tuner.targeted_module_names = [n for n in names if clean(n) in chosen]
        if not whole:
            self.config.target_modules = chosen
        self.record.selection = selection
        if (quantize := getattr(self.config, "_layerpeft_quantize", None)) is not None:
            self.record.quantized = quantize(self.model, selection)
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


# ---- what ties followers to the life of their model

FOLLOWERS: weakref.WeakSet[Any] = weakref.WeakSet()


class Tether:
    """Ties followers to the life of their model, and hears of adapters that are loaded into it.

    Pickles of the model do not take it along; a deep copy of the model gets followers of its own.
    """

    def __init__(self, followers: list[Any] | None = None) -> None:
        self.followers = followers or []

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for follower in self.followers:
            follower.on_load(state, prefix)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tether:
        twin = memo[id(self)] = Tether()
        twin.followers += [t for f in self.followers if (t := f.twin(memo)) is not None]
        FOLLOWERS.update(twin.followers)
        return twin

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Tether, ()

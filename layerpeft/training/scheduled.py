"""What following an adapter means where its layers are chosen again during training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.errors import SaveError, SelectionError, TrainingError, differences
from layerpeft.integrations import distributed
from layerpeft.saving.manifest import read_manifest
from layerpeft.selection.scoring import Measured
from layerpeft.selection.select import Selection
from layerpeft.text import note
from layerpeft.training import backward, verify
from layerpeft.training.gradients import GradientNorms, watch_gradients
from layerpeft.training.measuring import Pending, Tensors
from layerpeft.training.optimizer_states import holders, load_store
from layerpeft.training.record import LiveRecord
from layerpeft.training.switching import Switcher
from layerpeft.tuners.full.layer import keep_originals
from layerpeft.tuners.full.masters import Masters
from layerpeft.tuners.galore.refresh import Refresher
from layerpeft.tuners.lora.method import rest_but

NEEDS_UNUSED = (
    "layers change while training, and DistributedDataParallel waits for the gradients of all of them: build it with "
    "find_unused_parameters=True and without static_graph (Trainer: ddp_find_unused_parameters=True, and no ddp_static_graph)"
)

PLACES = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "task_type")


class Scheduled:
    """The part of a follower that belongs to its schedule."""

    adapter: str
    record: LiveRecord
    pending: Pending | None
    refresher: Refresher | None
    model: nn.Module
    tensors: Callable[[], Tensors]
    ids: Callable[[], set[int]]
    switcher: Switcher | None = None
    _norms: GradientNorms | None = None
    _told: int = -1  # the step up to which trackers were told of switches
    masters: Masters | None
    _since: set[str]
    gauge: Pending | None = None  # what measures the running step for the next choice
    _await: Callable[[Pending], None]
    _forget: Callable[[], None]
    _holds: Callable[[Optimizer], set[int]]
    _round: Sequence[Optimizer] = ()  # those that have stepped since the schedule last counted a step
    _held: MutableMapping[Optimizer, Any]  # optimizer -> which of the tensors it holds
    _on_copy: Callable[[nn.Module], None]

    def training(self) -> Tensors:
        """Those that train now: all of them, but where a schedule has switched some off."""
        switcher = self.switcher
        if switcher is None or not switcher.started:
            return self.tensors()
        return {t: group for t, group in self.tensors().items() if switcher.is_active(t)}

    def schedule(self, switcher: Switcher) -> None:
        """Switches the layers on and off from now on."""
        self.switcher = self.record.schedule = switcher
        self.model.register_forward_pre_hook(before_forward)
        note(switcher.sizes(self.tensors()))
        self._forget()  # PEFT is not done with them yet
        if switcher.waits:
            self._await(Pending(self.model, switcher.examined))

    def start(self, inside: bool = False) -> None:
        """Freezes what does not train yet, as soon as an optimizer holds the pool: what it did not see it would never train.

        `inside`: in a forward pass, where FSDP2 may have gathered some weights; where they are of the pool the start waits.
        """
        switcher = self.switcher
        if switcher is not None and switcher.started:
            switcher.hold(self.tensors())
        if switcher is None or switcher.started or self.pending is not None:
            return
        # an optimizer that has begun to step is known by now, where `gc.freeze()` has hidden it from `holders`
        stepping = any(ids for _, ids in self._held.values())
        self._forget()  # `fully_shard` puts other tensors in the place of those there were
        kinds = {distributed.is_cut(p) for group in self.tensors().values() for p in group.values()}
        if len(kinds) > 1 or not (stepping or holders(self.ids())):
            self._forget()
            return
        self._switch(switcher.start(self.model, self.tensors()), always=not inside)
        if switcher.measures() and self.gauge is None:
            self._measure()

    def news(self) -> dict[str, float]:
        """What trackers are told of the switches since they were last told, and of gradients."""
        found: dict[str, float] = {}
        if self.switcher is not None:
            found, self._told = self.switcher.news(self._told), self.switcher.standing.step
        norms = self._norms.take() if self._norms is not None else {}
        return found | {f"layers/grad_norm/{layer}": norm for layer, norm in norms.items()}

    def watch_gradients(self) -> None:
        """Begins to watch the gradients of a training's every layer, where `select` asks for it."""
        select = self.record.config.get("select") or {}
        if self._norms is not None:
            self._norms.close()
        if select.get("log_gradients"):
            self._norms = watch_gradients(self.model, select.get("stack"), self.tensors())

    def rest(self) -> None:
        """A training has ended: the whole pool may go to the optimizer of another."""
        self._round = []
        if self.gauge is not None:
            self.gauge.close()
            self.gauge = None
        if self._norms is not None:
            self._norms.close()
            self._norms = None
        if self.switcher is not None:
            rest_but(self.model, self.adapter, None)
            self.switcher.thaw(self.tensors())

    def restore(self, folder: str) -> None:
        """Goes on where the run stood that saved this folder.

        Raises: SaveError for a folder without a schedule; SelectionError where it was another one.
        """
        assert self.switcher is not None
        manifest = read_manifest(folder)
        if not manifest.get("schedule"):
            raise SaveError(
                f"{folder} holds no schedule: layers that change while training cannot go on from an adapter alone; start from it "
                "with PeftModel.from_pretrained(model, folder, is_trainable=True)"
            )
        if manifest["schedule"].get("divided"):
            raise SaveError(
                f"{folder} was saved by processes that each held a part of the optimizer's states (fully_shard), which are not in "
                "it; start from it with PeftModel.from_pretrained(model, folder, is_trainable=True)"
            )
        differ = sorted(differences(_flat(manifest["config"]), _flat(json.loads(json.dumps(self.record.config)))))
        if differ:
            raise SelectionError(f"the run in {folder} was set up in another way ({'; '.join(differ)})")
        for measuring in filter(None, (self.pending, self.gauge)):
            measuring.close()
        self.pending = self.gauge = None
        rest_but(self.model, self.adapter, None)
        self.switcher.thaw(self.tensors())
        self.switcher.restore(manifest["schedule"], load_store(folder))
        self.record.steps_trained = {int(r["layer"]): int(r["steps"]) for r in manifest["report"] if r.get("steps")}
        self._since = {t for t in self._since if self.record.steps_trained.get(self.switcher.layer_of[t])}

    def _switch(self, training: list[str], always: bool = True) -> None:
        """What follows from another set of layers: originals kept (`always`: of always-on modules too), refreshes, the cut."""
        keep_originals(self.model, self.adapter, training, always)
        rest_but(self.model, self.adapter, set(training))
        if self.masters is not None and self.switcher is not None:
            tensors, policy = self.tensors(), self.switcher.schedule.state
            for target in tensors.keys() - set(training):
                self.masters.rest([f"{target}|{n}" for n in tensors[target]], policy)
        if self.refresher is not None:
            self.refresher.switched(self.model, self.adapter, set(training))
        selection = self.record.selection
        backward.install(self.model, selection.stack if selection is not None else None)

    def _advance(self, optimizer: Optimizer) -> None:
        """Counts a step, which is over once every optimizer that holds some of what trains has stepped."""
        assert self.switcher is not None
        again = optimizer in self._round
        self._round = [o for o in self._round if o is not optimizer] + [optimizer]
        if not again and not verify.ids_of(self.training()) <= set().union(*(self._holds(o) for o in self._round)):
            return  # others hold the rest of what trains: a step is over once they have stepped, too
        together, self._round = self._round, [optimizer] if again else []
        training = self.switcher.after_step(self.model, self.tensors(), together)
        if training is not None:
            self._switch(training)
        if self.switcher.measures() and self.gauge is None:
            self._measure()

    def _measure(self) -> None:
        """Measures the coming step, frozen layers included, for the next choice."""
        assert self.switcher is not None
        known, turn = tuple(self.switcher.standing.known), self.switcher.standing.measured
        self.gauge = Pending(self.model, self.switcher.examined, known, turn)
        self.gauge.tensors, self.gauge.on_copy = self.tensors, self._on_copy

    def _take_measure(self) -> None:
        assert self.switcher is not None
        found = self.gauge.measured() if self.gauge is not None else None
        if self.gauge is not None and found is not None:
            self.switcher.remember(found[0])
            self.gauge.close()
            self.gauge = None

    def _active(self, held: set[int]) -> set[int]:
        """Those that train now."""
        if self.switcher is None:
            return held
        return held & verify.ids_of(self.training())

    def _first(self, measured: Measured, batches: int) -> Selection:
        assert self.switcher is not None and self.record.selection is not None
        active = self.switcher.first(measured)
        inside = tuple(t for t in self.tensors() if self.switcher.layer_of[t] in active)
        return replace(self.record.selection, layers=tuple(active), targets=inside)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was asked, `select` field by field, but for where its base model lies."""
    return {k: v for k, v in config.items() if k not in (*PLACES, "select")} | dict(config.get("select") or {})


def before_forward(model: nn.Module, *_: Any) -> None:
    """The first forward pass of a loop of one's own, whose optimizer is there by then. Raises: TrainingError under such a DDP."""
    tether = model.__dict__.get("_layerpeft")
    if tether is not None and model.training and torch.is_grad_enabled():
        for follower in tether.followers:
            if follower.switcher is not None and distributed.awaits_every_gradient():
                raise TrainingError(NEEDS_UNUSED)
            follower.start(inside=True)

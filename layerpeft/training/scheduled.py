"""What following an adapter means where its layers are chosen once, and where they are chosen again during training."""

import copy
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.optim.optimizer import Optimizer

from layerpeft.errors import SaveError, SelectionError, differences
from layerpeft.integrations.engines.known import is_cut
from layerpeft.integrations.files import as_written
from layerpeft.saving.manifest import read_manifest
from layerpeft.selection.scoring import Measured
from layerpeft.selection.select import Selection
from layerpeft.training import backward, verify
from layerpeft.training.holdings import Holdings
from layerpeft.training.measuring import Pending
from layerpeft.training.method import Method, Tensors
from layerpeft.training.optimizer_states import Store, bring_back, give, holders, put_away
from layerpeft.training.record import Record
from layerpeft.training.switching import Switcher

PLACES = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "task_type")


TOLD = 256  # layers, or units, of which trackers are told one by one


class Once:
    """The schedule of a choice that is made once: all of it trains, all the time."""

    switches = False

    def __init__(self, method: Method, on_copy: Callable[..., None]) -> None:
        self.method, self.holdings = method, Holdings(method)
        self.record: Record = method.config._layerpeft
        self.on_copy = on_copy  # told of a deep copy of the model as soon as it is used, and how it is called
        self._states_follow = False
        self._said = False

    @property
    def store(self) -> Store:
        """Optimizer states that are away."""
        return {}

    def training(self) -> Tensors:
        """Those that train now."""
        return self.holdings.tensors()

    def active(self, held: set[int]) -> set[int]:
        """Those of them that train now."""
        return held

    def trained(self) -> set[str]:
        """Targets that trained since this training began."""
        return set(self.holdings.tensors())

    def ever(self) -> set[str]:
        """Targets that trained, in the runs before this one too."""
        return set(self.holdings.tensors())

    def news(self) -> dict[str, float]:
        """What trackers are told of the choice, once it is made, and of the switches since they were last told."""
        selection = self.record.selection
        if self._said or selection is None or selection.num_layers > TOLD:
            return {}
        self._said = True
        found: dict[str, float] = {"layers/active": len(selection.layers), "layers/lowest": min(selection.layers)}
        found |= {f"layers/on/{i}": float(i in selection.layers) for i in range(selection.num_layers)}
        scores = selection.scores.values if selection.scores is not None and selection.scores.by != "depth" else ()
        return found | {f"layers/score/{i}": float(score) for i, score in enumerate(scores)}

    def carried(self) -> dict[str, Any]:
        """Where it stands, as plain data; empty where there is nothing to tell."""
        return {}

    # ---- what it hears, and does nothing about

    def count(self, targets: Iterable[str]) -> None: ...  # these have trained
    def begin(self) -> None: ...  # a training begins
    def start(self, inside: bool = False) -> None: ...  # freezes what does not train yet, as soon as that can be
    def skipped(self) -> None: ...  # a loss scaler skips the step
    def before_step(self) -> None: ...  # before a real step
    def after_step(self, optimizer: Optimizer) -> None: ...  # after a real step
    def rest(self) -> None: ...  # a training has ended
    def restore(self, moment: Mapping[str, Any], store: Store, where: str) -> None: ...  # goes on from there
    def lay_out(self) -> None: ...  # lets the tensors require gradients of which an optimizer's checkpoint holds states
    def copied(self, old: Any, memo: dict[int, Any]) -> None: ...  # in a deep copy of `old`: goes on where that stood
    def measure_anew(self) -> None: ...  # in a deep copy: puts hooks of its own in the place of those that came along
    def close(self) -> None: ...  # nobody follows, or measures, any more

    @contextmanager
    def states_here(self) -> Iterator[None]:
        """Inside, optimizers have all states that are away."""
        yield

    @contextmanager
    def states_follow(self) -> Iterator[None]:
        """Inside, what is restored comes with a checkpoint of the optimizer that holds every state, those that were away too."""
        self._states_follow = True
        try:
            yield
        finally:
            self._states_follow = False

    def watch(self, pending: Pending) -> Pending:
        """That which measures, told what trains."""
        pending.tensors, pending.on_copy = self.holdings.tensors, self.on_copy
        return pending


class Scheduled(Once):
    """Switches the layers of one adapter on and off. State is real here: who measures, and what has trained."""

    switches = True

    def __init__(self, method: Method, on_copy: Callable[..., None], switcher: Switcher) -> None:
        super().__init__(method, on_copy)
        self.switcher = self.record.schedule = switcher
        self._gauge: Pending | None = None  # what measures the running step for the next choice
        self._round: Sequence[Optimizer] = ()  # those that have stepped since the schedule last counted a step
        self._trained: set[str] = set()
        self._giving: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._told = -1  # the step up to which trackers were told of switches

    @property
    def store(self) -> Store:
        """Optimizer states that are away."""
        return self.switcher.store

    def training(self) -> Tensors:
        """Those that train now: all of them until an optimizer holds the pool."""
        tensors = self.holdings.tensors()
        if not self.switcher.started:
            return tensors
        return {t: group for t, group in tensors.items() if self.switcher.is_active(t)}

    def active(self, held: set[int]) -> set[int]:
        return held & verify.ids_of(self.training())

    def trained(self) -> set[str]:
        return self._trained

    def ever(self) -> set[str]:
        steps, layer_of = self.record.steps_trained, self.switcher.layer_of
        return {t for t in self.holdings.tensors() if steps.get(layer_of[t])}

    def count(self, targets: Iterable[str]) -> None:
        self._trained.update(targets)

    def begin(self) -> None:
        self._trained.clear()

    def skipped(self) -> None:
        if self._gauge is not None:
            self._gauge.restart()

    def start(self, inside: bool = False) -> None:
        """Freezes what does not train yet, as soon as an optimizer holds the pool: what it did not see it would never train.

        `inside`: in a forward pass, where FSDP2 may have gathered some weights; where they are of the pool the start waits.
        """
        switcher = self.switcher
        if switcher.started:
            switcher.hold(self.holdings.tensors())
            return
        stepping = self.holdings.stepping()
        self.holdings.forget()  # `fully_shard` puts other tensors in the place of those there were
        tensors = self.holdings.tensors()
        kinds = {is_cut(p) for group in tensors.values() for p in group.values()}
        # FSDP2 writes down the types of gradients in the first forward pass, in which the whole pool has to train
        early = kinds == {True} and not inside and not stepping
        if early or len(kinds) > 1 or not (stepping or holders(self.holdings.ids())):
            for parameter in (p for group in tensors.values() for p in group.values() if early):
                parameter.requires_grad_(True)  # what a resumed run had no states of, too
            self.holdings.forget()
            return
        for optimizer in holders(self.holdings.ids()) if kinds == {True} else ():
            self._give_files(optimizer)
        self._switch(switcher.start(self.method.model, tensors), always=not inside)
        self._measure()

    def before_step(self) -> None:
        """Takes up what the step's batches have shown."""
        found = self._gauge.measured() if self._gauge is not None else None
        if found is not None:
            self.switcher.remember(found[0])
            self.close()
        self.start()

    def after_step(self, optimizer: Optimizer) -> None:
        """Counts a step, which is over once every optimizer that holds some of what trains has stepped."""
        again = optimizer in self._round
        self._round = [o for o in self._round if o is not optimizer] + [optimizer]
        holdings = self.holdings
        if not again and not verify.ids_of(self.training()) <= set().union(*(holdings.of(o) for o in self._round)):
            return  # others hold the rest of what trains: a step is over once they have stepped, too
        together, self._round = self._round, [optimizer] if again else []
        training = self.switcher.after_step(self.method.model, holdings.tensors(), together)
        if training is not None:
            self._switch(training)
        self._measure()

    def news(self) -> dict[str, float]:
        found, self._told = self.switcher.news(self._told), self.switcher.standing.step
        return found

    def rest(self) -> None:
        """A training has ended: the whole pool may go to the optimizer of another."""
        self._round = []
        self.close()
        self._thaw()

    def carried(self) -> dict[str, Any]:
        """Where it stands, as plain data; empty before it has begun."""
        if not self.switcher.standing.history:
            return {}
        return {"schedule": self.switcher.plain(), "config": self._config(), "steps": self.record.steps_trained}

    def _config(self) -> dict[str, Any]:
        """What was asked for, as it stands in a file."""
        return json.loads(json.dumps(self.record.config))

    def restore(self, moment: Mapping[str, Any], store: Store, where: str) -> None:
        """Goes on where the run stood that tells this. Raises: SaveError for parts; SelectionError where it was another one."""
        if moment["schedule"].get("divided") and not self._states_follow:
            raise SaveError(
                f"{where} was saved by processes that each held a part of the optimizer's states (fully_shard), which are not in "
                "it; start from it with PeftModel.from_pretrained(model, folder, is_trainable=True)"
            )
        differ = sorted(differences(_flat(moment["config"]), _flat(self._config())))
        if differ:
            raise SelectionError(f"the run in {where} was set up in another way ({'; '.join(differ)})")
        self.close()
        self._thaw()
        with as_written(f"{where} does not hold the schedule that was saved"):
            self.switcher.restore(moment["schedule"], store)
            steps = {int(layer): int(count) for layer, count in moment["steps"].items()}
        self.record.steps_trained = steps
        self._trained = {t for t in self._trained if steps.get(self.switcher.layer_of[t])}

    @contextmanager
    def states_here(self) -> Iterator[None]:
        away, tensors = set(self.store), self.holdings.tensors()
        named = {f"{t}|{n}": p for t, group in tensors.items() for n, p in group.items()}
        optimizers = holders(self.holdings.ids()) if away else []
        bring_back(optimizers, named, self.store)
        try:
            yield
        finally:
            put_away(optimizers, {n: p for n, p in named.items() if n in away}, "offload", self.store)

    def lay_out(self) -> None:
        """torch wants a state of whatever requires a gradient, and gives none to what does not."""
        stated = self.switcher.stated
        for target, group in self.holdings.tensors().items():
            for parameter in group.values() if stated and target not in stated else ():
                parameter.requires_grad_(False)

    def first(self, measured: Measured, batches: int) -> Selection:
        """The first choice, from what the first step has shown."""
        assert self.record.selection is not None
        active = self.switcher.first(measured)
        inside = tuple(t for t in self.holdings.tensors() if self.switcher.layer_of[t] in active)
        return replace(self.record.selection, layers=tuple(active), targets=inside)

    def measure_anew(self) -> None:
        if self._gauge is not None:
            self.close()
            self._measure(always=True)

    def copied(self, old: Any, memo: dict[int, Any]) -> None:
        self._gauge = copy.deepcopy(old._gauge, memo)

    def close(self) -> None:
        if self._gauge is not None:
            self._gauge.close()
            self._gauge = None

    def _switch(self, training: list[str], always: bool = True) -> None:
        """What follows from another set of layers: originals kept (`always`: of always-on modules too), refreshes, the cut."""
        now = set(training)
        self.method.keep(now, always)
        self.method.switched(now, self.switcher.schedule.state)
        selection = self.record.selection
        backward.install(self.method.model, selection.stack if selection is not None else None)

    def _give_files(self, optimizer: Optimizer) -> None:
        """Lets the optimizer's state dict, of which every process holds a part, tell of states that are away."""
        wraps = isinstance(getattr(optimizer, "optimizer", None), Optimizer)  # Accelerate's own asks the one inside
        if optimizer not in self._giving and not wraps:
            self._giving.add(optimizer)
            optimizer.register_state_dict_post_hook(self._give)

    def _give(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        named = {f"{t}|{n}": p for t, group in self.holdings.tensors().items() for n, p in group.items()}
        give(optimizer, state, named, self.store)

    def _thaw(self) -> None:
        self.method.switched(None, self.switcher.schedule.state)
        self.switcher.thaw(self.holdings.tensors())

    def _measure(self, always: bool = False) -> None:
        """Measures the coming step, frozen layers included, where the next choice looks at it."""
        if self._gauge is not None or not (always or self.switcher.measures()):
            return
        known, turn = tuple(self.switcher.standing.known), self.switcher.standing.measured
        self._gauge = self.watch(Pending(self.method.model, self.switcher.examined, known, turn))


def moment_in(folder: str) -> dict[str, Any]:
    """Where the run stood that saved this folder. Raises: SaveError for a folder without a schedule."""
    manifest = read_manifest(folder)
    if not manifest.get("schedule"):
        raise SaveError(
            f"{folder} holds no schedule: layers that change while training cannot go on from an adapter alone; start from it "
            "with PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )
    steps = {r["layer"]: r["steps"] for r in manifest["report"] if r.get("steps")}
    return {"schedule": manifest["schedule"], "config": manifest["config"], "steps": steps}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was asked, `select` field by field, but for where its base model lies."""
    return {k: v for k, v in config.items() if k not in (*PLACES, "select")} | dict(config.get("select") or {})

"""Later passes over a row begin at the lowest layer that trains: what enters it is kept the first time that a row is seen.

Two hooks on the model do it, so that trainers and loops need not know. It is right or off: where anything below the cut keeps its
states from being a fixed function of a row, one line says why, and all is computed as without it. Published as layer recycling for
frozen encoders (Gururangan et al., 2019, for the idea of features that are computed once); bits are those of a run without it at
equal batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerpeft.integrations.torch import eager
from layerpeft.integrations.trainer import Seeing
from layerpeft.model.home import known_of
from layerpeft.selection.states import given
from layerpeft.text import note
from layerpeft.training.prefix import below, proof
from layerpeft.training.prefix.below import Below
from layerpeft.training.prefix.memory import Memory
from layerpeft.training.prefix.passing import Mode, Pass, keeps, unfit, wake
from layerpeft.training.prefix.running import RANDOM, Form, drew
from layerpeft.training.prefix.source import Source, source_of
from layerpeft.training.prefix.store import Store

CHANGES = "the layers that train change while training"
Open = Callable[[nn.Module, Below], Store]


class PrefixCache:
    """State is real here: what is kept, what was proved, and what became of the passes so far.

    `open_store(model, below)`: where states are kept, asked for once the cut is known; `lasting`: for other runs as well.
    `source`: nothing below the cut is there, but all was filled ahead, which has proved what a first batch would; what cannot begin
    at the cut is an error then.
    """

    def __init__(
        self,
        open_store: Open,
        stack: str | None,
        lower_dropout: bool = True,
        lasting: bool = False,
        source: Source | None = None,
    ) -> None:
        self.open_store, self.stack, self.lower_dropout, self.lasting = open_store, stack, lower_dropout, lasting
        self.source = source
        self.why: str | None = None  # it is off
        self.hits, self.misses = 0, 0  # rows of the passes so far
        self.newest: int | None = None  # rows alone are kept
        self.store: Store | None = None
        self._below: Below | None = None
        self._versions: tuple[Any, ...] = ()
        self._proved: set[Mode] = set()
        self._forms: dict[int, Form] = {}
        self._busy, self.rests = False, False  # in a proof, in this training
        self.kind: tuple[Any, ...] | None = None  # how keys of rows were made at the last pass
        self._now: Pass | None = None
        self._said: set[str] = set()

    def twin(self) -> PrefixCache:
        """That of a copy of the model."""
        found = PrefixCache(self.open_store, self.stack, self.lower_dropout, self.lasting, self.source)
        found.why = self.why
        return found

    def install(self, model: nn.Module) -> None:
        """From now on, for this model and its copies."""
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, always_call=True)

    def off(self, why: str) -> None:
        """No more, for this reason, which is said once. Raises: ConfigError where nothing else can be done."""
        self._must_not(why)
        self.why = why
        self.say(f"prefix_cache is off: {why}")
        if self.store is not None:
            self.store.close()
            self.store = None

    def say(self, sentence: str) -> None:
        """Once."""
        if sentence not in self._said:
            self._said.add(sentence)
            note(sentence)

    def begin(self, rows: Seeing) -> None:
        """A trainer begins, which sees its rows so often."""
        why = None
        if rows.fresh is not None:
            self._must_not("this trainer makes its rows anew")
            self.say(
                "prefix_cache: this trainer makes its rows anew, so that states serve the passes of a step, and go"
            )
        elif not (self.lasting or rows.again):
            why = "rows that are streamed never come again" if rows.epochs is None else None
            why = "one epoch without evaluation sees no row again" if rows.epochs == 1 else why
        if why is not None:
            self.say(f"prefix_cache is off: {why}")
        if rows.fresh != self.newest:
            self.forget()
        self.rests, self.newest = why is not None, rows.fresh

    def end(self) -> None:
        """A trainer has ended: how many passes of a row began at the cut."""
        if self.hits and self._below is not None:
            whole = self.hits + self.misses
            self.say(f"prefix_cache: {self.hits:,} of {whole:,} passes of a row began at layer {self._below.cut}")

    def news(self) -> dict[str, float]:
        """What trackers are told: the share of rows, so far, whose lower part was not computed."""
        seen = self.hits + self.misses
        return {"prefix_cache/hit_rate": self.hits / seen} if seen else {}

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A forward pass begins; what it is to be called with by name."""
        self._end()
        if self._busy or self.rests or self.why is not None or torch.compiler.is_compiling():
            return kwargs
        inputs = dict(given(model, args, kwargs))
        training = model.training and torch.is_grad_enabled()
        free = (training or self.source is not None) and inputs.get("use_cache") is None
        free = free and inputs.get("past_key_values") is None
        more = {"use_cache": False} if free and keeps(model, inputs) else {}  # nobody reads the keys of a training pass
        if (why := unfit(model, inputs | more)) is not None:
            self._must_not(why)
            self.say(f"prefix_cache: {why}, so that such passes are computed whole")
        elif self._ready(model):
            assert self._below is not None and self.store is not None
            parts = (self._below, inputs | more, self.store, self._proved, self._forms)
            self._now = Pass(model, *parts, self.lower_dropout, self.source)
            return kwargs | more
        return kwargs

    def after(self, model: nn.Module, output: Any) -> None:
        """It has ended. Where all was computed, what entered the cut is kept."""
        now = self._end()
        if now is None or output is None or self._busy:
            return
        self.kind = now.kind
        if now.running.why is not None:
            self.off(f"{now.running.why} (layer {now.below.cut})")
        elif now.kept:
            self.hits += len(now.rows)
        elif now.rows and now.running.entered is not None:
            self.misses += len(now.rows)
            self._keep(model, now, output)

    def forget(self) -> None:
        """What is kept belongs to other weights."""
        if self.store is not None:
            self.store.close()
        self.store, self._proved = None, set()

    def _keep(self, model: nn.Module, now: Pass, output: Any) -> None:
        entered, store = now.running.entered, self.store
        assert entered is not None and store is not None
        if now.mode not in self._proved:
            why = self._fault(model, now, entered, output)
            if why is not None:
                self.off(why)
                return
            self._proved.add(now.mode)
        for row in now.rows:
            if not store.has(row.key):
                store.put(row.key, entered[row.row, row.places].to("cpu", copy=True))

    def _fault(self, model: nn.Module, now: Pass, entered: torch.Tensor, output: Any) -> str | None:
        assert self.store is not None
        self._busy, quiet = True, now.quieted(model)
        try:
            found = proof.fault(model, now, output)
        finally:
            self._busy = False
            wake(quiet)
        if drew(now.random, now.running.random):
            return RANDOM.format(now.below.cut)
        known = ((row, self.store.get([row.key])) for row in now.rows)
        low = getattr(self.store, "bits", None) is not None
        if any(s and not proof.alike(s[0], entered[r.row, r.places].cpu(), low) for r, s in known):
            return proof.CHANGED.format(now.below.cut)
        return found

    def _ready(self, model: nn.Module) -> bool:
        """Whether there is a cut, and a store of states of what lies below it now."""
        names = known_of(model).blocks
        own = next((n for n in names if self.stack is None or n[0].rpartition(".")[0] == self.stack), None)
        lowest = below.lowest_of(model, own) if own else 0
        if self.source is not None:
            lowest = self.source.ahead.cut
        if lowest is None and self._below is None:  # an adapter that is switched off, before anything trained
            return False
        if lowest == 0:
            self.off("nothing lies below the lowest layer that trains")
            return False
        found = Below(own or (), lowest or 0)
        if self._below is not None and (lowest is None or lowest >= self._below.cut):
            found = self._below  # what enters it is as fixed while less trains, or nothing at all
        modules = below.modules_below(model, found)
        if (why := below.why_off(model, found, self.lower_dropout, modules)) is not None:
            self.off(why)
            return False
        if found != self._below:
            self._below, self._forms = found, _forms_of(model, found)
            self.forget()
        versions = _versions(modules)
        if versions != self._versions:
            self.forget()
            self._versions = versions
        if self.store is None:
            self.store = Memory(newest=self.newest) if self.newest else self.open_store(model, found)
        return True

    def _must_not(self, why: str) -> None:
        """Raises: ConfigError where what lies below the cut is not there."""
        if self.source is not None:
            raise self.source.lacks(why)

    def _end(self) -> Pass | None:
        now, self._now = self._now, None
        if now is not None:
            now.close()
        return now


def _forms_of(model: nn.Module, found: Below) -> dict[int, Form]:
    """What stand-ins for the blocks below give out, by number; nothing of blocks that are there."""
    lower = enumerate(map(model.get_submodule, found.names[: found.cut]))
    return {i: block.form for i, block in lower if source_of(block) is not None}  # type: ignore[misc]


def _versions(modules: below.Modules) -> tuple[Any, ...]:
    """Changes when a weight below the cut, or one in front of the blocks, is written to or another one takes its place."""
    held = (t for _, m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
    return tuple((id(t), 0 if t.is_inference() else t._version) for t in held)


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    for found in _of(model):
        kwargs = found.before(model, args, kwargs)
    return args, kwargs


def _after(model: nn.Module, _args: Any, output: Any) -> None:
    for found in _of(model):
        found.after(model, output)


_before, _after = eager(_before), eager(_after)


def _of(model: nn.Module) -> list[PrefixCache]:
    """Those of the model's adapters whose layers are chosen; a pickled copy of the model has none."""
    tether = known_of(model).tether
    records = [f.record for f in tether.followers if f.live] if tether is not None else []
    return [r.prefix for r in records if r.prefix is not None and r.selection is not None]

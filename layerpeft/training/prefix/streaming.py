"""The states that enter the cut, of any number of rows, with one block below it in memory at a time.

A portion of the batches goes through the front of the model, then through block after block: each is loaded, the whole portion
passes through it, and it is dropped. Between blocks states lie in a file that has no name, and is gone with the process. A batch
is computed as a training would compute it, whole and in its own shape, so that its states are the same to the bit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError
from layerpeft.integrations.torch import give_back
from layerpeft.model.evaluating import standing_in
from layerpeft.selection.states import entering_states
from layerpeft.training.prefix import fingerprint, proof
from layerpeft.training.prefix.below import Below
from layerpeft.training.prefix.folders import Handle
from layerpeft.training.prefix.passing import Keyed, Mode, quieted
from layerpeft.training.prefix.rows import Row, length
from layerpeft.training.prefix.running import RANDOM, TWICE, Form, drew, random_states, shaped
from layerpeft.training.prefix.store import Store

PORTION = 1 << 30  # bytes of states that go through a block before the next is loaded
WAITING = 32 << 20  # bytes of states that wait for the writer of the store
UNTOLD = "rows of a batch cannot be told apart, so that nothing can be kept of them"
ASTRAY = "what enters layer {} did not come there by the layer below alone"
LOSES = ("fused_lm_head", "num_items_in_batch")  # what trainers ask of the loss, which is never reached
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """What a trainer calls the model with, by name, and whether it trains then."""

    inputs: Inputs
    training: bool


@dataclass(frozen=True)
class Lower:
    """The lower part of a model. `model`: its front (`parts.front_alone`); `load(i)`: block i with its weights; `forms`: what each
    of them hands on; `cast`: the type that autocast casts to; `quiet`: nothing below the cut is random in training."""

    model: nn.Module
    below: Below
    forms: Sequence[Form]
    load: Callable[[int], nn.Module]
    device: torch.device
    cast: torch.dtype | None = None
    quiet: bool = False

    @contextmanager
    def block(self, number: int) -> Iterator[None]:
        """Inside, block `number` is in its place."""
        name, block = self.below.names[number], self.load(number)
        stands = self.model.get_submodule(name)
        self.model.set_submodule(name, block)
        try:
            yield
        finally:
            self.model.set_submodule(name, stands)
            for tensor in (*block.parameters(), *block.buffers()):  # whoever still holds the module
                tensor.data = tensor.new_empty(0)
            give_back()

    def belongs(self, step: Callable[[], object]) -> dict[str, str]:
        """As `fingerprint.belongs_to` of the whole model, block by block."""
        lines = fingerprint.told(fingerprint.held_below(self.model, self.below))
        for number in range(self.below.cut):
            with self.block(number):
                own = f"{self.below.names[number]}."
                held = fingerprint.held_below(self.model, self.below)
                lines |= fingerprint.told({name: t for name, t in held.items() if name.startswith(own)})
            step()
        return fingerprint.belongs(self.model, self.below, fingerprint.digest_of(lines))

    def keyed(self) -> Keyed:
        """What keys of its rows hang on besides the rows."""
        with self._cast():
            return Keyed.of(self.model, self.below, self.device.type)

    @torch.no_grad()
    def entering(self, number: int, call: Call, states: torch.Tensor | None = None) -> tuple[torch.Tensor, Inputs]:
        """What enters block `number` (rows, tokens, …), and what it is called with by name: of the front for 0, else by way of the
        block below it, which `states` enter. Raises: ConfigError where it draws random numbers, or comes there otherwise."""
        names, ran = self.below.names, []
        self.model.train(call.training)
        if call.training and self.quiet:
            quieted(self.model, self.below)
        before = random_states(self.device)
        with ExitStack() as stack:
            stack.enter_context(standing_in(self.model.get_submodule(names[number]), _reach))
            if states is not None:
                block = self.model.get_submodule(names[number - 1])
                own = block.forward

                def run(*args: Any, **kwargs: Any) -> Any:
                    ran.append(1)
                    hidden = entering_states(args, kwargs)
                    if hidden is not None and hidden.data_ptr() != states.data_ptr():  # something came in between
                        hidden.data.copy_(states)
                    return own(*args, **kwargs)

                stack.enter_context(standing_in(block, run))
            if states is not None and number > 1:
                form = self.forms[number - 2]
                under = self.model.get_submodule(names[number - 2])
                stack.enter_context(standing_in(under, lambda *_, **__: shaped(form, states)))
            hidden, kwargs = self._reached(stack, call)
        if drew(before, random_states(self.device)):
            raise ConfigError(RANDOM.format(self.below.cut))
        if hidden is None or len(ran) != (states is not None):
            raise ConfigError(TWICE if ran else ASTRAY.format(number))
        return hidden, kwargs

    def _reached(self, stack: ExitStack, call: Call) -> tuple[torch.Tensor | None, Inputs]:
        stack.enter_context(self._cast())
        try:
            self.model(**{k: v for k, v in call.inputs.items() if k not in LOSES})
        except _Reached as found:
            return found.hidden, found.kwargs
        return None, {}

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.cast, enabled=self.cast is not None)


class _Reached(Exception):
    def __init__(self, hidden: torch.Tensor | None, kwargs: Inputs) -> None:
        self.hidden, self.kwargs = hidden, kwargs


def _reach(*args: Any, **kwargs: Any) -> Any:
    raise _Reached(entering_states(args, kwargs), kwargs)


@dataclass
class Going:
    """A call on its way: its rows, and where its states lie. `alone`: it is the row of another call by itself, to be compared."""

    call: Call
    rows: list[Row]
    known: frozenset[bytes]
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    alone: tuple[Going, Row] | None = None


@dataclass
class Filling:
    """State is real here: the calls of the portion that is on its way, and what was filled so far. `lost`: keys of rows that the
    store has not taken. `step(n)`: so many passes of a call through a block are done."""

    lower: Lower
    store: Store
    room: Path
    step: Callable[[int], object]
    portion: int = PORTION
    rows: dict[bool, dict[bytes, int]] = field(default_factory=lambda: {True: {}, False: {}})
    lost: set[bytes] = field(default_factory=set)
    computed: int = 0
    entering: torch.dtype | None = None
    _proved: set[Mode] = field(default_factory=set)
    _going: list[Going] = field(default_factory=list)
    _waiting: set[bytes] = field(default_factory=set)
    _used: int = 0
    _end: int = 0

    def fill(self, calls: Iterable[Call]) -> None:
        """All rows of these calls are kept, those alone computed that are in batches of which one is not there yet.

        Raises: ConfigError where states are no fixed function of a row; OSError where the disk is full."""
        with _file(self.room) as file:
            for call in calls:
                self._begin(file, call)
                if self._used >= self.portion:
                    self._sweep(file)
            self._sweep(file)

    def _begin(self, file: Handle, call: Call) -> None:
        """Whether a call is to be computed, and then what enters the first block."""
        hidden, kwargs = self.lower.entering(0, call)
        rows, kind = self.lower.keyed().rows(call.inputs, hidden, kwargs)
        if not rows:
            raise ConfigError(UNTOLD)
        for row in rows:
            self.rows[call.training].setdefault(row.key, length(row))
        known = frozenset(row.key for row in rows if self.store.get([row.key]) is not None)  # read, and found whole
        if all(row.key in known or row.key in self._waiting for row in rows):
            self.step(self.lower.below.cut)
            return
        self._waiting |= {row.key for row in rows}
        mode = (call.training, *kind)
        going = self._put(file, Going(call, rows, known, self._end, hidden.shape, hidden.dtype), hidden)
        if mode not in self._proved:
            self._proved.add(mode)
            self._alone(file, going)

    def _alone(self, file: Handle, going: Going) -> None:
        """One row of a call by itself goes the same way: it must come out as it does among others."""
        row, shape, decoder = proof.longest(going.rows), (going.shape[0], going.shape[1]), self.lower.keyed().decoder
        inputs = {k: proof.own(k, v, row, shape, decoder) for k, v in going.call.inputs.items()}
        call = Call(inputs, going.call.training)
        try:
            hidden, _ = self.lower.entering(0, call)
        except Exception:  # such as that of a model that wants as many pictures as there were
            return
        self._put(file, Going(call, [], frozenset(), self._end, hidden.shape, hidden.dtype, (going, row)), hidden)

    def _put(self, file: Handle, going: Going, hidden: torch.Tensor) -> Going:
        _write(file, going, hidden)
        self._going.append(going)
        self._end += 8 * hidden.numel()  # in the widest type; holes take no room
        self._used += hidden.nbytes
        return going

    def _sweep(self, file: Handle) -> None:
        """What is on its way goes through all blocks, and into the store."""
        for number in range(self.lower.below.cut) if self._going else ():
            with self.lower.block(number):
                for going in tuple(self._going):
                    try:
                        hidden, _ = self.lower.entering(number + 1, going.call, self._read(file, going))
                    except Exception:
                        if going.alone is None:
                            raise
                        self._going.remove(going)
                        continue
                    _write(file, going, hidden)
                    self.step(going.alone is None)
        self._check(file)
        self._keep(file)
        self._going, self._used, self._end = [], 0, 0
        self._waiting.clear()

    def _check(self, file: Handle) -> None:
        cut, low = self.lower.below.cut, getattr(self.store, "bits", None) is not None
        for going in self._going:
            if going.alone is not None:
                other, row = going.alone
                ours, among = self._read(file, going), self._read(file, other)
                if not proof.alike(ours[0].cpu(), among[row.row, row.places].cpu()):
                    raise ConfigError(proof.TOGETHER.format(cut))
            states = self._read(file, going) if going.known else None
            if states is None:
                continue
            for row in going.rows:
                kept = self.store.get([row.key]) if row.key in going.known else None
                if kept and not proof.alike(kept[0], states[row.row, row.places].cpu(), low):
                    raise ConfigError(proof.CHANGED.format(cut))

    def _keep(self, file: Handle) -> None:
        waits = 0
        for going in self._going:
            if going.alone is not None:
                continue
            states, self.entering = self._read(file, going), going.dtype
            for row in going.rows:
                if not self.store.has(row.key):
                    state = states[row.row, row.places].to("cpu", copy=True)
                    if waits + state.nbytes > WAITING:
                        self.store.flush()
                        waits = 0
                    self.store.put(row.key, state)
                    waits += state.nbytes
                    self.computed += 1
        self.store.flush()
        self.lost |= {row.key for going in self._going for row in going.rows if not self.store.has(row.key)}

    def _read(self, file: Handle, going: Going) -> torch.Tensor:
        data = torch.empty(going.shape, dtype=going.dtype)
        file.read_into(_bytes(data), going.offset)
        return data.to(self.lower.device)


def _write(file: Handle, going: Going, hidden: torch.Tensor) -> None:
    going.shape, going.dtype = hidden.shape, hidden.dtype
    file.write(_bytes(hidden.detach().cpu().contiguous()), going.offset)


def _bytes(data: torch.Tensor) -> memoryview:
    return data.reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _file(folder: Path) -> Iterator[Handle]:
    """A file without a name there. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    fd, path = tempfile.mkstemp(dir=folder, prefix=".filling-")
    try:
        handle = Handle(Path(path), os.O_RDWR)
    finally:
        os.close(fd)
        os.unlink(path)
    yield handle

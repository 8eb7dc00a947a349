"""Hidden states on their way through a stack: what enters and leaves its layers, in whatever form blocks take and give them.

Only real tokens count: those that the `attention_mask` of the call lets in (`decoder_attention_mask`, or else the labels, in
the decoder of an encoder-decoder). Towers for images and sound beside a text model have none. Texts packed into one row are
told apart by `position_ids` that begin anew.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from layerpeft.errors import NothingSeenError, ScoreError
from layerpeft.integrations import distributed
from layerpeft.integrations.losses import IGNORED
from layerpeft.integrations.torch import add_to, eager, widest
from layerpeft.model.architectures import stack_labels, text_config
from layerpeft.model.layers import find_module
from layerpeft.model.units import LAYER, in_units
from layerpeft.selection.scoring import Measured, Request, Watching
from layerpeft.selection.sublayers import Stream
from layerpeft.text import some

Add = Callable[[torch.Tensor], torch.Tensor]
_NAMES = ("hidden_states", "hidden_state", "inputs_embeds", "x", "input", "inputs")


@dataclass(frozen=True)
class First:
    """`first`: which end of the scale is trained first; `low` turns the sign of every score."""

    first: Literal["high", "low"] = "high"


def signed(options: Any, values: Iterable[float]) -> Measured:
    """One number per layer; `first: low` turns the sign."""
    sign = -1.0 if getattr(options, "first", "high") == "low" else 1.0
    return Measured(tuple(0.0 + sign * value for value in values))


@dataclass(frozen=True)
class Passage:
    """One run of one layer: the states (rows, tokens, width) that entered and left it, which tokens are real and where texts begin
    inside of rows (both (rows, tokens); None: all are, nowhere)."""

    layer: int
    before: torch.Tensor
    after: torch.Tensor
    real: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The real tokens' states (tokens, width)."""
        return states.flatten(0, 1) if self.real is None else states[self.real]

    def texts(self, states: torch.Tensor) -> list[torch.Tensor]:
        """The same text by text, without those that have none."""
        real = [slice(None)] * len(states) if self.real is None else list(self.real)
        found = [s[r] for s, r in zip(states, real, strict=True)]
        if self.starts is not None:
            cuts = [s[r].nonzero().flatten().tolist() for s, r in zip(self.starts, real, strict=True)]
            found = [p for t, c in zip(found, cuts, strict=True) for p in t.tensor_split([i for i in c if i])]
        return [text for text in found if len(text)]

    def pooled(self, states: torch.Tensor, pool: str) -> torch.Tensor:
        """(samples, width): every token (`all`), or of every text its last one or the mean (in float32)."""
        if pool == "all":
            return self.tokens(states)
        texts = self.texts(states)
        if not texts:
            return states.new_zeros(0, states.shape[-1])
        return torch.stack([t[-1] if pool == "last" else t.float().mean(0) for t in texts])


def streams(
    request: Request, units: Iterable[int], tell: Callable[[int, torch.Tensor, torch.Tensor], None]
) -> list[Any]:
    """Hooks on the parts of layers, which are scored instead of those: `tell` hears of each of these `units` what the stream is
    before and after it."""
    layers, found = request.layers, list[Any]()
    places = {layers.names[i]: i for i in units}

    def told(part: str, before: torch.Tensor, after: torch.Tensor) -> None:
        if part in places:
            tell(places[part], before, after)

    every = in_units(layers.whole, layers.unit, layers.whole.targets)[0]  # also those that hold no target
    for block in {layers.block(i).index: layers.block(i) for i in places.values()}.values():
        parts = [unit.name for unit in every.layers if unit.block == block.index]
        found += Stream(request.model, block.name, parts, told).attach(entering_states, states_in)
    return found


class StatesWatching(Watching):
    """A measurement that sees every run of every layer that holds targets (`see`).

    A stack that runs several times in a batch (pairs, loops) is seen each time; what a backward pass runs again is not.
    """

    doing = "measure"
    entering = True  # whether what enters a layer is looked at; it is copied, since a block may change it in place

    def __init__(self, request: Request, options: Any) -> None:
        super().__init__(request, options)
        self.layers = sorted({t.layer for t in request.targets})
        self._entered: dict[int, torch.Tensor] = {}
        self._given: Mapping[str, Any] = {}
        config = getattr(request.model, "config", None)
        reads = str(getattr(request.model, "main_input_name", ""))
        kinds = stack_labels([request.layers.stack], reads)[0]
        self._below = bool(getattr(config, "is_encoder_decoder", False)) and "decoder" in request.layers.stack
        self._apart = "vision" in kinds or "audio" in kinds and reads == "input_ids"
        self._sound = "audio" in kinds

    def see(self, passage: Passage) -> None:
        """What becomes of one run of one layer."""
        raise NotImplementedError

    def attach(self) -> None:
        """Puts the hooks on."""
        for module in {id(m): m for m in (self._model, self.request.model)}.values():  # the innermost call counts
            self._handles.append(module.register_forward_pre_hook(eager(self.called), with_kwargs=True))
        if self.request.layers.unit != LAYER:
            self._handles += streams(self.request, self.layers, self._passed)
            return
        for layer in self.layers:
            block = find_module(self.request.model, self.request.layers.layers[layer].name)
            if self.entering:
                self._handles.append(block.register_forward_pre_hook(self._enter(layer), with_kwargs=True))
            self._handles.append(block.register_forward_hook(self._leave(layer)))

    def detach(self) -> None:
        """Takes every hook off."""
        super().detach()
        self._entered.clear()

    def refuse_unseen(self, seen: Iterable[int]) -> None:
        """Raises: ScoreError naming the layers of which nothing was seen."""
        seen = set(seen)
        unseen = [self.request.layers.layers[i].name for i in self.layers if i not in seen]
        if unseen:
            kind = ScoreError if seen else NothingSeenError
            raise kind(
                f"{len(unseen)} layer(s) gave out nothing to {self.doing}: {some(unseen)}. They were never called, give out no "
                "hidden states, or all of the input is padding; leave them out with exclude, or choose by gradient_norm."
            )

    def measured(self, values: Mapping[int, float]) -> Measured:
        """One number per layer; 0 for layers without targets."""
        return signed(self.options, (values.get(i, 0.0) for i in range(len(self.request.layers))))

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what the layers' padding is told by."""
        self._given = given(module, args, kwargs)

    def _enter(self, layer: int) -> Any:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = entering_states(args, kwargs)
            if states is not None:
                self._entered[layer] = states.detach().clone()

        return eager(enter)

    def _leave(self, layer: int) -> Any:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            after, before = states_in(output), self._entered.pop(layer, None)
            if after is not None and (before is not None or not self.entering):
                self._passed(layer, before, after)

        return eager(leave)

    def _passed(self, layer: int, before: torch.Tensor | None, after: torch.Tensor) -> None:
        with torch.no_grad():
            passage = self._passage(layer, after.detach(), before)
            if passage.real is None or bool(passage.real.any()):
                self._running = True
                self.see(passage)

    def _passage(self, layer: int, after: torch.Tensor, before: torch.Tensor | None) -> Passage:
        name = self.request.layers.layers[layer].name
        before = after if before is None else before
        if before.shape != after.shape:
            raise ScoreError(
                f"{name} takes states {tuple(before.shape)} and gives out {tuple(after.shape)}, which cannot be compared; leave "
                "such layers out with exclude, or choose by gradient_norm"
            )
        if after.dim() > 3 and after.shape[-1] != getattr(text_config(self.request.model), "hidden_size", None):
            raise ScoreError(
                f"{name} hands on maps {tuple(after.shape)} and no tokens' states; choose by gradient_norm"
            )
        mask, places = self._mask(), self._given.get("position_ids")
        if after.dim() == 2:  # without padding, or with the rows of the batch one after another
            rows = mask.shape if mask is not None and mask.numel() == len(after) else (1, len(after))
            before, after = before.unflatten(0, rows), after.unflatten(0, rows)
        before, after = before.flatten(0, -3), after.flatten(0, -3)
        real = None if mask is None else self._fitting(mask, after)
        starts = None
        if isinstance(places, torch.Tensor) and places.shape == after.shape[:2]:
            starts = (places == 0).to(after.device)
        return Passage(layer, before, after, real, starts)

    def _mask(self) -> torch.Tensor | None:
        """(rows, tokens), True for what is no padding."""
        if self._apart:
            return None
        found = self._given.get("decoder_attention_mask" if self._below else "attention_mask")
        if found is None and self._below and isinstance(labels := self._given.get("labels"), torch.Tensor):
            found = labels != IGNORED
        return found != 0 if isinstance(found, torch.Tensor) and found.dim() == 2 else None

    def _fitting(self, mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor | None:
        rows, tokens = states.shape[:2]
        if int(mask.sum()) == rows * tokens:  # there is no padding, or it is gone already
            return None
        if mask.shape[1] > tokens:  # of sound before its convolutions; with what is in a cache before the tokens
            mask = mask[:, :: mask.shape[1] // tokens][:, :tokens] if self._sound else mask[:, -tokens:]
        if mask.shape[1] != tokens or rows % mask.shape[0]:
            return None
        return mask.repeat(rows // mask.shape[0], 1).to(states.device)


class LayerSums(StatesWatching):
    """Adds numbers up over all that is seen, in float64 and layer by layer: `part` says which, of one run of one layer.

    While training, a batch whose numbers are not all finite is left out, since a loss scaler is going to skip it.
    """

    def __init__(self, request: Request, options: Any) -> None:
        super().__init__(request, options)
        self.sums: dict[int, torch.Tensor] = {}
        self._fresh: dict[int, torch.Tensor] = {}  # of the running batch, while training

    def part(self, passage: Passage) -> torch.Tensor:
        """(numbers,) of one run; always as many for a layer."""
        raise NotImplementedError

    def value(self, sums: torch.Tensor) -> float:
        """A layer's score from its sums, high first: the mean, where they are a sum and a number. Raises: ScoreError where they say
        nothing."""
        return float(sums[0] / sums[1])

    def see(self, passage: Passage) -> None:
        """Adds its part up."""
        part = self.part(passage).cpu().double()
        add_to(self._fresh if self.request.live else self.sums, passage.layer, part)

    def next_batch(self, scale: float | None = None) -> None:
        """Counts the batch, if anything came through that is finite."""
        self._running &= all(bool(part.isfinite().all()) for part in self._fresh.values())
        if self._running:
            for layer, part in self._fresh.items():
                add_to(self.sums, layer, part)
        self._fresh.clear()
        super().next_batch(scale)

    def combine(self, add: Add) -> None:
        """Adds up what all processes have seen."""
        sizes = torch.zeros(distributed.world_size(), len(self.layers), dtype=torch.float64)
        for place, layer in enumerate(self.layers):
            sizes[distributed.rank(), place] = self.sums[layer].numel() if layer in self.sums else 0
        for layer, size in zip(self.layers, add(sizes).amax(0).long().tolist(), strict=True):
            if size:
                self.sums[layer] = add(self.sums.get(layer, torch.zeros(size, dtype=torch.float64)))

    def result(self) -> Measured:
        """Raises: ScoreError naming layers of which nothing was seen."""
        self.refuse_unseen(self.sums)
        return self.measured({layer: self.value(sums) for layer, sums in self.sums.items()})


class RowSums(LayerSums):
    """Gathers rows of numbers in groups of `size`, over batches; `close` makes sums of a group, whose rest waits for the next.

    What of a passage is gathered `rows` says; it lies on the CPU in float32, or in float64 if it comes so.
    """

    name, what = "", "rows"
    size = 128
    least = 1  # rows of which something can be said

    def __init__(self, request: Request, options: Any) -> None:
        super().__init__(request, options)
        self._gathered: dict[int, list[torch.Tensor]] = {}  # of the running batch
        self.waiting: dict[int, torch.Tensor] = {}

    def rows(self, passage: Passage) -> torch.Tensor:
        """(samples, numbers) of one run of a layer."""
        raise NotImplementedError

    def close(self, rows: torch.Tensor) -> torch.Tensor:
        """The sums (numbers,) of a group, in float64."""
        raise NotImplementedError

    def see(self, passage: Passage) -> None:
        """Takes its rows."""
        rows = self.rows(passage).cpu()
        self._gathered.setdefault(passage.layer, []).append(rows if rows.dtype == torch.float64 else rows.float())

    def next_batch(self, scale: float | None = None) -> None:
        """Closes the groups that are full."""
        found = {layer: torch.cat(rows) for layer, rows in self._gathered.items()}
        self._gathered.clear()
        if self.request.live and not all(bool(rows.isfinite().all()) for rows in found.values()):
            self._running = False
        elif found:
            for layer, rows in found.items():
                held = self.waiting.pop(layer, None)
                self._wait(layer, rows if held is None else torch.cat([held, rows]))
        super().next_batch(scale)

    def combine(self, add: Add) -> None:
        """Adds up what all processes have seen; what waits in them is put together in their order."""
        super().combine(add)
        for layer in self.layers:
            rows = gathered(self.waiting.pop(layer, None), add)
            if rows is not None:
                self._wait(layer, rows)

    def result(self) -> Measured:
        """Closes what waits. Raises: ScoreError for too few rows, and for layers of which nothing was seen."""
        self.refuse_unseen({*self.sums, *self.waiting})
        sums = dict(self.sums)
        for layer, rows in self.waiting.items():
            if len(rows) >= self.least:
                add_to(sums, layer, self.close(rows))
        if short := [len(rows) for layer, rows in self.waiting.items() if layer not in sums]:
            raise ScoreError(
                f"{self.name} needs {self.least} {self.what} at least, and the batches hold {short[0]}; give more batches "
                "(num_batches), or larger ones"
            )
        return self.measured({layer: self.value(part) for layer, part in sums.items()})

    def _wait(self, layer: int, rows: torch.Tensor) -> None:
        while len(rows) >= self.size:
            part, rows = self.close(rows[: self.size]), rows[self.size :]
            add_to(self.sums, layer, part)
        if len(rows):
            self.waiting[layer] = rows


def gathered(rows: torch.Tensor | None, add: Add) -> torch.Tensor | None:
    """The rows (samples, numbers) of all processes, in their order; None where none holds any. Every process must ask."""
    facts = torch.zeros(distributed.world_size(), 2, dtype=torch.float64)
    if rows is not None:
        facts[distributed.rank()] = torch.tensor([len(rows), rows.shape[1]])
    facts = add(facts)
    counts, width = facts[:, 0].long().tolist(), int(facts[:, 1].max())
    if not sum(counts):
        return None
    found = torch.zeros(sum(counts), width, dtype=torch.float32 if rows is None else rows.dtype)
    if rows is not None:
        begin = sum(counts[: distributed.rank()])
        found[begin : begin + len(rows)] = rows
    return add(found)


def given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a module is called with, by name."""
    names = list(inspect.signature(module.forward).parameters) if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def states_in(output: Any) -> torch.Tensor | None:
    """The hidden states in what a block gives out: the tensor, or the first of several, (…, width)."""
    return next((p for p in _parts(output) if _is_states(p)), None)


def entering_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The hidden states among what a block is called with."""
    named = [kwargs[name] for name in _NAMES if name in kwargs]
    return states_in((*args, *named)) if args or named else states_in(kwargs)


def with_states(output: Any, states: torch.Tensor) -> Any:
    """The same output with other hidden states."""
    old = states_in(output)
    if isinstance(output, torch.Tensor):
        return states
    if isinstance(output, Mapping):
        made = {k: states if v is old else v for k, v in output.items()}
        return made if type(output) is dict else replace(output, **made)  # type: ignore[type-var]
    parts = [states if p is old else p for p in output]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(samples, width) twice -> (samples,); 1 between two zeros, 0 between a zero and something."""
    a, b = a.to(widest(a.device)), b.to(widest(b.device))
    norms = torch.stack([a.norm(dim=-1), b.norm(dim=-1)])
    product = norms.prod(0)
    alike = (norms.amax(0) == 0).to(a.dtype)
    cosine = (a * b).sum(-1) / torch.where(product > 0, product, 1)
    return torch.where(product > 0, cosine.clamp(-1, 1), alike).where(norms.isfinite().all(0), torch.nan)


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    return output if isinstance(output, tuple | list) else (output,)


def _is_states(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.is_floating_point() and part.dim() > 1

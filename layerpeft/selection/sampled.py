"""A sample of the tokens that go through a stack: of each what every layer gives out for it.

Every token gets a random key from (seed, process, batch), the same in all layers; the `tokens` smallest keys stay, so that the
sample does not depend on the order of batches, and in several processes it is one sample of all of them. It lies on the CPU in
the type of the activations: layers · tokens · width numbers. Only real tokens count (`selection/states.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layerpeft.integrations import distributed
from layerpeft.selection.draws import seed_of
from layerpeft.selection.scoring import Measured, Request
from layerpeft.selection.states import Passage, StatesWatching


@dataclass(frozen=True)
class Sample:
    """Tokens' outputs (tokens, width) with their keys (tokens,), smallest first."""

    keys: torch.Tensor
    rows: torch.Tensor


class TokenSample(StatesWatching):
    """The running measurement; `options.tokens` are sampled at most, and `value` makes a score of a layer's."""

    name = ""
    entering = False

    def __init__(self, request: Request, options: Any) -> None:
        super().__init__(request, options)
        self._kept: dict[int, Sample] = {}
        # of the running batch; a layer that runs several times counts once, so that the layers' tokens are the same
        self._fresh: dict[int, Sample] = {}

    def value(self, rows: torch.Tensor) -> float:
        """A layer's score from its sample (tokens, width)."""
        raise NotImplementedError

    def see(self, passage: Passage) -> None:
        """Keeps what may get into the sample."""
        layer = passage.layer
        if layer in self._fresh:
            return
        rows = passage.tokens(passage.after)
        keys = self._keys(rows.shape[0])
        order = keys.argsort()[: self.options.tokens]
        known = self._kept.get(layer)
        if known is not None and known.keys.numel() >= self.options.tokens:
            order = order[keys[order] < known.keys[-1]]
        self._fresh[layer] = Sample(keys[order], rows[order.to(rows.device)].cpu())

    def next_batch(self, scale: float | None = None) -> None:
        """Takes the batch's tokens into the sample; while training, no batch that is not finite."""
        if self.request.live and not all(bool(s.rows.isfinite().all()) for s in self._fresh.values()):
            self._fresh.clear()
            self._running = False
        for layer, fresh in self._fresh.items():
            known = self._kept.get(layer)
            self._kept[layer] = fresh if known is None else self._smallest(known, fresh)
        self._fresh.clear()
        super().next_batch(scale)

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """One sample of what all processes have seen, the same in each: every process fills in its own tokens' rows."""
        for layer in self.layers:
            self._kept.update(self._combined(layer, add))

    def result(self) -> Measured:
        """Scores by layer; 0 for layers without targets. Raises: ScoreError when a layer was never called."""
        self.refuse_unseen(self._kept)
        return self.measured({layer: self.value(sample.rows) for layer, sample in self._kept.items()})

    def _keys(self, count: int) -> torch.Tensor:
        """The keys of a batch's tokens, from 0 to 1."""
        seed = seed_of(f"layerpeft {self.name} {self.request.seed}|{distributed.rank()}|{self.batches}")
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def _smallest(self, *samples: Sample) -> Sample:
        keys = torch.cat([s.keys for s in samples])
        order = keys.argsort()[: self.options.tokens]
        return Sample(keys[order], torch.cat([s.rows for s in samples])[order])

    def _combined(self, layer: int, add: Callable[[torch.Tensor], torch.Tensor]) -> Mapping[int, Sample]:
        mine = self._kept.get(layer)
        world, rank, limit = distributed.world_size(), distributed.rank(), self.options.tokens
        count = 0 if mine is None else mine.keys.numel()
        *counts, width, seen = add(_facts(world, rank, count, 0 if mine is None else mine.rows.shape[1])).tolist()
        if not sum(counts):
            return {}
        keys = torch.full((world, limit), 0.0, dtype=torch.float64)
        if mine is not None:
            keys[rank, :count] = mine.keys
        keys = add(keys)
        held = torch.arange(limit) < torch.tensor(counts)[:, None]
        chosen = keys.masked_fill(~held, 2.0).flatten().argsort()[: min(limit, int(sum(counts)))]
        rows = torch.zeros(chosen.numel(), int(width / seen), dtype=torch.float32)
        own = chosen // limit == rank
        if mine is not None:
            rows[own] = mine.rows[chosen[own] % limit].float()
        return {layer: Sample(keys.flatten()[chosen], add(rows))}


def _facts(world: int, rank: int, count: int, width: int) -> torch.Tensor:
    """How many tokens each process holds, the sum of the widths, and in how many processes there is one."""
    counts = [float(count) if i == rank else 0.0 for i in range(world)]
    return torch.tensor([*counts, float(width), float(width > 0)], dtype=torch.float64)

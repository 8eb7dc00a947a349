"""Entropy of a layer's output activations (LUQ, arXiv 2509.23729): into how many kinds of states a layer sorts the tokens.

The block's outputs for a sample of tokens are clustered by k-means; the score is the entropy of the clusters' sizes,
`-Σ n_i/N · log(n_i/N)`, in nats, between 0 and log(clusters). LUQ gives the fewest bits to the layers with the lowest.

Every token gets a random key from (seed, process, batch), the same in all layers; the `tokens` smallest keys stay, so the sample
does not depend on the order of batches, and in several processes it is one sample of all of them. It lies on the CPU in the
type of the activations: layers · tokens · width numbers. Padding does not count where the batch has an `attention_mask` of the
shape of the tokens. Not in the paper's text: how tokens are sampled, and k-means++ as the start.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerpeft.errors import NothingSeenError, ScoreError
from layerpeft.integrations import distributed
from layerpeft.integrations.torch import eager
from layerpeft.model.layers import find_module
from layerpeft.selection.draws import seed_of
from layerpeft.selection.scoring import Measured, Request, Watching
from layerpeft.text import some

ROUNDS = 100  # of k-means, which mostly stands still after a few dozen


@dataclass(frozen=True)
class Options:
    """`clusters`: of k-means; `tokens`: how many are clustered, at most."""

    clusters: int = 100
    tokens: int = 2048


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


@dataclass(frozen=True)
class Sample:
    """Tokens' outputs (tokens, width) with their keys (tokens,), smallest first."""

    keys: torch.Tensor
    rows: torch.Tensor


class Activations(Watching):
    """The running measurement: a sample of every layer's outputs."""

    def __init__(self, request: Request, options: Options) -> None:
        super().__init__(request, options)
        self._layers = sorted({t.layer for t in request.targets})
        self._kept: dict[int, Sample] = {}
        # of the running batch; a layer that is run again to save memory counts once
        self._fresh: dict[int, Sample] = {}
        self._mask: torch.Tensor | None = None

    def attach(self) -> None:
        """Puts the hooks on."""
        self._handles.append(self._model.register_forward_pre_hook(eager(self._begin), with_kwargs=True))
        for layer in self._layers:
            block = find_module(self.request.model, self.request.layers.layers[layer].name)
            self._handles.append(block.register_forward_hook(self._hear(layer)))

    def next_batch(self, scale: float | None = None) -> None:
        """Takes the batch's tokens into the sample."""
        self.batches += bool(self._fresh)
        for layer, fresh in self._fresh.items():
            known = self._kept.get(layer)
            self._kept[layer] = fresh if known is None else self._smallest(known, fresh)
        self._fresh.clear()
        self._mask = None

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """One sample of what all processes have seen, the same in each: every process fills in its own tokens' rows."""
        for layer in self._layers:
            self._kept.update(self._combined(layer, add))

    def result(self) -> Measured:
        """Entropies by layer, in nats; 0 for layers without targets. Raises: ScoreError when a layer was never called."""
        unseen = [self.request.layers.layers[i].name for i in self._layers if i not in self._kept]
        if unseen:
            kind = ScoreError if self._kept else NothingSeenError
            raise kind(
                f"{len(unseen)} layer(s) gave out nothing to cluster: {some(unseen)}. "
                "They were never called, or all of the input is padding."
            )
        found = {
            i: size_entropy(cluster_sizes(s.rows, self.options.clusters, self.request.seed))
            for i, s in self._kept.items()
        }
        return Measured(tuple(found.get(i, 0.0) for i in range(len(self.request.layers))))

    def _begin(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        config = getattr(self.request.model, "config", None)
        below = getattr(config, "is_encoder_decoder", False) and "decoder" in self.request.layers.stack
        self._mask = kwargs.get("decoder_attention_mask" if below else "attention_mask")

    def _hear(self, layer: int) -> Any:
        def hear(_module: nn.Module, _args: Any, output: Any) -> None:
            if layer in self._fresh:
                return
            states = _states(output)
            if states is None:
                return
            mask = self._mask
            fits = isinstance(mask, torch.Tensor) and mask.shape == states.shape[:-1]
            rows = states[mask.to(states.device) != 0] if fits else states.flatten(0, -2)  # type: ignore[union-attr]
            keys = self._keys(rows.shape[0])
            order = keys.argsort()[: self.options.tokens]
            known = self._kept.get(layer)
            if known is not None and known.keys.numel() >= self.options.tokens:
                order = order[keys[order] < known.keys[-1]]
            self._fresh[layer] = Sample(keys[order], rows[order.to(rows.device)].detach().cpu())

        return eager(hear)

    def _keys(self, count: int) -> torch.Tensor:
        """The keys of a batch's tokens, from 0 to 1."""
        seed = seed_of(f"layerpeft entropy {self.request.seed}|{distributed.rank()}|{self.batches}")
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


start = Activations


def cluster_sizes(rows: torch.Tensor, clusters: int, seed: int = 0) -> list[int]:
    """Sizes of the clusters that k-means (Lloyd's, started by k-means++ from the seed) finds in (tokens, width)."""
    points = rows.double()
    points = points - points.mean(0)
    generator = torch.Generator().manual_seed(seed)
    squares = points.square().sum(1)
    centres = _spread_out(points, squares, min(clusters, points.shape[0]), generator)
    nearest = torch.full((points.shape[0],), -1)
    for _ in range(ROUNDS):
        # distances without the points' own squares, which are the same for all
        found = (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)
        if torch.equal(found, nearest):
            break
        nearest = found
        sizes = torch.bincount(nearest, minlength=centres.shape[0])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        # an empty one stays where it is
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
    return torch.bincount(nearest, minlength=centres.shape[0]).tolist()


def size_entropy(sizes: list[int]) -> float:
    """Entropy of a histogram, in nats; empty clusters do not count."""
    shares = torch.tensor([s for s in sizes if s], dtype=torch.float64) / sum(sizes)
    return abs(float(-(shares * shares.log()).sum()))


def _spread_out(points: torch.Tensor, squares: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each further centre is a point drawn with weights of its squared distance to the ones there are."""
    chosen = [int(torch.randint(points.shape[0], (), generator=generator))]
    best = torch.full_like(squares, torch.inf)
    while len(chosen) < count:
        last = points[chosen[-1]]
        best = torch.minimum(best, (squares - 2 * points @ last + squares[chosen[-1]]).clamp(min=0))
        best[chosen[-1]] = 0
        if not float(best.sum()):  # fewer kinds of points than clusters
            break
        chosen.append(int(torch.multinomial(best, 1, generator=generator)))
    return points[chosen].clone()


def _states(output: Any) -> torch.Tensor | None:
    """The hidden states in what a block gives out: the tensor, or the first of several, (…, width)."""
    parts = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else (output,)
    )
    return next((p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point() and p.dim() > 1), None)


def _facts(world: int, rank: int, count: int, width: int) -> torch.Tensor:
    """How many tokens each process holds, the sum of the widths, and in how many processes there is one."""
    counts = [float(count) if i == rank else 0.0 for i in range(world)]
    return torch.tensor([*counts, float(width), float(width > 0)], dtype=torch.float64)

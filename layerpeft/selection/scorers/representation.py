"""The quality of what a layer gives out, text by text (Skean et al., "Does Representation Matter?", arXiv 2412.09563).

- `measure: entropy` (prompt entropy): Shannon entropy of the eigenvalues of `Z Zᵀ / tr(Z Zᵀ)`, Z (tokens, width) the states of
  one text, over `log(min(tokens, width))`: 0 where all tokens point one way, 1 where they spread over all directions alike;
- `measure: curvature`: mean angle between `z_{t+1} − z_t` and `z_{t+2} − z_{t+1}`, in radians, 0 to π (Hosseini & Fedorenko,
  arXiv 2311.04930): how crooked a text's way through the states is;
- `measure: invariance`: `1 − InfoNCE / log(2·texts − 1)`, of the texts' means in two views, of unit length, over a temperature
  of 0.1: 1 where a text is nearer to its other view than to any other text, 0 where it cannot be told from them. The paper's
  views are disturbed by misspelling; here, without a tokenizer, a share `noise` of a view's tokens is exchanged for others of
  its batch.

The paper measures how good a layer's output is and chooses nothing to train by it, so the sign is a choice of yours: a high
number is trained first, `first: low` turns it. LiDAR and DiME, which it also names, are left out.

Costs the forward passes (`invariance`: twice as many) and, for the entropy, an eigenvalue decomposition of min(tokens, width)²
for each text and layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from layerpeft.errors import ScoreError
from layerpeft.integrations.torch import widest
from layerpeft.model.evaluating import evaluating
from layerpeft.selection.draws import seed_of
from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.scoring import Request, WatchingCalls
from layerpeft.selection.states import First, LayerSums, Passage, RowSums, given
from layerpeft.selection.typecheck import checked

TEMPERATURE = 0.1
TRAITS = Traits(units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`measure`: which quality; `noise`: the share of tokens exchanged in the second view of `invariance`."""

    measure: Literal["entropy", "curvature", "invariance"] = "entropy"
    noise: float = checked(0.1, above=0, below=1, of={"measure": ("invariance",)})


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


def start(request: Request, options: Options) -> LayerSums:
    """The measurement that the options ask for."""
    return Views(request, options) if options.measure == "invariance" else Texts(request, options)


def prompt_entropy(states: torch.Tensor) -> float:
    """Of (tokens, width), from 0 to 1; NaN for a single token and for nothing but zeros."""
    z = states.to(widest(states.device))
    gram = z @ z.T if len(z) <= z.shape[1] else z.T @ z
    if len(gram) < 2 or not float(gram.trace()) > 0:
        return math.nan
    shares = torch.linalg.eigvalsh(gram / gram.trace()).clamp(min=0)
    return float(-torch.special.xlogy(shares, shares).sum()) / math.log(len(gram))


def curvature(states: torch.Tensor) -> float:
    """Of (tokens, width), in radians; NaN where fewer than three tokens differ from each other."""
    steps = states.to(widest(states.device)).diff(dim=0)
    lengths = steps.norm(dim=-1)
    cosines = (steps[:-1] * steps[1:]).sum(-1) / (lengths[:-1] * lengths[1:])
    return float(cosines.clamp(-1, 1).arccos().nanmean())


def info_nce(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over both views (texts, width) of −log of the share of a text's other view among all but itself, in nats."""
    z = torch.nn.functional.normalize(torch.cat([a, b]).double(), dim=-1)
    likeness = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    other = torch.arange(len(z)).roll(len(a))
    return float(torch.nn.functional.cross_entropy(likeness, other))


class Texts(LayerSums):
    """The running measurement of `entropy` and `curvature`: their sum over texts, and how many have one."""

    entering = False

    def part(self, passage: Passage) -> torch.Tensor:
        """Sum and number over the texts of one run; a state that is not finite makes the sum so."""
        of = prompt_entropy if self.options.measure == "entropy" else curvature
        if not bool(passage.tokens(passage.after).isfinite().all()):
            return torch.tensor([math.nan, 1.0])
        found = [value for text in passage.texts(passage.after) if not math.isnan(value := of(text))]
        return torch.tensor([sum(found), len(found)], dtype=torch.float64)

    def value(self, sums: torch.Tensor) -> float:
        """The mean. Raises: ScoreError where no text has one."""
        if not float(sums[1]):
            least = {"entropy": "two tokens", "curvature": "three tokens that differ"}[self.options.measure]
            raise ScoreError(f"representation: no text has {least}, which {self.options.measure} needs")
        return super().value(sums)


class Views(RowSums, WatchingCalls):
    """The running measurement of `invariance`: a batch is run once more with some tokens exchanged."""

    entering = False
    name, what, least = "representation", "texts", 2

    def attach(self) -> None:
        """Puts the hooks on."""
        WatchingCalls.attach(self)
        super().attach()

    def rows(self, passage: Passage) -> torch.Tensor:
        """(texts, width)."""
        return passage.pooled(passage.after, "mean")

    def next_batch(self, scale: float | None = None) -> None:
        """Runs the batch that came through in its other view."""
        if self._seen is not None and self._gathered:
            args, kwargs, dtype = self._seen
            first, hooked = self._gathered, bool(self._handles)
            self.detach()
            self.attach()  # while training the hooks are gone by now
            with evaluating(self._model, dtype):
                self._model(**self._exchanged(given(self._model, args, kwargs)))
            if not hooked:
                self.detach()
            both = {layer: (torch.cat(a), torch.cat(self._gathered[layer])) for layer, a in first.items()}
            self._gathered = {layer: [torch.cat(views, -1)] for layer, views in both.items()}
        self._seen = None
        super().next_batch(scale)

    def close(self, rows: torch.Tensor) -> torch.Tensor:
        """The group's score times its texts, and how many those are."""
        score = 1 - info_nce(*rows.chunk(2, -1)) / math.log(2 * len(rows) - 1)
        return torch.tensor([score * len(rows), len(rows)], dtype=torch.float64)

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins anew."""
        super().called(module, args, kwargs)
        self._gathered = {}  # of several calls in a batch the last one counts

    def _exchanged(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with a share of the real tokens (one at least) exchanged for others of the batch; special ones stay."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, torch.Tensor):
            raise ScoreError(
                "representation: invariance exchanges tokens, and the batches have no input_ids; take measure: entropy or curvature"
            )
        generator = torch.Generator().manual_seed(seed_of(f"layerpeft views {self.request.seed}|{self.batches}"))
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask != 0
        special = [v for name, v in _named(self.request.model) if name.endswith(("_token_id", "_token_index"))]
        real &= ~torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device))
        draws = torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(ids.device).masked_fill(~real, 2)
        counts = (real.sum(-1, keepdim=True) * self.options.noise).ceil()
        chosen = draws.argsort(-1).argsort(-1) < counts
        pool = ids[real]
        drawn = pool[torch.randint(max(1, len(pool)), (int(chosen.sum()),), generator=generator).to(ids.device)]
        return {**inputs, "input_ids": ids.masked_scatter(chosen, drawn)}


def _named(model: nn.Module) -> list[tuple[str, int]]:
    """The whole numbers in a model's config by name, one by one where they are lists."""
    config = getattr(model, "config", None)
    found = vars(config).items() if config is not None else ()
    return [(n, i) for n, v in found for i in (v if isinstance(v, list | tuple) else [v]) if type(i) is int]

"""How far a layer turns the hidden state: `1 − cos(what enters, what leaves)`, mean over the real tokens; between 0 and 2.

Called block influence in ShortGPT (arXiv 2403.03853), and used by FFN-SkipLLM (arXiv 2404.03865), MuE (arXiv 2211.11152) and
LS-LoRA ("Where to adapt matters"), which puts LoRA into the layers whose cosine at the last token of 100 texts is below 0.85
(`pool: last`, and scores above 0.15): it found −0.76 to −0.91 of rank correlation between that cosine and the mean squared
gradient. ShortGPT removes the layers of least influence, IR-Tuning's cosine mode and CKA-LoRA train those of most: four lines
of work agree that a layer which turns the state far matters, so a high score is trained first; `first: low` turns the sign.

Of a sub-layer (`unit: sublayer`) what enters and leaves is the residual stream before and after it (`selection/sublayers.py`).

Costs the forward passes and nothing beside: one cosine for each token and layer.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from layerpeft.selection.scorers import OF_STATES, STATES, Traits
from layerpeft.selection.states import First, LayerSums, Passage, cosines

TRAITS = Traits(units=OF_STATES, reason=STATES)


@dataclass(frozen=True)
class Options(First):
    """`pool: all` takes every real token, `last` the last one of every text."""

    pool: Literal["all", "last"] = "all"


def needs(options: Options) -> str:
    """Forward passes over batches."""
    return "forward"


class Influence(LayerSums):
    """The running measurement: Σ (1 − cos) and the number of tokens, of every layer."""

    def part(self, passage: Passage) -> torch.Tensor:
        """The sum over the tokens of one run, and their number."""
        before, after = (passage.pooled(s, self.options.pool) for s in (passage.before, passage.after))
        turned = 1 - cosines(before, after)
        return torch.stack([turned.sum(), turned.new_tensor(len(turned))])


start = Influence

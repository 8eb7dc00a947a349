"""LISA's switching (arXiv 2403.17919): some blocks, drawn anew every K steps, train with all their weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import nn


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder blocks of a Llama."""
    return model.get_submodule("model.layers")  # type: ignore[return-value]


def switcher(
    model: nn.Module, optimizer: torch.optim.Optimizer, layers: int, every: int, seed: int, keep_states: bool
) -> Callable[[int], None]:
    """What to call before every step, with its number. Embeddings, final norm and head always train.

    The optimizer has to hold all weights already: blocks are frozen only now. States of blocks that are frozen again go, as in
    the paper, where every interval is a run of its own; `keep_states` keeps them, as the published callback does.
    """
    draw, blocks = random.Random(seed), blocks_of(model)

    def before_step(number: int) -> None:
        if number % every:
            return
        active = set(draw.sample(range(len(blocks)), layers))
        for index, block in enumerate(blocks):
            block.requires_grad_(index in active)
            if index not in active:
                for parameter in block.parameters():
                    parameter.grad = None
                    if not keep_states:
                        optimizer.state.pop(parameter, None)

    return before_step

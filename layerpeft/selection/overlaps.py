"""How much layers do the same to the output: alignment of their tangent kernels over tokens of the batches.

To train a layer by one token's part of its gradient changes the loss through another token by the inner product of both
parts. For a linear with inputs x and gradients g of its outputs that is `⟨g_s, g_t⟩ · ⟨x_s, x_t⟩`; summed over a
layer's targets it is the layer's neural tangent kernel K (tokens, tokens) (Jacot et al., arXiv 1806.07572), and no
gradient of a weight is formed. Two layers with the same kernel move the loss in the same way, whatever their weights
are. Their overlap is the centred alignment of the kernels (Cortes et al., JMLR 13, 2012), averaged over batches:
`⟨HKH, HLH⟩ / (‖HKH‖ ‖HLH‖)`, from 0 to 1, and 1 where they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from layerpeft.selection.draws import seed_of
from layerpeft.selection.scoring import Request

TOKENS = 128  # of a batch, drawn anew for each


def overlaps_for(request: Request) -> Overlaps | None:
    """What measures them beside a score, where that is asked for."""
    if not request.overlaps:
        return None
    return Overlaps({t.name: t.layer for t in request.targets}, len(request.layers), request.seed)


class Overlaps:
    """Kernels of the running batch, by layer, and the sum of alignments over batches. State is real here."""

    def __init__(self, layer_of: Mapping[str, int], count: int, seed: int) -> None:
        self.layer_of, self.count, self.seed = layer_of, count, seed
        self.batches = 0
        self._sum = torch.zeros(count, count, dtype=torch.float64)
        self._kernels: dict[int, torch.Tensor] = {}

    def see(self, target: str, gy: torch.Tensor, x: torch.Tensor) -> None:
        """(tokens, out), (tokens, in) of one target in the running batch. Those of one number of tokens are put together."""
        layer, tokens = self.layer_of[target], len(x)
        if tokens > TOKENS:
            draw = torch.Generator().manual_seed(seed_of(f"{self.seed}|tokens|{self.batches}"))
            places = torch.randperm(tokens, generator=draw)[:TOKENS].to(x.device)
            gy, x = gy[places], x[places]
        gy, x = gy.float(), x.float()
        kernel = (gy @ gy.T) * (x @ x.T)
        held = self._kernels.get(layer)
        if held is None or held.shape == kernel.shape:
            self._kernels[layer] = kernel if held is None else held + kernel.to(held.device)

    def next_batch(self, counts: bool) -> None:
        """Closes the running batch; `counts`: it is one of those that are scored."""
        kernels, self._kernels = self._kernels, {}
        if not counts:
            return
        self.batches += 1
        sizes = {len(k) for k in kernels.values()}
        if len(sizes) != 1:
            return
        flat = torch.zeros(self.count, sizes.pop() ** 2, dtype=torch.float32)
        for layer, kernel in kernels.items():
            centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
            flat[layer] = (centred / centred.norm().clamp_min(torch.finfo(torch.float32).tiny)).flatten().cpu()
        self._sum += (flat @ flat.T).double()

    def combine(self, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Adds up what the processes of a group have seen."""
        self._sum = add(self._sum)

    def result(self) -> tuple[tuple[float, ...], ...]:
        """The overlaps of all layers (layers, layers); a layer that was not seen overlaps with none."""
        scale = self._sum.diagonal().clamp_min(1e-30).rsqrt()
        found = self._sum * scale[:, None] * scale
        found.fill_diagonal_(1.0)
        return tuple(tuple(row) for row in found.tolist())

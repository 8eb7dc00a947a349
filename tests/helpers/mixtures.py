"""A small Llama whose experts are modules of their own, as model code from the hub keeps them."""

from __future__ import annotations

import torch

from tests.helpers.loops import llama


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(32, 16, bias=False), torch.nn.Linear(16, 32, bias=False)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.up_proj(x)))


class Mixture(torch.nn.Module):
    """Every token through the two of four experts that a softmax says."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(32, 4, bias=False)
        self.experts = torch.nn.ModuleList(Expert() for _ in range(4))
        self.seen = []

    def forward(self, x):
        flat = x.flatten(0, 1)
        gates, which = self.gate(flat).softmax(-1).topk(2, -1)
        self.seen.append((gates.detach(), which))
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = (which == number).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(flat[rows]) * gates[rows, place, None])
        return out.view_as(x)


def mixture():
    model = llama()
    torch.manual_seed(3)
    for layer in model.model.layers[1:]:
        layer.mlp = Mixture()
    return model

"""Hand-written torch: LoRA modules on some layers, the layers below run under `no_grad`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.arm import Ready, adamw
from benchmarks.model import LINEARS
from layerpeft.selection.grammar import layer_numbers


@dataclass(frozen=True)
class Options:
    """Which layers (layerpeft's grammar), the rank, and the factor."""

    layers: str = "last:3"
    r: int = 8
    lora_alpha: int = 16


class Lora(nn.Module):
    """`x Wᵀ + (x Aᵀ) Bᵀ · alpha / r`, with A (r, in) and B (out, r)."""

    def __init__(self, base: nn.Linear, r: int, alpha: int) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.base, self.factor = base, alpha / r
        self.A = nn.Linear(base.in_features, r, bias=False, **place)
        self.B = nn.Linear(r, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.base(x)
        return (found + self.B(self.A(x.to(self.A.weight.dtype))) * self.factor).to(found.dtype)


class Loop(nn.Module):
    """A Llama's forward pass written out; state: whether the layers that train are checkpointed."""

    def __init__(self, llama: Any, lowest: int) -> None:
        super().__init__()
        self.llama, self.lowest, self.checkpointed = llama, lowest, False

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """The same switch that transformers' models have."""
        self.checkpointed = True

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SimpleNamespace:
        inner = self.llama.model
        with torch.no_grad():
            hidden = inner.embed_tokens(input_ids)
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            rest = {"position_embeddings": inner.rotary_emb(hidden, positions), "attention_mask": None}
            for block in inner.layers[: self.lowest]:
                hidden = block(hidden, **rest)
        for block in inner.layers[self.lowest :]:
            run = checkpoint if self.checkpointed else _call
            hidden = run(block, hidden, use_reentrant=False, **rest)
        logits = self.llama.lm_head(inner.norm(hidden))
        return SimpleNamespace(loss=self.llama.loss_function(logits, labels, self.llama.config.vocab_size))


def build(model: nn.Module, options: Options, traced: bool) -> Ready:
    """AdamW over the LoRA modules. Rows may be padded at their end only: no attention mask is used."""
    model.requires_grad_(False)
    blocks: Any = model.get_submodule("model.layers")
    chosen = layer_numbers(options.layers, len(blocks))
    for index in chosen:
        for name, module in list(blocks[index].named_modules()):
            if name.rpartition(".")[2] in LINEARS:
                owner = blocks[index].get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], Lora(module, options.r, options.lora_alpha))
    loop = Loop(model, min(chosen))
    return Ready(loop, adamw(loop))


def _call(block: nn.Module, hidden: torch.Tensor, use_reentrant: bool, **rest: Any) -> torch.Tensor:
    return block(hidden, **rest)

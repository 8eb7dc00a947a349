"""Weights of experts (experts, out, in) trained by gradient projection: a low-rank branch beside each use of each expert.

What a model does with such a weight is followed while its experts module runs (model.experts). The branch is computed on the very
rows of each use, so that nothing of the whole weight's shape is made, forward or backward.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.functional import linear

from layerpeft.errors import ConfigError
from layerpeft.integrations.peft import is_traced, stores_out_first
from layerpeft.integrations.torch import eager
from layerpeft.model.experts import UNSEEN, Use, Uses, flat, joined, rows_of
from layerpeft.tuners.galore.layer import Projected
from layerpeft.tuners.galore.projection import lefts, rights, state_of, unscale


class _Branch(Uses):
    """Adds `s·B·Q` of the expert to what each use of its weight gives."""

    def __init__(self, layer: Any) -> None:
        state = state_of(layer)
        super().__init__(state.name, layer.get_param(), stores_out_first(layer))
        self.layer, self.state = layer, state
        self.watched = state.watched and state.watcher is not None and layer.training and torch.is_grad_enabled()
        a, b = (m[state.adapter].weight for m in (layer.lora_A, layer.lora_B))
        self.right, self.left = rights(a, state.experts), lefts(b, state.experts)

    @cached_property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(out, r), (r, in) of every expert; their gradients are put together once for all."""
        return list(zip(self.left.unbind(), self.right.unbind(), strict=True))

    def used(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The base's output and the branch, of any use."""
        y, x = compute(), use.x.to(self.right.dtype)
        branch = getattr(self, f"_{use.form}")(use, x)
        y = torch.add(y, branch, alpha=self.state.scale).to(y.dtype)
        if not self.watched:
            return y
        return self.state.watcher(self.layer, *flat(use, y), rows_of(use)).view_as(y)

    def _one(self, use: Use, x: torch.Tensor) -> torch.Tensor:
        return self._low(x, int(use.which))

    def _low(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        left, right = self.pairs[expert]
        return linear(linear(x, right), left)

    def _gathered(self, use: Use, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.right[use.which].mT), self.left[use.which].mT)

    def _gathered_columns(self, use: Use, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.left[use.which], torch.bmm(self.right[use.which], x))

    def _grouped(self, use: Use, x: torch.Tensor) -> torch.Tensor:
        if is_traced(x):  # all rows through one expert: as many bytes and operations
            return self._low(x, 0)
        if _fits_grouped(x, self.right.shape[1]):
            low = nn.functional.grouped_mm(x, self.right.mT, offs=use.which)
            return nn.functional.grouped_mm(low, self.left.mT.contiguous(), offs=use.which)
        return joined([self._low(x[rows], e) for e, rows in rows_of(use)], use)


class ProjectedExperts(Projected, ParamWrapper):
    """A weight of experts, trained by projection; stock PEFT in names and files."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The experts' output, with the branch inside. Raises: ConfigError for a use of the weight that is not known."""
        state = state_of(self)
        others = [a for a in self.active_adapters if a != state.adapter and a in self.lora_A]
        if self.disable_adapters or self.merged or state.adapter not in self.active_adapters:
            return ParamWrapper.forward(self, x, *args, **kwargs)
        if self.scaling[state.adapter] != state.scale:
            raise ConfigError(
                f"{state.name}: experts that are trained by projection have no other scale than {state.scale}; rescale what "
                "save_pretrained wrote, loaded by PeftModel.from_pretrained"
            )
        if others:
            raise ConfigError(f"{state.name} is trained by projection and takes no second active adapter ({others[0]})")
        return _with_branch(self, x, *args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts module without its wrappers, one for each weight."""
        layer: Any = self
        while isinstance(layer, ProjectedExperts):
            Projected.unload_and_optionally_merge_module(layer, merge, safe_merge, adapter_names)
            layer = layer.base_layer
        return self.get_base_layer()


@eager
def _with_branch(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    unscale(layer)
    uses = _Branch(layer)
    with uses:
        y = layer.base_layer(x, *args, **kwargs)
    if not uses.count and x.numel():
        raise uses.unknown(UNSEEN)
    return y


def _fits_grouped(x: torch.Tensor, rank: int) -> bool:
    """Whether torch's grouped matmul takes factors of that rank: it wants rows of whole 16 bytes, and no float64."""
    narrow = x.dtype != torch.float64 and hasattr(nn.functional, "grouped_mm")
    return narrow and not any(size * x.element_size() % 16 for size in (rank, x.shape[-1]))

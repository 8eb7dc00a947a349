"""What a method that trains the weights themselves tells those who follow it: float32 masters behind 16-bit weights."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.integrations.files import replacing
from layerpeft.training.method import FILE, Tensors
from layerpeft.tuners.full.layer import full_parameters, wrappers
from layerpeft.tuners.full.masters import Masters


class Mastered:
    """The part of a follower that keeps float32 masters of 16-bit weights, where its config asks for them."""

    adapter: str
    model: nn.Module
    masters: Masters | None = None
    _held: MutableMapping[Optimizer, Any]
    _real: bool
    _saved: dict[str, torch.Tensor] | None = None
    tensors: Callable[[], Tensors]

    def lend(self, optimizer: Optimizer) -> None:
        """Just before a real step: the optimizer sees float32 masters in the place of 16-bit weights."""
        if self.masters is None or not self._real:
            return
        named = self._named()
        if self._saved is not None:
            self.masters.restore(self._saved, named, [optimizer])
            self._saved = None
        self.masters.before_step({n: p for n, p in named.items() if p.requires_grad})

    def take_back(self) -> None:
        """Just after it: the weights are what the masters round to."""
        if self.masters is not None:
            self.masters.after_step()

    def ahead(self) -> set[str]:
        """Targets that have moved, by less than shows in 16 bits."""
        return {n.partition("|")[0] for n in self.masters.ahead(self._named())} if self.masters is not None else set()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the masters beside an adapter, and the states that a plain load would round."""
        path = Path(folder, FILE)
        found = self.masters.tensors(self._named(), list(self._held)) if self.masters is not None else {}
        if found:
            with replacing(path) as file:
                save_file({k: t.detach().cpu().contiguous() for k, t in found.items()}, file)
        else:
            path.unlink(missing_ok=True)

    def read_masters(self, folder: str | os.PathLike[str]) -> None:
        """Takes up what `save` wrote, as soon as there is an optimizer to give its states to."""
        path = os.path.join(folder, FILE)
        if self.masters is not None and os.path.isfile(path):
            self._saved = load_file(path)

    def _named(self) -> dict[str, nn.Parameter]:
        inside = {f"{t}|{n}": p for t, group in self.tensors().items() for n, p in group.items()}
        known = {id(p) for p in inside.values()}
        found: Any = wrappers(self.model, self.adapter)
        always = ((w._layerpeft_full.whole.name, w) for w in found)
        return inside | {
            f"{name}|{n}": p for name, w in always for n, p in full_parameters(w).items() if id(p) not in known
        }


def masters_for(config: Any) -> Masters | None:
    """The masters that a live config asks for."""
    asked = getattr(config, "_layerpeft_full", None)
    return Masters() if asked is not None and asked.master_weights else None

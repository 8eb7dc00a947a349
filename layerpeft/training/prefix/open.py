"""Where states are kept: the store that a setting means for one model and one cut."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
from torch import nn

from layerpeft.training.prefix.below import Below
from layerpeft.training.prefix.memory import Memory
from layerpeft.training.prefix.setting import Setting
from layerpeft.training.prefix.store import Store


@dataclass(frozen=True)
class opener:  # noqa: N801
    """What makes the store."""

    setting: Setting

    def __call__(self, model: nn.Module, below: Below) -> Store:
        limit = self.setting.limit
        return Memory(psutil.virtual_memory().available // 2 if limit is None else limit)

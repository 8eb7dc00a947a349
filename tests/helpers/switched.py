"""What optimizers hold of layers that are switched on and off."""

from __future__ import annotations

import torch

from tests.helpers.scheduling import pool_tensors, switcher_of


def moments(model, optimizer, rename=str):
    """All states by their parameter's name, whether the optimizer has them or they lie on the CPU."""
    names = {id(p): rename(n) for n, p in model.named_parameters()}
    pool = {f"{t}|{n}": p for t, group in pool_tensors(model).items() for n, p in group.items()}
    away = {pool[n]: s for n, s in switcher_of(model).store.items()}
    assert not set(away) & set(optimizer.state)
    states = {**away, **optimizer.state}
    return {f"{names[id(p)]}|{k}": torch.as_tensor(v).clone() for p, s in states.items() for k, v in s.items()}

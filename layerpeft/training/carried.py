"""What a model's plain `state_dict()` takes along of a run, so that `load_state_dict()` goes on where the run stood.

It lies in one tensor of bytes under torch's own name for such things, which every way to save a state dict takes.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save

from layerpeft.errors import SelectionError
from layerpeft.integrations.files import as_written
from layerpeft.text import note
from layerpeft.training import optimizer_states
from layerpeft.training.method import Method
from layerpeft.training.scheduled import Once, moment_in

KEY = "_extra_state"
Carried = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors by name, and plain facts
_FACTS = "facts"
_AWAY = "away|"  # before the names of optimizer states that are away


def taken(method: Method, schedule: Once) -> Carried | None:
    """What there is of one adapter's run besides its tensors; None where that is nothing."""
    tensors, facts = method.carried(), schedule.carried()
    if schedule.store and not optimizer_states.divided(schedule.store):
        away, facts["away"] = optimizer_states.packed(schedule.store)
        tensors |= {f"{_AWAY}{n}": t for n, t in away.items()}
    return (tensors, facts) if tensors or facts else None


def go_on(method: Method, schedule: Once, folder: str | None, carried: Carried | None) -> bool:
    """Goes on where the run stood that saved this folder, or a state dict that carried this; whether that moved a schedule.

    Raises: SaveError; SelectionError for the folder of another schedule (of a state dict the weights are taken, which is said).
    """
    if folder is not None:
        if schedule.switches:
            with as_written(f"{folder} does not hold the schedule that was saved"):
                moment, store = moment_in(folder), optimizer_states.load_store(folder)
            schedule.restore(moment, store, folder)
        return schedule.switches
    tensors, facts = carried or ({}, {})
    away = {n.removeprefix(_AWAY): t for n, t in tensors.items() if n.startswith(_AWAY)}
    method.restore({n: t for n, t in tensors.items() if not n.startswith(_AWAY)})
    if not facts or not schedule.switches:
        return False
    try:
        schedule.restore(facts, optimizer_states.unpacked(away, facts.get("away", {})), "this state")
    except SelectionError as error:
        note(f"{error}: its weights are taken, and not where its schedule stood")
        return False
    return True


def packed(by_adapter: Mapping[str, Carried]) -> torch.Tensor:
    """All of it as bytes."""
    tensors = {
        f"{a}|{n}": t.detach().cpu().contiguous() for a, (held, _) in by_adapter.items() for n, t in held.items()
    }
    facts = json.dumps({adapter: facts for adapter, (_, facts) in by_adapter.items()}, sort_keys=True).encode()
    return _bytes(save(tensors | {_FACTS: _bytes(facts)}))


def unpacked(found: torch.Tensor) -> dict[str, Carried]:
    """What `packed` was given."""
    tensors = load(found.cpu().numpy().tobytes())
    facts = json.loads(tensors.pop(_FACTS).numpy().tobytes())
    return {
        a: ({n.removeprefix(f"{a}|"): t for n, t in tensors.items() if n.startswith(f"{a}|")}, plain)
        for a, plain in facts.items()
    }


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)

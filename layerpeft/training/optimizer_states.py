"""What becomes of an optimizer's states of tensors that stop training for a while: kept, cleared, or taken to the CPU."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.integrations import distributed
from layerpeft.integrations.distributed import Part, part_of, put_together
from layerpeft.integrations.engines.known import is_cut, local
from layerpeft.integrations.files import note_in, replacing
from layerpeft.integrations.torch import instances_of

FILE = "layerpeft_optimizer.safetensors"
Store = dict[str, dict[str, Any]]  # tensor's name -> its state, on the CPU


def holders(ids: Set[int], stepping: Optimizer | None = None) -> list[Optimizer]:
    """The live optimizers that hold some of these tensors; the one that steps alone where it holds them all."""
    if stepping is not None and ids <= held_by(stepping):
        return [stepping]
    live = [o for o in instances_of(Optimizer) if hasattr(o, "param_groups")]
    return [o for o in live if not held_by(o).isdisjoint(ids)]


def held_by(optimizer: Optimizer) -> set[int]:
    """Identities of the tensors in its groups."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def put_away(optimizers: Iterable[Optimizer], tensors: Mapping[str, nn.Parameter], policy: str, store: Store) -> None:
    """Applies the policy to the states of these tensors: `keep` does nothing, `clear` drops them, `offload` moves them to `store`.

    On an accelerator the copy is asynchronous, in the order of the current stream.
    """
    if policy == "keep":
        return
    for optimizer in optimizers:
        for name, parameter in tensors.items():
            state = optimizer.state.pop(parameter, None)
            if state and policy == "offload":
                store[name] = {key: _to_cpu(value) for key, value in state.items()}


def bring_back(optimizers: Iterable[Optimizer], tensors: Mapping[str, nn.Parameter], store: Store) -> None:
    """Gives states back to the optimizer that holds the tensor, on the tensor's device.

    Counters of steps go where torch keeps them: on the CPU, unless the optimizer is fused or captured in graphs.
    """
    for optimizer in optimizers:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in tensors.items():
            if name in store and id(parameter) in groups:
                group = groups[id(parameter)]
                counts = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                optimizer.state[parameter] = {
                    key: _to_device(value, counts if key == "step" else parameter.device)
                    for key, value in store.pop(name).items()
                }


def is_hollow(optimizer: Optimizer) -> bool:
    """Whether it makes the step by which torch.distributed.checkpoint gets states to save or to load into.

    That is one of zero gradients at a rate of zero. Every process must ask.
    """
    if optimizer.state or any(g.get("lr") is None or float(g["lr"]) for g in optimizer.param_groups):
        return False
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return any(map(is_cut, found)) and distributed.everywhere(not any(bool(local(g).any()) for g in found))


def drop_hollow(optimizer: Optimizer) -> None:
    """Forgets states that such a step alone has made, and nothing was loaded into: their count would spoil the first real one."""
    for parameter, state in list(optimizer.state.items()):
        numbers = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        if float(numbers.pop("step", torch.tensor(0))) == 1 and not any(bool(local(t).any()) for t in numbers.values()):
            del optimizer.state[parameter]


def give(optimizer: Optimizer, state: dict[str, Any], tensors: Mapping[str, nn.Parameter], store: Store) -> None:
    """Adds parts of states that are away to the optimizer's state dict, as tensors that are cut up like those that are not."""
    if not divided(store):
        return
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for name, parameter in tensors.items():
        if name in store and id(parameter) in numbers:
            state["state"][numbers[id(parameter)]] = {
                key: put_together(value, value.part.device) if isinstance(value, Part) else value
                for key, value in store[name].items()
            }


def optimizer_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Bytes of all tensors that are reachable from `optimizer.state`, every storage once; this process's part where it has one."""
    storages = {}
    for optimizer in optimizers:
        for tensor in tensors_in(optimizer.state.values()):
            storage = local(tensor).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors in nested plain containers."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Part):
            yield value.part
        elif isinstance(value, Mapping):
            yield from tensors_in(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def packed(store: Store) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """A store as (tensors by "name|key", plain values by name), for safetensors and JSON.

    Raises: TypeError for values that are neither tensors nor plain data.
    """
    if any(t.is_pinned() for t in tensors_in(store.values())):
        torch.accelerator.synchronize()  # copies that are still on their way
    found: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, state in store.items():
        plain[name] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                found[f"{name}|{key}"] = value.contiguous()
            elif value is None or isinstance(value, bool | int | float | str):
                plain[name][key] = value
            else:
                raise TypeError(f"{name}: the optimizer's state {key!r} is a {type(value).__name__}")
    return found, plain


def unpacked(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Mapping[str, Any]]) -> Store:
    """What `packed` gave, put together again."""
    store: Store = {name: dict(values) for name, values in plain.items()}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("|")
        store.setdefault(name, {})[part] = tensor
    return store


def save_store(folder: str | os.PathLike[str], store: Store) -> None:
    """Writes the states that are away from the optimizer beside an adapter; an older file goes where there are none.

    States that are divided among the processes are not written.
    """
    path = Path(folder, FILE)
    if not store or divided(store):
        path.unlink(missing_ok=True)
        return
    tensors, plain = packed(store)
    with replacing(path) as file:
        save_file(tensors, file, metadata={"plain": json.dumps(plain)})


def divided(store: Store) -> bool:
    """Whether these are one process's parts of states only."""
    return any(isinstance(value, Part) for state in store.values() for value in state.values())


def saved_elsewhere(store: Store) -> bool:
    """Whether DeepSpeed saves these, whose checkpoints hold the parts of every process."""
    return all(v.mesh is None for state in store.values() for v in state.values() if isinstance(v, Part))


def load_store(folder: str | os.PathLike[str]) -> Store:
    """What `save_store` wrote; empty where it wrote nothing."""
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        return {}
    return unpacked(load_file(path), note_in(path, "plain"))


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Part):
        return replace(value, part=_to_cpu(value.part))
    if isinstance(value, torch.Tensor) and is_cut(value):
        return part_of(value, _to_cpu(local(value)))
    if not isinstance(value, torch.Tensor) or value.device.type in ("cpu", "meta"):
        return value
    there = torch.empty_like(value, device="cpu", pin_memory=True)
    return there.copy_(value, non_blocking=True)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Part):
        return put_together(value, device)
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

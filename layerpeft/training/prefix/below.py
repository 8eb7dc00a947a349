"""What lies below the lowest trained layer of a stack, and what of it keeps its states from being a fixed function of a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from layerpeft.integrations.checkpointing import Silent, is_replica, modules_of, named_modules_of, parameters_of
from layerpeft.integrations.engines.deepspeed import is_part
from layerpeft.integrations.peft import AuxiliaryTrainingWrapper, BaseTunerLayer
from layerpeft.model.architectures import text_config
from layerpeft.text import some

RANDOM = ("dropout", "drop_prob", "drop_path", "layerdrop", "jitter", "noise")  # in names of rates
# Whose hooks are no matter. Of ours only those of the backward cut: others look at what blocks give out (teachers, exits).
LIBRARIES = ("transformers", "torch", "accelerate", "peft", "trl")
OURS = "layerpeft.training.backward"
Modules = Sequence[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Below:
    """The blocks of a stack by name, and the lowest of them that trains (`cut`)."""

    names: tuple[str, ...]
    cut: int

    def blocks(self, base: nn.Module) -> list[nn.Module]:
        """Those below the cut, and then the one at it."""
        return [base.get_submodule(name) for name in self.names[: self.cut + 1]]

    @property
    def block(self) -> str:
        """The name of the lowest block that trains."""
        return self.names[self.cut]


def lowest_of(base: nn.Module, names: Sequence[str]) -> int | None:
    """The number of the lowest block in which something is trainable now; None where nothing is."""
    blocks = enumerate(map(base.get_submodule, names))
    return next((i for i, block in blocks if any(p.requires_grad for p in parameters_of(block))), None)


def in_front(base: nn.Module, first: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that come before the first block in the order of the model; those that hold it are among them."""
    for name, module in named_modules_of(base):
        if name == first:
            return
        yield name, module


def modules_below(base: nn.Module, below: Below) -> Modules:
    """What runs below the cut, by name."""
    found = list(in_front(base, below.names[0]))
    for name in below.names[: below.cut]:
        found += named_modules_of(base.get_submodule(name), name)
    return found


def why_off(base: nn.Module, below: Below, lower_dropout: bool = True, modules: Modules | None = None) -> str | None:
    """Why what enters block `below.cut` is no fixed function of a row, as far as it can be told without running it; None: it is.

    `lower_dropout`: what is random below the cut stays so in training. `modules`: those below, where they are known. Weights need
    not be there. It is asked at every pass: 80 blocks take some milliseconds.
    """
    modules = modules_below(base, below) if modules is None else modules
    trains = (f"{n}.{k}" for n, m in modules for k, p in m._parameters.items() if p is not None and p.requires_grad)
    if (name := next(trains, None)) is not None:
        return f"{name}, below layer {below.cut}, trains"
    if any(is_part(p) for _, m in modules for p in m._parameters.values()):
        return "DeepSpeed ZeRO-3 gathers the weights of every block in the order of whole passes"
    return _why_unfixed(modules, base, below, lower_dropout)


def why_unfixed(base: nn.Module, below: Below, lower_dropout: bool = True) -> str | None:
    """As `why_off`, whatever of it trains."""
    return _why_unfixed(modules_below(base, below), base, below, lower_dropout)


def _why_unfixed(modules: Modules, base: nn.Module, below: Below, lower_dropout: bool) -> str | None:
    if lower_dropout and (rates := random_in(modules)):
        return f"below layer {below.cut} there is dropout or noise ({some(rates)}); lower_dropout: off leaves it out"
    if rope := _moving(base):
        return rope
    return (
        _found(modules, (BaseTunerLayer, AuxiliaryTrainingWrapper), f"below layer {below.cut} lies another adapter")
        or _found(modules, (_BatchNorm,), "batch norms look at a batch as a whole")
        or _handing_on(modules)
        or _hooked(modules, base, below)
        or _compiled(base, modules, below)
        or ("DataParallel copies the model at every step" if is_replica(base) else None)
    )


def random_in(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The names of what is random in training there, with its rate."""
    found = []
    for name, module in modules:
        if isinstance(module, _DropoutNd):
            found += [f"{name}: {module.p:g}"] if module.p else []
            continue
        held = vars(module)
        rates = {key: held[key] for key in _rates(tuple(held)) if isinstance(held[key], float) and held[key]}
        found += [f"{name}.{key}: {rate:g}" for key, rate in rates.items()]
    return found


@lru_cache(4096)
def _rates(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if any(word in name for word in RANDOM))


def _hooked(modules: Iterable[tuple[str, nn.Module]], base: nn.Module, below: Below) -> str | None:
    """What is around the blocks, and ends with all, may have hooks."""
    around = [*modules, (below.block, base.get_submodule(below.block))]
    hooked = [(n, m) for n, m in around if m._forward_hooks or m._forward_pre_hooks]
    inside = [(n, m) for n, m in hooked if n and not below.names[0].startswith(f"{n}.")]
    hooks = ((n, h) for n, m in inside for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    found = [name for name, hook in hooks if not _is_known(hook)]
    return f"a hook waits for what comes up to layer {below.cut}, on {some(found)}" if found else None


def _is_known(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return isinstance(hook, Silent) or module == OURS or str(module).split(".")[0] in LIBRARIES


def _found(modules: Iterable[tuple[str, nn.Module]], kinds: tuple[type, ...], why: str) -> str | None:
    names = [name for name, module in modules if _is_one(type(module), kinds)]
    return f"{why} ({some(names)})" if names else None


@lru_cache(4096)
def _is_one(kind: type, of: tuple[type, ...]) -> bool:
    return issubclass(kind, of)


def _handing_on(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """T5 and those like it make their position bias in the first block and hand it upwards."""
    names = [n for n, m in modules if vars(m).get("has_relative_attention_bias", False)]
    return f"blocks hand a position bias upwards besides hidden states ({some(names)})" if names else None


def _moving(base: nn.Module) -> str | None:
    config: Any = text_config(base)
    kinds = _rope_types(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    moving = kinds & {"dynamic", "longrope"}
    return f"positions of rope type {min(moving)} hang on the longest row of a batch" if moving else None


def _rope_types(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    own = value.get("rope_type") or value.get("type")
    return ({own} if isinstance(own, str) else set()).union(*map(_rope_types, value.values()))


def _compiled(base: nn.Module, modules: Modules, below: Below) -> str | None:
    *around, _ = below.names[0].split(".")
    holding = {"", *(".".join(around[: i + 1]) for i in range(len(around)))}
    rest = modules_of(base, {id(module) for name, module in modules if name not in holding})
    known = chain((module for _, module in modules), rest)
    compiled = any(vars(m).get("_compiled_call_impl") is not None for m in known)
    return "the model is compiled, and a graph runs as a whole" if compiled else None

"""How near projection comes to the package `galore-torch`, and how far the two part by what only one of them does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import layerpeft
from benchmarks import table
from benchmarks.arm import Unavailable
from benchmarks.case import Case
from benchmarks.model import Batch, Model, batches, build
from benchmarks.model import check as check_model
from layerpeft import LayerGaloreConfig
from layerpeft.errors import Problems, unknown
from layerpeft.tuners.galore.subspace import SIDES

Say = Callable[[str], None]
Weights = Mapping[str, torch.Tensor]
EXACT = {"subspace": "svd", "basis": "raw", "stagger": False}
SCALE = 0.25


@dataclass(frozen=True)
class Loop:
    """What both sides' loops take: options of AdamW, and the norm that gradients are clipped to."""

    weight_decay: float = 0.0
    eps: float = 1e-14
    clip: float | None = None


BOTH = tuple(field.name for field in fields(Loop))


@dataclass(frozen=True)
class Options:
    """Both sides train `targets` in float64 by AdamW at `lr`, over eight batches by turns, with a new basis every `gap` steps.

    Over `steps` they are to be one, for each of `proj_types`. `breaks`: label -> `weight_decay`, `eps` and `clip` of both, and
    options of `LayerGaloreConfig` that are ours alone; over `parting_steps`, projected on the right.
    """

    model: Model
    batch: Batch
    targets: Sequence[str]
    r: int
    gap: int
    lr: float
    breaks: Mapping[str, Any]
    proj_types: Sequence[str] = SIDES
    steps: int = 50
    parting_steps: int = 20
    threads: int = 1


def check(options: Options, problems: Problems) -> None:
    """Adds what is wrong with the options."""
    check_model(options.model, options.batch, problems)
    for side in options.proj_types:
        if side not in SIDES:
            problems.add(f"proj_types: {unknown('side', side, SIDES)}")
    known = [*BOTH, *(field.name for field in fields(LayerGaloreConfig))]
    for label, broken in options.breaks.items():
        if not isinstance(broken, dict):
            problems.add(f"breaks: {label}: expected options, got {broken!r}")
            continue
        for name in set(broken) - set(known):
            problems.add(f"breaks: {label}: {unknown('option', name, known)}")


def measure(case: Case, say: Say) -> dict[str, Any]:
    """By side, and by what breaks the equality: the largest difference of a weight, and the largest movement of one.

    Raises: Unavailable without the package.
    """
    options: Options = case.options
    torch.set_num_threads(options.threads)
    equal = {side: parting(options, options.steps, side) for side in options.proj_types}
    broken = {label: parting(options, options.parting_steps, **given) for label, given in options.breaks.items()}
    for label, (difference, movement) in (equal | broken).items():
        say(f"{label}: {difference:.2g} apart after movements of {movement:.3f}")
    rows = {"equal": equal, "breaks": broken}
    return {
        part: {label: {"difference": float(f"{d:.4g}"), "movement": float(f"{m:.4g}")} for label, (d, m) in of.items()}
        for part, of in rows.items()
    }


def parting(options: Options, steps: int, proj_type: str = "right", **broken: Any) -> tuple[float, float]:
    """(largest difference of a weight, largest movement of one) of the two from one start; `broken` as in a case."""
    loop = Loop(**{name: value for name, value in broken.items() if name in BOTH})
    alone = {name: value for name, value in broken.items() if name not in BOTH}
    return apart(options, ours(options, steps, proj_type, loop, **alone), reference(options, steps, proj_type, loop))


def apart(options: Options, one: Weights, other: Weights) -> tuple[float, float]:
    """(largest difference of a weight, largest movement of one) of two runs."""
    first = weights(options, start(options))
    assert set(one) == set(other) == set(first)
    difference = max(float((one[name] - other[name]).abs().max()) for name in first)
    return difference, max(float((other[name] - first[name]).abs().max()) for name in first)


def ours(options: Options, steps: int, proj_type: str = "right", loop: Loop = Loop(), **alone: Any) -> Weights:
    """The weights after as many steps of projection as layerpeft does it."""
    given = {"r": options.r, "update_proj_gap": options.gap, "scale": SCALE, "proj_type": proj_type}
    config = LayerGaloreConfig(**{**given, "target_modules": list(options.targets), **EXACT, **alone})
    model: Any = layerpeft.get_peft_model(start(options), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float64}
    adamw = torch.optim.AdamW(trained, options.lr, eps=loop.eps, weight_decay=loop.weight_decay)
    _run(options, model, adamw, steps, loop.clip)
    return weights(options, model.merge_and_unload())


def reference(options: Options, steps: int, proj_type: str = "right", loop: Loop = Loop()) -> Weights:
    """The weights after as many steps of the package's optimizer. Raises: Unavailable without it."""
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise Unavailable("needs the package galore-torch (pip install galore-torch)") from error
    model = start(options)
    chosen = [p for name, p in model.named_parameters() if p.requires_grad_(_chosen(options, name)).requires_grad]
    projection = {"rank": options.r, "update_proj_gap": options.gap, "scale": SCALE, "proj_type": proj_type}
    group: Any = {"params": chosen, **projection}
    settings: Any = {"lr": options.lr, "eps": loop.eps, "weight_decay": loop.weight_decay}
    _run(options, model, GaLoreAdamW([group], **settings, no_deprecation_warning=True), steps, loop.clip)
    return weights(options, model)


def start(options: Options) -> nn.Module:
    """The model as both begin with it."""
    return build(options.model).double().train()


def weights(options: Options, model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that train, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if _chosen(options, name)}


def _chosen(options: Options, name: str) -> bool:
    return any(f".{target}.weight" in name for target in options.targets)


def _run(options: Options, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, clip: float | None) -> None:
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    turns: Iterator[Any] = cycle(batches(options.model, options.batch, vocabulary, count=8, seed=7))
    for batch in islice(turns, steps):
        model(**batch).loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        optimizer.zero_grad()


def tables(result: Mapping[str, Any]) -> str:
    """One line per side that is to be equal, and one for each thing that breaks the equality."""
    steps, fewer = result["case"]["steps"], result["case"]["parting_steps"]
    lines = [[f"`{label}`, {steps} steps", *_cells(row)] for label, row in result["equal"].items()]
    lines += [[f"{label}, {fewer} steps", *_cells(row)] for label, row in result["breaks"].items()]
    return table.markdown(["", "largest difference", "largest movement", "share"], lines)


def _cells(row: Mapping[str, float]) -> list[str]:
    return [f"{row['difference']:.1e}", f"{row['movement']:.3f}", f"{row['difference'] / row['movement']:.2g}"]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Nothing to draw."""

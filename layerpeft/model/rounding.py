"""What rounding does to a model's output, without storing anything: weights rounded for a while, and the divergence it makes.

A linear computes the same with a rounded weight as with the packed one, so any assignment can be judged before it is made.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from layerpeft.errors import ConfigError, Problems, ScoreError
from layerpeft.integrations import distributed
from layerpeft.integrations.engines.known import is_cut
from layerpeft.model.evaluating import evaluating, to_model
from layerpeft.model.layers import find_module
from layerpeft.model.outputs import compared, kl, logits_of, per_token
from layerpeft.model.precisions import KEPT, Storage, fits, missing_packages, precision_of, rounded

Assignment = Mapping[str, str]  # full name of a linear -> precision
NUDGED = "nudged"  # no precision: every weight moved by its last bit, which only a model in 16 bit can feel


@contextmanager
def rounded_weights(model: nn.Module, assignment: Assignment, storage: Storage) -> Iterator[None]:
    """Inside, the named linears compute with their weights as rounded; afterwards, and after an error, with the very same ones.

    The tensors themselves are set aside and put back, so nothing is copied, and optimizers and ties never notice.
    Raises: ConfigError for what cannot be rounded so.
    """
    asked = {name: precision for name, precision in assignment.items() if precision != KEPT}
    check_roundable(model, asked, storage)
    aside: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for name, precision in asked.items():
            module = find_module(model, name)
            parameter: Any = module.weight
            original = parameter.data
            if precision == NUDGED:
                new = _nudged(original)
            elif isinstance(module, Conv1D):  # stored as (in, out)
                new = rounded(original.T.contiguous(), precision, storage).T.contiguous()
            else:
                new = rounded(original, precision, storage)
            aside.append((parameter, original))
            parameter.data = new
        yield
    finally:
        for parameter, original in reversed(aside):
            parameter.data = original


def check_roundable(model: nn.Module, assignment: Assignment, storage: Storage) -> None:
    """Raises: ConfigError naming every module that is no linear with weights of its own, or does not fit its precision."""
    problems = Problems("rounding weights")
    for package in missing_packages({p for p in assignment.values() if p != NUDGED}):
        problems.add(f"it needs the package {package} (pip install {package})")
    for name, precision in assignment.items():
        module = find_module(model, name)
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Linear | Conv1D) or weight is None:
            problems.add(f"{name} ({type(module).__name__}) is no linear with a weight of its own")
        elif precision_of(module) != KEPT:
            problems.add(f"{name} is stored in {precision_of(module)} already")
        elif weight.device.type == "meta" or is_cut(weight):
            problems.add(f"the weight of {name} is not here as a whole")
        else:
            rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
            if precision != NUDGED and not fits(precision, rows, columns, storage):
                problems.add(f"{name} ({rows}, {columns}) does not fit {precision} in groups of {storage.group_size}")
    problems.raise_if_any(ConfigError)


def output_kl(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    assignments: Sequence[Assignment],
    storage: Storage,
    progress: bool = True,
    title: str = "output KL",
) -> list[float]:
    """KL(as it is ‖ as rounded) of the model's output distribution for each assignment, in nats per token that counts.

    Those are the tokens with a label; without labels, those that are not padding. One pass for the model as it is and one for each
    assignment per batch; only one batch's distributions are held at a time. Over several processes all batches count alike.
    Raises: ScoreError without batches, without logits, without a token that counts; ConfigError for what cannot be rounded.
    """
    sums, tokens, seen = [0.0] * len(assignments), 0, 0
    size = getattr(batches, "__len__", None)
    steps = size() * len(assignments) if size is not None else None
    with tqdm(total=steps, desc=title, unit="pass", leave=False, disable=None if progress else True) as bar:
        for batch in batches:
            inputs = to_model(model, batch)
            with evaluating(model):
                found, count = divergences(
                    lambda given=inputs: model(**given), model, inputs, assignments, storage, bar.update
                )
            sums = [a + b for a, b in zip(sums, found, strict=True)]
            tokens, seen = tokens + count, seen + 1
    *sums, everywhere, seen = distributed.add_up(torch.tensor([*sums, tokens, seen], dtype=torch.float64)).tolist()
    if not seen:
        raise ScoreError(f"{title}: batches is empty (a generator can be used only once)")
    return per_token(sums, everywhere)


def divergences(
    run: Callable[[], Any],
    model: nn.Module,
    inputs: Mapping[str, Any],
    assignments: Sequence[Assignment],
    storage: Storage,
    tick: Callable[[], Any] = lambda: None,
) -> tuple[list[float], int]:
    """Of one batch: the KL of each assignment, summed over the tokens that count, and how many those are.

    `run` gives the model's output on `inputs`; it is to be called in evaluation mode. Raises: ScoreError without logits.
    """
    changes = [partial(rounded_weights, model, assignment, storage) for assignment in assignments]
    return compared(run, model, inputs, changes, kl, logits_of, tick)


def _nudged(weight: torch.Tensor) -> torch.Tensor:
    """Every number of a 16-bit tensor up or down by its last bit; a two-hundredth of what nf4 changes."""
    return (weight.view(torch.int16) ^ 1).view(weight.dtype)

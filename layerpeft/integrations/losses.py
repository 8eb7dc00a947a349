"""transformers' and TRL's losses: which tensor of an output is the loss, and by what it is multiplied before its backward pass."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerpeft.errors import TrainingError

IGNORED = -100
# transformers' losses that divide by `num_items_in_batch`: the first label position that counts
DIVIDING = {"ForCausalLMLoss": 1, "ForMaskedLMLoss": 0, "ForTokenClassification": 0, "ForSequenceClassificationLoss": 0}


def loss_of(output: Any) -> torch.Tensor | None:
    """The loss in a model's output: under its name, or the scalar at the head of a tuple."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and output:
        head = output[0]
        return head if isinstance(head, torch.Tensor) and head.dim() == 0 else None
    return loss if isinstance(loss, torch.Tensor) else None


def watch_scale(model: nn.Module, inputs: Mapping[str, Any], output: Any) -> Callable[[], float | None]:
    """What tells, once the backward pass has run, by what this batch's own mean loss was multiplied; None where it cannot be told.

    Accumulation divides by steps or by labels, scalers multiply, and a Trainer does some of it inside of the model. What
    arrives at the loss in the backward pass says the rest, and at TRL's log-probabilities all of it.
    """
    heard: list[torch.Tensor] = []
    logs = getattr(output, "log_probs", None)
    if isinstance(logs, torch.Tensor) and logs.requires_grad and "labels" in inputs:
        counted = getattr(output, "label_mask", None)

        def hear_log_probs(gradient: torch.Tensor) -> None:
            weights = -gradient.double() * (1 if counted is None else counted)
            # Weights of both signs are no mean of the labels' losses: preferences, advantages.
            heard.append(torch.where(weights.min() < 0, torch.nan, weights.sum()))

        logs.register_hook(hear_log_probs)
        return lambda: _number(heard, 1.0)
    loss = loss_of(output)
    if loss is None or not loss.requires_grad:
        return lambda: None
    loss.register_hook(lambda gradient: heard.append(gradient.detach().double().sum()))
    share = _share(model, inputs)
    return lambda: _number(heard, share)


class _Beside(torch.autograd.Function):
    """The numbers that a loss is made of, as they are; its backward pass also goes to `more`, with the weight that `scale` makes of
    the gradient that arrives."""

    @staticmethod
    def forward(ctx: Any, numbers: torch.Tensor, more: torch.Tensor, task: float, scale: Callable) -> torch.Tensor:
        ctx.task, ctx.scale, ctx.like = task, scale, more
        return numbers.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # type: ignore[override]
        return grads[0] * ctx.task, ctx.scale(grads[0]).to(ctx.like), None, None


def learned_beside(
    model: nn.Module, inputs: Mapping[str, Any], output: Any, more: torch.Tensor, task: float = 1.0
) -> Any | None:
    """The output, whose loss also trains by `more`, a mean over the batch, with the weight that the trainer gives this batch's own
    mean loss, and `task` times by itself; its value stays. None where it holds no loss to train by."""
    logs = getattr(output, "log_probs", None)
    if isinstance(logs, torch.Tensor) and logs.requires_grad:
        counted = getattr(output, "label_mask", None)

        def weigh(gradient: torch.Tensor) -> torch.Tensor:
            weights = -gradient * (1 if counted is None else counted)
            if bool((weights < 0).any()):
                raise TrainingError(
                    "a loss that holds labels up and others down is no mean that another can stand beside"
                )
            return weights.sum()

        output.log_probs = _Beside.apply(logs, more, task, weigh)
        return output
    loss = loss_of(output)
    if loss is None or not loss.requires_grad:
        return None
    share = _share(model, inputs)
    both = _Beside.apply(loss, more, task, lambda g: g.sum() * (1.0 if share is None else share))
    if type(output) is tuple:
        return (both, *output[1:])
    if type(output) is dict:
        return output | {"loss": both}
    given: Any = output
    given.loss = both
    return given


def _number(heard: list[torch.Tensor], share: torch.Tensor | float | None) -> float | None:
    if not heard or share is None:
        return None
    scale = float(sum(heard[1:], heard[0]) * share)
    return scale if 0 < scale < float("inf") else None


def _share(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor | float | None:
    """This batch's labels over the number that the model divides its loss by; 1 where it takes the mean itself."""
    items, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
    if items is None:
        return 1.0
    called = inspect.unwrap(type(model).forward).__code__.co_names
    first = DIVIDING.get(getattr(getattr(model, "loss_function", None), "__name__", ""))
    if "loss_function" not in called or first is None or labels is None or labels.is_floating_point():
        return None
    if inputs.get("shift_labels") is not None:
        labels, first = inputs["shift_labels"], 0
    counted = (labels[..., first:] if labels.dim() > 1 else labels) != IGNORED
    return counted.sum() / torch.as_tensor(items, device=counted.device)

"""What there is to know of a way to train one model on several processes."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

# What a config may ask of an engine: layers that change while training, a choice that waits for the first step, scores by batches
# that are measured on a model it has divided, scores of weights, projections, those of experts, weights that train in place, packed
# weights, and such as are packed once a choice that waits is made; learning rates by layer; offsets of heads; a teacher besides;
# scales of linears; factors of single experts of a 3-D tensor, and such experts themselves, as views of it.
Need = Literal[
    "schedule",
    "wait",
    "batches",
    "weights",
    "projection",
    "projected_experts",
    "in_place",
    "packed",
    "packed_later",
    "rates",
    "heads",
    "distill",
    "scales",
    "single_experts",
    "expert_views",
]
Part = Literal["weights", "gradients", "states"]

FIXED = (
    "layers cannot change while training under {name}, which divides the optimizer among the processes for good; use DDP "
    "(torchrun, accelerate launch --multi_gpu), or fully_shard in a loop of your own, or a choice that is made once"
)
RATES = "learning rates by layer were not tried under {name}, which regroups what the optimizer holds; use DDP"

DISTILL = (
    "a teacher (distill) runs through the model beside every step, which {name}, where a process holds a part of it or of what it "
    "learns, was not tried with; use DDP"
)

HEADS = (
    "offsets of heads are read together with the weights of the projection after attention, of which a process holds a part only "
    "under {name}; use DDP, ZeRO-1 or ZeRO-2"
)
SINGLE = (
    "single experts of a 3-D tensor are followed while it is whole, and {name} divides it among the processes; use DDP, or choose "
    "such tensors as a whole (unit: target)"
)
VIEWS = (
    "single experts of a 3-D tensor train in their place in it, and {name} keeps what trains in a place of its own; use DDP, or "
    "method: lora, or choose such tensors as a whole (unit: target)"
)


SCALES = (
    "scales and biases of linears are saved together with the lengths of their weights' rows, of which a process holds a part only "
    "under {name}; use DDP, ZeRO-1 or ZeRO-2"
)


@dataclass(frozen=True)
class Engine:
    """One engine. `key`: its name in commands; `name`: what users call it; `argument`: the training argument that asks for it.

    `asked(args)`: whether training arguments (or what has their attributes), or `accelerate launch` by its environment, ask for it.
    `divides`: of what each process holds a part only. `is_part`, `local`: whether a tensor is cut up by it, and this process's own
    part of such a tensor; `whole`: all of it, in every process, each of which must ask.
    `cut_like(whole, like)`: a whole tensor, cut up like that one, in its own type; nobody is asked. `cannot`: what cannot be
    right, why, and the way out, as a sentence with `{name}` in it.
    """

    key: str
    name: str
    argument: str
    asked: Callable[[Any], bool]
    divides: frozenset[Part] = frozenset()
    is_part: Callable[[Any], bool] = lambda _: False
    local: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    cut_like: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda whole, like: whole
    cannot: Mapping[Need, str] = field(default_factory=dict)

    def refusals(self, needs: Iterable[Need]) -> list[str]:
        """A sentence for each of these that it cannot do."""
        return [self.cannot[need].format(name=self.name) for need in needs if need in self.cannot]


def launched(name: str) -> bool:
    """Whether `accelerate launch` has asked for this (DEEPSPEED, FSDP, CPU) in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes")

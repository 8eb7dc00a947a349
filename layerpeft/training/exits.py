"""Sorted fine-tuning: the loss at several depths of one stack, each through the model's own final norm and head.

SoFT (Kavehzadeh et al., arXiv 2309.08968): at depths d_1 < … < d_n = L the loss is the mean over i of the cross-entropy of what the
first d_i layers make of the batch. There are no new weights, and each exit is a model by itself. What comes after the layers runs
once for every exit, whatever it is (norm, scaling, head, soft caps, TRL's fused head), with the layers bypassed; the layers run
once. Under evaluation the model is as it was.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from layerpeft.errors import ConfigError, Problem, TrainingError
from layerpeft.integrations.checkpointing import is_reentrant
from layerpeft.integrations.engines.known import is_cut
from layerpeft.model.layers import base_of, find_module, layer_map

SHARED = ("loss", "log_probs")  # what a loss is made of: transformers' own, and TRL's by token


def checked_exits(exits: Sequence[int | str], layers: int) -> tuple[int, ...]:
    """The depths, ascending, of a stack of so many layers; shares ("50%") round half up, to 1 at least. Raises: ConfigError."""
    meant = {e: _depth(e, layers) for e in exits}
    wrong = [e for e, depth in meant.items() if depth is None or not 1 <= depth <= layers]
    found, sentence = tuple(sorted({d for d in meant.values() if d is not None})), ""
    if wrong or not found:
        sentence = f"{wrong or 'none'} are no depths of a stack of {layers} layers, which go from 1 to {layers}"
    elif found[-1] != layers:
        sentence = f"the last exit is the whole model: add {layers}, or take the layers above out (drop: {found[-1]}-{layers - 1})"
    elif len(found) < 2:
        sentence = f"name one before the last layer besides, as in [{max(1, layers // 2)}, {layers}]"
    if sentence:
        raise ConfigError(Problem(("exits",), f"exits: {sentence}"))
    return found


def _depth(exit: int | str, layers: int) -> int | None:
    if isinstance(exit, str) and re.fullmatch(r"\d{1,3}(\.\d{1,9})?%", exit):
        return max(1, math.floor(float(exit[:-1]) / 100 * layers + 0.5))
    return exit if isinstance(exit, int) and not isinstance(exit, bool) else None


def with_exits(model: nn.Module, exits: Sequence[int | str], stack: str | None = None) -> nn.Module:
    """The model, whose loss in training is from now on the mean over these exits: numbers or shares of layers, at last all.

    For losses that the model computes (Trainer, a loop of one's own: `model(**batch).loss`) and TRL's SFTTrainer; before or after
    adapters are put on it. Again with other exits: these take their place. Raises: ConfigError, LayerMapError.
    """
    base = base_of(model)
    layers = layer_map(base, stack)
    depths = checked_exits(exits, len(layers))
    without_exits(base)
    Exits(depths, [find_module(base, name) for name in layers.names]).attach(base)
    return model


def without_exits(model: nn.Module) -> None:
    """Takes the exits off again."""
    for held in exits_of(model):
        held.detach()


def depths_of(model: nn.Module) -> tuple[int, ...]:
    """The exits of a model, as numbers of layers; none where it has none."""
    return next((held.depths for held in exits_of(model)), ())


def exits_of(model: nn.Module) -> list["Exits"]:
    """What is on a model: nothing, or one."""
    owners = [getattr(hook, "__self__", None) for hook in base_of(model)._forward_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Exits)]


class Exits:
    """The running measurement: state is what the layers at the exits gave out in the pass that runs now."""

    def __init__(self, depths: tuple[int, ...], blocks: Sequence[nn.Module]) -> None:
        self.depths, self.blocks = depths, list(blocks)
        self._left: dict[int, Any] = {}
        self._watching = False
        self._handles: list[Any] = []

    def attach(self, base: nn.Module) -> None:
        """Puts the hooks on."""
        self._handles = [
            base.register_forward_pre_hook(self._before),
            base.register_forward_hook(self._after, with_kwargs=True),
            *(self.blocks[d - 1].register_forward_hook(partial(self._leave, d)) for d in self.depths[:-1]),
        ]

    def detach(self) -> None:
        """Takes them off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, base: nn.Module, _args: Any) -> None:
        self._left, self._watching = {}, base.training and torch.is_grad_enabled()
        if self._watching and any(is_reentrant(block) for block in self.blocks):
            self._watching = False
            raise TrainingError(
                "exits: reentrant checkpointing hides what layers give out; use_reentrant: false keeps it"
            )
        if self._watching and is_cut(next(base.parameters())):
            self._watching = False
            raise TrainingError(
                "exits: the model is divided among processes, and its head could not run again within a pass"
            )

    def _leave(self, depth: int, _block: nn.Module, _args: Any, output: Any) -> None:
        if self._watching:  # else an evaluation, or a backward pass that computes a layer again
            self._left[depth] = output

    def _after(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._watching:
            return None
        self._watching = False
        left, self._left = self._left, {}
        if lost := [d for d in self.depths[:-1] if d not in left]:
            raise TrainingError(f"exits: the layer at depth {lost[0]} was not called in this pass")
        if isinstance(output, tuple) or not any(isinstance(_of(output, key), torch.Tensor) for key in SHARED):
            raise TrainingError(
                "exits: the model gave out no loss; give it labels, for what its logits make a loss of is the last layer alone"
            )
        calm = {
            k: v for k, v in kwargs.items() if k != "output_router_logits"
        }  # layers that are bypassed route nothing
        found = [output]
        for depth in self.depths[:-1]:
            with bypassed(self.blocks, [left[depth]]):
                found.append(base.forward(*args, **calm))
        for key in SHARED:
            values = [_of(one, key) for one in found]
            if isinstance(values[0], torch.Tensor):
                output[key] = torch.stack(values).mean(0)
        return output


def _of(output: Any, key: str) -> Any:
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)


@contextmanager
def bypassed(blocks: Sequence[nn.Module], left: list[Any]) -> Iterator[None]:
    """Inside, these blocks compute nothing, give out what `left` holds by then, and nobody hears of it: no hook, no checkpoint."""
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(setattr, block, "training", block.training)
            stack.callback(setattr, block, "_compiled_call_impl", block._compiled_call_impl)
            block.training = False
            block._compiled_call_impl = lambda *_, **__: left[0]  # in the place of forward and of every hook
        yield


@contextmanager
def at_exit(model: nn.Module, depth: int, stack: str | None = None) -> Iterator[None]:
    """Inside, the model is its first `depth` layers: what they make goes on behind the last one."""
    base = base_of(model)
    blocks = [find_module(base, name) for name in layer_map(base, stack).names]
    left: list[Any] = []
    handle = blocks[depth - 1].register_forward_hook(
        lambda _block, _args, output: left.__setitem__(slice(None), [output])
    )
    try:
        with bypassed(blocks[depth:], left):
            yield
    finally:
        handle.remove()

"""What a training step costs by layer, in closed form from shapes: operations of its products, and bytes that it keeps.

A layer is a chain of products: what reads its input (q, k, v), attention itself, `o`, then gate and up, then down. With
T tokens a product by a weight (out, in) takes 2 T·out·in operations in the forward pass, as many for the gradient of its
input, and as many for that of the weight where it trains. Attention takes two products of (tokens, tokens) in the
forward pass and five in the backward pass of a fused kernel, four where they are made one by one. Norms, activations
and losses multiply no matrices, and are not counted. What is kept for the backward pass is in model/activations.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn

from layerpeft.errors import LayerMapError
from layerpeft.model.activations import block_of, kept
from layerpeft.model.architectures import text_config
from layerpeft.model.layers import Layer, LayerMap, Target, base_of
from layerpeft.model.load import Load, Work


@dataclass(frozen=True)
class LayerCost:
    """Operations of one layer. `through`: the gradient's way to its input; `again`: what is recomputed on that way; `own`: what
    training it adds; `saved`: of `through` and `own`, what falls away where nothing below trains."""

    forward: int
    through: int
    again: int
    own: int
    saved: int


@dataclass(frozen=True)
class LayerKept:
    """Bytes of one layer after its forward pass, its output among them: frozen above one that trains, trained above another one,
    trained with nothing below that trains. With checkpointing they are those of its output.

    `let_go`: in these three states, those of what it reads, where nothing in it needs that on the way back.
    """

    frozen: int
    trained: int
    lowest: int
    let_go: tuple[int, int, int]


@dataclass(frozen=True)
class Costs:
    """Operations of one forward and backward pass: of the head in one direction, of what else is `outside`, and by layer.

    `whole`: the share of passes that go through the layers below the lowest one that trains. Others begin there, since states were
    kept: of E epochs all but the first (1/E).
    """

    head: int
    outside: int
    layers: tuple[LayerCost, ...]
    tiled: bool = False
    whole: float = 1.0

    @property
    def top(self) -> tuple[int, ...]:
        """Above all layers, of those that train: their own operations."""
        return (0,)

    def least(self, held: tuple[int, ...]) -> float:
        """What a set that holds these layers takes at least."""
        return self.fixed - self.spared(len(self.layers) - 1) + held[0]

    def above(self, held: tuple[int, ...], layer: int, trains: bool) -> tuple[int, ...]:
        """With a layer below which another one trains."""
        return (held[0] + self.layers[layer].own * trains,)

    def closed(self, held: tuple[int, ...], layer: int) -> float:
        """Those of a step of which this is the lowest layer that trains, below those of `held`."""
        return held[0] + self.of([layer])

    @property
    def fixed(self) -> int:
        """What every step takes, whatever trains: the forward pass, and the head's way back."""
        return self.outside + 2 * self.head + sum(c.forward for c in self.layers)

    @property
    def everything(self) -> int:
        """Those of training all weights there are, embeddings and head too (which tiles add up in place, and nobody counts)."""
        head = 0 if self.tiled else self.head
        return self.fixed + head + sum(c.through + c.again + c.own for c in self.layers)

    def of(self, chosen: Collection[int]) -> int:
        """Those of training these layers: the backward pass runs down to the lowest of them. Raises: ValueError for none."""
        lowest = min(chosen)
        above = sum(c.through + c.again for c in self.layers[lowest:])
        own = sum(self.layers[i].own for i in chosen)
        return self.fixed - self.spared(lowest) + above + own - self.layers[lowest].saved

    def too_small(self, room: float, layer: int) -> str:
        """That a budget holds not even this layer."""
        least = self.of([layer])
        share = math.ceil(100 * least / self.of(range(len(self.layers))))
        return f"{room:.4g} operations holds no layer; the cheapest, {layer}, takes {least:.4g}: write time: {share}% or more"

    def added(self, layer: int) -> int:
        """Those that a layer adds to a step in which nothing trains: the way down to it, and its own; where states are kept, the
        forward pass from it on, too."""
        return self.of([layer]) - self.fixed + self.spared(len(self.layers))

    def said(self, chosen: Collection[int]) -> str:
        """Of which passes a mean is taken; nothing where all of them are whole."""
        if self.whole == 1:
            return ""
        passes = (
            f"a mean of {1 / self.whole:g} epochs, all but the first of which" if self.whole else "later epochs, which"
        )
        return f", in {passes} begin at layer {min(chosen)}"

    def spared(self, lowest: int) -> int:
        """Those that a mean pass has no need of, where states that enter this layer are kept."""
        return round((1 - self.whole) * sum(c.forward for c in self.layers[:lowest]))


@dataclass(frozen=True)
class _Product:
    """`branch` and `place`: its gradient goes to its input where something trains in this branch at a lower place, or further
    down. `target`: by which weight, None for attention's own."""

    branch: int
    place: int
    forward: int
    backward: int
    target: Target | None = None
    tokens: int = 0


_PLACES = {
    **dict.fromkeys(("q", "k", "v", "qkv", "q_a", "kv_a"), 0), "q_b": 1, "kv_b": 1, "o": 3,
    **dict.fromkeys(("gate", "up", "gate_up", "router"), 4), "down": 5,
}  # fmt: skip
_CORE = 2
# blocks whose attention and MLP read the same input: always, or as the config says
_SIDE_BY_SIDE = frozenset(("phi", "gptj", "codegen", "cohere", "cohere2"))
_SAID_BY = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")


def costs_of(
    model: nn.Module, layers: LayerMap, targets: Iterable[Target], load: Load | None = None, work: Work | None = None
) -> Costs:
    """The costs of training `targets` of these layers, by `work`.

    Raises: LayerMapError with the reason, for a model whose operations do not follow from shapes alone.
    """
    load, base = load or Load(), base_of(model)
    wanted = {t.name for t in targets}
    found = []
    work = work or Work()
    for layer in layers.layers:
        block = base.get_submodule(layer.name)
        normed = (work.norms or not work.rank) and _has(block, _NORM_FIRST)  # and trains, before the first products
        products = _products(base, layer, load)
        last = max(products, key=lambda p: (p.branch, p.place), default=None)
        if not _ends_with_product(base, block):
            last = None
        cost = _cost(products, wanted, work, normed, load.again, last)
        # checkpointing of adapters makes the output of embeddings require a gradient, which reaches the first layer
        opened = load.again and layer.index == 0 and not _is_image(base)
        found.append(replace(cost, saved=0) if opened else cost)
    return Costs(*_outside(base, layers, load), tuple(found), load.tiled)


def kept_of(
    model: nn.Module, layers: LayerMap, targets: Iterable[Target], load: Load, work: Work, late: bool = False
) -> tuple[LayerKept, ...]:
    """Bytes that layers keep for their backward pass where `targets` of them train, by `work`; counted as on a CPU.

    `late`: norms round after they have multiplied by their weight (OLMo 2), not before (Llama): shapes do not say which.
    Raises: LayerMapError with the reason, for blocks that are not written as attention and an MLP with residuals.
    """
    base, found = base_of(model), []
    wanted, beside = frozenset(t.name for t in targets), _side_by_side(text_config(base))
    for layer in layers.layers:
        block = block_of(base, layer, beside)
        states = ((frozenset(), True), (wanted, True), (wanted, False))
        frozen, trained, lowest = (kept(block, trains, work, below, load, late) for trains, below in states)
        found.append(LayerKept(frozen[0], trained[0], lowest[0], (frozen[1], trained[1], lowest[1])))
    return tuple(found)


def _side_by_side(config: Any) -> bool:
    """Whether attention and MLP read the same input."""
    return getattr(config, "model_type", "") in _SIDE_BY_SIDE or any(getattr(config, n, False) for n in _SAID_BY)


def _cost(
    products: list[_Product],
    wanted: Collection[str],
    work: Work,
    normed: bool,
    recomputes: bool,
    last: _Product | None,
) -> LayerCost:
    """`last`: the product before which recomputing stops, because nothing that comes later is kept for the backward pass."""
    trains = [(p.branch, p.place) for p in products if _trains(p.target, wanted)]
    forward = through = own = saved = 0
    again = 0 if last is None else -last.forward
    for product in products:
        below = normed or any(branch == product.branch and place < product.place for branch, place in trains)
        forward += product.forward
        through += product.backward
        saved += 0 if below else product.backward
        if product.target is None or not _trains(product.target, wanted):
            continue
        out, width = product.target.shape[-2:]
        if not work.rank:
            own += 2 * product.tokens * out * width
            continue
        first, second = (2 * product.tokens * work.rank * n for n in (width, out))
        own += first * (2 if work.fixed else 3) + second * 3
        saved += 0 if below else first  # the gradient of what the first factor reads
        if recomputes:
            own += first + (product.forward if product is last else second)
    return LayerCost(forward, through, again + forward if recomputes else 0, own, saved)


def _trains(target: Target | None, wanted: Collection[str]) -> bool:
    """Whether a weight is among those, or lies in a module that is."""
    return target is not None and (target.name in wanted or any(target.name.startswith(f"{name}.") for name in wanted))


def _products(base: nn.Module, layer: Layer, load: Load) -> list[_Product]:
    config = text_config(base)
    apart = _side_by_side(config)
    tokens = load.rows * _length(base, load)
    found, width = [], {}
    for target in layer.targets:
        group, _, part = target.role.partition(".")
        part = part.rpartition(".")[2]
        if getattr(config, "relative_attention", False):
            raise LayerMapError(f"{layer.kind} multiplies by positions besides")
        if group not in ("attention", "mlp", "moe") or part not in _PLACES:
            raise LayerMapError(f"{target.name} ({target.role}): what it takes does not follow from shapes alone")
        seen = tokens
        if target.kind == "experts" or ".experts." in target.name:
            seen = tokens * _experts_per_token(config)
        out, inside = target.shape[-2:]
        work = 2 * seen * out * inside
        found.append(_Product(int(apart and group != "attention"), _PLACES[part], work, work, target, seen))
        width[part] = (out, inside)
    if "o" in width:
        values = width["o"][1]
        keys = width["q"][0] if "q" in width else width["q_b"][0] if "q_b" in width else values
        core = 2 * tokens * _length(base, load) * (keys + values)
        apart = getattr(config, "_attn_implementation", "sdpa") == "eager" or _any_of(config, _DROPS_INSIDE)
        found.append(_Product(0, _CORE, core, core * 2 if apart else core * 5 // 2))
    return found


def _experts_per_token(config: Any) -> int:
    for name in ("num_experts_per_tok", "moe_topk", "num_experts_per_token"):
        if isinstance(number := getattr(config, name, None), int):
            return number
    raise LayerMapError("the config does not say how many experts a token meets")


def _length(base: nn.Module, load: Load) -> int:
    """Tokens of a row; those of an image follow from its patches."""
    config: Any = text_config(base)
    return (config.image_size // config.patch_size) ** 2 + 1 if _is_image(base) else load.length


def _is_image(base: nn.Module) -> bool:
    sizes = (getattr(text_config(base), name, None) for name in ("image_size", "patch_size"))
    return all(isinstance(size, int) for size in sizes)


def _outside(base: nn.Module, layers: LayerMap, load: Load) -> tuple[int, int]:
    """The head over all tokens, and patches of an image; what else stands outside reads one token of a row, or none."""
    if len(layers.stacks) > 1:
        raise LayerMapError("the model has several stacks, and what one takes goes with what trains in the other")
    if not hasattr(base, "get_output_embeddings"):
        raise LayerMapError(f"{type(base).__name__} does not say what its head is (get_output_embeddings)")
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    inside = tuple(f"{name}." for name in layers.names)
    patches = [m for n, m in base.named_modules() if isinstance(m, nn.Conv2d) and not n.startswith(inside)]
    tokens = load.rows * _length(base, load)
    outside = sum(2 * (tokens - load.rows) * prod(m.weight.shape) for m in patches)
    read = tokens - load.rows if load.tiled else tokens
    return (2 * read * prod(head.weight.shape) if head is not None else 0), outside


_NORM_FIRST = ("input_layernorm", "ln_1", "self_attn_layer_norm", "attn_norm", "layernorm_before", "norm1", "ln_attn")
_AFTER = ("post_feedforward_layernorm", "output.LayerNorm", "output_layer_norm", "layer_scale", "experts")
_DROPS_INSIDE = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")  # a fused kernel cannot, on a CPU
_DROPS = ("resid_pdrop", "residual_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout")


def _has(block: nn.Module, ends: tuple[str, ...]) -> bool:
    """Whether one of its modules is named so."""
    named = (name for name, module in block.named_modules() if not isinstance(module, nn.Identity))
    return any(end in name for name in named for end in ends)


def _ends_with_product(base: nn.Module, block: nn.Module) -> bool:
    """Whether nothing that follows its last product (norms, dropout, weights of experts) is kept for the backward pass."""
    return not _has(block, _AFTER) and not _any_of(text_config(base), _DROPS)


def _any_of(config: Any, names: tuple[str, ...]) -> bool:
    return any(getattr(config, name, 0) for name in names)

"""What a layer keeps for its backward pass, in closed form: bytes, from the shapes of its matrices, operation by operation.

A block that is written like Llama's, GPT-2's or BERT's is walked through once on shapes alone. A product by a weight keeps what it
reads where that weight trains, a norm and an activation what they read, attention its queries, keys, values, output and the
logarithm of its sums (eager: the probabilities), and a product of two what is multiplied. Nothing is kept where neither an input
requires a gradient nor a weight trains: the layer below which nothing trains keeps less than one further up.

What attention and dropout keep goes with the device. These are a CPU's numbers, as all counts are: dropout keeps what it multiplies
by in the type of its input (one byte an element on CUDA), and attention with dropout its probabilities (CUDA's kernels draw again).
Without dropout both keep as much, but that CUDA's kernel for masked attention pads its sums to 32 tokens, and that autocast has
LayerNorm read float32 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from layerpeft.errors import LayerMapError
from layerpeft.model.architectures import text_config
from layerpeft.model.layers import Layer, Target
from layerpeft.model.load import Load, Work

_ACTS = {
    "SiLUActivation": "input", "SiLU": "input", "GELUActivation": "input", "GELUTanh": "input", "GELU": "input",
    "PytorchGELUTanh": "input", "ReLU": "output", "NewGELUActivation": "steps",
}  # fmt: skip
_FIRST = ("input_layernorm", "ln_1", "self_attn_layer_norm")
_SECOND = ("post_attention_layernorm", "ln_2", "final_layer_norm")
_SUMS = ("attention.output.LayerNorm", "output.LayerNorm")
FLOAT = 4


@dataclass(eq=False)
class _Value:
    """A tensor: bytes of its storage, which views share, its width and bytes of an element; whether it needs a gradient."""

    size: int
    width: int
    item: int
    needs: bool
    whole: _Value | None = None

    @property
    def storage(self) -> _Value:
        return self.whole or self


@dataclass(frozen=True)
class Block:
    """A block's parts as far as they decide what is kept.

    `norms`: by place, with names; `turned`: by rotary positions, `joined`: with what these leave alone; `sums`: norms come after
    sums (BERT); `beside`: attention and MLP read the same; `inside`, `outside`: dropout of attention, of what is added; `window`:
    how far a token looks back.
    """

    name: str
    linears: Mapping[str, Target]
    norms: Mapping[str, tuple[str, nn.Module]]
    act: str
    item: int
    heads: int
    eager: bool
    capped: bool
    turned: bool
    joined: bool
    sums: bool
    beside: bool
    inside: float
    outside: float
    window: int | None

    def masked(self, load: Load) -> bool:
        """Whether attention is given a mask, for which grouped keys are repeated."""
        return load.padded and load.rows > 1 or self.window is not None and load.length >= self.window


def block_of(base: nn.Module, layer: Layer, beside: bool) -> Block:
    """What a layer is made of. Raises: LayerMapError for one that is not written like those that are known."""
    config, module = text_config(base), base.get_submodule(layer.name)
    roles = {t.role: t for t in layer.targets}
    linears = {role.partition(".")[2]: t for role, t in roles.items() if role.partition(".")[0] in ("attention", "mlp")}
    attends = {"qkv", "o"} <= linears.keys() or {"q", "k", "v", "o"} <= linears.keys()
    widens = bool({"up", "gate_up"} & linears.keys()) and "down" in linears
    if getattr(config, "relative_attention", False):
        raise LayerMapError(f"{layer.kind} multiplies by positions besides")
    if len(linears) != len(layer.targets) or not (attends and widens) or linears["o"].heads == 0:
        raise LayerMapError(f"{layer.kind} is not attention and an MLP alone")
    item = {p.element_size() for p in module.parameters() if p.is_floating_point()}
    if len(item) != 1 or not all(p.is_floating_point() for p in module.parameters()):
        raise LayerMapError(f"{layer.kind} has weights of several types")
    acts = {
        type(m).__name__ for n, m in module.named_modules() if "act" in n.rpartition(".")[2] and not list(m.children())
    }
    acts -= {"Identity"}
    if len(acts) != 1 or not acts <= _ACTS.keys():
        raise LayerMapError(f"{layer.kind} has other activations ({', '.join(sorted(acts)) or 'none'})")
    rope = getattr(config, "rope_parameters", None)
    turned = rope is not None
    joined = turned and ("qkv" in linears or bool(_share(config, "partial_rotary_factor")))
    how = getattr(config, "_attn_implementation", None)
    if how not in ("sdpa", "eager"):
        raise LayerMapError(f"what attention of the kind {how!r} keeps is not known")
    norms, sums = _norms(layer, module)
    return Block(
        layer.name, linears, norms, _ACTS[acts.pop()], item.pop(), linears["o"].heads, how == "eager",
        bool(getattr(config, "attn_logit_softcapping", None)), turned, joined, sums, beside,
        _share(config, "attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"),
        _share(config, "resid_pdrop", "residual_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout"),
        _window(config, layer.index),
    )  # fmt: skip


def _share(config: Any, *names: str) -> float:
    return next((float(getattr(config, n)) for n in names if getattr(config, n, None)), 0.0)


def _window(config: Any, index: int) -> int | None:
    """How many tokens a layer looks back, where not all."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds[index] == "sliding_attention" if kinds else True
    return getattr(config, "sliding_window", None) if slides else None


def _norms(layer: Layer, module: nn.Module) -> tuple[dict[str, tuple[str, nn.Module]], bool]:
    """Norms by place, and whether they follow sums. Raises: LayerMapError for others."""
    found = {n: m for n, m in module.named_modules() if "norm" in type(m).__name__.lower()}
    if set(found) == set(_SUMS):
        return {"attention": (_SUMS[0], found[_SUMS[0]]), "mlp": (_SUMS[1], found[_SUMS[1]])}, True
    placed: dict[str, str] = {}
    posts = "pre_feedforward_layernorm" in found or not any(n in found for n in _FIRST)
    for name in found:
        leaf = name.rpartition(".")[2]
        if leaf in ("q_norm", "k_norm"):
            place = leaf
        elif leaf in _FIRST:
            place = "first"
        elif leaf == "pre_feedforward_layernorm" or leaf in _SECOND and not posts:
            place = "second"
        elif leaf in ("post_attention_layernorm", "post_feedforward_layernorm"):
            place = "attention" if leaf in _SECOND else "mlp"
        else:
            place = ""
        if not place or place in placed:
            raise LayerMapError(f"{layer.kind} has a norm in another place ({name})")
        placed[place] = name
    if not placed.keys() & {"second", "mlp"}:
        raise LayerMapError(f"{layer.kind} has no norm before or after its MLP")
    return {place: (name, found[name]) for place, name in placed.items()}, False


def kept(block: Block, targets: Set[str], work: Work, below: bool, load: Load, late: bool) -> tuple[int, int]:
    """Bytes that are there after the block's forward pass and were not before it: what its backward pass needs, and its output.
    And those of its input, where its backward pass does not need that: they go when the next block begins.

    `targets`: names of what trains in it, or of what that lies in; `below`: something below it trains; `late`: as in `kept_of`.
    """
    walk = _Walk(block, targets, work, load, late)
    given = walk.new(block.linears["o"].shape[0], block.item, below)
    out = walk.sums(given) if block.sums else walk.layer(given)
    if load.again:
        return out.storage.size, 0
    held = {id(v): v.size for v in (*(v.storage for v in walk.held), out.storage) if v is not given}
    reads = any(v.storage is given for v in walk.held)
    return sum(held.values()) + walk.besides, 0 if reads else given.size


@dataclass
class _Walk:
    """A walk through one block, which writes down what is `held` for the way back, and bytes of weights `besides`."""

    block: Block
    targets: Set[str]
    work: Work
    load: Load
    late: bool
    held: list[_Value] = field(default_factory=list)
    besides: int = 0

    def trains(self, name: str) -> bool:
        return name in self.targets or any(name.startswith(f"{target}.") for target in self.targets)

    def keep(self, *values: _Value) -> None:
        self.held += values

    def new(self, width: int, item: int, needs: bool, tokens: int = 0) -> _Value:
        return _Value((tokens or self.load.tokens) * width * item, width, item, needs)

    def cast(self, x: _Value, item: int) -> _Value:
        if x.item == item:
            return x
        elements = self.load.tokens * x.width if x.whole else x.size // x.item
        return replace(x, size=elements * item, item=item, whole=None)

    # ---- operations

    def times(self, x: _Value, y: _Value) -> _Value:
        """Two, element by element."""
        self.keep(*([y] if x.needs else []), *([x] if y.needs else []))
        return self.new(x.width, max(x.item, y.item), x.needs or y.needs)

    def plus(self, x: _Value, y: _Value) -> _Value:
        return self.new(x.width, max(x.item, y.item), x.needs or y.needs)

    def dropped(self, x: _Value, share: float) -> _Value:
        if not share:
            return x
        out = self.new(x.width, x.item, x.needs)
        self.keep(*([self.new(x.width, x.item, False)] if x.needs else []))
        return out

    def linear(self, x: _Value, role: str) -> _Value:
        target, low, given = self.block.linears[role], self.load.low, x
        out, width = target.shape[-2:]
        trains = self.trains(target.name)
        whole = trains and not self.work.rank
        read = self.cast(x, low or self.block.item)
        self.keep(*([read] if whole else []))
        if low and low != self.block.item and (x.needs or whole):
            self.besides += out * width * low
        y = self.new(out, low or self.block.item, x.needs or whole)
        if not trains or whole:
            return y
        x = self.dropped(self.cast(given, FLOAT), self.work.dropout)
        first = self.cast(x, low or FLOAT)
        rank, factor = self.work.rank, low or FLOAT
        self.keep(*([] if self.work.fixed else [first]), self.new(rank, factor, True))
        if low and low != FLOAT:
            self.besides += (out + width * (x.needs or not self.work.fixed)) * rank * low
        return replace(y, needs=True)

    def norm(self, x: _Value, place: str) -> _Value:
        if place not in self.block.norms:
            return x
        name, module = self.block.norms[place]
        weighs = getattr(module, "weight", None) is not None
        wide = (
            bool(self.targets) if self.work.norms else not self.work.rank and self.trains(f"{self.block.name}.{name}")
        )
        trains = weighs and wide
        needs, sums = x.needs or trains, self.load.tokens * (x.width // self._size(module, x.width))
        if "RMS" not in type(module).__name__:
            read = x if isinstance(module, nn.LayerNorm) else self.cast(x, FLOAT)  # OLMo's, which rounds afterwards
            self.keep(*([read, self.new(2, read.item, False, sums)] if needs else []))
            return self.new(x.width, x.item, needs)
        read = self.cast(x, FLOAT)
        self.keep(*([read, self.new(1, FLOAT, False, sums)] if x.needs else []))
        late = self.late or not hasattr(module, "variance_epsilon")
        normed = self.new(x.width, FLOAT if late else x.item, x.needs)
        self.keep(*([normed] if trains else []))
        if x.needs and not hasattr(module, "variance_epsilon"):
            self.besides += self._size(module, x.width) * FLOAT  # of one more than the weight
        return self.new(x.width, x.item, needs)

    def _size(self, module: nn.Module, width: int) -> int:
        """Over how many elements a norm goes: those of one head, or all."""
        weight: Any = getattr(module, "weight", None)
        return weight.numel() if weight is not None else width

    # ---- parts of a block

    def attention(self, x: _Value) -> _Value:
        block, o = self.block, self.block.linears["o"].shape[-1]
        if "qkv" in block.linears:
            qkv = self.linear(x, "qkv")
            inner = (qkv.width - o) // 2
            q, k, v = (replace(qkv, width=w, whole=qkv) for w in (o, inner, inner))
        else:
            q, k, v = (self.linear(x, name) for name in "qkv")
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        if block.turned:
            q, k = (self.new(t.width, max(t.item, self.block.item), t.needs) for t in (q, k))
        groups = q.width // k.width
        mixed = self.inner(q, k, v, groups)
        if block.joined:  # heads come before tokens then, and are put in order
            mixed = self.new(mixed.width, mixed.item, mixed.needs)
        return self.dropped(self.linear(mixed, "o"), block.outside)

    def inner(self, q: _Value, k: _Value, v: _Value, groups: int) -> _Value:
        """Attention itself."""
        low, load, heads = self.load.low, self.load, self.block.heads
        q, k, v = (self.cast(t, low) if low else t for t in (q, k, v))
        needs = q.needs or k.needs or v.needs
        drops, pairs = self.block.inside, load.rows * heads * load.length * load.length
        written, masked = self.block.eager or drops, self.block.masked(load)  # product by product
        if groups > 1 and (written or masked):
            k, v = (self.new(q.width, t.item, t.needs) for t in (k, v))
        out = self.new(q.width, v.item, needs)
        if not written:
            sums = _Value(load.tokens * heads * FLOAT, 1, FLOAT, False)
            mask = _Value(load.rows * load.length**2 * q.item, 1, q.item, False)
            self.keep(*([q, k, v, out, sums, *([mask] if masked else [])] if needs else []))
            return out
        crossed = q.needs or k.needs
        # head by head, or scaled: copies; torch's own products of narrow types are in float32
        item = q.item if self.block.eager else FLOAT
        q, k, v = (self.new(t.width, item, t.needs) for t in (q, k, v))
        self.keep(*([k] if q.needs else []), *([q] if k.needs else []))
        if self.block.eager and self.block.capped and crossed:
            self.besides += pairs * q.item
        chances = _Value(pairs * FLOAT, 1, FLOAT, crossed)
        self.keep(*([chances] if crossed else []))
        used = self.cast(chances, v.item)
        if drops:
            self.keep(*([_Value(pairs * used.item, 1, used.item, False)] if crossed else []))
            used = _Value(pairs * used.item, 1, used.item, crossed)
        self.keep(*([v] if crossed else []), *([used] if v.needs else []))
        return out

    def activated(self, x: _Value) -> _Value:
        out = self.new(x.width, x.item, x.needs)
        if self.block.act == "steps" and x.needs:
            self.keep(x, *(self.new(x.width, x.item, True) for _ in range(3)))
        elif x.needs:
            self.keep(x if self.block.act == "input" else out)
        return out

    def mlp(self, x: _Value) -> _Value:
        linears = self.block.linears
        if "gate_up" in linears:
            both = self.linear(x, "gate_up")
            gate, up = (replace(both, width=both.width // 2, whole=both) for _ in range(2))
            wide = self.times(up, self.activated(gate))
        elif "gate" in linears:
            gate = self.activated(self.linear(x, "gate"))
            wide = self.times(gate, self.linear(x, "up"))
        else:
            wide = self.activated(self.linear(x, "up"))
        return self.dropped(self.linear(wide, "down"), self.block.outside)

    def layer(self, x: _Value) -> _Value:
        """Norms come first, or before what is added (Gemma has both, OLMo 2 the latter)."""
        first = self.norm(self.attention(self.norm(x, "first")), "attention")
        if self.block.beside:
            return self.plus(self.plus(self.mlp(self.norm(x, "second")), first), x)
        x = self.plus(x, first)
        return self.plus(x, self.norm(self.mlp(self.norm(x, "second")), "mlp"))

    def sums(self, x: _Value) -> _Value:
        """Norms come after what is added (BERT)."""
        x = self.norm(self.plus(self.attention(x), x), "attention")
        return self.norm(self.plus(self.mlp(x), x), "mlp")

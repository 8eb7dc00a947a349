"""The layer map: the repeated blocks of a model and the matrices in them, found by structure.

Names are always those of the user's own model, whatever wraps it (PEFT adapters, DDP, `torch.compile`).
No weight is read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from layerpeft.errors import LayerMapError, hint, nearest
from layerpeft.model.architectures import Matrix, matrices_of, role_of, stack_labels, stored_shape, text_config
from layerpeft.model.heads import AFTER_ATTENTION, heads_of
from layerpeft.model.names import unwrapped, upwards
from layerpeft.text import grid


@dataclass(frozen=True)
class Target:
    """One matrix inside a layer. `shape` is (out, in) however stored, (experts, out, in) or (out, in, *kernel).

    `heads`: of the projection that follows attention, how many heads' outputs it reads; 0 of others, and where that is not known.
    """

    name: str
    layer: int
    role: str
    kind: str
    shape: tuple[int, ...]
    params: int
    heads: int = 0


@dataclass(frozen=True)
class Layer:
    """One repeated block. `params` counts weights that an earlier layer already holds (shared ones) only there.

    `block`: of a unit below a layer, the layer that it lies in.
    """

    index: int
    name: str
    kind: str
    targets: tuple[Target, ...]
    params: int
    block: int = -1


@dataclass(frozen=True)
class LayerMap:
    """The layers of one stack, numbered from 0 at the input; `stacks` lists every stack as `name=path`.

    Or units below the layers (model/units.py), in their place: `unit` says of what kind, `of` is the map that they lie in.
    """

    model_type: str
    stack: str
    stacks: tuple[str, ...]
    layers: tuple[Layer, ...]
    unit: str = "layer"
    of: LayerMap | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def whole(self) -> LayerMap:
        """The layers, of whichever units this is the map."""
        return self.of or self

    def block(self, index: int) -> Layer:
        """The layer that a unit lies in, or is."""
        return self.of.layers[self.layers[index].block] if self.of else self.layers[index]

    def place(self, name: str, index: int) -> str:
        """The name, inside its layer, of something that lies in this unit: `self_attn.q_proj`."""
        return name[len(self.block(index).name) + 1 :]

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """All targets, layer by layer."""
        return tuple(target for layer in self.layers for target in layer.targets)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the names, shapes and kinds of layers and targets."""
        lines = [f"stack {self.stack}", *(f"layer {layer.name}" for layer in self.layers)]
        lines += [f"{t.name} {t.kind} {','.join(map(str, t.shape))}" for t in self.targets]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def table(self) -> str:
        """The map as text: one row per run of equal layers, one line per kind of target."""
        runs: list[list[Layer]] = []
        for layer in self.layers:
            if runs and _alike(runs[-1][0]) == _alike(layer):
                runs[-1].append(layer)
            else:
                runs.append([layer])
        rows = [("layer", "class", "targets (out x in)", "params")]
        for run in runs:
            first, last = run[0], run[-1]
            span = str(first.index) if first is last else f"{first.index}-{last.index}"
            lines = _target_lines(first.targets)
            rows.append((span, first.kind, lines[0], f"{first.params:,}"))
            rows += [("", "", line, "") for line in lines[1:]]
        weights = sum(target.params for target in self.targets)
        where = self.stack or "the model itself"
        title = f"{self.model_type}: {len(self)} layers in {where}, {len(self.targets)} targets, {weights:,} weights"
        return "\n".join([title, *grid(rows, "<<<>")])


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    module: nn.Module
    kids: tuple[_Node, ...]
    matrices: tuple[Matrix, ...]
    inside: bool  # some module below holds a matrix
    marked: bool  # transformers marks it as a block
    stacked: bool  # it is, or holds, a container of marked blocks


@dataclass(frozen=True)
class _Stack:
    node: _Node
    labels: frozenset[str]  # of encoder, decoder, text, vision, audio
    blocks: tuple[_Node, ...]

    @property
    def path(self) -> str:
        return self.node.name


def layer_map(model: nn.Module, stack: str | None = None) -> LayerMap:
    """The repeated blocks of `model` with their targets; `stack` picks one by path or by name (`encoder`, `vision`, …).

    Raises: LayerMapError for a model without repeated blocks, for shared weights, for an unknown stack.
    """
    return stacks_of(model).layers(stack)


@dataclass(frozen=True)
class Stacks:
    """What one walk over a model has found, for all that is asked of its stacks. It keeps the modules alive: not to be kept."""

    base: nn.Module
    root: _Node
    found: tuple[_Stack, ...]
    maps: dict[str, LayerMap] = field(default_factory=dict)

    def layers(self, stack: str | None = None) -> LayerMap:
        """The map of one stack. Raises: as `layer_map`."""
        if stack is not None:
            chosen = _named_stack(stack, self.found, self.root)
        elif self.found:
            chosen = _default_stack(self.found)
        else:
            raise LayerMapError(_nothing_found(self.root, self.base))
        if chosen.path not in self.maps:
            layers = _layers(chosen.blocks, text_config(self.base))
            _refuse_shared(layers, chosen, self.found, self.base)
            stacks = tuple(_display(self.found))
            self.maps[chosen.path] = LayerMap(_model_type(self.base), chosen.path, stacks, layers)
        return self.maps[chosen.path]

    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """Names of the blocks of every stack, of the default one first.

        Without those that share their weights, and without rows of other modules beside blocks that are marked as such.
        """
        first = _default_stack(self.found) if self.found else None
        names = []
        found = [s for s in self.found if s.blocks[0].marked] or self.found
        for stack in sorted(found, key=lambda s: s is not first):
            with suppress(LayerMapError):
                names.append(self.layers(stack.path).names)
        return tuple(names)


def stacks_of(model: nn.Module) -> Stacks:
    """Walks over a model once. Any model will do: only `layers` and `blocks` ask for repeated blocks."""
    base = base_of(model)
    root = _grow("", base, frozenset(), getattr(text_config(base), "hidden_size", None))
    return Stacks(base, root, tuple(_find_stacks(root, base)))


def base_of(model: nn.Module) -> nn.Module:
    """The user's own model inside PeftModel, a tuner, data-parallel, FSDP, DeepSpeed or compiled wrappers."""
    while True:
        inner = unwrapped(model)
        modules = inner._modules
        if "base_model" in modules and hasattr(inner, "peft_config"):
            inner = modules["base_model"]
        elif "model" in modules and "targeted_module_names" in inner.__dict__:
            inner = modules["model"]
        elif "module" in modules and _distributed(inner):
            inner = modules["module"]
        if inner is model or inner is None:
            return model
        model = inner


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The original module of this name in the unwrapped model; a parameter's name gives the module that holds it.

    Raises: LayerMapError for a name that the model does not have, with the nearest one.
    """
    module = base_of(model)
    parts = name.split(".") if name else []
    for i, part in enumerate(parts):
        child = module._modules.get(part)
        if child is None:
            if i == len(parts) - 1 and part in module._parameters:
                return module
            here = ".".join(parts[:i])
            close = nearest(part, [*module._modules, *module._parameters])
            hint = f" Did you mean {'.'.join([*parts[:i], close])!r}?" if close else ""
            raise LayerMapError(f"the model has no module {name!r}: {here or 'its root'} has no {part!r}.{hint}")
        module = unwrapped(child)
    return module


def standing_at(model: nn.Module, name: str) -> nn.Module:
    """What stands at this name now, adapters and all; a parameter's name gives the module that holds it. Raises: as above."""
    above, _, leaf = name.rpartition(".")
    holder = find_module(model, above)
    return holder._modules.get(leaf) or find_module(model, name)


def _distributed(module: nn.Module) -> bool:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return True
    return type(module).__module__.split(".")[0] == "deepspeed"


def _model_type(base: nn.Module) -> str:
    name = getattr(getattr(base, "config", None), "model_type", None)
    return name if isinstance(name, str) and name else type(base).__name__


def _grow(name: str, module: nn.Module, above: frozenset[int], hidden: int | None) -> _Node:
    """The tree of original modules; a module that contains itself is not followed twice."""
    matrices = matrices_of(name, module, hidden)
    above = above | {id(module)}
    kids = []
    for key, child in module._modules.items():
        if child is not None:
            child = unwrapped(child)
            if id(child) not in above:
                kids.append(_grow(f"{name}.{key}" if name else key, child, above, hidden))
    marked = isinstance(module, GradientCheckpointingLayer)
    stacked = any(k.stacked for k in kids) or (_container(module) and any(k.marked for k in kids))
    inside = any(k.matrices or k.inside for k in kids)
    return _Node(name, module, tuple(kids), matrices, inside, marked, stacked)


def _container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _blocks(node: _Node) -> tuple[_Node, ...]:
    """Children that are blocks: they hold matrices below themselves, or transformers marks them."""
    return tuple(kid for kid in node.kids if kid.inside or kid.marked)


def _is_stack(node: _Node) -> bool:
    if not _container(node.module) or not node.inside:
        return False
    blocks = _blocks(node)
    if any(block.marked for block in blocks):
        return True
    # a list of towers or stages that are stacks themselves is not a stack
    if any(block.stacked or _is_stack(block) for block in blocks):
        return False
    return max(Counter(type(block.module) for block in blocks).values(), default=0) > 1


def _find_stacks(root: _Node, base: nn.Module) -> list[_Stack]:
    """The outermost stacks, in the order of the model."""
    found: list[_Node] = []

    def visit(node: _Node) -> None:
        if _is_stack(node):
            found.append(node)
        else:
            for kid in node.kids:
                visit(kid)

    visit(root)
    labels = stack_labels([node.name for node in found], str(getattr(base, "main_input_name", "")))
    return [_Stack(node, label, _blocks(node)) for node, label in zip(found, labels, strict=True)]


def _default_stack(found: Sequence[_Stack]) -> _Stack:
    """Text before vision and audio, the decoder of an encoder-decoder, otherwise the largest."""
    pool = [s for s in found if not s.labels & {"vision", "audio"}] or list(found)
    if any("encoder" in s.labels for s in pool):
        pool = [s for s in pool if "decoder" in s.labels] or pool
    pool = [s for s in pool if "text" in s.labels] or pool
    pool = [s for s in pool if s.blocks[0].marked] or pool
    return pool[0] if len(pool) == 1 else max(pool, key=lambda s: (_count(s.node, set()), len(s.blocks)))


def _named_stack(name: str, found: Sequence[_Stack], root: _Node) -> _Stack:
    path = name.partition("=")[2] or name
    fits = [s for s in found if s.path == path] or _labelled(name, found)
    if len(fits) == 1:
        return fits[0]
    listed = "; ".join(f"{text}: {len(s.blocks)} {_kinds(s)}" for text, s in zip(_display(found), found, strict=True))
    if fits:
        raise LayerMapError(f"{len(fits)} stacks fit stack={name!r}: give the path of one. Found: {listed}.")
    node = _descend(root, path)
    if node is not None and _container(node.module) and _blocks(node):
        return _Stack(node, frozenset(), _blocks(node))
    close = hint(name, [*(s.path for s in found), *(label for s in found for label in s.labels)])
    raise LayerMapError(f"unknown stack {name!r}.{close} Found: {listed or 'no stack of repeated blocks'}.")


def _labelled(label: str, found: Sequence[_Stack]) -> list[_Stack]:
    """The stacks of this name: text before vision and audio, layers before other rows (mergers beside a tower's blocks)."""
    fits = [s for s in found if label in s.labels]
    if len(fits) > 1:
        fits = [s for s in fits if not s.labels & {"vision", "audio"}] or fits
        fits = [s for s in fits if s.blocks[0].marked] or fits
    return fits


def _descend(node: _Node, path: str) -> _Node | None:
    for part in path.split("."):
        full = f"{node.name}.{part}" if node.name else part
        kid = next((kid for kid in node.kids if kid.name == full), None)
        if kid is None:
            return None
        node = kid
    return node


def _display(found: Sequence[_Stack]) -> list[str]:
    """`name=path` for every stack, with a name that only this stack has."""
    uses = Counter(label for s in found for label in s.labels if s in _labelled(label, found))
    paired = uses["encoder"] and uses["decoder"]
    names = ("encoder", "decoder", "text", "vision", "audio") if paired else ("text", "vision", "audio", "encoder")
    order = [label for label in names if uses[label] == 1]
    texts = []
    for s in found:
        own = next((label for label in order if s in _labelled(label, found)), None)
        texts.append(f"{own}={s.path}" if own else s.path)
    return texts


def _kinds(stack: _Stack) -> str:
    return "/".join(dict.fromkeys(type(block.module).__name__ for block in stack.blocks))


def _layers(blocks: tuple[_Node, ...], config: Any) -> tuple[Layer, ...]:
    seen: set[int] = set()
    counted: set[int] = set()
    layers = []
    for index, block in enumerate(blocks):
        skip = len(block.name) + 1
        targets = []
        nodes = list(_walk(block))
        held = [matrix for node in nodes for matrix in node.matrices]
        modules = {node.name: node.module for node in nodes}
        moe = any("experts" in matrix.name for matrix in held)
        for matrix in held:
            if matrix.key not in seen:
                seen.add(matrix.key)
                role = role_of(matrix.name[skip:], matrix.kind == "experts", moe)
                above = [modules[n] for n in upwards(matrix.name)[1:] if n in modules]
                heads = heads_of(matrix, above, config) if role == AFTER_ATTENTION else 0
                targets.append(Target(matrix.name, index, role, matrix.kind, matrix.shape, prod(matrix.shape), heads))
        kind = type(block.module).__name__
        layers.append(Layer(index, block.name, kind, tuple(targets), _count(block, counted)))
    return tuple(layers)


def _count(node: _Node, counted: set[int]) -> int:
    """Parameters below a node that are not in `counted` yet; a packed weight counts the elements it stands for."""
    sizes = {matrix.key: prod(matrix.shape) for matrix in node.matrices}
    owned = {id(p): prod(stored_shape(p)) for p in node.module._parameters.values() if p is not None}
    if node.kids:  # a parametrized linear keeps its weight in a child
        sizes = {key: size for key, size in sizes.items() if key in owned}
    new = {key: size for key, size in {**owned, **sizes}.items() if key not in counted}
    counted.update(new)
    return sum(new.values()) + sum(_count(kid, counted) for kid in node.kids)


def _refuse_shared(layers: tuple[Layer, ...], chosen: _Stack, found: Sequence[_Stack], base: nn.Module) -> None:
    if len(layers) > 1 and sum(bool(layer.targets) for layer in layers) < 2:
        raise LayerMapError(_shared(len(layers), 1, chosen.path))
    claimed = getattr(text_config(base), "num_hidden_layers", None)
    groups = getattr(text_config(base), "num_hidden_groups", 1)
    if isinstance(claimed, int) and len(layers) < claimed and len(layers) == groups and len(found) == 1:
        raise LayerMapError(_shared(claimed, len(layers), chosen.path))


def _shared(claimed: int, blocks: int, path: str) -> str:
    sets = "one set" if blocks == 1 else f"{blocks} sets"
    return (
        f"the {claimed} layers of this model share {sets} of weights ({path or 'the model itself'}), so single layers "
        'cannot be chosen; select="all" trains them together.'
    )


def _nothing_found(root: _Node, base: nn.Module) -> str:
    containers = [n for n in _walk(root) if _container(n.module) and n.kids]
    claimed = getattr(text_config(base), "num_hidden_layers", None)
    single = next((n for n in containers if len(_blocks(n)) == 1), None)
    if single is not None and isinstance(claimed, int) and claimed > 1:
        return _shared(claimed, 1, single.name)
    seen = "; ".join(
        f"{n.name or 'the model itself'} ({type(n.module).__name__} of "
        f"{', '.join(dict.fromkeys(type(k.module).__name__ for k in n.kids))})"
        for n in containers[:8]
    )
    seen = seen or ", ".join(f"{k.name} ({type(k.module).__name__})" for k in root.kids[:8]) or "no submodules"
    return f'{type(base).__name__} has no repeated blocks to choose from, only select="all" fits it. Found: {seen}.'


def _walk(node: _Node) -> Iterator[_Node]:
    yield node
    for kid in node.kids:
        yield from _walk(kid)


def _alike(layer: Layer) -> tuple[Any, ...]:
    return (layer.kind, layer.params, *((t.role, t.kind, t.shape, t.name[len(layer.name) :]) for t in layer.targets))


def _target_lines(targets: tuple[Target, ...]) -> list[str]:
    groups: dict[str, Counter[str]] = {}
    for target in targets:
        group, _, part = target.role.rpartition(".")
        text = f"{part} {'x'.join(map(str, target.shape))}"
        groups.setdefault(group, Counter())[text] += 1
    lines = []
    for group, texts in groups.items():
        shown = ", ".join(text if n == 1 else f"{text} ({n} times)" for text, n in texts.items())
        lines.append(f"{group}: {shown}" if group else shown)
    return lines or ["-"]

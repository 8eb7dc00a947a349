"""Linears of a live model stored in fewer bits, in place and one at a time, and the table of what was asked and what came of it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from layerpeft.errors import Problems, QuantizationError
from layerpeft.integrations.engines.known import is_cut
from layerpeft.integrations.files import as_written
from layerpeft.integrations.peft import watch_wrapping
from layerpeft.model import precisions
from layerpeft.model.home import home_of, known_of
from layerpeft.model.layers import base_of, find_module
from layerpeft.model.precisions import KEPT, PLAIN, Storage
from layerpeft.quantization.picture import write_bits
from layerpeft.saving.manifest import BITS
from layerpeft.selection.typecheck import read_fields
from layerpeft.text import grid, ranges, size_text

FORMAT = 1
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
MARKS = {"nf4": "is_loaded_in_4bit", "fp4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}  # transformers' own
ROUNDING = 4096  # bytes by which a library's own padding may exceed the formula before that is a mismatch


@dataclass(frozen=True)
class Stored:
    """One linear: the precision asked for, the one its tensors have, its weights, and their bytes now and before."""

    name: str
    asked: str
    got: str
    weights: int
    bytes: int
    before: int


@dataclass(frozen=True)
class Quantized:
    """What is stored how: full name -> precision of every linear that was looked at, and why others were left alone.
    `choice`: what was asked for, as plain data; `why`: the same in a sentence."""

    modules: Mapping[str, str]
    storage: Storage = PLAIN
    rows: tuple[Stored, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    choice: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = ""  # of what is kept, such as "bfloat16"

    @property
    def assignment(self) -> dict[str, str]:
        """Those that are stored in fewer bits."""
        return {n: p for n, p in self.modules.items() if p != KEPT}

    @property
    def has_budget(self) -> bool:
        """Whether bits were spent from a budget."""
        return not {"mean_bits", "budget"}.isdisjoint(self.choice)

    @property
    def mean_bits(self) -> float:
        """Bits per weight that the linears take, scales included."""
        return 8 * sum(r.bytes for r in self.rows) / max(1, sum(r.weights for r in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"format": FORMAT, **asdict(self), "rows": [vars(r) for r in self.rows]}

    @property
    def precisions(self) -> dict[str, str]:
        """Full name -> precision of the linears that are stored in fewer bits, and how they are packed."""
        found = self.assignment
        return {**found, "(packing)": str(self.storage)} if found else {}

    def save(self, folder: str, found: Any) -> dict[str, Any]:
        """Its part in the record of an adapter: the picture of the bits, and all of it as plain data."""
        write_bits(self, os.path.join(folder, BITS))
        return {"quant": self.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quantized:
        """Raises: QuantizationError for another format, or a precision that this version does not know."""
        if data.get("format") != FORMAT or not isinstance(data.get("modules"), Mapping):
            raise QuantizationError(f"not a record of precisions of format {FORMAT} (found {data.get('format')!r})")
        strange = sorted({str(p) for p in data["modules"].values() if p not in (*precisions.PRECISIONS,)})
        if strange:
            raise QuantizationError(
                f"unknown precisions {', '.join(strange)}; allowed: {', '.join(precisions.PRECISIONS)}"
            )
        given = read_fields(cls, data, QuantizationError, "a record of precisions")
        with as_written("this is no record of precisions", QuantizationError):
            rows = tuple(Stored(**r) for r in given.pop("rows", ()))
            storage = Storage(**given.pop("storage", {}))
        return cls(given.pop("modules"), storage, rows, **given)

    def table(self) -> str:
        """Asked and got by kind of module, measured bytes, and what was left alone."""
        return "\n".join(_lines(self))

    __str__ = table


def apply(
    model: nn.Module,
    modules: Mapping[str, str],
    storage: Storage = PLAIN,
    *,
    left: Mapping[str, str] | None = None,
    why: str = "",
    choice: Mapping[str, Any] | None = None,
    marked: bool = True,
    progress: bool = True,
) -> Quantized:
    """Stores every named linear in its precision, in place, one after the other; the peak is the model plus one linear.

    `modules`: full name -> precision, "16bit" for those that have to stay as they are; names that are quantized so already are
    taken as they are. `marked`: see `mark_kinds`. Nothing is changed before everything was checked.
    Raises: QuantizationError for linears that cannot be stored so, or are not when all is done.
    """
    base = base_of(model)
    found = _checked(base, modules, storage)
    kept_as = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
    todo = [n for n in found if modules[n] != KEPT and precisions.precision_of(found[n]) == KEPT]
    others = {n: found[n] for n in found if n not in set(todo)}
    shapes = {n: (module.out_features, module.in_features) for n, module in found.items()}
    itemsize = {n: module.weight.element_size() for n, module in found.items() if n in set(todo)}
    found.clear()  # or all 16-bit weights would live until the end
    for name in tqdm(todo, desc="quantizing", unit="linear", disable=not progress or len(todo) < 100):
        _replace(base, name, modules[name], storage)
    rows = []
    for name in modules:
        module = others.get(name) or find_module(base, name)
        out, inner = shapes[name]
        size, before = precisions.measured_bytes(module), out * inner * itemsize.get(name, kept_as.itemsize)
        rows.append(Stored(name, modules[name], precisions.precision_of(module), out * inner, size, before))
    check(rows, storage, {n: (*shapes[n], itemsize.get(n, 0)) for n in shapes})
    mark_kinds(base, modules.values(), marked)
    kept = str(kept_as).removeprefix("torch.")
    return Quantized(dict(modules), storage, tuple(rows), dict(left or {}), why, dict(choice or {}), kept)


def check(rows: Iterable[Stored], storage: Storage, shapes: Mapping[str, tuple[int, int, int]]) -> None:
    """Asked against got, bytes included. Raises: QuantizationError naming every difference."""
    problems = Problems("what is stored is not what was asked for")
    for row in rows:
        if row.got != row.asked:
            problems.add(f"{row.name}: asked {row.asked}, got {row.got}")
            continue
        out, inner, itemsize = shapes[row.name]
        if row.asked == KEPT or not itemsize:
            continue
        most = precisions.stored_bytes(row.asked, out, inner, storage, itemsize)
        if row.bytes > most + ROUNDING:
            problems.add(f"{row.name}: {row.asked} takes {row.bytes:,} bytes, expected {most:,}")
    problems.raise_if_any(QuantizationError)


class Mark:
    """Says on a model that it is packed, as `transformers` does with True, until an adapter is on it.

    Trainers take the mark for QLoRA, and cast all that trains to bfloat16: factors, norms, the weights themselves. Some ask before
    they wrap and act on the answer afterwards, so it is the answer itself that changes.
    """

    on = True

    def __bool__(self) -> bool:
        return self.on


def mark_kinds(base: nn.Module, kinds: Iterable[str], marked: bool = True) -> None:
    """Lets PEFT know, whenever it wraps, which classes know these kinds; and anyone until then (`marked`).

    What a loader of others has marked stays so.
    """
    found = frozenset(name for kind in kinds if (name := MARKS.get(kind)) and vars(base).get(name) is not True)
    home_of(base).marks |= found
    if marked:
        vars(base).update({name: Mark() for name in found})
    if found:
        watch_wrapping(_marked)


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    base = base_of(model)
    marks = known_of(base).marks
    vars(base).update({name: Mark() for name in marks if name not in vars(base)})
    try:
        yield
    finally:
        for mark in [vars(base).pop(name) for name in marks if isinstance(vars(base).get(name), Mark)]:
            mark.on = False


def _checked(base: nn.Module, modules: Mapping[str, str], storage: Storage) -> dict[str, Any]:
    """The modules by name. Raises: QuantizationError with everything that stands in the way."""
    problems = Problems("quantization")
    missing = precisions.missing_packages(set(modules.values()))
    if missing:
        problems.add(f"needs {' and '.join(missing)}: pip install 'layerpeft[quant]'")
    found: dict[str, Any] = {}
    wrong: dict[str, list[str]] = {}
    for name, asked in modules.items():
        module = found[name] = find_module(base, name)
        why = _why_not(base, name, module, asked, precisions.precision_of(module), storage)
        if why:
            wrong.setdefault(why, []).append(name)
    for why, names in wrong.items():
        problems.add(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}")
    problems.raise_if_any(QuantizationError)
    return found


def _why_not(base: nn.Module, name: str, module: Any, asked: str, there: str, storage: Storage) -> str | None:
    if not precisions.reads(asked, module.in_features, next(module.parameters()).device):
        return (
            f"bitsandbytes reads 4-bit matrices wrongly on a CPU whose rows ({module.in_features}) are no multiple of 64; take "
            "hqq4 or int8, or another device"
        )
    if asked == there:
        otherwise = precisions.packed_otherwise(module, storage) if there != KEPT else None
        return f"is packed already {otherwise}" if otherwise else None
    if there != KEPT:
        wish = "to be kept in 16 bit" if asked == KEPT else f"asked for as {asked}"
        return f"is {there} already, and {wish}; load the model in 16 bit"
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}; only plain linears are quantized"
    above, _, leaf = name.rpartition(".")
    if find_module(base, above)._modules.get(leaf) is not module:
        return "is wrapped already (by an adapter); quantize before get_peft_model"
    weight = module.weight
    if weight.device.type == "meta":
        return "has no weight here (offloaded, or not loaded yet)"
    if is_cut(weight):
        return "is cut up over processes (fully_shard); quantize before that"
    out, inner = weight.shape
    if not precisions.fits(asked, out, inner, storage):
        return f"{asked} packs groups of {storage.group_size} weights, which {out} x {inner} do not fill; take another group_size"
    return None


def _replace(base: nn.Module, name: str, precision: str, storage: Storage) -> None:
    above, _, leaf = name.rpartition(".")
    parent: Any = find_module(base, above)
    old = parent._modules[leaf]
    with torch.no_grad():
        parent._modules[leaf] = precisions.quantized_linear(old, precision, storage)


def _lines(found: Quantized) -> list[str]:
    groups: dict[tuple[str, str, str, tuple[str, ...]], list[Stored]] = {}
    leaves: dict[tuple[str, str, str], list[Stored]] = {}
    for row in found.rows:
        leaves.setdefault((_block(row.name), row.asked, row.got), []).append(row)
    for (block, asked, got), rows in leaves.items():
        key = (_stack(block), asked, got, tuple(dict.fromkeys(r.name.rpartition(".")[2] for r in rows)))
        groups.setdefault(key, []).extend(rows)
    body = [("layers", "linears", "asked", "got", "bits", "bytes")]
    several = len({stack for stack, *_ in groups if stack}) > 1
    for (stack, asked, got, ends), rows in groups.items():
        where = ranges({int(m[0]) for r in rows if (m := _NUMBER.findall(r.name))}) or _few([r.name for r in rows])
        where = f"{stack} {where}" if several and stack else where
        size, weights = sum(r.bytes for r in rows), sum(r.weights for r in rows)
        body.append((where, ", ".join(ends), asked, got, f"{8 * size / weights:.2f}", size_text(size)))
    if found.rows:
        size, before = sum(r.bytes for r in found.rows), sum(r.before for r in found.rows)
        body.append(("all", "", "", "", f"{found.mean_bits:.2f}", f"{size_text(size)} of {size_text(before)}"))
    reasons = {why: [n for n, own in found.left.items() if own == why] for why in dict.fromkeys(found.left.values())}
    return grid(body, "<") + [f"left alone, {why}: {_few(names)}" for why, names in reasons.items()]


def _block(name: str) -> str:
    """The name up to the layer's number, which stands for the layer."""
    match = _NUMBER.search(name)
    return name[: match.end()] if match else name


def _stack(block: str) -> str:
    """The name of what the layers of a block's kind are in; empty for a linear outside of layers."""
    match = _NUMBER.search(f"{block}.")
    return block[: match.start()].rstrip(".") if match else ""


def _few(names: list[str]) -> str:
    """Names, those of many layers by their ends."""
    if len(names) <= 4:
        return ", ".join(names)
    ends = Counter(n.rpartition(".")[2] for n in names)
    return ", ".join(f"{end} ({count} times)" for end, count in ends.items())

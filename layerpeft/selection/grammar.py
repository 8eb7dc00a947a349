"""The layer grammar, and how many layers `keep` means."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from layerpeft.errors import Problem, Problems, SelectionError
from layerpeft.model.heads import place_of
from layerpeft.model.layers import LayerMap


def layer_numbers(value: Any, count: int, key: str = "layers", unit: str = "layer") -> tuple[int, ...]:
    """The layers (or smaller units) that a grammar (the value of `key`) names in a stack of `count`, ascending.

    `3`, `-1`, `[3, 7]`, `"8-15"`, `"first:2"`, `"last:25%"`, `"first:10+last:2"`, `"stride:4"`, `"all"`.
    Raises: SelectionError for what is out of range, matches nothing, or cannot be read.
    """
    problems = Problems(f"{unit}s of a stack of {count}")
    found: set[int] = set()
    for part in _parts(value):
        found.update(_part(part, count, problems, unit))
    problems.raise_if_any(SelectionError)
    if not found:
        raise SelectionError(Problem((key,), f"{key}: {value!r} names no {unit}"))
    return tuple(sorted(found))


def how_many(keep: Any, candidates: int, unit: str = "layer") -> int | None:
    """Number of layers that `keep` means among `candidates`; None for "auto" and for a budget. Shares are rounded half up, at
    least 1.

    Raises: SelectionError when more are asked for than there are.
    """
    if keep is None or keep == "auto" or isinstance(keep, Mapping):
        return None
    if keep == "all":
        return candidates
    share = _share(keep)
    number = max(1, math.floor(share * candidates + 0.5)) if share is not None else int(keep)
    if number > candidates:
        text = f"keep: {keep} {unit}s are asked for, and there are {candidates} to choose from"
        raise SelectionError(Problem(("keep",), text))
    return number


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [p.strip() for p in re.split(r"[+,]", value)]
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, Sequence):
        return [p for item in value for p in _parts(item)]
    return [value]


def _part(part: Any, count: int, problems: Problems, unit: str = "layer") -> range:
    if isinstance(part, int) and not isinstance(part, bool):
        return _index(part, part, count, problems, unit)
    text = str(part)
    if text == "all":
        return range(count)
    if re.fullmatch(r"-?\d{1,9}", text):
        return _index(int(text), part, count, problems, unit)
    if between := re.fullmatch(r"(\d{1,9})-(\d{1,9})", text):
        low, high = int(between[1]), int(between[2])
        if low > high:
            problems.add(f"{part!r} runs backwards; write {high}-{low}")
        elif high >= count:
            problems.add(f"{part!r} is out of range; {unit}s are 0 to {count - 1}")
        return range(low, min(high + 1, count))
    if ends := re.fullmatch(r"(first|last):(\d{1,9}(?:\.\d{1,9})?)(%?)", text):
        number = _end_count(ends[2], ends[3], count, part, problems, unit)
        return range(number) if ends[1] == "first" else range(count - number, count)
    if (stride := re.fullmatch(r"stride:(\d{1,9})", text)) and int(stride[1]) >= 1:
        return range(0, count, int(stride[1]))
    problems.add(
        f"cannot read {part!r}; write 3, -1, [3, 7], '8-15', 'first:2', 'last:25%', 'first:10+last:2', 'stride:4', 'all'"
    )
    return range(0)


def _index(index: int, part: Any, count: int, problems: Problems, unit: str) -> range:
    if -count <= index < count:
        return range(index % count, index % count + 1)
    problems.add(f"{part} is out of range; {unit}s are 0 to {count - 1} (or -1 to -{count})")
    return range(0)


def _end_count(number: str, percent: str, count: int, part: Any, problems: Problems, unit: str) -> int:
    value = float(number)
    if percent and not 0 < value <= 100 or not percent and (value != int(value) or value < 1):
        problems.add(f"{part!r} takes a whole number from 1, or a share above 0 % up to 100 %")
        return 0
    found = max(1, math.floor(count * value / 100 + 0.5)) if percent else int(value)
    if found > count:
        problems.add(f"{part!r} asks for {found} {unit}s of {count}")
        return 0
    return found


def _share(keep: Any) -> float | None:
    """The share that `keep` means, or None for a count."""
    if isinstance(keep, str):
        return float(keep.rstrip("%")) / 100
    return keep if isinstance(keep, float) and keep < 1 else None


def checked_keep(keep: Any, problems: Problems) -> Any:
    """`keep` as it is meant; None, and a problem, where it means nothing."""
    offer = (
        "a whole number from 1, a share between 0 and 1 (0.25, '25%'), a budget ({time: 50%}, {memory: 8GB}), or 'auto'"
    )
    if keep in (None, "auto", "all"):
        return keep
    if isinstance(keep, str) and re.fullmatch(r"\d{1,9}", keep):
        keep = int(keep)
    good, wrong = False, f"is not {offer}"
    if isinstance(keep, str):
        good = re.fullmatch(r"\d{1,9}(\.\d{1,9})?%", keep) is not None and 0 < float(keep[:-1]) < 100
        wrong += "; for everything write select: all"
    elif isinstance(keep, float):
        good = 0 < keep < 1
        wrong = "has two meanings; write 1 for one layer, or select: all for every layer" if keep == 1 else wrong
    elif isinstance(keep, int) and not isinstance(keep, bool):
        good = keep >= 1
    if not good:
        problems.add(f"keep: {keep!r} {wrong}", "keep")
    return keep if good else None


def heads_placed(value: Any, units: LayerMap, key: str = "layers") -> Any:
    """A grammar of heads, with the places of those that it names by `[layer, head]`; layers as in the grammar, -1 is the last.

    Raises: SelectionError for what the model does not have.
    """
    if not _is_pairs(value):
        return value
    problems, layers = Problems(f"{key}: heads by [layer, head]"), len(units.whole)
    there = {(u.block, place_of(u.name)[1]): u.index for u in units.layers}  # type: ignore[index]
    found = []
    for layer, head in value:
        place = (layer % layers if -layers <= layer < layers else layer, head)
        if place in there:
            found.append(there[place])
        else:
            held = [h for i, h in there if i == place[0]]
            why = f"layer {layer} has heads 0 to {max(held)}" if held else f"layer {layer} has no heads to choose from"
            problems.add(f"[{layer}, {head}]: {why}", key)
    problems.raise_if_any(SelectionError)
    return sorted(found)


def _is_pairs(value: Any) -> bool:
    """Whether these are pairs of whole numbers."""
    rows = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    pairs = [r for r in rows if isinstance(r, Sequence) and not isinstance(r, str) and len(r) == 2]
    return bool(rows) and len(pairs) == len(rows) and all(type(n) is int for pair in pairs for n in pair)


def check_grammar(name: str, value: Any, problems: Problems, *, pairs: bool = False) -> None:
    """Adds what cannot be read as layers, whatever the depth of the model; `pairs`: it may be heads by `[layer, head]`."""
    if pairs and _is_pairs(value):
        return
    trial = Problems("")
    if pairs and any(isinstance(row, list | tuple) for row in (value if isinstance(value, list | tuple) else ())):
        trial.add(f"cannot read {value!r} as heads; write [[layer, head], …], or their places as numbers")
        value = []
    for part in _parts(value):
        if not isinstance(part, str | int) or isinstance(part, bool):
            trial.add(f"cannot read {part!r} as a layer")
        else:
            _part(part, 10**9, trial)  # only the spelling can be wrong in so deep a stack
    for item in trial.items:
        problems.add(f"{name}: {item}", name)

"""Which cells run by default: those that show something. What repeats it is `slow`: `pytest -m slow`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cells: Iterable[Any], keep: Collection[Any] | int) -> list[Any]:
    """The cells of one parameter, slow but for those in `keep`, or the first so many."""
    listed = list(cells)
    kept = listed[:keep] if isinstance(keep, int) else keep
    assert isinstance(keep, int) or all(cell in listed for cell in keep), keep
    return [cell if cell in kept else repeated(cell) for cell in listed]


def repeated(cell: Any) -> Any:
    """One cell that is slow; a tuple holds a value for each parameter."""
    return pytest.param(*(cell if isinstance(cell, tuple) else (cell,)), marks=pytest.mark.slow)


def wanted(request: pytest.FixtureRequest, *parameters: str) -> list[Any]:
    """The values of a parameter (tuples of several) for which tests of this file are to run: a shared set-up makes no others."""
    items = [i for i in request.session.items if i.path == request.node.path and hasattr(i, "callspec")]
    given = [i.callspec.params for i in items if set(parameters) <= set(i.callspec.params)]  # type: ignore[attr-defined]
    values = [tuple(g[p] for p in parameters) if parameters[1:] else g[parameters[0]] for g in given]
    return [value for n, value in enumerate(values) if value not in values[:n]]


def mark_repetitions(items: Iterable[pytest.Item]) -> None:
    """Of tests marked `matrix`, those stay that show each value of every parameter once, or each combination it names.

    Of tests marked `spread(n)`, which say the same of one thing after another, every n-th stays, beginning elsewhere in each.
    """
    items = list(items)
    cells = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("matrix")
        if marker is not None and hasattr(item, "callspec") and "slow" not in item.keywords:
            crossed = [tuple(names.split(",")) for names in marker.args]
            values = {name: id(value) for name, value in item.callspec.params.items()}
            alone = [(name,) for name in values if not any(name in names for names in crossed)]
            shows = {(names, tuple(values[n] for n in names)) for names in [*crossed, *alone]}
            cells[item.nodeid.partition("[")[0]].append((item, shows))
    for same in cells.values():
        wanted = set().union(*(shows for _, shows in same))
        while wanted:
            item, shows = max(same, key=lambda cell: len(cell[1] & wanted))
            wanted -= shows
            same.remove((item, shows))
        for item, _ in same:
            item.add_marker(pytest.mark.slow)
    _spread(items)


def _spread(items: list[pytest.Item]) -> None:
    cells = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("spread")
        if marker is not None and "slow" not in item.keywords:
            cells[item.path, item.nodeid.partition("[")[0], marker.args[0]].append(item)
    for number, ((_, _, every), same) in enumerate(cells.items()):
        for place, item in enumerate(same):
            if (place - number) % every:
                item.add_marker(pytest.mark.slow)

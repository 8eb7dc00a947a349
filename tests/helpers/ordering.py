"""In which order several workers take tests: what shares a set-up first, so that no other worker takes half of it."""

from __future__ import annotations

from collections import defaultdict

import pytest


def for_workers(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Each worker begins with an equal run of the tests, and takes from the end of the other's when its own are done."""
    files: dict[object, list[pytest.Item]] = defaultdict(list)
    for item in items:
        files[item.path].append(item)
    sharing = [tests for tests in files.values() if any(map(_shares, tests))]
    alone = [item for tests in files.values() if not any(map(_shares, tests)) for item in tests]
    ordered: list[pytest.Item] = []
    for number in range(workers):
        room = (len(items) - len(ordered)) // (workers - number)
        own = [item for tests in sharing[number::workers] for item in tests]
        room = max(0, room - len(own))
        ordered += own + alone[:room]
        del alone[:room]
    return ordered + alone


def _shares(item: pytest.Item) -> bool:
    known = getattr(item, "_fixtureinfo", None)
    return known is not None and any(defs[-1].scope == "module" for defs in known.name2fixturedefs.values())

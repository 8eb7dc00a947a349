"""What ties followers to the life of their model."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

FOLLOWERS: weakref.WeakSet[Any] = weakref.WeakSet()


class Tether:
    """Ties followers to the life of their model, and hears of adapters that are loaded into it.

    Pickles of the model do not take it along; a deep copy of the model gets followers of its own.
    """

    def __init__(self, followers: list[Any] | None = None) -> None:
        self.followers = followers or []

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for follower in self.followers:
            follower.on_load(state, prefix)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tether:
        twin = memo[id(self)] = Tether()
        twin.followers += [t for f in self.followers if (t := f.twin(memo)) is not None]
        FOLLOWERS.update(twin.followers)
        return twin

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Tether, ()

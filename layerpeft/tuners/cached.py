"""What is kept of rows below the lowest layer that trains: its fields in a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from layerpeft.errors import LayerpeftError, Problems
from layerpeft.model.layers import LayerMap
from layerpeft.selection.typecheck import checked
from layerpeft.training.prefix.below import Below, why_unfixed
from layerpeft.training.prefix.cache import CHANGES, PrefixCache
from layerpeft.training.prefix.open import Opener
from layerpeft.training.prefix.setting import Setting, parse_lower
from layerpeft.training.prefix.source import source_of
from layerpeft.training.record import Record

CACHED = ("prefix_cache", "lower_dropout")


@dataclass
class Cached:
    """Fields of a config that chooses. `prefix_cache`: a `Setting`, or what one is made of; `lower_dropout`: on or off."""

    prefix_cache: Any = checked(
        None,
        "Keep what enters the lowest trained layer: memory, disk, 20GB, a folder. Default: computed at every pass.",
    )
    lower_dropout: Any = checked(
        None, "off: no dropout below the lowest trained layer, so that prefix_cache can keep states. Default: on."
    )

    @property
    def caching(self) -> Setting | None:
        """`prefix_cache`, parsed. Raises: ConfigError."""
        return self._parsed("prefix_cache", Setting.parse) if self.prefix_cache is not None else None  # type: ignore[attr-defined]

    @property
    def drops_below(self) -> bool:
        """Whether what lies below the cut trains with its dropout. Raises: ConfigError."""
        return parse_lower(self.lower_dropout)

    def share_whole(self, base: nn.Module, layers: LayerMap) -> float:
        """Of passes over rows, the share that goes through what lies below the lowest trained layer: of E epochs the first, of
        unknown many none. Raises: LayerpeftError."""
        blocks = Below(layers.names, len(layers) - 1)
        if self.caching is None or why_unfixed(base, blocks, self.drops_below) is not None:
            return 1.0
        epochs = self.choosing.epochs  # type: ignore[attr-defined]
        return 0.0 if epochs is None else min(1.0, 1 / epochs)

    def cached(self) -> dict[str, Any]:
        """The fields as a recipe writes them; nothing where nothing is kept."""
        found = {} if self.caching is None else {"prefix_cache": self.caching.plain()}
        return found if self.drops_below else found | {"lower_dropout": "off"}


def check_cached(config: Any, problems: Problems) -> None:
    """Adds what is wrong with the fields."""
    for ask in (Cached.cached, lambda asked: asked.drops_below):
        try:
            ask(config)
        except LayerpeftError as error:
            problems.absorb(error)
    if config.lower_dropout is not None and config.prefix_cache is None:
        problems.add("lower_dropout is for prefix_cache, and that is not set", "lower_dropout")


def keep_states(config: Cached, record: Record, model: nn.Module, stack: str) -> None:
    """What is below the lowest layer that trains is computed once for a row, from now on."""
    setting = config.caching
    if setting is None:
        return
    source = source_of(model)
    opener, lasting = Opener(setting, source), setting.where != "memory"
    record.prefix = PrefixCache(opener, stack, config.drops_below, lasting, source)
    if record.schedule is not None:
        record.prefix.off(CHANGES)
    record.prefix.install(model)

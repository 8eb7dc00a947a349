"""Where things are kept that can be made again."""

import os
from pathlib import Path


def caches(name: str) -> Path:
    """A folder in LAYERPEFT_CACHE, or in `layerpeft` of the user's folder of caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LAYERPEFT_CACHE") or Path(home, "layerpeft"), name)

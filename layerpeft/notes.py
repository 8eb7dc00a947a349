"""What layerpeft tells a person while it works: to standard error, from the first process, without tearing progress bars."""

from __future__ import annotations

import logging
import os
import sys

from tqdm.auto import tqdm

logger = logging.getLogger("layerpeft")


def note(message: str) -> None:
    """Prints one line, and logs it at INFO. Silent in all but the first process, and with LAYERPEFT_QUIET=1."""
    logger.info(message)
    if os.environ.get("RANK", "0") == "0" and os.environ.get("LAYERPEFT_QUIET") != "1":
        tqdm.write(f"[layerpeft] {message}", file=sys.stderr)

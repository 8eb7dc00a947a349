"""Without a network, the hub is asked once and not for a minute: what is cached is used, and what is not is said at once."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlparse
from urllib.request import getproxies

PATIENCE = 3.0  # seconds


@contextmanager
def settled(needed: bool = True) -> Iterator[None]:
    """Inside, huggingface_hub does not tell of its retries, and does not try at all where the hub cannot be reached."""
    if not needed:
        yield
        return
    from huggingface_hub import constants

    talker = logging.getLogger("huggingface_hub.utils._http")
    level, offline, variable = talker.level, constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    datasets = sys.modules.get("datasets.config")
    theirs = getattr(datasets, "HF_HUB_OFFLINE", None)
    talker.setLevel(logging.ERROR)
    try:
        if not offline and not reachable(constants.ENDPOINT):
            constants.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = "1"
            if datasets is not None:
                datasets.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        talker.setLevel(level)
        constants.HF_HUB_OFFLINE = offline
        if variable is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        if datasets is not None:
            datasets.HF_HUB_OFFLINE = theirs  # type: ignore[attr-defined]


@cache
def reachable(endpoint: str) -> bool:
    """Whether a connection to the hub can be opened; taken for granted behind a proxy."""
    if getproxies():
        return True
    address = urlparse(endpoint)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), PATIENCE).close()
    except OSError:
        return False
    return True

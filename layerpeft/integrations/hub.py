"""Without a network, the hub is asked once and not for a minute: what is cached is used, and what is not is said at once."""

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import yaml

PATIENCE = 3.0  # seconds
MOST = 2**16  # characters of a card in which its licence is looked for


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


def license_of(place: str, revision: str | None = None, kind: str = "model") -> str | None:
    """What the card of a model or of a data set (`kind`: "dataset") says its licence is, in a folder or the hub's cache: nothing is
    fetched. None where no card is there, or it does not say."""
    from huggingface_hub import try_to_load_from_cache

    path: Any = Path(place) / "README.md"
    if not Path(place).is_dir():
        try:
            path = try_to_load_from_cache(place, "README.md", revision=revision, repo_type=kind)
        except ValueError:  # no address of the hub's
            return None
    try:
        text = Path(path).read_text(encoding="utf-8")[:MOST] if isinstance(path, str | Path) else ""
        head = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    said = head.get("license") if isinstance(head, dict) else None
    return said if isinstance(said, str) and re.fullmatch(r"[\w.+-]{1,64}", said) else None


def push(trainer: Any, folder: Path) -> None:
    """Sends a folder as it is to the repository of a trainer, whose own `push_to_hub` would write another card before."""
    from huggingface_hub import HfApi

    trainer._finish_current_push()
    args, left = trainer.args, ["_*", "checkpoint-*", ".layerpeft_files.json"]
    told = {"commit_message": "End of training", "revision": args.hub_revision, "ignore_patterns": left}
    HfApi(token=args.hub_token).upload_folder(repo_id=trainer.hub_model_id, folder_path=folder, **told)

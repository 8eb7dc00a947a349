"""What libraries do again and again, done once: in tests that is a good part of their time."""

from __future__ import annotations

import functools
import logging
import os
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import imports, memory
from datasets import arrow_dataset, fingerprint
from jinja2.environment import Environment

COMPILE: Any = Environment.compile


def make_brisk(patch: pytest.MonkeyPatch) -> None:
    """Accelerate has the collector look at all there is whenever a trainer begins and ends, and asks for versions ever again;
    each model card compiles its template anew; torch's compiler logs all it does for pytest to keep; no test pulls a plug, so
    nothing has to reach the disk; rows that are mapped are known by a hash of the code that maps them; a seed for accelerators
    that are not there is kept for later, each with the stack it came from."""
    patch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
    patch.setattr(Environment, "compile", _compile)
    patch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    patch.setattr(os, "fsync", lambda _: None)
    patch.setattr(imports, "_is_package_available", functools.cache(imports._is_package_available))
    if not torch.accelerator.is_available():
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            patch.setattr(kind, "manual_seed_all", lambda seed: None)
    for module in (fingerprint, arrow_dataset):
        patch.setattr(module, "update_fingerprint", lambda *_: fingerprint.generate_random_fingerprint())
    patch.setattr(metadata, "distribution", functools.cache(metadata.distribution))
    patch.setattr(metadata.Distribution, "metadata", property(functools.cache(metadata.Distribution.metadata.fget)))


def _compile(self: Environment, source: Any, *args: Any, **kwargs: Any) -> Any:
    known = self.shared and isinstance(source, str) and not args and not kwargs
    return _kept(self, source) if known else COMPILE(self, source, *args, **kwargs)


@functools.cache
def _kept(environment: Environment, source: str) -> Any:
    return COMPILE(environment, source)

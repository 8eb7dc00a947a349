"""Where a result comes from: commit, versions, machine. Nothing that names a person, a host or a path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock

PACKAGES = ("layerpeft", "torch", "transformers", "peft", "trl", "accelerate", "galore-torch")


def provenance(seed: int, folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """Commit, whether the checkout differs from it, versions, machine, threads, which clock was read, and seed."""
    changed = _git("status", "--porcelain", "--untracked-files=no", folder=folder)
    return {
        "commit": _git("rev-parse", "HEAD", folder=folder),
        "uncommitted_changes": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "clock": clock.kind(),
        "seed": seed,
    }


def machine() -> dict[str, Any]:
    """Processor, number of cores, memory, accelerator."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": accelerator_name(),
    }


def accelerator_name() -> str | None:
    """The name of the first accelerator, or None."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return None
    module = torch.get_device_module(found.type)
    return str(module.get_device_name(0)) if hasattr(module, "get_device_name") else found.type


def _git(*words: str, folder: Path) -> str | None:
    try:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None

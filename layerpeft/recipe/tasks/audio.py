"""Sounds of files as numbers, one channel, at the rate that a model hears."""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerpeft.recipe.rows import Unfit

INSTALL = "pip install soundfile"


def sound(file: Mapping[str, Any], rate: int) -> Any:
    """Samples between -1 and 1, float32, of shape (samples,), at `rate`. Raises: Unfit for what is no sound that can be read."""
    data = file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes()
    found, own = _wave(data) if data[:4] == b"RIFF" else _other(data)
    return resampled(found.mean(axis=1), own, rate)


def seconds(file: Mapping[str, Any]) -> float:
    """How long a sound is. Raises: Unfit."""
    data = file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes()
    found, own = _wave(data) if data[:4] == b"RIFF" else _other(data)
    return len(found) / own


def _wave(data: bytes) -> tuple[Any, int]:
    """Samples of shape (samples, channels) and their rate."""
    import numpy as np

    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return _other(data)  # floats, or packed in another way
    raw = raw[: len(raw) // (width * channels) * width * channels]
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        found = padded.view("<i4").reshape(-1) / 2.0**31
    else:
        found = np.frombuffer(raw, {1: np.uint8, 2: "<i2", 4: "<i4"}[width]).astype("float64")
        found = (found - 128) / 128 if width == 1 else found / 2.0 ** (8 * width - 1)
    if not len(found):
        raise Unfit("has a sound without samples")
    return found.reshape(-1, channels).astype("float32"), own


def _other(data: bytes) -> tuple[Any, int]:
    try:
        import soundfile  # type: ignore[import-not-found]
    except ImportError:
        raise Unfit(f"has a sound that is no plain WAV file; other kinds need a package ({INSTALL})") from None
    try:
        return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except Exception as error:  # of whichever kind the library likes
        raise Unfit(f"has a sound that cannot be read ({error})") from None


def resampled(found: Any, own: int, rate: int) -> Any:
    """The same sound at another rate: a sinc under a Hann window, cut off at the lower of the two rates' halves (Smith, 1984)."""
    import torch

    if own == rate:
        return found
    common = math.gcd(own, rate)
    step, parts = own // common, rate // common  # `parts` samples come of `step`
    cutoff = 0.97 * min(step, parts)
    reach = math.ceil(16 * step / cutoff)
    places = torch.arange(-reach, reach + step, dtype=torch.float64) / step
    shifts = torch.arange(parts, dtype=torch.float64)[:, None] / parts
    turns = (places[None] - shifts) * cutoff
    window = torch.cos(turns.clamp(-16, 16) * math.pi / 32) ** 2
    kernel = torch.sinc(turns) * window * cutoff / step
    samples = torch.as_tensor(found, dtype=torch.float64)
    padded = torch.nn.functional.pad(samples, (reach, reach + step))[None, None]
    made = torch.nn.functional.conv1d(padded, kernel[:, None], stride=step)[0]
    return made.T.reshape(-1)[: math.ceil(len(samples) * rate / own)].float().numpy()

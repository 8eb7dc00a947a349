"""Sounds that are made by a seed: every letter is a tone of its own, a blank is silence."""

import io
import wave
from collections.abc import Iterator
from random import Random
from typing import Any

RATE = 16_000
SECONDS = 0.08  # of a letter
LETTERS = {letter: 300.0 * 1.3**i for i, letter in enumerate("abcdefg")}
WORDS = ["bad", "bag", "bed", "bee", "cab", "cage", "dad", "deaf", "egg", "fab", "fad", "feed", "gab"]


def tunes(draw: Random) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows with the words that sound, and the sound (WAV, 16 bits, mono)."""
    while True:
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 2)))
        yield {"text": text}, wav(_tones(text, draw))


def _tones(text: str, draw: Random) -> Any:
    import numpy as np

    noise, length = np.random.default_rng(draw.randrange(2**32)), int(RATE * SECONDS)
    time, fade = np.arange(length) / RATE, np.hanning(length) ** 0.5
    tones = [fade * np.sin(2 * np.pi * LETTERS[c] * time) if c in LETTERS else 0 * time for c in text]
    sound = np.concatenate([*tones, np.zeros(length)])
    return 0.3 * sound + 0.01 * noise.standard_normal(len(sound))


def wav(sound: Any, rate: int = RATE) -> bytes:
    """A sound between -1 and 1 as a file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


MAKERS = {"tunes": tunes}

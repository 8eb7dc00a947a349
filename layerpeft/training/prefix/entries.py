"""How a state becomes bytes and back: its record of fixed size, its digest, and 8 bits with a scale for each token."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# The place in here is what a record says, so new types go to the end. A record whose type is 0 is of nothing.
DTYPES = (
    None, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
SCALED = (torch.float32, torch.float16, torch.bfloat16)
MOST_DIMS = 4
_RECORD = struct.Struct(
    "<16sQQQBBBx4I"
)  # key, offset, length, digest, type, bits, dimensions, shape; then its own check
_CHECK = struct.Struct("<I")
SIZE = _RECORD.size + _CHECK.size  # bytes of a record
# what an index needs of it
FIELDS = np.dtype([("low", "<u8"), ("high", "<u8"), ("where", "V24"), ("type", "u1"), ("rest", "V23")])


@dataclass(frozen=True)
class Form:
    """What the bytes of a state mean. `bits`: 0 for a state as it is, else 8: a float32 scale per token, then whole numbers."""

    dtype: torch.dtype
    bits: int
    shape: tuple[int, ...]

    def restored(self, data: torch.Tensor) -> torch.Tensor:
        """The state (tokens, …) from its bytes (bytes,) uint8, in the same memory where it is kept as it is."""
        if not self.bits:
            return data.view(self.dtype).view(self.shape)
        tokens = self.shape[0]
        scales, whole = data[: 4 * tokens].view(torch.float32), data[4 * tokens :].view(torch.int8)
        return (whole.view(tokens, -1) * scales[:, None]).to(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Entry:
    """What a record says: `length` bytes at `offset` of the data file, whose XXH3 (64 bits) is `digest`."""

    key: bytes
    offset: int
    length: int
    digest: int
    form: Form

    def fits(self, data: torch.Tensor) -> bool:
        """Whether these bytes (bytes,) uint8 are those that were written."""
        return len(data) == self.length and digest_of(data.numpy()) == self.digest


def packed(state: torch.Tensor, bits: int | None = None) -> tuple[torch.Tensor, Form] | None:
    """The bytes (bytes,) uint8 of a state (tokens, …) and what they mean; None for a type or shape that no record can say.

    `bits`=8: with a scale for each token, largest magnitude / 127, where the state is of floats that are all finite.
    """
    state = state.detach().contiguous()
    if state.dtype not in DTYPES or state.dim() > MOST_DIMS or max(state.shape, default=0) >= 2**32:
        return None
    if bits == 8 and state.dtype in SCALED and state.dim() > 1 and state.numel():
        flat = state.reshape(len(state), -1).float()
        top = flat.abs().amax(1)
        if bool(top.isfinite().all()):
            scales = top / 127
            whole = (flat / scales.where(scales > 0, 1)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
            data = torch.cat([scales.view(torch.uint8), whole.flatten().view(torch.uint8)])
            return data, Form(state.dtype, 8, tuple(state.shape))
    return state.reshape(-1).view(torch.uint8), Form(state.dtype, 0, tuple(state.shape))


def record_of(key: bytes, offset: int, data: torch.Tensor, form: Form) -> bytes:
    """`SIZE` bytes that say where the bytes of this row's state lie."""
    digest = digest_of(data.numpy())
    shape = (*form.shape, *[0] * (MOST_DIMS - len(form.shape)))
    said = (key, offset, len(data), digest, DTYPES.index(form.dtype), form.bits, len(form.shape), *shape)
    record = _RECORD.pack(*said)
    return record + _CHECK.pack(_check(record))


def entry_of(record: bytes) -> Entry | None:
    """What a record says; None where it is cut short or altered, or of nothing."""
    if len(record) != SIZE or _CHECK.unpack_from(record, _RECORD.size)[0] != _check(record[: _RECORD.size]):
        return None
    key, offset, length, digest, kind, bits, dims, *shape = _RECORD.unpack_from(record)
    dtype = DTYPES[kind] if kind < len(DTYPES) else None
    return None if dtype is None else Entry(key, offset, length, digest, Form(dtype, bits, tuple(shape[:dims])))


def digest_of(data: Any) -> int:
    """XXH3 of these bytes, 64 bits."""
    import xxhash  # nothing else needs it, and those who keep nothing need not load it

    return xxhash.xxh3_64_intdigest(data)


def _check(record: bytes) -> int:
    return digest_of(record) & 0xFFFFFFFF

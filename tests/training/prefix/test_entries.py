"""A state as bytes and back: to the bit in every type, within half a step of its scale in 8 bits; altered records are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerpeft.training.prefix import index as index_of
from layerpeft.training.prefix.entries import DTYPES, FIELDS, SIZE, entry_of, packed, record_of
from layerpeft.training.prefix.index import Index

KEY = bytes(range(16))
SHAPES = [(5, 8), (0, 8), (7,), (), (3, 2, 4), (2, 1, 3, 2)]


def back(state: torch.Tensor, bits: int | None = None) -> torch.Tensor:
    kept = packed(state, bits)
    assert kept is not None
    entry = entry_of(record_of(KEY, 70, *kept))
    assert entry is not None and entry.fits(kept[0])
    assert (entry.key, entry.offset, entry.length, entry.form) == (KEY, 70, len(kept[0]), kept[1])
    return entry.form.restored(kept[0].clone())


def bits_of(state: torch.Tensor) -> bytes:
    return state.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_type_and_shape_comes_back_to_the_bit():
    for dtype in DTYPES[1:]:
        for shape in SHAPES:
            raw = torch.randint(0, 256, (*shape, 8), dtype=torch.uint8)
            state = (
                (raw > 99)[..., 0] if dtype == torch.bool else raw.view(dtype)[..., 0]
            )  # NaNs of every kind among them
            found = back(state)
            assert (found.dtype, found.shape) == (state.dtype, state.shape)
            assert bits_of(found) == bits_of(state), (dtype, shape)
    turned = torch.randn(6, 4, requires_grad=True).t()
    assert torch.equal(back(turned), turned)
    assert packed(torch.zeros(1, 1, 1, 1, 1)) is None and packed(torch.zeros(2, dtype=torch.complex64)) is None


def test_eight_bits_are_within_half_a_step_and_halve_sixteen():
    for dtype, own in ((torch.float32, 0), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        state = (torch.randn(40, 96) * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
        state[3] = 0
        kept, found = packed(state, 8), back(state, 8)
        assert kept is not None and len(kept[0]) == 40 * (96 + 4)
        top = state.float().abs().amax(1, keepdim=True)
        assert found.dtype == dtype
        assert bool(((found.float() - state.float()).abs() <= top * (0.5 / 127 + own)).all())
        assert not found[3].any() and not torch.equal(found, state)
    for kept_whole in (torch.tensor([[1.0, torch.inf]]), torch.tensor([[torch.nan, 1.0]]), torch.arange(6).view(2, 3)):
        assert bits_of(back(kept_whole, 8)) == bits_of(kept_whole)


def test_a_record_of_which_any_bit_is_altered_is_none():
    kept = packed(torch.randn(3, 4))
    assert kept is not None
    record = record_of(KEY, 0, *kept)
    assert len(record) == SIZE == FIELDS.itemsize
    for bit in range(8 * SIZE):
        altered = bytearray(record)
        altered[bit // 8] ^= 1 << bit % 8
        assert entry_of(bytes(altered)) is None, bit
    assert entry_of(record[:-1]) is None and entry_of(bytes(SIZE)) is None
    for at in range(len(kept[0])):
        data = kept[0].clone()
        data[at] ^= 16
        assert not entry_of(record).fits(data)  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 600])
def test_an_index_answers_as_a_dict_and_stays_small(size, monkeypatch):
    monkeypatch.setattr(index_of, "FEW", 1000)
    draw, index, known, before = np.random.default_rng(0), Index(), {}, None
    for step in range(30 if size > 1 else 200):
        low, high = draw.integers(0, 2**64, size, np.uint64), draw.integers(0, 3, size, np.uint64)
        if before:  # again, at another place
            low[0], high[0] = before
        places = np.arange(size) + step * size
        index.add(low, high, places)
        keys = [a.tobytes() + b.tobytes() for a, b in zip(low, high)]
        known |= dict(zip(keys, places.tolist()))
        if step % 2:
            index.forget(keys[-1])
            index.forget(keys[-1])
            known.pop(keys[-1])
        before = low[-1], high[-1]
        assert len(index) == len(known)
        assert all(index.find(key) == known.get(key) for key in keys[:50])
    assert all(index.find(key) == known[key] for key in list(known)[:: max(1, size // 500)])
    assert index.find(bytes(16)) is None
    if size > 1:
        assert sum(a.nbytes for a in index._sorted) <= 16 * (len(known) + 30)
        assert len(index._newest) <= max(1000, len(known) // 8)

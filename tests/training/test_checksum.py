"""The checksum of frozen weights."""

from __future__ import annotations

import pytest
import torch

from layerpeft.training.verify import checksum

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.float8_e4m3fn,
]
SHAPES = [(1,), (3,), (7, 1), (5, 13), (64, 65), (1 << 14,), (131, 1001), (2, 3, 5, 7), ()]


def filled(shape, dtype, draw):
    count = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (count,), generator=draw, dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_checksum_changes_with_every_single_bit(shape, dtype):
    draw = torch.Generator().manual_seed(len(shape) + 7)
    tensor = filled(shape, dtype, draw)
    whole, data = checksum(tensor), tensor.reshape(-1).view(torch.uint8)
    places = {0, data.numel() - 1, *torch.randint(0, data.numel(), (12,), generator=draw).tolist()}
    for place in places:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum(tensor) != whole, (place, bit)
            data[place] ^= 1 << bit
    assert checksum(tensor) == whole


def test_a_checksum_sees_changes_that_cancel_in_a_sum():
    draw = torch.Generator().manual_seed(0)
    for shape in ((8,), (64, 64), (600, 300)):
        tensor = torch.rand(shape, generator=draw) + 1.0
        whole, flat = checksum(tensor), tensor.reshape(-1)
        words = flat.view(torch.int32)
        for _ in range(20):
            i, j = torch.randperm(len(flat), generator=draw)[:2].tolist()
            words[i] += 1  # up by the smallest step here, down by as much there
            words[j] -= 1
            assert checksum(tensor) != whole
            words[i] -= 1
            words[j] += 1
            a, b = float(flat[i]), float(flat[j])
            flat[i], flat[j] = b, a  # two values change places
            assert a == b or checksum(tensor) != whole
            flat[i], flat[j] = a, b
        assert checksum(tensor) == whole


def test_a_checksum_is_of_the_values_and_not_of_the_storage():
    tensor = torch.arange(3000, dtype=torch.float32).reshape(50, 60)
    assert checksum(tensor.T.contiguous().T) == checksum(tensor) == checksum(tensor.clone())
    assert checksum(tensor.T) != checksum(tensor)
    odd = torch.arange(101, dtype=torch.bfloat16)
    assert checksum(odd[1:]) == checksum(odd[1:].clone()) != checksum(odd[:-1])
    assert checksum(torch.empty(0)) == checksum(torch.empty(5, device="meta")) == 0
    zeros = [checksum(torch.zeros(n)) for n in (4, 40000)]
    assert zeros == [0, 0]  # nothing to weigh; a length never changes without a shape that PEFT refuses

"""What a person reads and writes: sizes, tables, names."""

import pytest

from layerpeft.text import size_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9), ("16GiB", 2**34), (" 1.5 kib ", 1536), ("2mb", 2 * 10**6), ("1TB", 10**12), ("7B", 7), ("512", 512),
        (".5KB", 500), ("0GB", 0), ("", None), ("GB", None), ("5 iB", None), ("1.2.3GB", None), ("24G", None), ("-1GB", None),
    ],
)  # fmt: skip
def test_a_size_is_read_or_none(text, size):
    assert size_of(text) == size

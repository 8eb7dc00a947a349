"""What a person reads and writes: sizes, tables, names."""

import ast
import re

import pytest

from layerpeft.text import grid, literal, no_size, size_of, some


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9), ("16GiB", 2**34), (" 1.5 kib ", 1536), ("2mb", 2 * 10**6), ("1TB", 10**12), ("7B", 7), ("512B", 512),
        ("512", None), ("24576", None), ("2000000", 2 * 10**6), (2048, 2048), (24, None), (True, None), (2.5, None),
        (".5KB", 500), ("0GB", 0), ("", None), ("GB", None), ("5 iB", None), ("1.2.3GB", None), ("24G", None), ("-1GB", None),
    ],
)  # fmt: skip
def test_a_size_is_read_or_none(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("24", "'24' has no unit; write 24GiB, 24GB, or 24B of bytes"),
        (24, "24 has no unit; write 24GiB, 24GB, or 24B of bytes"),
        (0, "0 is no size; write it as 24GB or 16GiB"),
        ("24G", "'24G' has no unit; write 24GiB, 24GB"),
        ("500mi", "'500mi' has no unit; write 500MiB, 500MB"),
        ("much", "'much' is no size; write it as 24GB or 16GiB"),
    ],
)
def test_what_is_no_size_says_what_it_lacks(given, says):
    assert no_size(given) == says and size_of(given) is None
    for word in re.findall(r"\d+[A-Za-z]+", says.partition("write")[2]):
        assert size_of(word) is not None


@pytest.mark.parametrize("text", ["plain", "модель 😀", 'it\'s a "run"\n\\', "not UTF-8 \udcff", ""])
def test_a_text_is_written_as_python_reads_it(text):
    assert ast.literal_eval(literal(text)) == text and literal(text).encode()


def test_a_table_is_aligned_and_has_no_blanks_at_the_end():
    rows = [("", "a", "long head"), ("name", "bb", ""), ("x", "", "1")]
    assert grid(rows, "<>") == ["       a  long head", "name  bb", "x                 1"]
    assert grid(rows, "<") == ["      a   long head", "name  bb", "x         1"]
    assert grid(rows, "<<>", gap=" ") == ["     a  long head", "name bb", "x               1"]


def test_a_cell_that_is_wider_than_its_column_is_shown_whole():
    assert grid([("a", "b"), ("wide", "c")], "<>", (2, 3)) == ["a     b", "wide    c"]


def test_lists_are_cut_and_say_so():
    names = list("abcdef")
    assert some(names) == "a, b, c, d …" and some(names[:4]) == "a, b, c, d" and some([]) == ""
    assert some(names, 2, " and {} more") == "a, b and 4 more" and some(names[:2], 2, " and {} more") == "a, b"

"""Rows of a file as they were written: text stays text, a number keeps its spelling, and every row knows where it begins."""

import csv
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerpeft.errors import RecipeError, told

DEEPEST = 100  # brackets within brackets, of one row
LONGEST = 2**31 - 1  # characters of one cell: the module's own bound is 131,072
SAMPLE_BY = (LINE, PARAGRAPH, DOCUMENT) = ("line", "paragraph", "document")  # as the text loader of `datasets` has them
_SPACE = re.compile(r"[ \t\r\n]*")


class Written(str):
    """A number of a file, in its spelling."""


@dataclass(frozen=True)
class Broken:
    """What keeps a row from being read. `ends`: nothing behind it was read."""

    text: str
    ends: bool = False


Row = tuple[int, dict[str, Any] | Broken]  # the line that it begins on (of parquet: its number), and its cells


def read(path: Path, delimiter: str | None = None, most: int | None = None, by: str | None = None) -> Iterator[Row]:
    """The rows of a file, by its suffix; after one that is broken reading goes on, where that is possible.

    `delimiter`: of a table, whatever its suffix; `most`: bytes to look through, None for all; `by`: of plain text, whatever
    its suffix, what a row is (SAMPLE_BY). Raises: RecipeError for a file that cannot be read at all.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif delimiter or path.suffix in (".csv", ".tsv"):
            yield from _table(path, delimiter or ("\t" if path.suffix == ".tsv" else ","), most)
        elif by or path.suffix == ".txt":
            yield from _text(path, by or LINE, most)
        else:
            yield from _json(path, most)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise RecipeError(f"{path} is no readable {path.suffix} file: {told(error, 300)}") from error


def plain(value: Any) -> Any:
    """A value of a file with its numbers as numbers."""
    if isinstance(value, Written):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def text_of(value: Any) -> str:
    """A cell as text: what stands in the file. Nested values, true, false and null as JSON writes them.
    Raises: ValueError for what is no text, as bytes."""
    if isinstance(value, str):
        return str(value)  # a Written one too
    if isinstance(value, bytes | bytearray | memoryview):
        raise ValueError("bytes are no text")
    if isinstance(value, dict | list | tuple):
        return _nested(value)
    return json.dumps(value) if value is None or isinstance(value, bool | int | float) else str(value)


def _nested(value: Any) -> str:
    if isinstance(value, dict):
        inside = (f"{json.dumps(str(key), ensure_ascii=False)}: {_nested(part)}" for key, part in value.items())
        return f"{{{', '.join(inside)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_nested, value))}]"
    number = isinstance(value, Written) or value is None or isinstance(value, bool | int | float)
    return text_of(value) if number else json.dumps(text_of(value), ensure_ascii=False)


# ---- text -----------------------------------------------------------------------------------------------------------


def _lines(path: Path, most: int | None) -> Iterator[tuple[int, bytes]]:
    seen = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            seen += len(line)
            if most is not None and seen > most:
                return
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decoded(line: bytes, path: Path) -> str:
    """Raises: ValueError naming the byte that is no text, and a command that helps."""
    try:
        text = line.decode()
        at = text.find("\0")
    except UnicodeDecodeError as error:
        text, at = "", error.start
    if at < 0:
        return text
    wide = line.startswith((b"\xff\xfe", b"\xfe\xff"))
    what = f"byte {at + 1} (0x{line[at]:02x}) is no UTF-8"
    if not wide and any(byte < 32 and byte not in b"\t\n\r\f" for byte in line):
        raise ValueError(f"{what}; this is no text")
    kind, new = "UTF-16" if wide else "LATIN1", path.with_stem(f"{path.stem}-utf8")
    command = f"iconv -f {kind} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(new))}"
    raise ValueError(f"{what}; for a text in {kind}: {command}")


def _text(path: Path, by: str, most: int | None) -> Iterator[Row]:
    """Plain text as the text loader of `datasets` divides it: a line a row, empty ones too; what stands between empty lines; or
    all that a file holds."""
    held, begun = "", 1  # what is not yet a row, and the line that it begins on
    for number, raw in _lines(path, most):
        try:
            line = _decoded(raw, path).replace("\r\n", "\n")
        except ValueError as error:
            yield number, Broken(str(error))
            continue
        if by == LINE:
            yield number, {"text": line.removesuffix("\n")}
            continue
        held += line
        if by == PARAGRAPH and held.endswith("\n\n"):
            if held != "\n\n":
                yield begun, {"text": held.removesuffix("\n\n")}
            held, begun = "", number + 1
    if held:
        yield begun, {"text": held}


def _table(path: Path, delimiter: str, most: int | None) -> Iterator[Row]:
    """Cells as they stand: no word means nothing, no number becomes another; an empty line is no row."""
    header: list[str] = []
    line = begun = rows = 0
    last = b""

    def texts() -> Iterator[str]:
        nonlocal line, last
        for number, raw in _lines(path, most):
            line, last = number, raw
            yield _decoded(raw, path)

    before = csv.field_size_limit(LONGEST)
    try:
        for cells in csv.reader(texts(), delimiter=delimiter, strict=True):
            first, begun = begun + 1, line
            if not cells:
                continue
            if not header:
                header = cells
                twice = sorted(name for name, times in Counter(header).items() if name and times > 1)
                if twice:
                    yield (
                        first,
                        Broken(f"the header has the column {twice[0]!r} twice; give one of them another name", True),
                    )
                    return
            elif len(cells) != len(header):
                wrong = f"number of cells: {len(cells)}, and of columns in the header: {len(header)}"
                yield first, Broken(f"{wrong} (a cell that holds {delimiter!r} is put in quotes)")
            else:
                yield first, dict(zip(header, cells, strict=True))
            rows += cells is not header
    except ValueError as error:
        rows += 1
        yield line, Broken(str(error), True)
    except csv.Error as error:
        rows += 1
        if most is None or path.stat().st_size <= most:  # else it was cut here
            advice = 'a quote in a quoted cell is written twice: "a ""b"" c"'
            if b"\r" in last.rstrip(b"\r\n"):
                advice = f"lines end in \\n: tr '\\r' '\\n' < {shlex.quote(str(path))} > lines.csv"
            yield begun + 1, Broken(f"not readable as a table ({error}; {advice})", True)
    finally:
        csv.field_size_limit(before)
    if header and not rows:
        yield 1, Broken("a header, and no row below it", True)


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return made


_DECODER = json.JSONDecoder(parse_float=Written, parse_int=Written, parse_constant=Written, object_pairs_hook=_object)


def _json(path: Path, most: int | None) -> Iterator[Row]:
    """JSON by lines, as one list, or as objects one after another, whatever the suffix says."""
    first = True
    for number, raw in _lines(path, most):
        if not raw.strip():
            continue
        listed = first and raw.lstrip().startswith(b"[")
        row = Broken("") if listed else _row(raw, path)
        if first and isinstance(row, Broken):
            whole = _whole(path, listed)
            yield from whole
            if whole or listed:
                return
        first = False
        yield number, row


def _row(raw: bytes, path: Path) -> dict[str, Any] | Broken:
    try:
        return _checked(
            _DECODER.decode(_decoded(raw, path).rstrip("\r\n"))
        )  # or what lacks its end has it a line below
    except (ValueError, RecursionError) as error:
        return _fault(error)


def _fault(error: Exception) -> Broken:
    if isinstance(error, RecursionError):
        return Broken(f"nested more than {DEEPEST} deep")
    place = (
        f"{error.msg.removesuffix(' at')} at column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )
    return Broken(f"not readable as JSON ({place})")


def _checked(row: Any) -> dict[str, Any] | Broken:
    if not isinstance(row, dict):
        kind = "a number" if isinstance(row, Written) else "null" if row is None else type(row).__name__
        return Broken(f"a row must be a mapping of columns, not {kind}")
    level: list[Any] = [row]
    for _ in range(DEEPEST):
        level = [c for v in level for c in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        if not level:
            return row
    return _fault(RecursionError())


def _whole(path: Path, listed: bool) -> list[Row]:
    """A file that is one list, or objects over several lines; empty where it is neither, and its lines are to be read."""
    texts: list[str] = []
    for number, raw in _lines(path, None):
        try:
            texts.append(_decoded(raw, path))
        except ValueError as error:
            return [(number, replace(_fault(error), ends=True))] if listed else []
    found = list(_values("".join(texts)))
    return found if listed or (found and not isinstance(found[0][1], Broken)) else []


def _values(text: str) -> Iterator[Row]:
    """The values of a list, or those that stand one after another, each with the line it begins on."""
    at = _past(text, 0)
    listed = text[at : at + 1] == "["
    at, counted, line = _past(text, at + listed), 0, 1
    while at < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line + text.count("\n", at, getattr(error, "pos", at)), replace(_fault(error), ends=True)
            return
        yield line, _checked(value)
        at = _past(text, end)
        if listed and text[at : at + 1] == ",":
            at = _past(text, at + 1)
        elif listed and text[at : at + 1] != "]":
            break
    if listed and text[at:].rstrip() != "]":
        yield (
            text.count("\n", 0, at) + 1,
            Broken("not readable as JSON (the list of rows is not closed, or goes on after its end)", True),
        )


def _past(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


# ---- parquet --------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        if len(set(schema.names)) < len(schema.names):
            raise ValueError(f"two columns have one name ({', '.join(schema.names)})")
        short = [f.name for f in schema if pyarrow.types.is_float16(f.type) or pyarrow.types.is_float32(f.type)]
        for batch in file.iter_batches(batch_size=1000):
            table = batch.to_pydict()
            for name in short:  # 0.1 in 32 bits is no 0.10000000149011612
                values = batch.column(name).to_numpy(zero_copy_only=False)
                table[name] = [
                    None if v is None else Written(n) for v, n in zip(table[name], values.astype(str), strict=True)
                ]
            for cells in zip(*table.values(), strict=True):
                number += 1
                yield number, dict(zip(table, cells, strict=True))

"""Training rows: where they are, which columns they have, and how columns become what a trainer reads."""

from __future__ import annotations

import csv
import glob
import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerpeft.errors import Problems, RecipeError, first_line, hint
from layerpeft.recipe.shipped import resolve

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# what `columns` may define, by trainer: each tuple is one complete set
FORMS = {
    "sft": (("prompt", "completion"), ("user", "assistant"), ("system", "user", "assistant"), ("text",)),
    "classification": (("text", "label"), ("text", "text_pair", "label")),
}
HUB = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"  # what an address on the hub looks like
READ_AHEAD = 64 * 2**20  # bytes of a file that are looked through before training; the loader sees the rest


def local_files(name: str | list[str]) -> list[Path] | None:
    """The files that a data set name means, or None for a folder or a hub id. A list always means files; `*` is expanded.
    Raises: RecipeError naming what is missing, or of a kind that cannot be read."""
    problems = Problems("data")
    found: list[Path] = []
    for item in name if isinstance(name, list) else [name]:
        path = Path(resolve(item)).expanduser()
        hub = re.fullmatch(HUB, item) and not path.exists()
        if path.suffix not in READERS and (path.is_dir() or (hub and not isinstance(name, list))):
            return None
        matches = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(str(path)) else [path]
        for match in matches or [path]:
            if match.suffix not in READERS:
                problems.add(f"{item!r} is not of a kind that can be read ({', '.join(READERS)})")
            elif not match.is_file():
                problems.add(f"no file {item!r} (looked for {match.absolute()})")
        found += matches
    if len({READERS.get(path.suffix) for path in found}) > 1:
        problems.add("files of different kinds in one list; use one kind")
    problems.raise_if_any(RecipeError)
    return found


def columns_of(path: Path) -> list[str]:
    """The columns of a local file, from its first row. Raises: RecipeError for a file that is empty or not of its kind."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
        if path.suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                return next(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        return _json_columns(path)
    except StopIteration:
        raise RecipeError(f"{path} is empty") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError, JSONDecodeError and pyarrow's errors are ValueErrors
        raise RecipeError(f"{path} is no readable {path.suffix} file: {error}") from error


def broken_lines(path: Path, most: int | None = READ_AHEAD) -> list[str]:
    """What cannot be read in a file of JSON lines, by line (three at most); empty for other kinds of file.
    `most`: bytes to look through, None for all."""
    found: list[str] = []
    if path.suffix != ".jsonl":
        return found
    seen = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            seen += len(line)
            if (most is not None and seen > most) or len(found) == 3:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                found.append(f"{path}, line {number}: not readable as JSON ({what})")
                continue
            if not isinstance(row, dict):
                found.append(f"{path}, line {number}: a row must be a mapping of columns, not {type(row).__name__}")
    return found


def _json_columns(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".jsonl":
            rows = (_row(line) for line in file if line.strip())
            first = next(rows)
            found = first if first is not None else next((row for row in rows if row is not None), None)
            return [] if found is None else list(found)  # broken lines are named one by one elsewhere
        text = file.read()
        if not text.strip():
            raise StopIteration
        row = json.loads(text)
    row = row[0] if isinstance(row, list) and row else row
    if not isinstance(row, dict):
        raise RecipeError(f"{path}: a row must be a mapping of columns, not {type(row).__name__}")
    return list(row)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def template_columns(template: str) -> list[str]:
    """The columns that a template such as "Question: {question}" names. Raises: ValueError with a readable sentence."""
    return [name for _, name, _, _ in _pieces(template) if name is not None]


def _pieces(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r}: {error} (a brace that is text is written twice: {{{{)") from error
    for _, name, form, change in pieces:
        if name == "" or form or change:
            raise ValueError(f"{template!r}: braces hold the name of a column and nothing else")
    return pieces


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's values in place of `{column}`; an empty cell (None) is empty text."""
    cells = [(text, None if name is None else row[name]) for text, name, _, _ in _pieces(template)]
    return "".join(text + ("" if cell is None else str(cell)) for text, cell in cells)


def column_problems(
    trainer: str, have: list[str], columns: Mapping[str, str] | None, text_field: str | None = "text"
) -> list[tuple[str, str]]:
    """What keeps rows with the columns `have` from being trained on: the template at fault ("" for none), and a sentence."""
    if not have:
        return []  # nothing could be read of them, and that is said elsewhere
    if columns:
        found = []
        for name, template in columns.items():
            for missing in sorted(set(template_columns(template)) - set(have)):
                sentence = f"no column {missing!r} in the data; it has {', '.join(have)}.{hint(missing, have)}"
                found.append((name, sentence))
        return found
    if trainer == "classification":
        forms, wanted = [{"text", "label"}], "`text` and `label`"
        example = 'columns: {text: "{sentence}", label: "{class}"}'
    else:
        forms = [{"messages"}, {"conversations"}, {"prompt", "completion"}, {text_field}, {"input_ids"}]
        wanted = f"`messages`, `prompt` and `completion`, or `{text_field}`"
        example = 'columns: {prompt: "{question}", completion: "{answer}"}'
    if any(form <= set(have) for form in forms):
        return []
    return [("", f"the rows need {wanted}, and have {', '.join(have)}; say what is what, as in {example}")]


def form_problem(trainer: str, columns: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is wrong with the names or templates of `columns`: the template ("" for all of them) and a sentence, or None."""
    for name, template in columns.items():
        if not isinstance(template, str):
            return name, f"a template is text with columns in braces, not {template!r}"
        try:
            if not template_columns(template) and name != "system":
                return name, f"{template!r} names no column; write it in braces, as in '{{{template or 'question'}}}'"
        except ValueError as error:
            return name, str(error)
    if set(columns) not in [set(form) for form in FORMS[trainer]]:
        allowed = "; ".join(" + ".join(form) for form in FORMS[trainer])
        given = " + ".join(columns) or "nothing"
        return "", f"{given} is not a complete set for trainer: {trainer}; allowed: {allowed}"
    return None


def load(name: str | list[str], *, config: str | None, split: str, optional: bool = False) -> Any | None:
    """The rows as a `datasets.Dataset`. With `optional`, None where there is no such split.
    Raises: RecipeError in one sentence for whatever the loader could not do."""
    import datasets

    files = local_files(name)
    try:
        if files is not None:
            kind = READERS[files[0].suffix]
            extra: dict[str, Any] = {"sep": "\t"} if files[0].suffix == ".tsv" else {}
            paths = [str(path) for path in files]
            return datasets.load_dataset(kind, data_files=paths, split="train", **extra)
        assert isinstance(name, str)
        source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
        if optional and split not in datasets.get_dataset_split_names(source, config):
            return None
        return datasets.load_dataset(source, config, split=split)
    except Exception as error:  # the loader raises many kinds, some of them private; one line says it all
        broken = [sentence for file in files or () for sentence in broken_lines(file, None)]
        reason = broken[0] if broken else first_line(error)
        raise RecipeError(f"cannot load the data {name!r} (split {split!r}): {reason}") from error


def shape(rows: Any, trainer: str, columns: Mapping[str, str] | None, text_field: str = "text") -> Any:
    """The rows with the columns that the trainer reads. Raises: RecipeError when a column is missing."""
    have = list(rows.column_names)
    problems = Problems("data")
    for name, sentence in column_problems(trainer, have, columns, text_field):
        problems.add(f"columns.{name}: {sentence}" if name else sentence)
    problems.raise_if_any(RecipeError)
    if not columns:
        return rows
    return rows.map(_shaped, fn_kwargs={"columns": dict(columns)}, remove_columns=have, desc="Filling templates")


def _shaped(row: Mapping[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    filled = {name: fill(template, row) for name, template in columns.items()}
    if "user" not in filled:
        return filled
    before = [{"role": role, "content": filled[role]} for role in ("system", "user") if role in filled]
    return {"prompt": before, "completion": [{"role": "assistant", "content": filled["assistant"]}]}

"""Training rows: where they are, which columns they have, and how columns become what a trainer reads."""

from __future__ import annotations

import glob
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from layerpeft.errors import Problems, RecipeError, first_line, hint, told
from layerpeft.integrations.files import version_of
from layerpeft.integrations.places import ADDRESS, expanded, missing, neither
from layerpeft.recipe import media
from layerpeft.recipe.reading import LINE, Broken, Row, plain, read, text_of
from layerpeft.recipe.shipped import resolve
from layerpeft.recipe.templates import EXAMPLE, Say, fill, in_recipe, pieces_of, suited, template_columns
from layerpeft.text import some

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
# what `columns` may define, by trainer: each tuple is one complete set
FORMS = {
    "sft": (("prompt", "completion"), ("user", "assistant"), ("system", "user", "assistant"), ("text",)),
}
ALPACA = ("instruction", "output")  # columns of Alpaca rows, and those that they may have
MAY = ("input", "system", "history")
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}  # as ShareGPT calls them
READ_AHEAD = 64 * 2**20  # bytes of a file that are looked through before training; the loader sees the rest
SMALL = 16 * 2**20  # bytes of rows that are kept in memory; more than that goes to the cache of `datasets`
FIRST = 1000  # rows that are looked at for the names of columns
SHOWN = 3  # problems of rows that are named one by one
# words in the names of files that say to which split they belong
SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}


class Place(NamedTuple):
    """Where a row stands: file and line, and its number among the rows there, from 1."""

    where: str
    number: int


@dataclass(frozen=True)
class Source:
    """Rows in order, each with its place: of files, or of a data set of the hub. `held`: them, where they are few.

    `name` and `split` as they were asked for; `by`: what a row of plain text is; `media`: what tables say of files beside them;
    `declared`: the types that the data set says its columns have.
    """

    name: Any
    split: str = "train"
    files: tuple[Path, ...] = ()
    delimiter: str | None = None
    by: str | None = None
    media: str | None = None
    data: Any = None
    declared: Any = None
    held: tuple[tuple[Place, Mapping[str, Any]], ...] | None = field(default=None, compare=False, repr=False)

    def __iter__(self) -> Iterator[tuple[Place, Mapping[str, Any]]]:
        """Raises: RecipeError naming the first rows that cannot be read."""
        if self.held is not None:
            yield from self.held
        elif self.data is not None:
            for number, row in enumerate(self.data, 1):
                yield Place(f"{self.name} (split {self.split!r}), row {number}", number), row
        else:
            yield from self._read()

    def read(self, path: Path) -> Iterator[Row]:
        """What stands in one of its files. Raises: RecipeError."""
        found = read(path, self.delimiter, by=self.by)
        return found if self.media is None else media.placed(found, path, self.media)

    def _read(self) -> Iterator[tuple[Place, Mapping[str, Any]]]:
        problems = Problems(f"cannot load the data {self.name!r} (split {self.split!r})")
        for path in self.files:
            for number, (line, row) in enumerate(self.read(path), 1):
                where = _where(path, line)
                if isinstance(row, Broken):
                    problems.add(f"{where}: {row.text}")
                elif not problems.items:
                    yield Place(where, number), row
                if len(problems.items) == SHOWN:
                    break
        problems.raise_if_any(RecipeError)

    def __len__(self) -> int:
        known = self.held if self.held is not None else self.data
        return sum(1 for _ in self) if known is None else len(known)

    @property
    def columns(self) -> list[str]:
        if self.data is not None:
            return list(self.data.column_names)
        return list(dict.fromkeys(name for path in self.files for name in columns_of(path, self.read)))

    def classes(self, column: str) -> tuple[str, ...]:
        """The names that the column's type declares for its numbers."""
        found = self.declared or (self.data.features if self.data is not None else {})
        if self.files and self.files[0].suffix == ".parquet":
            import datasets
            import pyarrow.parquet

            found = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(self.files[0]))
        kind = found.get(column)
        return tuple(getattr(getattr(kind, "feature", kind), "names", None) or ())

    def place(self, index: int) -> Place:
        return next(islice(self, index, None))[0]

    @property
    def small(self) -> bool:
        if self.data is not None:
            return self.data.data.nbytes <= SMALL
        return sum(path.stat().st_size for path in self.files) <= SMALL


def _where(path: Path, line: int) -> str:
    return f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {line}"


def local_files(name: str | list[str], home: Path | None = None) -> list[Path] | None:
    """The files that a data set name means, or None for a folder or a hub id. A list always means files; `*` is expanded.
    Raises: RecipeError naming what is missing, or of a kind that cannot be read."""
    problems = Problems("")
    found: list[Path] = []
    for item in name if isinstance(name, list) else [name]:
        path = expanded(resolve(item))
        hub = ADDRESS.fullmatch(item) and not path.exists()
        if path.suffix not in READERS and (path.is_dir() or (hub and not isinstance(name, list))):
            return None
        matches = _matches(path)
        for match in matches or [path]:
            if match.suffix not in READERS:
                problems.add(f"{item!r} is not of a kind that can be read ({', '.join(READERS)})")
            elif match.is_dir():
                problems.add(f"{item!r} is a folder (of a folder, name the files in it: {match}/*.jsonl)")
            elif not match.is_file():
                problems.add(missing("file", item, home))
        found += matches
    if len({READERS.get(path.suffix) for path in found}) > 1:
        problems.add("files of different kinds in one list; use one kind")
    problems.raise_if_any(RecipeError)
    return found


def _matches(path: Path) -> list[Path]:
    """What a pattern means. Brackets and the like in folders that are there as they are spelled are no pattern."""
    there = path
    while not there.exists():
        there = there.parent
    rest = str(path.relative_to(there))
    if there == path or not glob.has_magic(rest):
        return [path]
    return sorted(there / found for found in glob.glob(rest, root_dir=there))


def columns_of(path: Path, reader: Callable[[Path], Iterator[Row]] = read) -> list[str]:
    """The columns of a local file, from its first rows. Raises: RecipeError for a file that is empty or not of its kind."""
    found = list(islice(reader(path), FIRST))
    if not found:
        raise RecipeError(f"{path} is empty")
    return list(dict.fromkeys(name for _, row in found if not isinstance(row, Broken) for name in row))


def columns_here(name: str) -> list[str]:
    """The columns of files, or of what lies in a local folder; none of a data set of the hub. Raises: RecipeError."""
    files = local_files(name)
    if files is not None:
        return [column for path in files for column in columns_of(path)]
    found = _saved(name, "train", True) or _of_folder(name, "train", True, None)
    return found.columns if found is not None else []


def broken_lines(path: Path, most: int | None = READ_AHEAD) -> list[str]:
    """What cannot be read in a file, by line (three at most). `most`: bytes to look through, None for all."""
    if path.suffix == ".parquet":
        return []  # rows of a table with a schema are whole
    broken = (f"{_where(path, line)}: {row.text}" for line, row in read(path, most=most) if isinstance(row, Broken))
    return list(islice(broken, SHOWN))


def column_problems(
    trainer: str,
    have: list[str],
    columns: Mapping[str, str] | None,
    text_field: str | None = "text",
    say: Say = in_recipe,
) -> list[tuple[str, str]]:
    """What keeps rows with the columns `have` from being trained on: the template at fault ("" for none), and a sentence.
    `say`: how templates are written where that is read."""
    if not have:
        return []  # nothing could be read of them, and that is said elsewhere
    if columns:
        return template_problems(have, columns)
    wanted = f"`messages`, `prompt` and `completion`, `instruction` and `output`, or `{text_field}`"
    if trainer == "sft" and (pictures := {"image", "images"} & set(have)):
        said = f"images are not trained on ({pictures.pop()}) by a model that reads none; for the words alone say which they are"
        return [("", f"{said}, as in {say(EXAMPLE)}")]
    there = any(set(form) <= set(have) for form in forms(text_field or "text"))
    return [] if there else [("", lacking(wanted, have, EXAMPLE, say))]


def template_problems(have: list[str], columns: Mapping[str, str]) -> list[tuple[str, str]]:
    """Templates that name columns which are not there, each with a sentence."""
    return [
        (name, f"no column {missing!r} in the data; it has {_names(have)}.{hint(missing, have)}")
        for name, template in columns.items()
        for missing in sorted(set(template_columns(template)) - set(have))
    ]


def lacking(wanted: str, have: list[str], example: Mapping[str, str], say: Say = in_recipe) -> str:
    """What rows with these columns need; `example`: templates, which `say` writes."""
    if not have:
        return f"the rows need {wanted}, and have no columns"
    other = next((mark for mark in ";\t|" if len(have) == 1 and mark in have[0]), None)
    more = (
        f" (one column, with {other!r} in its name: a .csv has commas between its cells, a .tsv tabs)" if other else ""
    )
    return (
        f"the rows need {wanted}, and have {_names(have)}{more}; say what is what, as in {say(suited(example, have))}"
    )


def _names(have: list[str]) -> str:
    """Columns in a message: as many of them, and as much of each, as anybody reads."""
    short = [name if len(name) <= 80 else f"{name[:80]}…" for name in have]
    return some([repr(name) if name != name.strip() else name for name in short], 40, " and {} more")


def form_problem(
    trainer: str, columns: Mapping[str, Any], forms: tuple[tuple[str, ...], ...] = (), more: tuple[str, ...] = ()
) -> tuple[str, str] | None:
    """What is wrong with the names or templates of `columns`: the template ("" for all of them) and a sentence, or None. `forms`,
    and what may stand beside them (`more`): of a trainer that is not in FORMS."""
    forms = forms or FORMS[trainer]
    for name, template in columns.items():
        if not isinstance(template, str):
            return name, f"a template is text with columns in braces, not {template!r}"
        try:
            if not template_columns(template) and name != "system":
                return name, f"{template!r} names no column; write it in braces, as in '{{{template or 'question'}}}'"
        except ValueError as error:
            return name, str(error)
    if not any(set(form) <= set(columns) <= {*form, *more} for form in forms):
        allowed = "; ".join(" + ".join(form) for form in forms)
        given = " + ".join(columns) or "nothing"
        return "", f"{given} is not a complete set for trainer: {trainer}; allowed: {allowed}"
    return None


def load(
    name: str | list[str], *, config: str | None, split: str, optional: bool = False, by: str | None = None
) -> Source | None:
    """The rows of files, of a folder, or of a data set of the hub. With `optional`, None where there is no such split; `by`: what
    a row of plain text is. Raises: RecipeError naming lines that cannot be read, or saying what the loader could not do."""
    files = local_files(name)
    source: Source | None
    if files is not None:
        source = Source(name, split, tuple(files), by=by if files[0].suffix == ".txt" else None)
    else:
        assert isinstance(name, str)
        source = _saved(name, split, optional)
        if source is None and config is None:
            source = _of_folder(name, split, optional, by)
        try:
            source = _of_hub(name, config, split, optional, by) if source is None else source
        except Exception as error:  # the loader raises many kinds, some of them private; one line says it all
            why = error.__cause__ if isinstance(error.__cause__, ImportError) else error  # a package that is lacking
            raise RecipeError(_unread(name, split, why)) from error
        if source is None or (optional and not source.files and source.data is None):
            return None
    for path in source.files:
        columns_of(path, source.read)  # an empty one is an error
    held = tuple(source) if source.files and source.small else None
    return replace(source, held=held)


def _unread(name: str, split: str, why: BaseException) -> str:
    """What to say of a folder, or of a name that may be one on the hub, which gave no rows."""
    folder = expanded(name)
    if not folder.exists() and isinstance(why, OSError):
        return f"{neither('file or folder', name)}: {first_line(why)}"
    if folder.is_dir() and not any(path.suffix in READERS for path in folder.rglob("*")):
        return f"the folder {name!r} holds no rows: no file in it can be read ({', '.join(READERS)})"
    return f"cannot load the data {name!r} (split {split!r}): {first_line(why)}"


def _saved(name: str, split: str, optional: bool) -> Source | None:
    """A folder that `save_to_disk` wrote: a Dataset, which is all of one split, or a DatasetDict; None of any other."""
    folder = expanded(name)
    several = (folder / "dataset_dict.json").is_file()
    if not several and not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever Arrow and the loader raise
        raise RecipeError(f"{name!r} was written by save_to_disk, and cannot be read: {told(error, 300)}") from error
    if not several:
        return Source(name, split) if optional else Source(name, split, data=found)
    if split not in found and not optional:
        raise RecipeError(f"{name!r} has no split {split!r}, but {', '.join(found)}.{hint(split, found)}")
    return Source(name, split, data=found.get(split))


def _of_folder(name: str, split: str, optional: bool, by: str | None) -> Source | None:
    """A local folder whose files say by their names to which split they belong; None where that is for `datasets` to say."""
    folder = expanded(name)
    about = folder / "README.md"
    said = about.is_file() and about.read_bytes().startswith(b"---")
    if not folder.is_dir() or said or re.search(r"[\[+]", split):
        return None
    inside = [p for p in sorted(folder.rglob("*")) if p.suffix in READERS and p.is_file()]
    files = [p for p in inside if not any(part.startswith((".", "__")) for part in p.relative_to(folder).parts)]
    # texts beside tables tell of these; a table that says what pictures or sounds are is all that there is
    files = media.tables(files) or [p for p in files if p.suffix != ".txt"] or files
    names = {split: SPLITS.get(split, re.escape(split)), **SPLITS}
    by_split = {
        key: [p for p in files if re.search(f"(?<![a-z])({words})(?![a-z])", p.relative_to(folder).as_posix().lower())]
        for key, words in names.items()
    }
    there = {key: found for key, found in by_split.items() if found} or ({"train": files} if files else {})
    if split in there:
        files = there[split]
        by = by if files[0].suffix == ".txt" else None
        return Source(name, split, tuple(files), by=by, media=media.media_of(files))
    if there and not optional:
        raise RecipeError(
            f"cannot load the data {name!r} (split {split!r}): there is no such split, but {', '.join(there)}"
        )
    return Source(name, split) if there else None


def _of_hub(name: str, config: str | None, split: str, optional: bool, by: str | None) -> Source | None:
    """What `datasets` loads. Tables, JSON and text are read here, as they were written."""
    import datasets

    source = str(expanded(name)) if expanded(name).is_dir() else name
    if optional and split not in datasets.get_dataset_split_names(source, config):
        return None
    made: Any = datasets.load_dataset_builder(source, config)
    asked = (made.config.data_files or {}).get(split)
    if made.name in ("csv", "json", "text") and asked and not getattr(made.config, "field", None):
        paths = tuple(map(Path, datasets.DownloadManager().download_and_extract(list(asked))))
        sep = made.config.sep if made.name == "csv" else None
        return Source(
            name, split, paths, sep, (by or LINE) if made.name == "text" else None, declared=made.info.features
        )
    return Source(name, split, data=datasets.load_dataset(source, config, split=split))


# ---- rows as a data set ---------------------------------------------------------------------------------------------


class Unfit(Exception):
    """What keeps one row from being trained on, as a sentence without its place."""


@dataclass(frozen=True)
class Making:
    """`row(cells, how)` makes one row (raises: Unfit). `ways`: kinds of cells with a word for each, of which a column has one;
    columns of `free` may mix them."""

    row: Callable[[Mapping[str, Any], Any], dict[str, Any]]
    how: Any
    ways: Mapping[type, str]
    free: tuple[str, ...] = ()


def made_rows(source: Source, making: Making, most: int | None, stamp: Any = None) -> Iterator[dict[str, Any]]:
    """The first `most` rows. Raises: RecipeError naming the first that do not fit."""
    problems = Problems("")
    kinds: dict[str, tuple[type, int]] = {}
    for place, row in islice(source, most):
        try:
            made = making.row(row, making.how)
            for name, value in made.items():
                kind, number = kinds.setdefault(name, (type(value), place.number))
                mixes = type(value) is not kind and name not in making.free
                if mixes and {type(value), kind} <= set(making.ways):
                    here, there = making.ways[type(value)], making.ways[kind]
                    raise Unfit(f"has its {name} as {here}, and row {number} as {there}; write all rows one way")
            if not problems.items:
                yield made
        except Unfit as error:
            problems.add(f"{place.where}: row {place.number} {error}")
            if len(problems.items) == SHOWN:
                break
    problems.raise_if_any(RecipeError)


def dataset(
    source: Source, making: Making, names: Iterable[str], feature: Callable[[str, Any], Any], most: int | None
) -> Any:
    """A `datasets.Dataset` of the rows, in memory or, where they are many, on the disk. `names`: its columns where there are no
    rows; `feature(name, value)`: the type of a column whose first cell is `value`.

    Raises: RecipeError as `made_rows`, or for a full disk.
    """
    import datasets

    first = next(made_rows(source, making, 1), None)
    cells = dict.fromkeys(names, "") if first is None else first
    features = datasets.Features({name: feature(name, value) for name, value in cells.items()})
    if first is None:
        return datasets.Dataset.from_dict({name: [] for name in cells}, features=features)
    if source.small:
        return datasets.Dataset.from_list(list(made_rows(source, making, most)), features=features)
    stamp = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in source.files]
    given = {"source": source, "making": making, "most": most, "stamp": (str(stamp), version_of("layerpeft"))}
    try:
        return datasets.Dataset.from_generator(made_rows, gen_kwargs=given, features=features)
    except Exception as error:
        if isinstance(error.__cause__, RecipeError):
            raise error.__cause__ from None
        raise RecipeError(f"the rows cannot be kept on the disk: {told(error.__cause__ or error, 300)}") from error


# ---- rows as a trainer reads them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What becomes of a row. `have`: all columns; `kept`: those that are read, where no templates are given."""

    trainer: str
    columns: tuple[tuple[str, str], ...]
    have: tuple[str, ...]
    kept: tuple[str, ...]
    field: str
    talks: bool = True  # Alpaca rows become turns; else text


IDS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")
TURNS = ("messages", "conversations")  # columns that hold a whole conversation
BESIDE = ("tools", "chat_template_kwargs")


def forms(text_field: str) -> list[tuple[str, ...]]:
    """Columns that are enough by themselves, in the order in which a trainer looks for them."""
    return [("input_ids",), ("prompt", "completion"), *((name,) for name in TURNS), (text_field,), ALPACA]


def shape(
    rows: Any,
    trainer: str,
    columns: Mapping[str, str] | None,
    text_field: str = "text",
    most: int | None = None,
    talks: Callable[[], bool] = lambda: True,
) -> Any:
    """A `datasets.Dataset` of the rows (the first `most`) with the columns that the trainer reads. `rows`: a Source, or a Dataset.
    `talks`: whether there is a template that writes turns, which is asked for Alpaca rows alone.
    Raises: RecipeError when a column is missing, or rows hold what cannot be trained on, with their places."""
    source = rows if isinstance(rows, Source) else Source("rows", data=rows)
    have = source.columns
    problems = Problems("data")
    for name, sentence in column_problems(trainer, have, columns, text_field):
        problems.add(f"columns.{name}: {sentence}" if name else sentence)
    problems.raise_if_any(RecipeError)
    form = next((form for form in forms(text_field) if set(form) <= set(have)), ())
    more = IDS if form == ("input_ids",) else MAY if form == ALPACA else BESIDE
    kept = tuple(dict.fromkeys((*form, *(name for name in more if name in have))))
    turns = form == ALPACA and not columns and talks()
    how = Shape(trainer, tuple((columns or {}).items()), tuple(have), kept, text_field, turns)
    return dataset(source, Making(shaped, how, _WAYS, BESIDE), dict(how.columns) or kept, _feature, most)


def _feature(name: str, value: Any) -> Any:
    """Lists of turns and the like keep the keys that each row has; Arrow's own types would give all rows those of all others."""
    import datasets

    if isinstance(value, str) and name not in BESIDE:
        return datasets.Value("string")
    return datasets.List(datasets.Value("int64")) if name in IDS else datasets.Json()


_WAYS = {str: "text", list: "a list of turns"}


def shaped(row: Mapping[str, Any], how: Shape) -> dict[str, Any]:
    """One row as the trainer reads it. Raises: Unfit."""
    row = defaultdict(lambda: None, row)  # a key that this row lacks is an empty cell
    if not how.columns and how.kept[:2] == ALPACA:
        made = _alpaca(row, how)
    elif not how.columns:
        made = {name: _direct(name, row[name], how) for name in how.kept}
        made = {"messages" if name == "conversations" else name: value for name, value in made.items()}
    else:
        made = {name: _filled(name, template, row) for name, template in how.columns}
    for name, value in made.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unfit(f"has half of a character ({text[error.start]!r}) in its {name}") from None
    lengths = {name: len(made[name]) for name in IDS if name in made}
    if len(set(lengths.values())) > 1:
        raise Unfit(f"has lists of different lengths: {', '.join(f'{name} {n}' for name, n in lengths.items())}")
    if not how.columns and isinstance(made.get("prompt"), str) != isinstance(made.get("completion"), str):
        ways = [_WAYS[type(made[name])] for name in ("prompt", "completion")]
        raise Unfit(f"has its prompt as {ways[0]} and its completion as {ways[1]}; write both one way")
    if "user" not in made:
        return made
    before = [{"role": role, "content": made[role]} for role in ("system", "user") if role in made]
    return {"prompt": before, "completion": [{"role": "assistant", "content": made["assistant"]}]}


def _alpaca(row: Mapping[str, Any], how: Shape) -> dict[str, Any]:
    """An Alpaca row as prompt and completion: turns, or text with an empty line between its parts. Raises: Unfit."""
    said = {name: _text(name, row[name]) for name in (*ALPACA, "input", "system") if row[name] is not None}
    if "output" not in said:
        raise Unfit("has no output")
    asked = [text for name in ("instruction", "input") if (text := said.get(name, "")).strip()]
    if not asked:
        raise Unfit("has no instruction")
    turns = [{"role": "system", "content": said["system"]}] if said.get("system", "").strip() else []
    for pair in plain(row["history"]) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unfit(f"has a history that is no list of pairs, question and answer ({_kind(pair)} in it)")
        turns += [{"role": role, "content": text_of(text)} for role, text in zip(("user", "assistant"), pair)]
    turns.append({"role": "user", "content": "\n\n".join(asked)})
    if how.talks:
        return {"prompt": turns, "completion": [{"role": "assistant", "content": said["output"]}]}
    return {"prompt": "".join(f"{turn['content']}\n\n" for turn in turns), "completion": said["output"]}


def _filled(name: str, template: str, row: Mapping[str, Any]) -> str:
    """A template's text. Raises: Unfit where there is nothing to fill it with, or what there is is no text."""
    pieces = pieces_of(template)
    named = [column for _, column, _, _ in pieces if column is not None]
    literal = "".join(text for text, _, _, _ in pieces).strip()
    if named and not literal and name != "system" and all(row[column] is None for column in named):
        raise Unfit(f"has no {name} ({' and '.join(named)} {'is' if len(named) == 1 else 'are'} empty)")
    try:
        return fill(template, row)
    except ValueError as error:
        raise Unfit(f"has no text for {name}: {error}") from None


def _direct(name: str, value: Any, how: Shape) -> Any:
    """A column that is read as it is. Raises: Unfit."""
    if name in BESIDE:
        return plain(value) if value is not None else {} if name == "chat_template_kwargs" else None
    if value is None:
        raise Unfit(f"has no {name}")
    if name in IDS:
        found = plain(value)
        if not isinstance(found, list) or not all(type(i) is int and -100 <= i < 2**31 for i in found):
            raise Unfit(f"has {name} that are no list of numbers of tokens")
        return found
    if name in TURNS or (name in ("prompt", "completion") and isinstance(value, list)):
        return _turns(name, plain(value))
    if isinstance(value, dict | list | tuple):
        same = ", ".join(f'{n}: "{{{n}}}"' for n in how.kept if n not in BESIDE)
        raise Unfit(f"has a {name} that is {_kind(value)}, not text; to train on it as JSON: columns: {{{same}}}")
    return _text(name, value)


def _text(name: str, value: Any) -> str:
    try:
        return text_of(value)
    except ValueError as error:
        raise Unfit(f"has no text for {name}: {error}") from None


def _turns(name: str, turns: Any) -> list[dict[str, Any]]:
    """Turns of a conversation. Raises: Unfit naming the turn."""
    if not isinstance(turns, list) or not turns:
        raise Unfit(f"has {name} that {'are empty' if turns == [] else f'are {_kind(turns)}, not a list of turns'}")
    for number, turn in enumerate(turns, 1):
        keys_of_turn(name, number, turn)
    return [turn if "role" in turn else _renamed(turn) for turn in turns]


def keys_of_turn(name: str, number: int, turn: Any) -> tuple[str, str]:
    """Under which keys a turn says who speaks, and what. Raises: Unfit."""
    what = f"has a turn ({name}, number {number})"
    if not isinstance(turn, dict):
        raise Unfit(f'{what} that is {_kind(turn)}; a turn is {{"role": …, "content": …}}')
    who, said = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    if not isinstance(turn.get(who), str):
        raise Unfit(f"{what} without {who}")
    if turn.get(said) is None and not turn.get("tool_calls"):
        raise Unfit(f"{what} of {turn[who]!r} without {said}")
    return who, said


def _renamed(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT's as chat templates know it."""
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", tuple: "a list"}.get(
        type(value), "text" if isinstance(value, str) else repr(value)
    )

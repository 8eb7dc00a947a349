"""Rows as token ids, before any weight is loaded: which are cut, which fall out, and why."""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerpeft.errors import Problem, Problems, RecipeError, hint, told
from layerpeft.integrations import trl
from layerpeft.recipe import roles
from layerpeft.recipe.rows import Source
from layerpeft.recipe.templates import EXAMPLE, in_recipe

NO_TEXT, NO_LABEL = "hold no text", "hold no label"
WHAT = {"dataset_name": "training", "eval_dataset": "held-out"}


@dataclass(frozen=True)
class Tally:
    """What became of the rows of one kind. `cut`: those that lost their end (or start); `blank`: that stay, with an empty answer or
    text; `dropped`: by reason; `first`: where the first of those stands."""

    read: int
    kept: int
    cut: int = 0
    blank: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    max_length: int | None = None
    first: str = ""

    def told(self, what: str) -> str:
        """One line."""
        parts = [f"{what} rows: {self.read} read, {sum(self.dropped.values())} dropped, {self.kept} left"]
        parts += [f"{count} of {self.read} rows {reason}, and are dropped" for reason, count in self.dropped.items()]
        parts[-1] += f" (the first: {self.first})" if self.first else ""
        parts += [f"{self.cut} cut at max_length: {self.max_length}"] if self.cut else []
        parts += [f"{self.blank} with an empty text or answer, of which the end alone is learned"] if self.blank else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Amount:
    """How much rows are: how many are left, and their tokens; `about`: told by some of them."""

    rows: int
    tokens: int
    about: bool


def amount(made: Any, found: Tally, rows: int) -> Amount:
    """Of so many `rows`, those that were `made` of some of them or of all, and what became of these."""
    limit = found.max_length
    lengths = (len(ids) for batch in made.iter(1000) for ids in batch["input_ids"])
    tokens = sum(length if limit is None else min(length, limit) for length in lengths)
    return Amount(len(made) * rows // found.read, tokens * rows // found.read, rows > found.read)


def late(limit: int | None) -> str:
    """The reason of rows whose labels all come too late."""
    return f"have no label left within max_length: {limit}"


def tokenized(
    rows: Any, source: Source, tokenizer: Any, arguments: Any, key: str, most: int | None = None
) -> tuple[Any, Tally]:
    """The rows that teach something, as `input_ids` and `labels` of their whole length, and what became of the others.

    `most`: no more rows than that are tried, from all over the data. Raises: RecipeError naming the first row that cannot be
    read so, or where none is left.
    """
    _check(tokenizer, arguments)
    try:
        tokenizer = trl.dressed(tokenizer, arguments)
    except (OSError, ValueError) as error:
        name = "chat_template_path"
        text = f"{name}: no template at {arguments.chat_template_path!r}, neither a .jinja file nor a model ({told(error, 200)})"
        raise RecipeError(Problem((name,), text)) from error
    return _tokenized(rows, source, tokenizer, arguments, key, most)


def _tokenized(
    rows: Any, source: Source, tokenizer: Any, arguments: Any, key: str, most: int | None
) -> tuple[Any, Tally]:
    step = 1 if most is None else -(-len(rows) // most)
    part = rows if step == 1 else rows.select(range(0, len(rows), step))
    roles.check(part, source, tokenizer, key, step)
    try:
        made = trl.tokenized(part, tokenizer, arguments)
    except Exception as error:  # templates, tokenizers and TRL raise what they like
        raise RecipeError(_unreadable(error, part, source, tokenizer, arguments, key, step)) from error
    if "input_ids" in part.column_names:
        ids = (row for batch in made.iter(1000) for row in batch["input_ids"])
        bad = next((i for i, row in enumerate(ids) if any(not 0 <= token < len(tokenizer) for token in row)), None)
        if bad is not None:
            place = source.place(bad * step)
            text = (
                f"{key}: {place.where}: row {place.number} has input_ids that are no tokens (0 to {len(tokenizer) - 1})"
            )
            raise RecipeError(Problem((key,), text))
    fates = [
        _fate(labels, blank, arguments) for labels, blank in zip(_labels(made), _blank(part, arguments), strict=True)
    ]
    kept = [i for i, fate in enumerate(fates) if fate in ("", "cut", "blank")]
    found = tally(fates, arguments.max_length, lambda i: source.place(i * step).where)
    if not kept and step == 1:
        raise RecipeError(_none_left(found, made, part, key))
    if not kept:
        return _tokenized(rows, source, tokenizer, arguments, key, None)
    return made if len(kept) == len(made) else made.select(kept), found


def _check(tokenizer: Any, arguments: Any) -> None:
    """Raises: RecipeError for settings with which TRL's trainer would stop, after the weights are loaded."""
    problems = Problems("")
    for name in ("eos_token", "pad_token"):
        token = getattr(arguments, name)
        if token is not None and token not in tokenizer.get_vocab():
            problems.add(
                f"{name}: {token!r} is no token of the model's tokenizer.{hint(token, tokenizer.all_special_tokens)}",
                name,
            )
    if arguments.packing and arguments.max_length is None:
        problems.add("packing: needs a max_length, to which rows are packed", "packing")
    if arguments.padding_free and not arguments.packing and arguments.max_length is not None:
        problems.add(
            "padding_free: does not cut rows; take packing: true beside it, or max_length: null", "padding_free"
        )
    problems.raise_if_any(RecipeError)


def tally(fates: list[str], limit: int | None, where: Any) -> Tally:
    """What became of the rows: "" kept, "cut", "blank", or the reason for which it is dropped. `where`: of a row by its index."""
    counts = Counter(fates)
    stay = [counts.pop(fate, 0) for fate in ("", "cut", "blank")]
    first = where(next(i for i, fate in enumerate(fates) if fate in counts)) if counts else ""
    return Tally(len(fates), sum(stay), stay[1], stay[2], dict(counts), limit, first)


def _labels(made: Any) -> Iterable[list[int]]:
    return (labels for batch in made.iter(1000) for labels in batch["labels"])


def _blank(part: Any, arguments: Any) -> list[str]:
    """For each row what is empty in it: its text or its answer."""
    for name, word in ((arguments.dataset_text_field, NO_TEXT), ("completion", "blank")):
        if name in part.column_names and "input_ids" not in part.column_names and not isinstance(part[0][name], list):
            return [word if not text.strip() else "" for text in part[name]]
    return [""] * len(part)


def _fate(labels: list[int], blank: str, arguments: Any) -> str:
    """What becomes of a row. The first token follows nothing, so nothing is learned of it."""
    limit, whole = arguments.max_length, sum(label != -100 for label in labels[1:])
    if blank == NO_TEXT or not whole:
        return blank if blank == NO_TEXT else NO_LABEL
    if limit is None or len(labels) <= limit or (arguments.packing and arguments.packing_strategy != "bfd"):
        return blank
    ends = arguments.truncation_mode == "keep_end" and not arguments.packing
    left = labels[-limit:] if ends else labels[:limit]
    return "cut" if any(label != -100 for label in left[1:]) else late(limit)


def _none_left(found: Tally, made: Any, part: Any, key: str) -> Problem:
    """Every row has fallen out."""
    what, reasons = WHAT[key], list(found.dropped)
    told = f"all {found.read} rows {' or '.join(reasons)}"
    cure = ""
    if reasons == [late(found.max_length)]:
        if "prompt" in part.column_names:
            told = f"all {found.read} prompts are longer than max_length: {found.max_length}"
        firsts = (next(i for i, label in enumerate(labels) if i and label != -100) for labels in _labels(made))
        cure = f"; max_length: {min(firsts) + 1} keeps the shortest"
    text = f"0 of {found.read} {what} rows left: {told}, no row is left (the first: {found.first}){cure}"
    return Problem((key,), f"{key}: {text}")


def _unreadable(
    error: Exception, part: Any, source: Source, tokenizer: Any, arguments: Any, key: str, step: int
) -> Problem:
    """Why rows cannot be turned into tokens, and the first of them."""
    bad = _first_bad(part, tokenizer, arguments)
    if bad is None:
        return Problem((key,), f"{key}: the rows cannot be turned into tokens: {told(error, 300)}")
    place = source.place(bad * step)
    where, row = f"{place.where}: row {place.number}", part.select([bad])
    said = told(_failure(row, tokenizer, arguments) or error, 300)
    if arguments.assistant_only_loss:
        all_turns = copy.copy(arguments)
        all_turns.assistant_only_loss = False
        if _failure(row, tokenizer, all_turns) is None:
            name = "assistant_only_loss"
            text = f"{name}: {where} has no tokens of the assistant ({said}); {name}: false trains on all turns"
            return Problem((name,), text)
    if tokenizer.chat_template is None:
        cure = (
            "the tokenizer has no chat template: name a file (chat_template_path: ./template.jinja), or write rows as text, as in "
            f"{in_recipe(EXAMPLE)}"
        )
    else:
        cure = "mend the row or take it out, or name another template (chat_template_path: ./template.jinja)"
    return Problem((key,), f"{key}: {where} cannot be turned into tokens ({said}); {cure}")


def _first_bad(part: Any, tokenizer: Any, arguments: Any) -> int | None:
    """The first row that fails by itself, found by halving; None where it takes several."""
    low, high = 0, len(part)
    while high - low > 1:
        middle = (low + high) // 2
        failed = _failure(part.select(range(low, middle)), tokenizer, arguments)
        low, high = (low, middle) if failed else (middle, high)
    return low if _failure(part.select([low]), tokenizer, arguments) else None


def _failure(rows: Any, tokenizer: Any, arguments: Any) -> Exception | None:
    try:
        trl.tokenized(rows, tokenizer, arguments)
    except Exception as error:  # as above
        return error
    return None

"""Questions whose answer is a piece of a text: where it begins and ends, in windows over texts that are too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerpeft.errors import Problem, RecipeError
from layerpeft.recipe import tokens
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source, Unfit
from layerpeft.recipe.tasks import cell
from layerpeft.recipe.tasks.metrics import answer_metrics
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import left, longest, needs, tokenizer

LONGEST, BEST = 30, 20  # tokens of an answer; places of its start and end that are tried
NOWHERE = [-1, -1]


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`question`, `context`, and `texts` and `starts` of its answers (characters), which are empty where it has none."""
    question, context = (cell.text(name, cells[name], empty=False) for name in ("question", "context"))
    column = "answers" if "answers" in cells else "answer"
    found = _pairs(cells[column], cells.get("answer_start"))
    texts, starts = [], []
    for answer, start in found:
        text = cell.text(column, answer)
        if not text:
            raise Unfit(f"has an empty answer ({column}); a question without an answer has an empty list")
        where = context.find(text) if start is None else start
        if where < 0:
            raise Unfit(f"has an answer ({column}) that is not in its context: {_short(text)}")
        if context[where : where + len(text)] != text:
            there = _short(context[where : where + len(text)])
            raise Unfit(f"has an answer_start of {start}, where its context has {there}, and not {_short(text)}")
        texts.append(text)
        starts.append(where)
    return {"question": question, "context": context, "texts": texts, "starts": starts}


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def _pairs(value: Any, start: Any) -> list[tuple[Any, int | None]]:
    """Answers and their places, of the ways in which these are written. Raises: Unfit."""
    found = cell.parsed(value)
    if found is None:
        return []
    if isinstance(found, Mapping):
        texts = cell.parsed(found.get("text"))
        starts = cell.parsed(found.get("answer_start"))
        if texts is None:
            raise Unfit('has answers without text; they are {"text": […], "answer_start": […]}')
        texts = texts if isinstance(texts, list) else [texts]
        starts = starts if isinstance(starts, list) else [starts] * len(texts)
        if len(texts) != len(starts):
            raise Unfit(f"has {len(texts)} answers and {len(starts)} answer_start; each answer has one")
    elif isinstance(found, list):
        pairs = [(a.get("text"), a.get("answer_start")) if isinstance(a, Mapping) else (a, None) for a in found]
        texts, starts = [t for t, _ in pairs], [s for _, s in pairs]
    else:
        texts, starts = [value] if value != "" else [], [cell.parsed(start)]
    return [(text, _place(place)) for text, place in zip(texts, starts)]


def _place(value: Any) -> int | None:
    if value is None or value == "":
        return None
    try:
        found = int(str(value))
    except ValueError:
        raise Unfit(f"has an answer_start that is no whole number: {value!r}") from None
    if found < 0:
        raise Unfit(f"has an answer_start below zero: {found}")
    return found


def head(recipe: Recipe, train: Any, source: Source, processing: Any = None) -> Head:
    """Whether there are questions without an answer. Raises: RecipeError where no question has one."""
    none = sum(not texts for texts in train["texts"])
    if none == len(train):
        raise RecipeError(Problem(("dataset_name",), "dataset_name: answers: no training row has an answer"))
    return Head(about={"without_answer": none > 0})


def processing(recipe: Recipe, rows: Any) -> Any:
    """A tokenizer that knows where each token stands in its text. Raises: RecipeError for any other."""
    found = tokenizer(recipe)
    needs(recipe, found.is_fast, "a fast tokenizer (tokenizer.json), which knows the place of each token")
    length, stride = longest(recipe, found), recipe["stride"]
    if length is not None and stride >= length:
        text = f"windows of max_length: {length} tokens cannot share {stride} of them with the next; give fewer"
        raise RecipeError(Problem(("stride",), f"stride: {text}"))
    found.padding_side = "right"  # places of answers are counted from the first token
    return found


def windows(question: str, context: str, tokenizer: Any, limit: int | None, stride: int) -> list[dict[str, Any]]:
    """Token ids of the question with each window of the context; `offsets`: where each token stands in the context, (-1, -1) of
    those that are not of it.

    Raises: ValueError where the question leaves no room for a context."""
    more = {} if limit is None else {"truncation": "only_second", "max_length": limit, "stride": stride}
    try:
        found = tokenizer(
            question,
            context,
            return_overflowing_tokens=limit is not None,
            return_offsets_mapping=True,
            verbose=False,
            **more,
        )
    except BaseException as error:  # the tokenizer's own is no Exception where it panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(str(error)) from error
    encodings = found.encodings
    if limit is None:
        found = {k: [v] for k, v in found.items()}
    made = []
    for i, encoding in enumerate(encodings):
        inputs = {k: list(found[k][i]) for k in found if k in tokenizer.model_input_names}
        of = encoding.sequence_ids
        offsets = [list(place) if of[j] == 1 else NOWHERE for j, place in enumerate(found["offset_mapping"][i])]
        made.append({**inputs, "offsets": offsets})
    return made


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """Windows, each with the tokens at which the first answer begins and ends; the first token twice where it is not in it."""
    limit, stride = longest(given.recipe, given.processing), given.recipe["stride"]

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        made: dict[str, list[Any]] = {}
        for row in rows:
            try:
                found = windows(row["question"], row["context"], given.processing, limit, stride)
            except ValueError:
                found = [{"input_ids": [], "offsets": []}]
            for window in found:
                start, end = _tokens_of(row, window["offsets"])
                window |= {"start_positions": start, "end_positions": end, "row": row["number"], "answered": end > 0}
                for key in {**dict.fromkeys(made), **window}:
                    made.setdefault(key, []).append(window.get(key, [1] * len(window["input_ids"])))
        return made

    numbered = part.add_column("number", list(range(len(part))))
    made = numbered.map(encode, batched=True, remove_columns=numbered.column_names, desc="Tokenizing")
    answered, fates = [False] * len(part), [""] * len(part)
    for number, ids, has in zip(made["row"], made["input_ids"], made["answered"], strict=True):
        answered[number] |= has
        fates[number] = fates[number] if ids else f"have a question that fills max_length: {limit}"
    for number, texts in enumerate(part["texts"]):
        if texts and not answered[number] and not fates[number]:
            fates[number] = "have an answer that no window holds whole"
    keep = [i for i, number in enumerate(made["row"]) if not fates[number]]
    found, tally = left(part, fates, given, lambda kept: part)
    made = made if len(keep) == len(made) else made.select(keep)
    return made.remove_columns("answered"), tally


def _tokens_of(row: Mapping[str, Any], offsets: Sequence[Sequence[int]]) -> tuple[int, int]:
    """First and last token of the first answer; 0 and 0 where the window does not hold all of it."""
    if not row["texts"]:
        return 0, 0
    start, end = row["starts"][0], row["starts"][0] + len(row["texts"][0])
    inside = [i for i, (a, b) in enumerate(offsets) if a >= 0 and b > start and a < end and b > a]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def best(starts: Any, ends: Any, offsets: Sequence[Sequence[int]]) -> tuple[float, tuple[int, int], float]:
    """Score and characters of the best answer in a window (logits of start and end, (tokens,)), and the score of having none."""
    import numpy as np

    none = float(starts[0] + ends[0])
    top = [np.argsort(side)[::-1][:BEST] for side in (starts, ends)]
    found = (-float("inf"), (0, 0))
    for s in top[0]:
        for e in top[1]:
            if s <= e < s + LONGEST and e < len(offsets) and offsets[s][0] >= 0 and offsets[e][0] >= 0:
                found = max(found, (float(starts[s] + ends[e]), (int(offsets[s][0]), int(offsets[e][1]))))
    return *found, none


def answer(context: str, found: Sequence[tuple[float, tuple[int, int], float]], without: bool) -> str:
    """The answer over all windows of a context; "" where having none is likelier, if rows without one were learned (`without`)."""
    score, (start, end), _ = max(found)
    return "" if without and min(none for *_, none in found) > score else context[start:end]


def trainer(setup: Any, model: Any) -> dict[str, Any]:
    """The collator pads; answers of the held-out rows are held against theirs."""
    from transformers import DataCollatorWithPadding

    without = bool(setup.learned.about.get("without_answer"))

    def metrics(prediction: Any) -> dict[str, float]:
        starts, ends = prediction.predictions[:2]
        found: dict[int, list[Any]] = {}
        for i, (number, offsets) in enumerate(zip(setup.held_out["row"], setup.held_out["offsets"], strict=True)):
            found.setdefault(number, []).append(best(starts[i], ends[i], offsets))
        rows = setup.examples.select(list(found))
        said = [answer(row["context"], f, without) for row, f in zip(rows, found.values(), strict=True)]
        return answer_metrics(said, rows["texts"])

    return {"data_collator": DataCollatorWithPadding(setup.tokenizer), "compute_metrics": metrics}


TASK = Task(
    forms=(("question", "context", "answers"), ("question", "context", "answer")),
    more=("answer_start",),
    example={"question": "{query}", "context": "{passage}", "answer": "{answer}"},
    row=row,
    types={"texts": "texts", "starts": "counts"},
    processing=processing,
    head=head,
    features=features,
    trainer=trainer,
    new_head=True,
    measure=lambda head: "eval_f1",
)

"""Numbers for rows whose answer is known, of the model as it was trained."""

from __future__ import annotations

import math
import shlex
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from layerpeft.errors import UsageError
from layerpeft.integrations.drawing import new_figure, write_figure
from layerpeft.quantization.save import is_saved
from layerpeft.recipe import rows as text_rows
from layerpeft.recipe import tokens
from layerpeft.recipe.recipe import training_arguments
from layerpeft.recipe.rows import TURNS, Source, Unfit
from layerpeft.recipe.tasks import answers as reading
from layerpeft.recipe.tasks import cell
from layerpeft.recipe.tasks.classification import MANY, NUMBER, label_of
from layerpeft.recipe.tasks.labels import name_of, number
from layerpeft.recipe.tasks.metrics import (
    answer_metrics,
    class_metrics,
    entity_f1,
    error_rates,
    has_entities,
    label_metrics,
    number_metrics,
    text_metrics,
)
from layerpeft.recipe.tasks.shape import form_of, shape
from layerpeft.recipe.tasks.tagging import NOT_LEARNED, TAGS
from layerpeft.recipe.tasks.task import Head, Part
from layerpeft.recipe.trainer import Setup, make_trainer
from layerpeft.text import counted, grid
from layerpeft.using.folder import Trained
from layerpeft.using.hearing import Hears
from layerpeft.using.incoming import Incoming
from layerpeft.using.predict import answers
from layerpeft.using.ways import Answers, Classes, Tags, Way, Writes

MOST = 40  # classes of a picture with numbers in it


@dataclass
class Found:
    """`numbers` by name; `classes`: a line for each, and `confusion` (wanted, found) counts; `unknown`: labels of rows that the
    model does not have, `left`: rows without a number, by reason."""

    numbers: dict[str, float]
    rows: int = 0
    classes: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        parts = {"classes": self.classes, "confusion": self.confusion, "unknown_labels": dict(self.unknown)}
        return {"rows": self.rows, **self.numbers, **{k: v for k, v in parts.items() if v}, "left_out": dict(self.left)}

    def __str__(self) -> str:
        lines = [counted(self.rows, "row")]
        lines += [f"  left out: {n} {why}" for why, n in self.left.most_common(8)]
        lines += [f"  unknown label {name!r}: {counted(n, 'row')}" for name, n in self.unknown.most_common(8)]
        lines += [f"{name}: {value:.6g}" for name, value in self.numbers.items()]
        if self.classes:
            names = list(self.classes[0])
            cells = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in self.classes]
            lines += ["", *grid([names, *cells], "<>")]
        return "\n".join(lines)


# ---- rows with an answer --------------------------------------------------------------------------------------------

SAID = {"prompt": "completion", "user": "assistant", "text": "completion", "source": "target"}  # what follows what


def wanted_columns(kind: type[Way]) -> tuple[str, ...]:
    """What a row's answer may be called."""
    if issubclass(kind, Hears):
        return ("text",)
    if issubclass(kind, Writes):
        return *dict.fromkeys(SAID.values()), *TURNS
    return TAGS if issubclass(kind, Tags) else ("answers", "answer") if issubclass(kind, Answers) else ("label",)


def judged_forms(kind: type[Way]) -> list[tuple[str, ...]]:
    """Columns that are enough, with the answer among them."""
    if issubclass(kind, Writes):
        return [(*form, SAID[form[0]]) if form[0] in SAID else form for form in kind.forms]
    return [(*form, name) for form in kind.forms for name in wanted_columns(kind)]


def evaluate_answers(rows: Incoming, way: Way, batch: int) -> Found:
    """Accuracy, macro-F1 and a line for each class; of numbers their errors; of tags F1 of names; exact match of text.

    Raises: UsageError where no row can be judged."""
    pairs: list[tuple[Any, Any]] = []
    found = Found({})
    for given, answer, why in answers(rows, way, batch):
        try:
            if answer is None:
                raise Unfit(why)
            pairs.append(_pair(way, answer, rows.cells(given), rows, found.unknown))
        except _Strange:
            continue
        except Unfit as error:
            found.left[str(error)] += 1
    found.rows = len(pairs)
    if not pairs:
        raise UsageError(f"no row can be judged: {dict(found.left) or ''} {dict(found.unknown) or ''}".strip())
    _judge(way, pairs, found)
    return found


class _Strange(Exception):
    """A label that the model does not have; it is counted."""


def _pair(way: Way, answer: Mapping[str, Any], cells: Mapping[str, Any], rows: Incoming, unknown: Counter[str]) -> Any:
    """What was found and what was wanted, of one row. Raises: Unfit, _Strange."""
    column = next(name for name in wanted_columns(type(way)) if name in cells)
    value = cells[column]
    if isinstance(way, Answers):
        texts = reading.row({**cells, "question": "?", "context": cells["context"]}, rows.how.known)["texts"]
        return answer["answer"], texts
    if isinstance(way, Hears):
        return answer["text"], " ".join(cell.text(column, value, empty=False).split())
    if isinstance(way, Writes):
        last = value[-1]["content"] if isinstance(value, list) and value else value
        return answer["text"], cell.text(column, last)
    known = rows.how.known.classes(column)
    if isinstance(way, Tags):
        tags = [name_of(tag, known, "tag") for tag in cell.listed(column, value)]
        if len(tags) != len(answer["tags"]):
            raise Unfit(f"has {len(answer['tags'])} words and {len(tags)} tags")
        wanted = tags
    elif isinstance(way, Classes) and way.kind == NUMBER:
        measured = number(name_of(value, ()))
        if measured is None:
            raise Unfit("has a label that is no number")
        return answer["score"], measured
    else:
        label = label_of(value, known)
        wanted = [label] if isinstance(label, str) else label
    if strange := set(wanted) - set(way.names):
        unknown.update(strange)
        raise _Strange
    return answer, wanted


def _judge(way: Way, pairs: Sequence[tuple[Any, Any]], found: Found) -> None:
    said, wanted = [p[0] for p in pairs], [p[1] for p in pairs]
    if isinstance(way, Answers):
        found.numbers |= answer_metrics(said, wanted)
    elif isinstance(way, Hears):
        found.numbers |= error_rates(said, wanted)
    elif isinstance(way, Writes):
        found.numbers |= text_metrics(said, wanted)
    elif isinstance(way, Classes) and way.kind == NUMBER:
        found.numbers |= number_metrics(said, wanted)
    elif isinstance(way, Classes) and way.kind == MANY:
        sides = [
            [[n in labels for n in way.names] for labels in side] for side in ([a["labels"] for a in said], wanted)
        ]
        found.numbers |= label_metrics(*sides)
        hits = [(n, [(s[i], w[i]) for s, w in zip(*sides, strict=True)]) for i, n in enumerate(way.names)]
        found.classes = [
            _line(n, sum(s and w for s, w in p), sum(s for s, _ in p), sum(w for _, w in p)) for n, p in hits
        ]
    elif isinstance(way, Tags):
        flat = [(t, w) for a, ws in pairs for t, w in zip(a["tags"], ws, strict=True) if t is not None]
        _classes(way.names, [t for t, _ in flat], [w for _, w in flat], found)
        if has_entities(way.names):
            found.numbers["entity_f1"] = entity_f1([[t or "O" for t in a["tags"]] for a in said], wanted)
    else:
        losses = [-math.log(max(a["scores"][w[0]], 1e-45)) for a, w in pairs]
        found.numbers["loss"] = sum(losses) / len(losses)
        _classes(way.names, [a["label"] for a in said], [w[0] for w in wanted], found)


def _classes(names: Sequence[str], said: Sequence[str], wanted: Sequence[str], found: Found) -> None:
    at = {name: i for i, name in enumerate(names)}
    found.numbers |= class_metrics([at[s] for s in said], [at[w] for w in wanted])
    counts = Counter(zip(wanted, said, strict=True))
    found.confusion = [[counts[w, s] for s in names] for w in names]
    named, asked = Counter(said), Counter(wanted)
    found.classes = [_line(n, counts[n, n], named[n], asked[n]) for n in names]


def _line(name: str, hits: int, said: int, wanted: int) -> dict[str, Any]:
    f1 = 2 * hits / (said + wanted) if said + wanted else 0.0
    share = (hits / said if said else 0.0, hits / wanted if wanted else 0.0)
    return {"class": name, "precision": share[0], "recall": share[1], "f1": f1, "rows": wanted}


def draw_confusion(found: Found, path: Path) -> bool:
    """Wanted classes downwards, found ones to the right, darker where there is more of a class; False without matplotlib."""
    names = [row["class"] for row in found.classes]
    side = max(4.0, min(14.0, 0.45 * len(names) + 2.5))
    figure = new_figure(side + 0.6, side)
    if figure is None:
        return False
    axes = figure.subplots()
    shares = [[n / max(1, sum(row)) for n in row] for row in found.confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(found.confusion if len(names) <= MOST else []):
        for j, n in enumerate(row):
            if n:
                axes.text(j, i, str(n), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "#222222")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="found", ylabel="wanted", title=f"{found.rows} rows, accuracy {found.numbers['accuracy']:.3f}")
    return write_figure(figure, path, dpi=120)


# ---- the loss of text -----------------------------------------------------------------------------------------------


def evaluate_text(found: Trained, source: Source, model: Any, tokenizer: Any, batch: int, columns: Any) -> Found:
    """Mean loss (nats) over the tokens that training learns of such rows, and its perplexity. Raises: RecipeError."""
    recipe = found.recipe
    if found.trainer == "causal_lm":
        made, tally = _features(found, source, tokenizer, columns)
        cut = slice(None)
    else:
        recipe = replace(recipe, trainer="sft")
        arguments = training_arguments(recipe, bf16=False, fp16=False, use_cpu=True)
        made = text_rows.shape(
            source, "sft", columns, recipe["dataset_text_field"], None, lambda: bool(tokenizer.chat_template)
        )
        made, tally = tokens.tokenized(made, source, tokenizer, arguments, "eval_dataset")
        most = arguments.max_length
        cut = slice(-most, None) if most and arguments.truncation_mode == "keep_end" else slice(None, most)
    total, count = 0.0, 0
    for begin in range(0, len(made), batch):
        part = made[begin : begin + batch]
        loss, learned = _loss(model, [i[cut] for i in part["input_ids"]], [i[cut] for i in part["labels"]])
        total, count = total + loss, count + learned
    mean = total / count
    numbers = {"loss": mean, "perplexity": math.exp(min(mean, 700)), "tokens": float(count)}
    return Found(numbers, len(made), left=Counter(tally.dropped))


@torch.no_grad()
def _loss(model: Any, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> tuple[float, int]:
    """The sum of the losses of a batch, and how many tokens it is of."""
    long, device = max(map(len, ids)), next(model.parameters()).device

    def padded(lists: Any, value: int) -> torch.Tensor:
        return torch.tensor([[*line, *[value] * (long - len(line))] for line in lists], device=device)

    mask = padded([[1] * len(line) for line in ids], 0)
    logits = model(input_ids=padded(ids, 0), attention_mask=mask).logits.float()
    wanted = padded(labels, NOT_LEARNED)[:, 1:].flatten()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=NOT_LEARNED, reduction="sum")
    return float(loss), int((wanted != NOT_LEARNED).sum())


def _features(found: Trained, source: Source, processing: Any, columns: Any) -> tuple[Any, Any]:
    task = found.recipe.task
    assert task is not None
    rows = shape(source, task, columns)
    head = Head(("reward",) if found.recipe.row.one_number else (), {}, dict(found.task))
    return task.features(rows, Part(found.recipe, "eval_dataset", source, processing, head))


# ---- what its trainer measures --------------------------------------------------------------------------------------


def evaluate_by_trainer(found: Trained, source: Source, model: Any, tokenizer: Any, batch: int, columns: Any) -> Found:
    """What the trainer measures of held-out rows: of pairs the margin of rewards (by the reward model, or against the base by
    log-probabilities) and how many are in the right order. Raises: RecipeError."""
    rows, tally = _features(found, source, tokenizer, columns)
    setup = Setup(found.recipe, tokenizer, rows, rows, rows, Head(), sources=(source, source))
    with tempfile.TemporaryDirectory() as folder:
        more = {"report_to": "none", "push_to_hub": False, "output_dir": folder, "per_device_eval_batch_size": batch}
        trainer = make_trainer(setup, model, bf16=False, fp16=False, gradient_checkpointing=False, **more)
        measured = trainer.evaluate()
    timing = ("runtime", "per_second", "num_tokens", "epoch", "preparation_time")
    numbers = {k.removeprefix("eval_"): v for k, v in measured.items() if not any(word in k for word in timing)}
    return Found(numbers, len(rows), left=Counter(tally.dropped))


def harness_line(found: Trained) -> str | None:
    """The command of lm-evaluation-harness for this folder; None of models that it does not ask."""
    if not found.kind.endswith(("CausalLM", "LMHeadModel")) or found.quant is not None or is_saved(found.place):
        return None
    said = f"pretrained={found.place}" + (f",peft={found.folder}" if found.base else "")
    return f"lm_eval --model hf --model_args {shlex.quote(said)} --tasks TASK"


def is_preferred(found: Trained, columns: Collection[str]) -> bool:
    """Whether rows are preferences (pairs, or answers liked or not), which its trainer measures by a loss of its own."""
    row, task = found.recipe.row, found.recipe.task
    own = row.evaluates and not row.alone and not row.writes
    return own and task is not None and bool(form_of(task, list(columns)))

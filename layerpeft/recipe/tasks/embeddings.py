"""Texts that are to be near to each other or far, as rows of sentence-transformers: a vector for each text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerpeft.errors import Problem, RecipeError, told
from layerpeft.integrations import sentences
from layerpeft.integrations.code import named as file_named
from layerpeft.recipe import tokens
from layerpeft.recipe.beside import losses
from layerpeft.recipe.beside.losses import ALIKE, CLASS, NEGATIVES, PAIR, SCORED
from layerpeft.recipe.model import allow, code, loading, model_config, model_path
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source, Unfit
from layerpeft.recipe.tasks import cell
from layerpeft.recipe.tasks.labels import name_of, number
from layerpeft.recipe.tasks.metrics import spearman
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import MODEL, encoded, longest, needs, tokenizer
from layerpeft.text import some

TEXTS = ("anchor", "positive", *NEGATIVES, "sentence1", "sentence2", "sentence")
FLAGS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
AMONG = 1000  # candidates of which the nearest is looked for
Vectors = Callable[[Sequence[str], str], Any]  # of texts of a column: (texts, numbers of a vector), each of length 1


def auto_name(recipe: Recipe) -> str:
    """transformers' class for the model: of one that reads and writes the half that reads. Raises: RecipeError without one."""
    import transformers

    config = model_config(recipe)
    if not getattr(config, "is_encoder_decoder", False):
        return "AutoModel"
    name = f"{type(config).__name__.removesuffix('Config')}EncoderModel"
    needs(recipe, hasattr(transformers, name), "a model that reads alone, or has a class for its encoder")
    return name


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """The texts of a row in the order in which losses read them, and its `score`, or its `label` as a text."""
    found: dict[str, Any] = {name: cell.text(name, cells[name], empty=False) for name in TEXTS if name in cells}
    if "score" in cells:
        score = number(cell.text("score", cells["score"]))
        if score is None:
            raise Unfit(f"has the score {cells['score']!r}, which is no number")
        return {**found, "score": score}
    if "label" not in cells:
        return found
    label = name_of(cells["label"], known.classes("label"))
    if "sentence1" in found and str(cells["label"]).strip().lower() not in FLAGS:
        raise Unfit(
            f"has the label {cells['label']!r}, which is neither 1 (alike) nor 0; a number that is more or less is a `score`"
        )
    return {**found, "label": str(cells["label"]).strip().lower() if "sentence1" in found else label}


def with_limit(recipe: Recipe, rows: Any) -> Any:
    """The model's tokenizer, reading as far as the model of sentence-transformers was made for. Raises: RecipeError for a model
    whose first module is no transformer."""
    place = model_path(recipe)
    first = next((kind for kind, _ in sentences.modules_of(place)), "Transformer").rpartition(".")[2]
    needs(recipe, first == "Transformer", f"a transformer as its first module (it is {first})")
    _admit(recipe, place)
    found = tokenizer(recipe)
    limit = sentences.longest_in(place)
    if limit is not None:
        found.model_max_length = min(limit, found.model_max_length)
    return found


def _admit(recipe: Recipe, place: str) -> None:
    """Names the code of modules that are not the library's, which is about to run. Raises: RecipeError where it may not."""
    foreign = sentences.foreign_modules(place)
    if foreign and not recipe["trust_remote_code"]:
        text = f"modules.json names code that is not sentence-transformers' ({some(foreign)}); trust_remote_code: true lets it run"
        raise RecipeError(Problem((MODEL,), f"{MODEL}: {text}"))
    files = [file_named(path) for path in sorted(Path(place).glob("**/*.py"))] if foreign else []
    allow("trust_remote_code", "trust_remote_code: true", files + foreign)


def head(recipe: Recipe, train: Any, source: Source, processing: Any = None) -> Head:
    """What the rows are. Raises: RecipeError where the loss is for others."""
    if wrong := losses.fitting(recipe.get(losses.KEY), train.column_names):
        raise RecipeError(Problem((losses.KEY,), f"{losses.KEY}: {wrong}"))
    return Head(about={"rows": list(losses.form_of(train.column_names))})


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """The texts as they are, which a collator turns into tokens, and a number as `label`. Raises: RecipeError where held-out rows
    are others than those of training."""
    form = losses.form_of(part.column_names)
    if (wanted := given.head.about.get("rows")) and list(form) != wanted:
        text = f"the rows have {' + '.join(part.column_names)}, and those of training {' + '.join(wanted)}"
        raise RecipeError(Problem((given.key,), f"{given.key}: {text}"))
    limit = longest(given.recipe, given.processing)
    names = {name: i for i, name in enumerate(sorted(set(part["label"])))} if form == CLASS else FLAGS
    texts = [name for name in part.column_names if name in TEXTS]

    def encode(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        sizes = [len(given.processing(row[name], verbose=False)["input_ids"]) for name in texts]
        fate = tokens.NO_TEXT if not all(sizes) else "cut" if limit is not None and max(sizes) > limit else ""
        more = {"label": row["score"]} if "score" in row else {"label": names[row["label"]]} if "label" in row else {}
        return {**{name: row[name] for name in texts}, **more}, fate

    made, tally = encoded(part, given, encode)
    return made.select_columns([*texts, *(name for name in made.column_names if name not in texts)]), tally


# ---- training and measuring -----------------------------------------------------------------------------------------


def held_by(recipe: Recipe, model: Any, place: str, limit: int | None, padding: str | None = None) -> Any:
    """A SentenceTransformer around the model. Raises: RecipeError where the modules that lie beside it cannot be read."""
    options: dict[str, Any] = {"revision": loading(recipe).get("revision"), **code(recipe)}
    try:
        made = sentences.around(model, place, **options)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        text = f"sentence-transformers cannot read what lies beside the model ({told(error, 300)})"
        raise RecipeError(Problem((MODEL,), f"{MODEL}: {text}")) from error
    if made.tokenizer.pad_token is None:
        made.tokenizer.pad_token = padding
    if limit is not None:
        made.max_seq_length = limit
    return made


def trainer(setup: Any, model: Any) -> dict[str, Any]:
    """The model within its SentenceTransformer, a loss around that, and what is measured besides."""
    recipe, limit = setup.recipe, longest(setup.recipe, setup.tokenizer)
    held = held_by(recipe, model, model_path(recipe), limit, setup.tokenizer.pad_token)
    loss = losses.made(recipe.get(losses.KEY), held, tuple(setup.learned.about["rows"]))
    return {"model": held, "loss": loss, "judge": judge}


def judge(held: Any, rows: Any, arguments: Any) -> dict[str, float]:
    """Numbers of held-out rows, by the vectors of their texts. `arguments`: of the trainer, with its `prompts`."""
    return measured(rows, vectors_of(held, arguments.prompts, arguments.eval_batch_size))


def vectors_of(held: Any, prompts: Any, batch: int) -> Vectors:
    """What makes vectors of texts, `batch` at a time, each after the prompt of its column (or of all)."""

    def vectors(texts: Sequence[str], column: str) -> Any:
        prompt = prompts.get(column) if isinstance(prompts, Mapping) else prompts
        options = {"batch_size": batch, "show_progress_bar": False, "normalize_embeddings": True}
        return held.encode(list(texts), prompt=prompt, convert_to_tensor=True, **options).float()

    return vectors


def measured(rows: Any, vectors: Vectors) -> dict[str, float]:
    """Spearman's correlation of cosines with scores or labels; of other rows how often the nearest of `AMONG` texts is the right
    one: that of the row, or one of its class."""
    names = rows.column_names
    if "sentence1" in names:
        one, other = (vectors(rows[name], name) for name in ("sentence1", "sentence2"))
        return {"spearman": spearman((one * other).sum(-1).tolist(), [float(v) for v in rows["label"]])}
    hits = total = 0
    for begin in range(0, len(rows), AMONG):
        part = rows[begin : begin + AMONG]
        found = _classes(part, vectors) if "sentence" in names else _nearest(part, vectors)
        hits, total = hits + sum(found), total + len(found)
    return {"recall@1": hits / total} if total else {}


def _nearest(part: Mapping[str, Sequence[str]], vectors: Vectors) -> list[bool]:
    """Whether the text nearest to each anchor, of all that rows hold besides, is its own."""
    texts = {text: name for name in part if name in ("positive", *NEGATIVES) for text in part[name]}
    candidates = [*texts]
    among = vectors(candidates, "positive")
    best = (vectors(part["anchor"], "anchor") @ among.T).argmax(-1).tolist()
    return [candidates[index] == wanted for index, wanted in zip(best, part["positive"], strict=True)]


def _classes(part: Mapping[str, Any], vectors: Vectors) -> list[bool]:
    """Whether the text nearest to each is of its class, for those that are not alone in theirs."""
    labels, made = part["label"], vectors(part["sentence"], "sentence")
    near = made @ made.T
    near.fill_diagonal_(-2)
    best = near.argmax(-1).tolist() if len(labels) > 1 else []
    return [labels[i] == label for i, label in zip(best, labels) if labels.count(label) > 1]


def measure(head: Head) -> str:
    return "eval_spearman" if head.about["rows"] in (list(SCORED), list(ALIKE)) else "eval_recall@1"


def write(trainer: Any, folder: Path) -> None:
    """Pooling and what else the modules are, beside the adapter."""
    sentences.write_parts(trainer.model, folder)


TASK = Task(
    forms=(PAIR, SCORED, ALIKE, CLASS),
    more=NEGATIVES,
    example={"anchor": "{question}", "positive": "{answer}"},
    row=row,
    types={"score": "number"},
    processing=with_limit,
    head=head,
    features=features,
    trainer=trainer,
    measure=measure,
    write=write,
)

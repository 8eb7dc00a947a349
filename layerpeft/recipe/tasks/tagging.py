"""Words and a tag for each: names in a text, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerpeft.recipe import tokens
from layerpeft.recipe.model import model_config
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source, Unfit
from layerpeft.recipe.tasks import cell, labels
from layerpeft.recipe.tasks.metrics import class_metrics, entity_f1, has_entities
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import encoded, longest, needs, tokenizer

TAGS = ("tags", "ner_tags", "pos_tags", "labels")
NOT_LEARNED = -100


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`tokens`, the words, and `tags`, one name for each."""
    column = next(name for name in TAGS if name in cells)
    words, tags = cell.listed("tokens", cells["tokens"]), cell.listed("tags", cells[column])
    if not words:
        raise Unfit("has no tokens")
    if len(words) != len(tags):
        raise Unfit(f"has {len(words)} words and {len(tags)} tags ({column}); each word has one")
    for number, (word, tag) in enumerate(zip(words, tags, strict=True), 1):
        if not isinstance(word, str) or not word.strip():
            raise Unfit(
                f"has a word (tokens, number {number}) that is {'empty' if isinstance(word, str) else repr(word)}"
            )
        if tag is None or tag == "":
            raise Unfit(f"has no tag ({column}) for its word {number} ({word!r})")
        cell.text("tokens", word)
    return {"tokens": words, "tags": [labels.name_of(tag, known.classes(column), "tag") for tag in tags]}


def head(recipe: Recipe, train: Any, source: Source, processing: Any = None) -> Head:
    """The names of tags; "O" comes first."""
    declared = () if recipe["columns"] else next((found for name in TAGS if (found := source.classes(name))), ())
    found = {tag for tags in train["tags"] for tag in tags}
    return Head(labels.ordered(found, declared, model_config(recipe), "O"))


def processing(recipe: Recipe, rows: Any) -> Any:
    """A tokenizer that takes words one by one. Raises: RecipeError where it cannot say which token is of which word."""
    found = tokenizer(recipe)
    needs(recipe, found.is_fast, "a fast tokenizer (tokenizer.json), which knows the word of each token")
    return found


def words_as_tokens(words: Sequence[str], tokenizer: Any, limit: int | None) -> Any:
    """Token ids of words, whose `word_ids()` say the word of each. A tokenizer in whose tokens the blank before a word lies
    gets that blank."""
    first = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
    spaced = first if _keeps_blanks(tokenizer) else list(words)
    return tokenizer(spaced, is_split_into_words=True, truncation=limit is not None, max_length=limit, verbose=False)


def _keeps_blanks(tokenizer: Any) -> bool:
    """Whether "a b" is other tokens than "a" and "b", and "a" and " b" together are the same ones."""
    whole = tokenizer("a b", add_special_tokens=False)["input_ids"]
    apart = [t for word in ("a", "b") for t in tokenizer(word, add_special_tokens=False)["input_ids"]]
    spaced = [t for word in ("a", " b") for t in tokenizer(word, add_special_tokens=False)["input_ids"]]
    return whole != apart and whole == spaced


def features(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """Token ids; the first token of a word has the number of its tag, all others teach nothing."""
    names = {name: i for i, name in enumerate(given.head.labels)}
    labels.refuse_strange(given.key, "tags", part["tags"], names, given.source)
    limit = longest(given.recipe, given.processing)

    def encode(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        ids = words_as_tokens(row["tokens"], given.processing, limit)
        of = ids.word_ids()
        firsts = [w is not None and (i == 0 or of[i - 1] != w) for i, w in enumerate(of)]
        learned = [names[row["tags"][w]] if f else NOT_LEARNED for w, f in zip(of, firsts)]
        fate = "" if any(firsts) else tokens.NO_TEXT
        fate = (
            "cut"
            if fate == "" and max(w for w in of if w is not None) < len(row["tokens"]) - 1 and limit is not None
            else fate
        )
        return {**ids, "labels": learned}, fate

    return encoded(part, given, encode)


def trainer(setup: Any, model: Any) -> dict[str, Any]:
    """The collator pads labels, too; a word counts once, by its first token."""
    from transformers import DataCollatorForTokenClassification

    names = setup.learned.labels

    def metrics(prediction: Any) -> dict[str, float]:
        pairs = [
            (f[w != NOT_LEARNED].tolist(), w[w != NOT_LEARNED].tolist())
            for f, w in zip(prediction.predictions, prediction.label_ids)
        ]
        found = class_metrics([f for fs, _ in pairs for f in fs], [w for _, ws in pairs for w in ws])
        if has_entities(names):
            tags = [[[names[i] for i in side] for side in pair] for pair in pairs]
            found["entity_f1"] = entity_f1([f for f, _ in tags], [w for _, w in tags])
        return found

    return {
        "data_collator": DataCollatorForTokenClassification(setup.tokenizer),
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }


TASK = Task(
    forms=tuple(("tokens", name) for name in TAGS),
    example={"tokens": "{words}", "tags": "{ner}"},
    row=row,
    types={"tokens": "texts", "tags": "texts"},
    processing=processing,
    head=head,
    features=features,
    trainer=trainer,
    new_head=True,
    measure=lambda head: "eval_entity_f1" if has_entities(head.labels) else "eval_macro_f1",
)

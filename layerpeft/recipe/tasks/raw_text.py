"""Plain text, of which a model learns the next token (joined into blocks), or those that were masked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from layerpeft.recipe import tokens
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.rows import Source
from layerpeft.recipe.tasks import cell
from layerpeft.recipe.tasks.task import Head, Known, Part, Task
from layerpeft.recipe.tasks.tokenizing import encoded, left, longest, needs, tokenizer


def row(cells: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """`text`."""
    return {"text": cell.text("text", cells["text"])}


def head(recipe: Recipe, train: Any, source: Source, processing: Any = None) -> Head:
    return Head()


# ---- the next token -------------------------------------------------------------------------------------------------


def blocks(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """All texts one after the other, each with an end, in blocks of `max_length` tokens; the last one is shorter."""
    limit, end = longest(given.recipe, given.processing), given.processing.eos_token_id
    ids = [given.processing(text, verbose=False)["input_ids"] if text.strip() else [] for text in part["text"]]
    fates = ["" if found else tokens.NO_TEXT for found in ids]
    ends = [end] if end is not None else []
    whole = [found if found[-1:] == ends else [*found, *ends] for found in ids if found]
    if limit is not None:
        joined = [token for found in whole for token in found]
        whole = [joined[i : i + limit] for i in range(0, len(joined), limit)]
    whole = [found for found in whole if len(found) > 1]  # of one token nothing is learned
    _, tally = left(part, fates if whole else [tokens.NO_LABEL] * len(fates), given, lambda kept: part)
    import datasets

    kind = datasets.List(datasets.Value("int64"))
    names = ("input_ids", "attention_mask", "labels")
    return datasets.Dataset.from_list(
        [{"input_ids": found, "attention_mask": [1] * len(found), "labels": found} for found in whole],
        features=datasets.Features(dict.fromkeys(names, kind)),
    ), tally


def padded(setup: Any, model: Any) -> dict[str, Any]:
    """The collator pads; what it adds teaches nothing, and an end does, be it the token that pads or not."""
    from transformers import DataCollatorForSeq2Seq

    return {"data_collator": DataCollatorForSeq2Seq(setup.tokenizer)}


NEXT = Task(
    forms=(("text",),), example={"text": "{article}"}, row=row, types={}, processing=tokenizer, head=head, features=blocks,
    trainer=padded,
)  # fmt: skip


# ---- tokens that were masked ----------------------------------------------------------------------------------------


def with_mask(recipe: Recipe, rows: Any) -> Any:
    """A tokenizer with a token that masks. Raises: RecipeError for any other."""
    found = tokenizer(recipe)
    needs(recipe, found.mask_token is not None, "a mask token in the tokenizer")
    return found


def texts(part: Any, given: Part) -> tuple[Any, tokens.Tally]:
    """Token ids; of held-out rows some are masked here, so that they are the same before and after."""
    limit = longest(given.recipe, given.processing)
    special = set(given.processing.all_special_ids)
    mask = Masking(given.recipe, given.processing) if given.key != "dataset_name" else None

    def encode(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        ids = given.processing(row["text"], verbose=False)
        fate = "" if set(ids["input_ids"]) - special else tokens.NO_TEXT
        if limit is not None and len(ids["input_ids"]) > limit:
            ids, fate = given.processing(row["text"], truncation=True, max_length=limit), fate or "cut"
        if mask is None or fate == tokens.NO_TEXT:
            return ids, fate
        made = mask([dict(ids)])
        return {**ids, "input_ids": made["input_ids"][0].tolist(), "labels": made["labels"][0].tolist()}, fate

    return encoded(part, given, encode)


class Masking:
    """Pads, and masks a share of the tokens: which ones hangs on the seed, the epoch and the rows of the batch alone, so that a run
    that is resumed, or that reads ahead, masks as any other. Rows with labels were masked before."""

    def __init__(self, recipe: Any, tokenizer: Any) -> None:
        from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=recipe["mlm_probability"])
        self.pad, self.seed, self.trainer = DataCollatorForSeq2Seq(tokenizer), recipe["seed"], None

    def follow(self, trainer: Any) -> None:
        """Goes by the epoch in which this trainer is."""
        self.trainer = trainer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        if "labels" in rows[0]:
            return self.pad(rows)
        epoch = int(self.trainer.state.epoch or 0) if self.trainer is not None else -1
        said = f"{self.seed} {epoch} {[list(row['input_ids']) for row in rows]}"
        number = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=7).digest(), "big")
        self.mask.generator = torch.Generator().manual_seed(number)
        return self.mask(rows)


def masking(setup: Any, model: Any) -> dict[str, Any]:
    """The collator masks anew in every epoch."""
    return {"data_collator": Masking(setup.recipe, setup.tokenizer)}


MASKED = Task(
    forms=(("text",),), example={"text": "{article}"}, row=row, types={}, processing=with_mask, head=head, features=texts,
    trainer=masking,
)  # fmt: skip

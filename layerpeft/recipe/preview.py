"""`layerpeft preview`: rows as the model will see them, from the batches of the recipe's own trainer; no weight is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import pairwise
from typing import Any

from layerpeft.recipe.calls import calls_of
from layerpeft.recipe.gathered import digest
from layerpeft.recipe.recipe import Recipe
from layerpeft.recipe.tasks.written import texts
from layerpeft.recipe.tokens import WHAT, Tally
from layerpeft.recipe.trainer import Setup, prepare, tokenized
from layerpeft.recipe.trainers.row import Row

IDS, NOT_LEARNED = "input_ids", -100


@dataclass(frozen=True)
class Part:
    """One sequence of token ids without its padding. `learned`: which of them carry loss (empty: it is
    no matter of tokens); `starts`: where rows begin that are
    packed into it, but for the first; `cut`: what max_length took from its end, or from its start (`before`)."""

    name: str
    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    starts: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    before: bool = False


@dataclass(frozen=True)
class Shown:
    """A row of a batch: its sequences, and in words what else goes with it."""

    parts: tuple[Part, ...]
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preview:
    """Rows of the first batches in the order of training; what became of all rows, and how many are `copies` of others, by
    `training` and `held-out`; `packed`: into how many sequences."""

    tokenizer: Any
    shown: tuple[Shown, ...]
    counts: Mapping[str, Tally]
    copies: Mapping[str, int]
    packed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        decode = self.tokenizer.decode if hasattr(self.tokenizer, "decode") else str
        rows = [
            {
                "facts": list(row.facts),
                "parts": [
                    {
                        "name": part.name, "text": decode(list(part.ids)), "tokens": list(part.ids), "learned": list(part.learned),
                        "starts": list(part.starts), "cut": decode(list(part.cut)) if part.cut else "", "cut_tokens": len(part.cut),
                    }
                    for part in row.parts
                ],
            }
            for row in self.shown
        ]  # fmt: skip
        counts = {
            what: {
                "read": found.read, "left": found.kept, "cut": found.cut, "blank": found.blank, "dropped": dict(found.dropped),
                "copies": self.copies.get(what, 0), "max_length": found.max_length, "first": found.first,
            }
            for what, found in self.counts.items()
        }  # fmt: skip
        return {"rows": rows, "counts": counts, "packed": self.packed}


def preview(recipe: Recipe, rows: int = 3) -> Preview:
    """The first `rows` of a training, and what becomes of all. Raises: RecipeError as training would before its first step."""
    setup = prepare(recipe)
    parts = zip(WHAT.values(), (setup.train, setup.held_out), strict=True)
    copies = {what: len(part) - len({digest(row) for row in part}) for what, part in parts if part is not None}
    setup = tokenized(setup)
    shown, packed = _without_trainer(setup, rows) if recipe.row.beside else _collated(setup, rows)
    return Preview(setup.tokenizer, shown, setup.counts, copies, packed)


def _collated(setup: Setup, rows: int) -> tuple[tuple[Shown, ...], int | None]:
    """What the trainer's own loader gives. A trainer makes its output folder when it is built, so that is another here."""
    with tempfile.TemporaryDirectory() as folder:
        return _loaded(setup, rows, folder)


def _loaded(setup: Setup, rows: int, folder: str) -> tuple[tuple[Shown, ...], int | None]:
    recipe = setup.recipe
    workers = {"dataloader_num_workers": 0, "dataloader_prefetch_factor": None, "dataloader_persistent_workers": False}
    quiet = replace(recipe, values={**recipe.values, **workers, "output_dir": folder})
    trainer = calls_of(replace(setup, recipe=quiet)).trainer
    seen: list[Sequence[Any]] = []
    own = trainer.data_collator

    @wraps(own)
    def collate(features: Sequence[Any]) -> Any:
        seen.append([dict(feature) for feature in features if isinstance(feature, Mapping)])
        return own(features)

    trainer.data_collator = collate
    shown: list[Shown] = []
    for number, batch in enumerate(trainer.get_train_dataloader()):
        found = rows_of(batch, recipe.row, setup.labels)
        features = seen[number] if len(seen[number]) == len(found) else [{}] * len(found)
        shown += [_with_cut(row, one, setup) for row, one in zip(found, features, strict=True)]
        if len(shown) >= rows:
            break
    packs = getattr(trainer.args, "packing", False)
    return tuple(shown[:rows]), len(trainer.train_dataset) if packs else None


def _without_trainer(setup: Setup, rows: int) -> tuple[tuple[Shown, ...], None]:
    """Of a trainer with rewards or a teacher, which are models of their own: its rows, as it begins with them."""
    shown = []
    for row in setup.train.select(range(min(rows, len(setup.train)))):
        if IDS in row:
            part = Part("", tuple(row[IDS]), tuple(map(bool, row["completion_mask"])))
        else:
            chat = {"add_special_tokens": False} if isinstance(row["prompt"], list) else {}
            ids = setup.tokenizer(texts(row, (), setup.tokenizer)[0], verbose=False, **chat)[IDS]
            part = Part("prompt", tuple(ids), ())
        facts = () if IDS in row else ("the model answers in training",)
        shown.append(Shown((part,), facts))
    return tuple(shown), None


def rows_of(batch: Mapping[str, Any], row: Row, labels: Sequence[str] = ()) -> list[Shown]:
    """The rows of a batch as collated; of pairs in one tensor the chosen ones come first."""
    apart = {"decoder_input_ids", *(("prompt_input_ids",) * ("chosen_input_ids" in batch))}  # stand in others, too
    sequences = [k for k, v in batch.items() if k.endswith(IDS) and k not in apart and getattr(v, "ndim", 0) == 2]
    found: list[list[Part]] = []
    for key in sequences:
        made = [_part(batch, key, index, row) for index in range(len(batch[key]))]
        if row.each == 2 and key == IDS:
            half = len(made) // 2
            made_pairs = zip(made[:half], made[half:], strict=True)
            found = [[replace(a, name="chosen"), replace(b, name="rejected")] for a, b in made_pairs]
            continue
        found = [[*(found[index] if found else ()), part] for index, part in enumerate(made)]
    if _is_target(batch):
        target = [[i for i in ids if i != NOT_LEARNED] for ids in batch["labels"].tolist()]
        made = [Part("target", tuple(ids), (True,) * len(ids)) for ids in target]
        found = [[*(found[index] if found else ()), part] for index, part in enumerate(made)]
    facts = _facts(batch, labels)
    count = len(found) or max((len(lines) for lines in facts.values()), default=0)
    return [
        Shown(
            tuple(found[index]) if found else (),
            tuple(lines[index] for lines in facts.values() if len(lines) == count),
        )
        for index in range(count)
    ]


def _is_target(batch: Mapping[str, Any]) -> bool:
    """Whether labels are a text of their own, and no marks on the one that is read."""
    labels, ids = batch.get("labels"), batch.get(IDS)
    if labels is None or getattr(labels, "ndim", 0) != 2 or labels.is_floating_point():
        return False
    return ids is None or ids.shape != labels.shape or "decoder_input_ids" in batch


def _part(batch: Mapping[str, Any], key: str, index: int, row: Row) -> Part:
    prefix = key.removesuffix(IDS)
    ids = batch[key][index].tolist()
    mask, labels, answered = (batch.get(f"{prefix}{name}") for name in ("attention_mask", "labels", "completion_mask"))
    learned: list[bool] = []
    if labels is not None and labels.shape == batch[key].shape and not (prefix == "" and _is_target(batch)):
        learned = [label != NOT_LEARNED for label in labels[index].tolist()]
    elif answered is not None and answered.shape == batch[key].shape:
        learned = [bool(flag) for flag in answered[index].tolist()]
    where, starts = batch.get("position_ids"), []
    if where is not None and getattr(where, "shape", None) == batch[key].shape:
        starts = [i for i, place in enumerate(where[index].tolist()) if place == 0 and i]
    kept = [True] * len(ids)
    if mask is not None and mask.shape == batch[key].shape:
        kept = [bool(flag) for flag in mask[index].tolist()]
    if "CausalLM" in row.model:
        learned = [flag and i > 0 and i not in starts for i, flag in enumerate(learned)]  # the first follows nothing
    places = [i for i, keep in enumerate(kept) if keep]
    number = {place: i for i, place in enumerate(places)}
    return Part(
        prefix.removesuffix("_"),
        tuple(ids[i] for i in places),
        tuple(learned[i] for i in places if learned),
        tuple(number[i] for i in starts if i in number and not _padded(ids, i, starts, kept)),
    )


def _padded(ids: Sequence[int], start: int, starts: Sequence[int], kept: Sequence[bool]) -> bool:
    """Whether nothing but padding begins here."""
    end = next((b for a, b in pairwise([*starts, len(ids)]) if a == start), len(ids))
    return not any(kept[start:end])


def _facts(batch: Mapping[str, Any], labels: Sequence[str]) -> dict[str, list[str]]:
    """In words, by key: what is no sequence of tokens, a line for each row."""
    found = {}
    for key, value in batch.items():
        shape = getattr(value, "shape", None)
        if shape is None and key in ("label", "labels") and isinstance(value, list):
            found[key] = [f"{key}: {item}" for item in value]
        elif shape is None or not len(shape) or key.endswith((IDS, "attention_mask", "completion_mask")):
            continue
        elif key in ("label", "labels") and len(shape) == 1:
            found[key] = [f"label: {_named(item, labels)}" for item in value.tolist()]
        elif key == "labels" and value.is_floating_point() and len(labels) == shape[1]:
            found[key] = [
                f"labels: {', '.join(n for n, on in zip(labels, item) if on) or 'none'}" for item in value.tolist()
            ]
        elif value.is_floating_point() and len(shape) > 1:
            found[key] = [f"{key}: {' × '.join(map(str, shape[1:]))} numbers"] * shape[0]
    return found


def _named(label: Any, labels: Sequence[str]) -> str:
    return f"{label} ({labels[label]})" if isinstance(label, int) and 0 <= label < len(labels) else str(label)


def _with_cut(row: Shown, feature: Mapping[str, Any], setup: Setup) -> Shown:
    """With what max_length took, told by the whole row."""
    limit = setup.recipe.get("max_length")
    if limit is None or any(part.starts for part in row.parts):
        return row
    return replace(row, parts=tuple(_cut(part, _whole(part, feature, setup, limit)) for part in row.parts))


def _whole(part: Part, feature: Mapping[str, Any], setup: Setup, limit: int) -> Sequence[int]:
    """The token ids of the row that a sequence was cut from; those of the sequence where nothing tells."""
    prompt = feature.get("prompt_ids")
    for key in (f"{part.name}_ids", "completion_ids"):
        if prompt is not None and key in feature:
            return [*prompt, *feature[key]]
    train = setup.train
    if len(part.ids) < limit or IDS not in getattr(train, "column_names", ()):
        return part.ids
    own = list(part.ids)
    for batch in train.iter(1000):
        for ids in batch[IDS]:
            if len(ids) > len(own) and (ids[: len(own)] == own or ids[-len(own) :] == own):
                return ids
    return part.ids


def _cut(part: Part, whole: Sequence[int]) -> Part:
    size = len(part.ids)
    if len(whole) <= size:
        return part
    if tuple(whole[:size]) == part.ids:
        return replace(part, cut=tuple(whole[size:]))
    return replace(part, cut=tuple(whole[:-size]), before=True) if tuple(whole[-size:]) == part.ids else part

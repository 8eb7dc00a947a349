"""What `train`, `score` and `compare` share: rows, model, batches to measure on, a wrapped model, a trainer, a measure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import peft
from torch import nn

from layerpeft.errors import Problem, RecipeError
from layerpeft.model.layers import base_of
from layerpeft.quantization.apply import MARKS, Quantized
from layerpeft.quantization.load import load_quantized
from layerpeft.quantization.save import is_saved, load_saved
from layerpeft.recipe import rows
from layerpeft.recipe.model import auto_class, code, from_hub, model_config, model_path
from layerpeft.recipe.recipe import Recipe, layer_config, training_arguments
from layerpeft.selection.schedule import scoreless
from layerpeft.selection.scoring import live_only, needs_batches
from layerpeft.selection.select import DEFAULT_BATCHES
from layerpeft.tuners.load import early
from layerpeft.tuners.precision import batches_wanted


@dataclass(frozen=True)
class Setup:
    """A recipe with its tokenizer and rows. `examples`: held-out rows as text; `labels`: class names by number.
    `ready` says that the rows went through a trainer's preparation once (truncated, packed) and must not again."""

    recipe: Recipe
    tokenizer: Any
    train: Any
    held_out: Any | None
    examples: Any | None
    labels: tuple[str, ...] = ()
    ready: bool = False

    @property
    def head(self) -> tuple[tuple[str, ...], int | None]:
        """What rows and tokenizer say of a classification head: its classes, and the token that pads."""
        return self.labels, self.tokenizer.pad_token_id

    @property
    def measure(self) -> str:
        """The number that runs are compared by: `eval_loss` (lower is better) or `eval_macro_f1` (higher is better)."""
        return "eval_macro_f1" if self.recipe.trainer == "classification" else "eval_loss"


def prepare(recipe: Recipe) -> Setup:
    """Tokenizer and rows of a recipe. No weight is loaded. Raises: RecipeError."""
    tokenizer = _tokenizer(recipe)
    train, held_out = _rows(recipe)
    labels = _labels(train) if recipe.trainer == "classification" else ()
    setup = Setup(recipe, tokenizer, train, held_out, held_out, labels)
    if not labels:
        return setup
    return replace(setup, train=_classified(setup, train), held_out=held_out and _classified(setup, held_out))


def load_model(setup: Setup, select: Any = None, stored: Quantized | None = None) -> nn.Module:
    """The base model with its weights; a new classification head is drawn from the recipe's seed.

    With the choice of layers that it is loaded for (`select`, or precisions that were `stored`), linears are quantized as they
    are read, where the architecture alone says which. Raises: RecipeError in one sentence when it cannot be had.
    """
    from transformers import set_seed

    recipe = setup.recipe
    set_seed(training_arguments(recipe).seed)
    options = {"dtype": recipe["dtype"], "attn_implementation": recipe["attn_implementation"], **code(recipe)}
    options |= {"revision": recipe["model_revision"], "config": model_config(recipe, *setup.head)}
    options |= recipe["model_init_kwargs"] or {}
    if is_saved(model_path(recipe)):
        attention = {k: v for k, v in options.items() if k == "attn_implementation" and v is not None}
        return from_hub(recipe, load_saved, model_path(recipe), **attention)
    config = layer_config(recipe, select).with_stored(stored)
    wanted = early(config, lambda: recipe.model) if select is not None else None
    if wanted is None:
        return from_hub(recipe, auto_class(recipe).from_pretrained, model_path(recipe), **options)
    device = training_arguments(recipe).device
    options["device"] = device if device.type != "cpu" else None  # quantizing is faster there
    kind = auto_class(recipe).__name__
    return from_hub(recipe, load_quantized, model_path(recipe), wanted.assignment, wanted.storage, kind=kind, **options)


def first_batches(setup: Setup, model: nn.Module, count: int) -> tuple[list[Any], Setup]:
    """The first `count` batches of the training order, made by the trainer's own collator; and the setup, rows tokenized."""
    quantized = getattr(model, "is_quantized", False)
    if quantized:  # Trainer refuses a quantized model without an adapter; this one is taken off again
        model = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules="all-linear"))
    trainer = make_trainer(setup, model, report_to="none", push_to_hub=False)
    batches = list(islice(iter(trainer.get_train_dataloader()), count))
    setup = replace(setup, train=trainer.train_dataset, held_out=trainer.eval_dataset, ready=True)
    if quantized:
        model.unload()  # type: ignore[operator]
    return batches, setup


def batches_for(setup: Setup, model: nn.Module, select: Any) -> tuple[list[Any] | None, Setup]:
    """Batches for a choice that is measured on data, None for any other."""
    config = layer_config(setup.recipe, select)
    most, choice = batches_wanted(config), config.choosing
    if needs_batches(choice) and not live_only(choice) and not (choice.is_scheduled and scoreless(choice)):
        most = max(most, choice.num_batches or DEFAULT_BATCHES)
    return first_batches(setup, model, most) if most else (None, setup)


def wrap(
    setup: Setup, model: nn.Module, select: Any, batches: Sequence[Any] | None, stored: Quantized | None = None
) -> peft.PeftModel:
    """The model with the recipe's adapter on the layers that `select` means, drawn from the recipe's seed.
    `stored`: precisions of the run that this one goes on with."""
    from transformers import set_seed

    set_seed(training_arguments(setup.recipe).seed)
    config = layer_config(setup.recipe, select, batches).with_stored(stored)
    return peft.get_peft_model(model, config)  # type: ignore[arg-type,return-value]


def make_trainer(setup: Setup, model: nn.Module, **changes: Any) -> Any:
    """TRL's SFTTrainer or transformers' Trainer, as the recipe sets it up."""
    recipe = setup.recipe
    arguments = training_arguments(recipe, **changes)
    given = {"model": model, "args": arguments, "train_dataset": setup.train, "eval_dataset": setup.held_out}
    if recipe.trainer == "sft":
        from trl import SFTTrainer

        if setup.ready:
            arguments.dataset_kwargs = {**(arguments.dataset_kwargs or {}), "skip_prepare_dataset": True}
        with unmarked(model):
            return SFTTrainer(processing_class=setup.tokenizer, **given)
    from transformers import DataCollatorWithPadding, Trainer

    return Trainer(
        processing_class=setup.tokenizer,
        data_collator=DataCollatorWithPadding(setup.tokenizer),
        compute_metrics=_class_metrics,
        **given,
    )


@contextlib.contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Inside, a base that was quantized by layer does not say so: TRL would take it for QLoRA and cast what trains to bfloat16."""
    base = base_of(model)
    marks = {} if getattr(base, "is_quantized", False) else {n: vars(base).pop(n) for n in MARKS if n in vars(base)}
    try:
        yield
    finally:
        vars(base).update(marks)


def train(trainer: Any, checkpoint: str | None = None) -> float:
    """Trains, and returns the seconds it took. The seed is set here, so that what was measured before changes nothing.
    Raises: RecipeError when a tracker refuses."""
    from transformers import set_seed

    set_seed(trainer.args.seed)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        if type(error).__module__.split(".")[0] == "wandb":  # no login, no network
            advice = "WANDB_MODE=offline needs no login and no network"
            raise RecipeError(f"report_to: wandb: {error} ({advice})") from error
        raise
    return time.perf_counter() - started


def held_out_numbers(trainer: Any) -> dict[str, float]:
    """Loss on the held-out rows, and accuracy and macro-F1 where there are classes; empty without held-out rows."""
    if trainer.eval_dataset is None:
        return {}
    found = trainer.evaluate()
    return {k: float(found[k]) for k in ("eval_loss", "eval_accuracy", "eval_macro_f1") if k in found}


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _tokenizer(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    options = {"revision": recipe["model_revision"], **code(recipe)}
    tokenizer = from_hub(recipe, AutoTokenizer.from_pretrained, model_path(recipe), **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _rows(recipe: Recipe) -> tuple[Any, Any | None]:
    config, split, test = recipe["dataset_config"], recipe["dataset_train_split"], recipe["dataset_test_split"]
    train = rows.load(recipe["dataset_name"], config=config, split=split)
    held_out = None
    if recipe["eval_dataset"] is not None:
        held_out = rows.load(recipe["eval_dataset"], config=config, split=test)
    elif rows.local_files(recipe["dataset_name"]) is None:
        held_out = rows.load(
            recipe["dataset_name"], config=config, split=test, optional="dataset_test_split" not in recipe.values
        )
    field = recipe["dataset_text_field"] if recipe.trainer == "sft" else "text"
    shaped = [part and rows.shape(part, recipe.trainer, recipe["columns"], field) for part in (train, held_out)]
    for index, key in enumerate(("max_train_samples", "max_eval_samples")):
        part, most = shaped[index], recipe[key]
        if part is not None and most is not None and most < len(part):
            shaped[index] = part.select(range(most))
        if part is not None and not len(part):
            name = ("dataset_name", "eval_dataset")[index]
            raise RecipeError(Problem((name,), f"{name}: there are no rows"))
    return shaped[0], shaped[1]


def _labels(train: Any) -> tuple[str, ...]:
    """Class names in order: those that the data set declares, else the distinct values, numbers by size."""
    declared = getattr(train.features["label"], "names", None)
    if declared:
        return tuple(declared)
    values = set(train["label"])
    if any(isinstance(v, float) or v is None or v == "" for v in values):
        raise RecipeError(
            "label: classes are text or whole numbers, and every row has one; regression is not in this version"
        )
    names = sorted(map(str, values), key=lambda v: (0, int(v), "") if v.isdecimal() else (1, 0, v))
    if len(names) < 2:
        raise RecipeError(f"label: the training rows hold one class only ({names[0]!r})")
    return tuple(names)


def _classified(setup: Setup, part: Any) -> Any:
    """Rows as a classifier reads them: token ids and the number of the class."""
    numbers = {name: i for i, name in enumerate(setup.labels)}
    declared = bool(getattr(part.features["label"], "names", None))
    strange = set() if declared else {str(v) for v in set(part["label"])} - set(numbers)
    if strange:
        shown = ", ".join(sorted(strange)[:5])
        raise RecipeError(f"label: held-out rows have classes that no training row has: {shown}")

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        pair = (row["text_pair"],) if "text_pair" in row else ()
        encoded = setup.tokenizer(row["text"], *pair, truncation=True, max_length=setup.recipe["max_length"])
        return {**encoded, "labels": row["label"] if declared else numbers[str(row["label"])]}

    return part.map(encode, remove_columns=part.column_names, desc="Tokenizing")


def _class_metrics(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return class_metrics(logits.argmax(-1).tolist(), prediction.label_ids.tolist())


def class_metrics(found: Sequence[int], wanted: Sequence[int]) -> dict[str, float]:
    """Accuracy, and macro-F1: the plain mean of F1 over every class that occurs in either list."""
    scores = []
    for label in sorted({*found, *wanted}):
        hits = sum(f == w == label for f, w in zip(found, wanted, strict=True))
        named = sum(f == label for f in found) + sum(w == label for w in wanted)
        scores.append(2 * hits / named)
    right = sum(f == w for f, w in zip(found, wanted, strict=True))
    return {"accuracy": right / len(wanted), "macro_f1": sum(scores) / len(scores)}

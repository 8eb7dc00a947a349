"""What `train`, `score` and `compare` share: rows, model, batches to measure on, a wrapped model, a trainer, a measure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import peft
import torch
from torch import nn
from transformers import TrainerCallback

from layerpeft.errors import LayerpeftError, Problem, RecipeError, mentions, told
from layerpeft.integrations.distributed import world_size
from layerpeft.integrations.peft import HEADS, spare_tables
from layerpeft.integrations.trl import referenced
from layerpeft.model.new_modules import new_modules
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.load import load_quantized
from layerpeft.quantization.save import is_saved, load_saved
from layerpeft.recipe import keys, roles, rows, tokens
from layerpeft.recipe.choice import unfit
from layerpeft.recipe.gathered import rows_of
from layerpeft.recipe.model import (
    allow,
    auto_class,
    check_head,
    code,
    from_hub,
    kernels,
    loading,
    model_config,
    model_path,
)
from layerpeft.recipe.recipe import Recipe, layer_config, training_arguments
from layerpeft.recipe.sources import paths
from layerpeft.recipe.tasks.metrics import NAMES
from layerpeft.recipe.tasks.task import Follows, Head, Part
from layerpeft.recipe.tasks.tokenizing import tokenizer as tokenizer_of
from layerpeft.recipe.trainers.row import named
from layerpeft.selection.schedule import scoreless
from layerpeft.selection.scoring import live_only, needs_batches
from layerpeft.selection.select import DEFAULT_BATCHES, Selection
from layerpeft.text import note, some
from layerpeft.training.exits import with_exits
from layerpeft.training.prefix.source import Source
from layerpeft.training.prefix.upper import load_upper, stand_in
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.load import early
from layerpeft.tuners.precision import batches_wanted


@dataclass(frozen=True)
class Setup:
    """A recipe with its tokenizer (or processor) and rows. `examples`: held-out rows as they were read; `learned`: what the
    training rows say of the model's head. `sources`: where training and held-out rows were read; `counts`: what became of them, by
    `training` and `held-out`; `ready` says that the rows went through a trainer's preparation once (truncated, packed) and must not
    again. `dropped`: what was taken out of the recipe's model. `amounts`: rows and tokens that are left, by `training` and
    `held-out`, where some rows were tried."""

    recipe: Recipe
    tokenizer: Any
    train: Any
    held_out: Any | None
    examples: Any | None
    learned: Head = Head()
    ready: bool = False
    sources: tuple[rows.Source, rows.Source | None] | None = None
    counts: Mapping[str, tokens.Tally] = field(default_factory=dict)
    dropped: Selection | None = None
    amounts: Mapping[str, tokens.Amount] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by number."""
        return self.learned.labels

    @property
    def head(self) -> tuple[tuple[str, ...], int | None, Mapping[str, Any]]:
        """What rows and tokenizer say of a head: its classes, the token that pads, and what else its config has to say."""
        return self.labels, getattr(self.tokenizer, "pad_token_id", None), self.learned.values

    @property
    def measure(self) -> str:
        """The number that runs are compared by: `eval_loss` (lower is better) or that of the task (higher is better)."""
        task = self.recipe.task
        return "eval_loss" if task is None else task.measure(self.learned)


def prepare(recipe: Recipe) -> Setup:
    """Tokenizer and rows of a recipe, those of a task as the model reads them. No weight is loaded. Raises: RecipeError."""
    named = recipe["dataset_name"]
    note(f"reading the rows of {some(paths(named))}")
    (train, held_out), sources = rows_of(recipe)
    task = recipe.task
    if task is None:
        return Setup(recipe, tokenizer_of(recipe), train, held_out, held_out, sources=sources)
    processing = task.processing(recipe, train)
    head = task.head(recipe, train, sources[0], processing)
    check_head(recipe, len(head.labels) or head.values.get("vocab_size", 0))
    setup = Setup(recipe, processing, train, held_out, held_out, head, sources=sources)
    for key, part, source in _parts(setup):
        roles.check(part, source, processing, key)
    made = [task.features(part, Part(recipe, key, source, processing, head)) for key, part, source in _parts(setup)]
    return _counted(setup, made)


def tokenized(setup: Setup, most: int | None = None) -> Setup:
    """The setup with its rows as token ids, those that teach nothing left out; what became of them is told.

    With `most` no more rows than that are tried; they tell how much all are, and the rows stay as they are. Raises: RecipeError
    naming the first row that a chat template or the tokenizer cannot take, or where none is left.
    """
    recipe = setup.recipe
    if recipe.task is not None or (recipe["dataset_kwargs"] or {}).get("skip_prepare_dataset"):
        return setup
    arguments = training_arguments(recipe, bf16=False, fp16=False)
    made = [
        tokens.tokenized(part, source, setup.tokenizer, arguments, key, most) for key, part, source in _parts(setup)
    ]
    if most is None:
        return _counted(setup, made)
    sizes = (
        tokens.amount(one, found, len(part)) for (one, found), (_, part, _) in zip(made, _parts(setup), strict=True)
    )
    return replace(setup, amounts=dict(zip(tokens.WHAT.values(), sizes)))


def _parts(setup: Setup) -> list[tuple[str, Any, Any]]:
    """Key, rows and source of the training rows, and of the held-out ones where there are any."""
    parts = zip(tokens.WHAT, (setup.train, setup.held_out), setup.sources or (), strict=True)
    return [(key, part, source) for key, part, source in parts if part is not None]


def _counted(setup: Setup, made: Sequence[tuple[Any, tokens.Tally]]) -> Setup:
    counts = {what: found for what, (_, found) in zip(tokens.WHAT.values(), made)}
    for what, found in counts.items():
        note(found.told(what))
    parts = [part for part, _ in made]
    return replace(setup, train=parts[0], held_out=(*parts[1:], None)[0], counts=counts)


def load_model(
    setup: Setup, select: Any = None, stored: Quantized | None = None, source: Source | None = None
) -> nn.Module:
    """The base model with its weights; a new classification head is drawn from the recipe's seed.

    With the choice of layers that it is loaded for (`select`, or precisions that were `stored`), linears are quantized as they
    are read, where the architecture alone says which. With a `source` nothing below its cut is loaded, and `stored` is of the rest.
    Raises: RecipeError in one sentence when it cannot be had.
    """
    from transformers import set_seed

    recipe = setup.recipe
    for place in recipe.row.beside:
        named(f"{place}.ready")(setup)
    options = loaded_with(setup)
    set_seed(training_arguments(recipe).seed)
    if is_saved(model_path(recipe)):
        attention = {k: v for k, v in options.items() if k == "attn_implementation" and v is not None}
        return from_hub(recipe, load_saved, model_path(recipe), **attention)
    config = layer_config(recipe, select).with_stored(stored)
    wanted = early(config, lambda: recipe.model) if select is not None else stored
    if wanted is None:
        kind, options["output_loading_info"] = auto_class(recipe), True
        load = (
            kind.from_pretrained if source is None else partial(load_upper, kind, cut=source.ahead.cut, source=source)
        )
        model, found = from_hub(recipe, load, model_path(recipe), **options)
        task = recipe.task
        inner = f"{model.base_model_prefix}." if task is not None and task.new_head else ""
        lost = sorted(key for key in found["missing_keys"] if key.startswith(inner))
        if lost:
            note(f"{model_path(recipe)} lacks {len(lost)} weights, which start at random: {some(lost)}")
        return model
    device = training_arguments(recipe).device
    options["device"] = device if device.type != "cpu" else None  # quantizing is faster there
    options["kind"] = auto_class(recipe).__name__
    if source is not None:
        options |= {"before": partial(stand_in, cut=source.ahead.cut, source=source), "heads": True}
    return from_hub(recipe, load_quantized, model_path(recipe), wanted.assignment, wanted.storage, **options)


def loaded_with(setup: Setup) -> dict[str, Any]:
    """What `from_pretrained` is told of the recipe's model. Raises: RecipeError where code that it would run is kept out."""
    recipe = setup.recipe
    for key in ("attn_implementation", "experts_implementation"):
        allow(key, key, kernels(loading(recipe).get(key)))
    return loading(recipe) | {"config": model_config(recipe, *setup.head), **code(recipe)}


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
    if not setup.recipe.row.alone:
        return None, setup  # it waits for the trainer's first step
    config = layer_config(setup.recipe, select)
    most, choice = batches_wanted(config), config.choosing
    if needs_batches(choice) and not live_only(choice) and not (choice.is_scheduled and scoreless(choice)):
        if sentence := unfit(choice, setup.recipe.trainer):  # of an arm; a recipe's own choice was checked before
            raise RecipeError(f"select.{sentence}")
        most = max(most, choice.num_batches or DEFAULT_BATCHES)
        note(f"scoring layers by {choice.by} on {most} batches")
    return first_batches(setup, model, most) if most else (None, setup)


def wrap(
    setup: Setup, model: nn.Module, select: Any, batches: Sequence[Any] | None, stored: Quantized | None = None
) -> peft.PeftModel:
    """The model with the recipe's adapter on the layers that `select` means, drawn from the recipe's seed.
    `stored`: precisions of the run that this one goes on with."""
    from transformers import set_seed

    set_seed(training_arguments(setup.recipe).seed)
    config = _with_head(setup, model, layer_config(setup.recipe, select, batches).with_stored(stored))
    spare_tables()
    wrapped: Any = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    if setup.recipe["exits"] is not None:
        with_exits(wrapped, setup.recipe["exits"], config.choosing.stack)
    return wrapped


def _with_head(setup: Setup, model: nn.Module, config: LayerLoraConfig) -> LayerLoraConfig:
    """Plain LoRA with what is new in the model, as far as PEFT's type of task does not train it by itself."""
    task = setup.recipe.task
    plain = config.choosing.is_all and not config.works_by.in_place
    if task is None or not task.new_head or not plain or not config.train_new:
        return config
    known = (*(config.modules_to_save or ()), *(HEADS if setup.recipe.row.task_type else ()))
    born = [name for name in new_modules(model) if not f".{name}".endswith(tuple(f".{other}" for other in known))]
    return config.changed(modules_to_save=[*(config.modules_to_save or ()), *born]) if born else config


def make_trainer(setup: Setup, model: nn.Module, **changes: Any) -> Any:
    """The trainer of TRL or transformers, as the recipe sets it up."""
    recipe, task = setup.recipe, setup.recipe.task
    arguments = training_arguments(recipe, **changes)
    given = {"model": model, "args": arguments, "train_dataset": setup.train, "eval_dataset": setup.held_out}
    for place in recipe.row.beside:
        given |= named(f"{place}.given")(setup)
    if recipe.row.trl and not recipe.row.alone:
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):  # models are loaded by now
            if hasattr(arguments, name):
                setattr(arguments, name, None)
    if task is not None:
        given |= task.trainer(setup, model)
        if task.in_batches:
            arguments.remove_unused_columns = False
    elif "input_ids" in setup.train.column_names:
        arguments.assistant_only_loss = False  # the labels say it by now
    if setup.ready and task is None:
        arguments.dataset_kwargs = {**(arguments.dataset_kwargs or {}), "skip_prepare_dataset": True}
    kind, makes = named(recipe.row.trainer), recipe.row.made
    kind = partial(named(makes), kind) if makes else partial(referenced, kind) if recipe.row.reference else kind
    try:
        made = kind(processing_class=setup.tokenizer, **given)
    except (
        ValueError,
        TypeError,
        NotImplementedError,
    ) as error:  # what it finds wrong with its settings, when it is built
        at = next(
            (k for k in recipe.values if k in keys.argument_settings(recipe.trainer) and mentions(error, k)), "trainer"
        )
        raise RecipeError(Problem((at,), f"{at}: {recipe.trainer}: {told(error, 400)}")) from error
    if isinstance(made.data_collator, Follows):
        made.data_collator.follow(made)
    return made


class _Begun(TrainerCallback):
    """Sees the first step: what is raised before it, when a run is resumed, is over what lies in its checkpoint."""

    def __init__(self, begun: list[int]) -> None:
        self.begun = begun

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun.append(state.global_step)


def train(trainer: Any, checkpoint: str | None = None) -> float:
    """Trains, and returns the seconds it took. The seed is set here, so that what was measured before changes nothing.
    Raises: RecipeError when a tracker refuses."""
    from transformers import set_seed

    set_seed(trainer.args.seed)
    started = time.perf_counter()
    begun: list[int] = []
    trainer.add_callback(_Begun(begun))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except LayerpeftError:
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] == "wandb":  # no login, no network
            advice = "WANDB_MODE=offline needs no login and no network"
            raise RecipeError(f"report_to: wandb: {error} ({advice})") from error
        if checkpoint is None or begun or isinstance(error, torch.OutOfMemoryError):
            raise
        why = f"{type(error).__name__}: {told(error, 400)}"
        raise RecipeError(f"the run in {checkpoint} cannot be gone on with: {why}") from error
    return time.perf_counter() - started


def divides(trainer: Any) -> bool:
    """Whether an engine gets the model when training begins, so that it may not run before: it could not, or DDP would be left out,
    since Trainer takes a model that was evaluated for one that is prepared."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or world_size() > 1)


def held_out_numbers(trainer: Any) -> dict[str, float]:
    """Loss on the held-out rows, and the numbers of the task; empty without held-out rows."""
    if trainer.eval_dataset is None:
        return {}
    note(f"measuring held-out rows {'after' if trainer.state.global_step else 'before'} training")
    found = trainer.evaluate()
    found = {**trainer.state.log_history[-1], **found}  # TRL's own numbers are in what it logs alone
    return {k: float(found[k]) for k in NAMES if k in found}

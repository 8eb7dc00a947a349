"""`layerpeft train` and `layerpeft score`: one recipe, from its file to what is written."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from layerpeft.errors import LayerpeftError, RecipeError, SaveError, differences, told
from layerpeft.integrations import hub
from layerpeft.integrations.code import file_beside
from layerpeft.integrations.distributed import everywhere, from_first
from layerpeft.integrations.drawing import count_whole, new_figure, write_figure
from layerpeft.integrations.files import disk_is_full, replace_file
from layerpeft.integrations.peft import whole_state
from layerpeft.model.layers import base_of
from layerpeft.model.precisions import tensor_bytes
from layerpeft.quantization.apply import Quantized
from layerpeft.recipe import after
from layerpeft.recipe.beside import rewards
from layerpeft.recipe.exits import exit_numbers, write_exits
from layerpeft.recipe.learned import unlearned
from layerpeft.recipe.outcome import RUN, Memory, Reached, outcome, write_run
from layerpeft.recipe.page.page import PAGE, write_page
from layerpeft.recipe.recipe import Recipe, as_chosen, checkpoint_of, command_of, layer_config, to_yaml
from layerpeft.recipe.samples import ANSWERS, SILENT, Sample, generate, prompt_of, show
from layerpeft.recipe.shorter import shorten
from layerpeft.recipe.surroundings import SHORTER_RECORD, TRAINED, checkpoints_in
from layerpeft.recipe.tasks.metrics import NAMES
from layerpeft.recipe.trainer import (
    Setup,
    batches_for,
    divides,
    held_out_numbers,
    load_model,
    make_trainer,
    prepare,
    tokenized,
    train,
    wrap,
)
from layerpeft.recipe.upper import naming_rows, upper_part
from layerpeft.saving.card import CARD, write_card
from layerpeft.saving.checkpoints import last_checkpoint
from layerpeft.saving.manifest import MANIFEST, read_manifest, selection_of
from layerpeft.saving.owned import files_below, put_on_record, recording, room, strangers
from layerpeft.selection import plugins
from layerpeft.selection.select import SCORERS, Selection
from layerpeft.text import is_first, measured, note, size_text, some
from layerpeft.training.exits import depths_of
from layerpeft.training.prefix.source import source_of
from layerpeft.training.record import as_reported, record_of
from layerpeft.training.report import LayerReport, layer_report
from layerpeft.tuners.exits import exit_folder
from layerpeft.tuners.precision import wish

Say = Callable[[str], None]
SAMPLES = 1
LATER = "layers that are chosen in the first step"
WRITTEN = (
    PAGE,
    CARD,
    "layers.png",
    "bits.png",
    "layers.csv",
    MANIFEST,
    "training_loss.png",
    "log.jsonl",
    RUN,
    "recipe.yaml",
    SHORTER_RECORD,
)


@dataclass(frozen=True)
class Result:
    """What a run found: held-out numbers before and after, samples of text, the layer table, seconds of training.
    `weight_bytes`: measured bytes of all weights, adapter and scales included; `depths`: of exits; `exits`: numbers
    after, of each but the last; `above`: nothing below this layer was loaded."""

    output_dir: Path
    before: Mapping[str, float]
    after: Mapping[str, float]
    samples: tuple[Sample, ...]
    report: LayerReport
    seconds: float
    weight_bytes: int = 0
    exits: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    depths: tuple[int, ...] = ()
    above: int | None = None


def run(recipe: Recipe, say: Say = print) -> Result:
    """Trains a recipe and writes adapter, record, curves and the resolved recipe to its output_dir.

    Raises: LayerpeftError; before any weight is loaded for whatever can be known by then. KeyboardInterrupt says how to go on.
    """
    started = time.time()
    try:
        with _beside(recipe.output_dir):
            return _run(recipe, say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(recipe, started)) from None


def _run(recipe: Recipe, say: Say) -> Result:
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet; the first line of standard output is PEFT's count
        setup = shorten(tokenized(prepare(recipe)))
        checkpoint = checkpoint_of(recipe)
        recorded = checkpoint if checkpoint is not None and (Path(checkpoint) / MANIFEST).is_file() else None
        kept = _kept(recipe, recorded) if recorded else None
        stored = _stored(recipe, recorded) if recorded else None
        choice = recipe.select if kept is None else as_chosen(recipe, kept)
        upper = upper_part(setup, kept, stored)
        note(f"loading the model {setup.recipe['model_name_or_path']}")
        if upper is not None:
            model = upper.wrap(setup, upper.load(setup))
        else:
            model, setup = _wrapped(recipe, setup, load_model(setup, choice, stored), kept, stored)
    if (record := record_of(model.peft_config["default"])) is not None:
        record.rows = {what: asdict(found) for what, found in setup.counts.items()}
        record.dropped = setup.dropped.to_dict() if setup.dropped is not None else None
        record.task = {"trainer": recipe.trainer, **setup.learned.about}
    chosen = record.selection if record is not None else None
    layers = (
        (LATER if recipe.config.needs(batches=False) & {"wait"} else "all layers")
        if chosen is None
        else f"{chosen.unit}s {some([str(n) for n in chosen.layers], 16)} ({chosen.why})"
    )
    note(f"trains {layers}")
    if is_first():
        model.print_trainable_parameters()
    trainer = make_trainer(setup, model)
    with naming_rows(setup):
        begin = _Begin(setup, trainer)
        trainer.add_callback(begin)
        trainer.add_callback(_Files(recipe))
        trainer.add_callback(memory := Memory())
        with _room(recipe):
            seconds = train(trainer, checkpoint)
        after, exits = held_out_numbers(trainer), exit_numbers(setup.recipe, trainer)
    samples = _answers(setup, model, begin.samples)
    report = layer_report(model)
    folder = from_first(room(recipe.output_dir, TRAINED) if is_first() else None)
    result = Result(
        folder, begin.numbers, after, samples, report, seconds, tensor_bytes(model), exits, depths_of(model)
    )
    result = result if upper is None else replace(result, above=upper.below.cut)
    state = whole_state(model)
    if is_first():
        with _room(recipe):
            found = outcome(recipe, setup, trainer, model, memory, Reached(begin.numbers, after, samples, seconds))
            with as_reported(record, report):
                _write(recipe, setup, model, trainer, found, folder, state)
            write_exits(recipe, model, folder)
        if trainer.args.push_to_hub:
            hub.push(trainer, folder)
        _tell(setup, result, say, trainer.state.log_history, trainer.state.global_step)
    return result


class _Begin(TrainerCallback):
    """Held-out numbers and samples from before training; where an engine divides the model, it can run once training has begun."""

    def __init__(self, setup: Setup, trainer: Any) -> None:
        self.setup, self.trainer = setup, trainer
        self.numbers: Mapping[str, float] = {}
        self.samples: tuple[Sample, ...] = ()
        if not divides(trainer):
            self.look()

    def look(self) -> None:
        self.numbers = held_out_numbers(self.trainer)
        self.samples = _answers(self.setup, self.trainer.model, ())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if divides(self.trainer):
            logged = list(state.log_history)
            self.look()
            state.log_history[:] = logged  # it is no step of this run


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """What trackers would write into the current folder goes into this one, unless their own variables say where."""
    own = {"TENSORBOARD_LOGGING_DIR": str(folder / "runs"), "WANDB_DIR": str(folder)}
    own = {name: place for name, place in own.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


def _how_to_go_on(recipe: Recipe, started: float) -> str:
    """What is left of a run that was interrupted: the command that goes on with it, where it has saved a checkpoint."""
    folder = recipe.output_dir
    last = last_checkpoint(folder) if folder.is_dir() else None
    if last is None or (Path(last).stat().st_mtime < started and not recipe["resume_from_checkpoint"]):
        return "nothing was saved (save_steps says after how many steps a run does)"
    return f"{Path(last).name} is the last that was saved; go on with\n  {_again(recipe)}"


def _again(recipe: Recipe) -> str:
    """The command that goes on from the last checkpoint; resuming and writing over the run exclude each other."""
    never = {"overwrite_output_dir": False} if recipe["overwrite_output_dir"] else {}
    return command_of(recipe, {"resume_from_checkpoint": True} | never)


@contextlib.contextmanager
def _room(recipe: Recipe) -> Iterator[None]:
    """Raises: SaveError saying what is kept, where the disk turns out to be full inside."""
    folder, began = recipe.output_dir, time.time()
    try:
        yield
    except Exception as error:
        if not disk_is_full(error, folder):
            raise
        last = last_checkpoint(folder) if folder.is_dir() else None
        kept = f"{last} is whole" if last else "nothing of this run is kept"
        with contextlib.suppress(LayerpeftError, OSError):
            if (folder / MANIFEST).stat().st_mtime >= began and read_manifest(folder):
                last, kept = None, f"the adapter in {folder} is whole, what stands beside it is not"
        again = f"; with more room, {_again(recipe)} goes on from there" if last else ""
        raise SaveError(
            f"output_dir: no room is left on the disk of {folder} ({told(error, 200)}); {kept}{again}"
        ) from error


# ---- steps of a run -------------------------------------------------------------------------------------------------


def _kept(recipe: Recipe, checkpoint: str) -> Selection:
    """The choice of the run that is resumed. Raises: RecipeError when the recipe asks for another."""
    chosen = selection_of(checkpoint)
    asked, had = recipe.config.choosing.to_dict(), dict(chosen.select)
    changed = [k for k in sorted({*asked, *had} - {"by"}) if asked.get(k) != had.get(k)]
    if isinstance(asked["by"], str) and asked["by"] != had.get("by"):
        changed.insert(0, "by")
    if changed:
        lines = ", ".join(f"{k}: {had.get(k)!r} there, {asked.get(k)!r} here" for k in changed)
        raise RecipeError(
            f"select: the run in {checkpoint} chose its layers another way ({lines}); resuming keeps its choice"
        )
    return chosen


def _stored(recipe: Recipe, checkpoint: str) -> Quantized | None:
    """The precisions of the run that is resumed, None where its base was not quantized by layer.
    Raises: RecipeError when the recipe asks for others."""
    found = read_manifest(checkpoint).get("quant")
    stored = None if found is None else Quantized.from_dict(found)
    then, now = stored.choice if stored is not None else {}, json.loads(json.dumps(wish(layer_config(recipe))))
    differ = differences(then, now)
    if differ:
        raise RecipeError(f"the run in {checkpoint} stored its layers in other precisions ({'; '.join(differ)})")
    return stored


def _wrapped(
    recipe: Recipe, setup: Setup, model: nn.Module, kept: Selection | None, stored: Quantized | None
) -> tuple[Any, Setup]:
    """The model with its adapter: on the layers of the run that is resumed, or on those that the recipe chooses now."""
    if kept is not None and recipe.config.choosing.is_scheduled:
        # the schedule goes on when the checkpoint is loaded
        return wrap(setup, model, recipe.select, None, stored), setup
    if kept is None:
        batches, setup = batches_for(setup, model, recipe.select)
        return wrap(setup, model, recipe.select, batches), setup
    wrapped = wrap(setup, model, as_chosen(recipe, kept), None, stored)
    record = wrapped.peft_config["default"]._layerpeft  # type: ignore[attr-defined]
    record.selection = kept
    record.config["select"] = recipe.config.choosing.to_dict()
    return wrapped, setup


class _Files(TrainerCallback):
    """Keeps a record of the checkpoints of a run, whose first step removes those of the run that is written over.

    No later resume is to pick one of those up.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.folder = recipe.output_dir
        self.old = checkpoints_in(self.folder) if recipe["overwrite_output_dir"] else []
        self.card = ["README.md"] * recipe.row.trl  # TRL writes one with every checkpoint

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if not self.old or not is_first():
            return
        files = [file for name in self.old for file in files_below(self.folder, name)]
        left = strangers(self.folder, files)  # what came in after the recipe was checked
        gone = [name for name in self.old if not any(Path(file).parts[0] == name for file in left)]
        for name in gone:
            shutil.rmtree(self.folder / name)
        note(f"removed the checkpoints of the run before: {', '.join(gone)}")
        self.old = []

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        everywhere(True)  # each process writes states of its own
        if not is_first():
            return
        card = [name for name in self.card if (self.folder / name).is_file()]
        put_on_record(self.folder, [*files_below(self.folder, f"checkpoint-{state.global_step}"), *card])


def _answers(setup: Setup, model: nn.Module, earlier: Sequence[Sample]) -> tuple[Sample, ...]:
    """What the model says to the first held-out prompts; `earlier` answers become the "before". Nothing of an upper part."""
    tokens = setup.recipe["sample_tokens"] if source_of(base_of(model)) is None else 0
    if not setup.recipe.row.answers or not tokens or setup.examples is None:
        return ()
    found = []
    field = setup.recipe["dataset_text_field"]
    for index in range(min(SAMPLES, len(setup.examples))):
        pair = prompt_of(setup.examples[index], field)
        if pair is None:
            return ()
        answer = generate(model, setup.tokenizer, pair[0], tokens)
        if earlier:
            found.append(Sample(earlier[index].prompt, earlier[index].wanted, earlier[index].before, answer))
        else:
            found.append(Sample(show(pair[0]), pair[1].strip(), answer))
    return tuple(found)


# ---- what is written ------------------------------------------------------------------------------------------------


def _write(
    recipe: Recipe, setup: Setup, model: Any, trainer: Any, found: Mapping[str, Any], folder: Path, state: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with recording(folder):
        model.save_pretrained(str(folder), **({} if state is None else {"state_dict": state}))
        setup.tokenizer.save_pretrained(str(folder))
        if recipe.task is not None:
            recipe.task.write(trainer, folder)
        command = shlex.join(["layerpeft", "train", str(folder / "recipe.yaml"), f"output_dir={folder}-again"])
        replace_file(folder / "recipe.yaml", f"# {command}\n{to_yaml(recipe)}".encode())
        by = recipe.select.get("by") if isinstance(recipe.select, Mapping) else None
        # beside the recipe that names it
        if isinstance(by, str) and by.endswith(".py") and not Path(by).is_absolute() and not strangers(folder, [by]):
            (folder / by).parent.mkdir(parents=True, exist_ok=True)
            replace_file(folder / by, Path(str(plugins.get(SCORERS, by).__file__)).read_bytes())
        for name in rewards.files(recipe):
            if not strangers(folder, [name]):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                replace_file(folder / name, file_beside(name, recipe.path.parent, name)[1])
        if setup.labels:
            named = json.dumps(dict(enumerate(setup.labels)), indent=1)
            replace_file(folder / "labels.json", f"{named}\n".encode())
        before = [{"step": 0, **found["before"]}] * bool(found["before"])
        history = before + trainer.state.log_history
        replace_file(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode())
        draw_curve(history, folder / "training_loss.png")
        write_run(folder, found)
        write_card(folder, found)
        write_page(folder)


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training loss over optimizer steps, with the held-out loss where it was measured."""
    figure = new_figure(7, 4)
    if figure is None:
        return
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o")):
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style if len(points) > 1 else "o", label=label)
    if not axes.lines:
        note("no loss was logged (logging_steps), so there is no picture of it")
        return
    axes.set(xlabel="optimizer step", ylabel="loss", title="loss")
    count_whole(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(figure, path, dpi=120)


# ---- what is said ---------------------------------------------------------------------------------------------------


def _tell(setup: Setup, result: Result, say: Say, history: Sequence[Mapping[str, Any]], steps: int) -> None:
    say("")
    for what, found in setup.counts.items():
        say(found.told(what))
    for key, name in NAMES.items():
        if key in result.after:
            say(f"{name}: {measured(result.before[key])} before, {measured(result.after[key])} after")
            for depth, numbers in result.exits.items():
                say(f"  of the first {depth} layers: {measured(numbers[key])} after")
    if (trouble := unlearned(setup.recipe, history, result.before, result.after, steps)) is not None:
        say(f"\n{trouble}\n")
    if not result.after:
        say("no held-out rows (eval_dataset), so nothing was measured before and after")
    say(f"training took {result.seconds:.0f} s; all weights take {size_text(result.weight_bytes)}")
    for sample in result.samples:
        for title, text in vars(sample).items():
            lines = text.splitlines()[:12] or [SILENT] * (title in ANSWERS)
            say(f"\n{title}:\n" + "\n".join(f"  {line}" for line in lines))
    say(f"\n{result.report}")
    if result.above is not None:
        say(
            f"\nsamples are left out: nothing below layer {result.above} was loaded, and generating needs the whole model"
        )
    folder = result.output_dir
    written = [name for name in WRITTEN if (folder / name).is_file()]
    written += [exit_folder(folder, depth).name for depth in result.depths]
    say(f"\nwritten to {folder}: adapter_model.safetensors, {', '.join(written)}")
    say("\nnext:")
    for line in _next(setup, result):
        say(f"  {line}")


def _next(setup: Setup, result: Result) -> list[str]:
    """Commands that make sense after this run: what was trained in use, then what the choice is worth."""
    recipe, folder = setup.recipe, result.output_dir
    example = setup.examples[0] if setup.examples is not None else {}
    template = bool(getattr(setup.tokenizer, "chat_template", None))
    lines = after.commands(recipe, folder, template, example, result.above)
    if result.above is not None:
        return lines
    rows = result.report.rows
    if result.after:  # without held-out rows there is nothing to compare
        chosen = [row.layer for row in rows if row.chosen]
        lines += after.comparing(recipe, folder, chosen or [row.layer for row in rows])
    if not (folder / MANIFEST).is_file():  # plain LoRA on every layer
        return lines
    if any(row.score is not None for row in rows):
        lines.append(f"{shlex.join(['layerpeft', 'score', str(folder / 'recipe.yaml')])}    # the scores alone")
    return lines

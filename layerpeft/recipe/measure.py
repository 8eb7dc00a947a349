"""`layerpeft plan --measure`: one real step of a recipe, and what was predicted beside what was counted."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from layerpeft.errors import Problem, RecipeError
from layerpeft.model.precisions import held_bytes, tensor_bytes
from layerpeft.planning.plan import Plan, plan
from layerpeft.planning.trace import Pass, count, gradient_bytes
from layerpeft.recipe.plan import empty, options_of
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import Recipe, layer_config, training_arguments
from layerpeft.recipe.shorter import shorten
from layerpeft.recipe.trainer import batches_for, load_model, make_trainer, prepare, tokenized, wrap
from layerpeft.text import grid, size_text

# nothing is saved, evaluated, sent anywhere or repeated for the sake of one step
ONCE: Mapping[str, Any] = {
    "max_steps": 1,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",  # a warm-up begins with a rate of zero, with which nothing trains
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "torch_compile": False,
}


@dataclass(frozen=True)
class Part:
    """One part of the cost: bytes, or operations."""

    name: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        """Predicted over measured; 1 where both are nothing."""
        return self.predicted / self.measured if self.measured else 1.0 if not self.predicted else float("inf")


@dataclass(frozen=True)
class Measured:
    """One real step beside its plan. `shape`: rows and tokens of the batch that was run; `device_peak`: the allocator's bytes."""

    parts: tuple[Part, ...]
    shape: tuple[int, int]
    plan: Plan
    loss: float
    device_peak: int | None = None

    def __getitem__(self, name: str) -> Part:
        """A part by its name."""
        return next(part for part in self.parts if part.name == name)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("", "predicted", "measured", "ratio")]
        for part in self.parts:
            shown = [f"{n:.4g}" if part.name == "operations" else size_text(n) for n in (part.predicted, part.measured)]
            table.append((part.name, *shown, f"{part.ratio:.3f}"))
        lines = [
            f"one step on {self.shape[0]} rows of {self.shape[1]} tokens (loss {self.loss:.4f})",
            *grid(table, "<>"),
        ]
        lines += [f"predicted for: {text}" for text in self.plan.assumed[:-1]]
        if self.device_peak is not None:
            lines.append(f"most that the device's allocator had given out: {size_text(self.device_peak)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "parts": [asdict(part) | {"ratio": part.ratio} for part in self.parts],
            "shape": list(self.shape),
            "loss": self.loss,
            "device_peak": self.device_peak,
        }


def measure(recipe: Recipe | str, settings: Sequence[str] = ()) -> Measured:
    """Runs one optimizer step of a recipe (real weights, its first batch, its optimizer) and counts it beside the plan of that
    batch. Nothing is written. `recipe`: a checked one, or the name or path of one, with `settings` as on the command line.

    Raises: LayerpeftError.
    """
    from transformers import PrinterCallback

    if isinstance(recipe, str):
        recipe = load_recipe(recipe, settings, "plan")
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe, values={**recipe.values, "output_dir": folder})  # trainers make theirs at once
        if recipe.row.writes:
            text = f"{recipe.trainer}: what a step takes is known once its answers are written, and no plan knows that"
            raise RecipeError(Problem(("trainer",), f"trainer: {text}"))
        setup = shorten(tokenized(prepare(recipe)))
        recipe = setup.recipe
        bare = empty(setup)
        model = load_model(setup, recipe.select)
        batches, setup = batches_for(setup, model, recipe.select)
        wrapped: Any = wrap(setup, model, recipe.select, batches)
        trainer = make_trainer(setup, wrapped, output_dir=folder, **ONCE)
        trainer.remove_callback(PrinterCallback)
        with _watched(trainer) as seen, _device_peak() as device:
            trainer.train()
    accelerated = next(wrapped.parameters()).device.type != "cpu"
    options = options_of(recipe, training_arguments(recipe), accelerated)
    options |= {
        "batch_size": seen.shape[0],
        "length": seen.shape[1],
        "step": replace(options["step"], **seen.how),
    }
    record = getattr(wrapped.peft_config["default"], "_layerpeft", None)
    chosen = record.selection.placed if record else recipe.select
    found = plan(bare, layer_config(recipe, chosen), **options)
    parts = (
        Part("weights", found.weights, seen.weights),
        Part("gradients", found.gradients, seen.gradients),
        Part(f"optimizer, {found.optimizer}", found.states, seen.states),
        Part("activations", found.applies.peak, seen.passed.peak),
        Part("operations", found.flops, seen.passed.flops),
    )
    return Measured(parts, seen.shape, found, seen.loss, device[0] if device else None)


@dataclass
class _Seen:
    """What the step showed; filled in as it goes."""

    weights: int = 0
    gradients: int = 0
    states: int = 0
    passed: Pass = Pass(0, 0)
    shape: tuple[int, int] = (0, 0)
    how: Mapping[str, bool] = field(default_factory=dict)
    loss: float = 0.0


@contextlib.contextmanager
def _watched(trainer: Any) -> Iterator[_Seen]:
    """Counts the trainer's own training step, then gradients before and states after the optimizer's."""
    run, model, seen = trainer.training_step, trainer.model, _Seen()

    def step(*args: Any, **kwargs: Any) -> Any:
        inputs = next(a for a in (*args, *kwargs.values()) if isinstance(a, Mapping) and "input_ids" in a)
        rows, tokens = inputs["input_ids"].shape
        seen.shape = (int(rows), int(tokens))
        padded = "attention_mask" in inputs and not bool(inputs["attention_mask"].all())
        seen.how = {"padded": padded, "packed": "position_ids" in inputs}
        seen.weights = tensor_bytes(model)
        result: list[Any] = []
        besides = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
        seen.passed = count(lambda: result.append(run(*args, **kwargs)), model, besides)
        seen.loss = float(result[0])
        seen.gradients = gradient_bytes(model)
        return result[0]

    trainer.training_step = step
    try:
        yield seen
        seen.states = state_bytes(trainer.optimizer)
    finally:
        trainer.training_step = run


def state_bytes(optimizer: Any) -> int:
    """Bytes that an optimizer keeps besides the parameters; tensors that several states share count once."""
    seen: set[int] = set()
    inner = getattr(optimizer, "optimizer", optimizer)
    return sum(held_bytes(v, seen) for state in inner.state.values() for v in state.values())


@contextlib.contextmanager
def _device_peak() -> Iterator[list[int]]:
    """The allocator's peak while inside, in a list that is empty where there is no accelerator."""
    found: list[int] = []
    there = torch.accelerator.is_available()
    if there:
        torch.accelerator.reset_peak_memory_stats()
    yield found
    if there:
        found.append(int(torch.accelerator.max_memory_allocated()))

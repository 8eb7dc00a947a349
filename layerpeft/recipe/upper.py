"""`train` on the upper part of a model alone, where all that enters its lowest trained layer was filled ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import peft
import transformers
from torch import nn

from layerpeft.errors import ConfigError, RecipeError, differences
from layerpeft.integrations.engines.known import asked_for
from layerpeft.model.layers import base_of
from layerpeft.model.names import lying_in
from layerpeft.planning.plan import wrapped
from layerpeft.planning.trace import Step
from layerpeft.quantization.apply import Quantized
from layerpeft.quantization.save import is_saved
from layerpeft.recipe.model import loading, model_config, model_path
from layerpeft.recipe.plan import empty
from layerpeft.recipe.prefill import CHANGING, checkpoint_folder
from layerpeft.recipe.recipe import Recipe, as_chosen, command_of, layer_config, training_arguments
from layerpeft.recipe.trainer import Setup, load_model, wrap
from layerpeft.selection.scoring import needs
from layerpeft.selection.select import Selection
from layerpeft.text import note
from layerpeft.training.prefix.ahead import Ahead, all_ahead, config_digest
from layerpeft.training.prefix.below import Below, lowest_of, why_off
from layerpeft.training.prefix.cache import CHANGES
from layerpeft.training.prefix.fingerprint import belongs
from layerpeft.training.prefix.setting import Setting
from layerpeft.training.prefix.source import MissingRow, Source
from layerpeft.training.record import record_of
from layerpeft.tuners.load import early
from layerpeft.tuners.soft import BY_SCORE

GENERATING = ("generate_during_eval", "predict_with_generate")
SHOWN = 24  # tokens of a row in a message


@dataclass(frozen=True)
class Upper:
    """A run that loads nothing below `below.cut`. `selection`: its choice, of the whole model; `stored`: precisions of the whole
    model, where it is quantized, and `packed` those of what is there."""

    source: Source
    below: Below
    selection: Selection
    stored: Quantized | None = None

    @property
    def packed(self) -> Quantized | None:
        lower = lying_in(self.below.names[: self.below.cut])
        return self.stored and replace(
            self.stored, modules={n: kind for n, kind in self.stored.modules.items() if not lower(n)}, rows=()
        )

    def load(self, setup: Setup) -> nn.Module:
        """The part from the cut on. Raises: RecipeError; ConfigError where it is not run as the part below was."""
        model = load_model(setup, stored=self.packed, source=self.source)
        ahead = self.source.ahead
        if differ := differences(dict(ahead.belongs), belongs(model, self.below, ahead.belongs["weights"])):
            raise ConfigError(f"what was filled ahead is of another model: {'; '.join(differ)}")
        return model

    def wrap(self, setup: Setup, model: nn.Module) -> peft.PeftModel:
        """With the adapter on the chosen layers, and the record that it would have on the whole model."""
        recipe, chosen = setup.recipe, self.selection
        select = chosen.placed
        if chosen.in_parts:  # numbers of those that are there
            every = layer_config(recipe, {"stack": chosen.stack, "unit": chosen.unit}).examine(model).layers.names
            numbers = {name: number for number, name in enumerate(every)}
            select |= {"layers": [numbers[name] for name in chosen.names]}
        found = wrap(setup, model, select, None, self.packed)
        record = record_of(found.peft_config["default"])
        assert record is not None
        record.selection = chosen
        if self.stored is not None and record.quantized is not None:
            record.quantized = replace(record.quantized, modules=self.stored.modules)
        record.config["select"] = recipe.config.choosing.to_dict()
        return found


def upper_part(setup: Setup, kept: Selection | None = None, stored: Quantized | None = None) -> Upper | None:
    """How a run goes on from what was filled ahead; None where nothing was, or the whole model is needed, which is said.

    `kept`, `stored`: choice and precisions of the run that is resumed. Raises: RecipeError, ConfigError.
    """
    recipe, setting = setup.recipe, setup.recipe.config.caching
    if setting is None or setting.where == "memory":
        return None
    digest = config_digest(model_config(recipe, *setup.head))
    fillings = [found for _, found in all_ahead(setting.root) if found.config == digest]
    if not fillings:
        return None
    why = _why_whole(recipe, kept)
    found = None if why else _matching(setup, setting, fillings, kept, stored)
    if isinstance(found, Upper):
        ahead = found.source.ahead
        rows = ahead.train.rows + ahead.held_out.rows
        note(f"nothing below layer {ahead.cut} is loaded: what enters it was filled ahead, of {rows:,} rows")
        return found
    note(f"prefix_cache: something was filled ahead of this model, and it is loaded whole all the same: {why or found}")
    return None


def _why_whole(recipe: Recipe, kept: Selection | None) -> str | None:
    """What looks below the cut, or changes what lies there."""
    config, arguments = recipe.config, training_arguments(recipe, bf16=False, fp16=False)
    if config.is_scheduled:
        return CHANGES
    if kept is None and needs(config.choosing) != "nothing":
        return f"select: {config.choosing.by} measures all layers"
    if by_score := [name for name in BY_SCORE if getattr(config, name) is not None]:
        return f"{by_score[0]} goes by the scores of all layers"
    if looking := [key for key in ("exits", "drop") if recipe[key] is not None]:
        return f"{looking[0]} is for all layers"
    if config.distill is not None:
        return "distill looks at what layers give out"
    if loading(recipe).get("quantization_config") is not None or is_saved(model_path(recipe)):
        return "layers that are packed by quantization_config, or were saved so, are not loaded apart"
    if recipe.row.beside:
        return f"trainer: {recipe.trainer} has it generate, or asks others beside it"
    if generating := [key for key in GENERATING if getattr(arguments, key, False)]:
        return f"{generating[0]} has it generate"
    if changing := [key for key in CHANGING if getattr(arguments, key, False)]:
        return f"{changing[0]} changes how layers run"
    if getattr(arguments, "neftune_noise_alpha", None) and config.drops_below:
        return "neftune_noise_alpha adds noise below"
    engine = asked_for(arguments)
    return None if engine is None else f"{engine.name} divides it among processes"


def _matching(
    setup: Setup, setting: Setting, fillings: list[Ahead], kept: Selection | None, stored: Quantized | None
) -> Upper | str:
    """The filling that a run can go on from, or why there is none."""
    recipe, model = setup.recipe, empty(setup)
    config = layer_config(recipe, None if kept is None else as_chosen(recipe, kept)).with_stored(stored)
    found, _ = wrapped(model, config, [], Step())
    record, base = record_of(found.method.config), base_of(found.model)
    names = found.layers.names if found.layers is not None else ()
    lowest = lowest_of(base, names) if names else None
    if not lowest or record is None or record.selection is None:
        return "nothing lies below the lowest layer that trains"
    below = Below(names, lowest)
    if why := why_off(base, below, config.drops_below):
        return why
    packed = early(config, lambda: model)
    if packed is None and config.quantizes:
        return "which linears are packed hangs on their weights"
    wanted = _wanted(recipe, model, below, setting, packed)
    told = [(filling.differs(**wanted), filling) for filling in fillings if filling.block == below.block]
    same = [filling for differ, filling in told if not differ]
    folder = checkpoint_folder(recipe) if same else None
    for filling in same:
        if folder is not None and filling.holds_of(folder):
            source = Source(setting.root, filling, command_of(recipe, verb="prefill"))
            return Upper(source, below, kept or record.selection, packed)
    if same:
        return "it was filled of other weights"
    nearest = min((differ for differ, _ in told), key=len, default=[])
    cuts = ", ".join(sorted({str(filling.cut) for filling in fillings}))
    return "; ".join(nearest) or f"it trains down to layer {lowest}, and what enters layer {cuts} was filled"


def _wanted(recipe: Recipe, model: Any, below: Below, setting: Setting, stored: Quantized | None) -> Mapping[str, Any]:
    """What a filling has to be of, in the words of `Ahead`."""
    arguments, attention = training_arguments(recipe), loading(recipe)["attn_implementation"]
    lower = lying_in(below.names[: below.cut])
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        "model": type(model).__name__,
        "cut": below.cut,
        "attention": attention if isinstance(attention, str) else str(model.config._attn_implementation),
        "transformers": transformers.__version__,
        "bits": setting.bits,
        "dtype": str(dtype).removeprefix("torch."),
        "packed": {n: p for n, p in (stored.assignment if stored else {}).items() if lower(n)},
        "cast": "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None,
    }


@contextmanager
def naming_rows(setup: Setup) -> Iterator[None]:
    """Raises: RecipeError for a row that was not filled ahead, with its text."""
    try:
        yield
    except MissingRow as error:
        begins = setup.tokenizer.decode(error.ids[:SHOWN]) if error.ids else ""
        raise RecipeError(f"{error}\n(the row begins: {begins!r})" if begins else str(error)) from error

"""`layerpeft prefill`: the states of all rows of a recipe are filled ahead, with one layer of its model in memory at a time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import cached_file

from layerpeft.errors import LayerpeftError, Problem, RecipeError, SaveError
from layerpeft.integrations.files import disk_is_full
from layerpeft.integrations.trainer import seeing
from layerpeft.model.layers import base_of
from layerpeft.model.precisions import PLAIN, Storage
from layerpeft.planning.plan import wrapped
from layerpeft.planning.prefix import SCALE
from layerpeft.planning.trace import Step
from layerpeft.quantization.load import load_quantized
from layerpeft.quantization.save import is_saved
from layerpeft.recipe.calls import Calls, calls_of
from layerpeft.recipe.choice import BLOCK
from layerpeft.recipe.launching import refuse_several
from layerpeft.recipe.model import INIT, auto_class, from_hub, loading, model_config, model_path
from layerpeft.recipe.plan import empty
from layerpeft.recipe.recipe import Recipe, command_of, layer_config, training_arguments
from layerpeft.recipe.shorter import KEY
from layerpeft.recipe.surroundings import SCORED
from layerpeft.recipe.trainer import Setup, loaded_with, prepare, tokenized
from layerpeft.saving.shards import open_checkpoint
from layerpeft.selection.grammar import layer_numbers
from layerpeft.selection.scoring import needs
from layerpeft.text import note, size_text
from layerpeft.training.prefix import fingerprint, parts
from layerpeft.training.prefix.ahead import Ahead, Filled, all_ahead, config_digest, form_number, marks_of, write_ahead
from layerpeft.training.prefix.below import Below, lowest_of, why_off
from layerpeft.training.prefix.cache import CHANGES
from layerpeft.training.prefix.disk import Disk
from layerpeft.training.prefix.running import Form
from layerpeft.training.prefix.setting import Setting
from layerpeft.training.prefix.streaming import Filling, Lower
from layerpeft.training.prefix.upwards import forms_below
from layerpeft.tuners.load import early

# Arguments of trainers that change what lies below the cut once training begins, in a way that is not looked into ahead.
CHANGING = {
    "torch_compile": "a compiled model runs as a whole",
    "use_liger_kernel": "it puts other kernels in the place of parts of the layers",
    "fp16_full_eval": "held-out rows are computed in another type",
    "bf16_full_eval": "held-out rows are computed in another type",
}


CHOICE = ("keep", "pick", "layers", "exclude", "unit", "stack")


@dataclass(frozen=True)
class Prefill:
    """What is to be filled, known before weights are. `packed`: precision of the linears below that are packed, by name."""

    setup: Setup
    place: Path
    setting: Setting
    below: Below
    forms: tuple[Form, ...]
    packed: Mapping[str, str]
    storage: Storage
    device: torch.device

    def load(self, before: parts.Before, inside: str) -> nn.Module:
        """A part of the model, as training loads it. Raises: RecipeError."""
        recipe, options = self.setup.recipe, loaded_with(self.setup)
        options["device"] = self.device if self.device.type != "cpu" else None
        chosen = {name: kind for name, kind in self.packed.items() if name.startswith(f"{inside}.")}
        kind = auto_class(recipe).__name__
        options |= {"kind": kind, "before": before, "progress": False}
        return from_hub(recipe, load_quantized, model_path(recipe), chosen, self.storage, **options)

    def block(self, number: int) -> nn.Module:
        """A block below the cut."""
        name = self.below.names[number]
        return self.load(parts.block_alone(name), name).get_submodule(name)

    def lower(self, cast: torch.dtype | None) -> Lower:
        """The front of the model, and what loads the rest."""
        front = self.load(parts.front_alone(self.below.names, self.forms), " ")
        quiet = not self.setup.recipe.config.drops_below
        return Lower(front, self.below, self.forms, self.block, self.device, cast, quiet)


def prefill(recipe: Recipe, say: Any = print) -> Ahead:
    """Fills the states of all rows of a recipe, those held out among them, and records that they are there.

    Raises: LayerpeftError; before any weight is loaded for whatever can be known by then. KeyboardInterrupt says how to go on.
    """
    with contextlib.redirect_stdout(sys.stderr):
        plan = planned(recipe)
        calls = calls_of(plan.setup)
        note(f"loading what lies in front of the layers of {recipe['model_name_or_path']}")
        lower = plan.lower(calls.cast)
        started, store = time.perf_counter(), _opened(plan, lower, calls)
        with _on_disk(plan, store):
            filling = _filled(plan, lower, store, calls)
            ahead = _recorded(plan, lower, store, filling)
        seconds = time.perf_counter() - started
    _tell(recipe, plan, ahead, filling, store, seconds, say)
    store.close()
    return ahead


def planned(recipe: Recipe) -> Prefill:
    """What there is to fill. Raises: RecipeError, before weights are loaded, where nothing can be filled ahead, and why."""
    setting, place = _asked(recipe), checkpoint_folder(recipe)
    setup = tokenized(prepare(recipe))
    model = empty(setup)
    below = _lowest(recipe, model)
    with _off():
        forms = forms_below(model, below.names, below.cut)
    config = layer_config(recipe)
    wanted = early(config, lambda: recipe.model)
    if wanted is None and config.quantizes:
        raise _refusal(
            "prefix_cache", "which linears are packed hangs on their weights, and these are never there at once"
        )
    lower = tuple(f"{name}." for name in below.names[: below.cut])
    packed = {name: kind for name, kind in (wanted.assignment if wanted else {}).items() if name.startswith(lower)}
    storage, device = wanted.storage if wanted else PLAIN, training_arguments(recipe).device
    return Prefill(setup, place, setting, below, tuple(forms), packed, storage, device)


# ---- what keeps a recipe from it ------------------------------------------------------------------------------------


def _asked(recipe: Recipe) -> Setting:
    """Where states are to lie. Raises: RecipeError."""
    setting, config = recipe.config.caching, recipe.config
    if setting is None or setting.where == "memory":
        again = command_of(recipe, {"layerpeft.prefix_cache": "disk"}, "prefill")
        given = "it is not set" if setting is None else "memory goes with its process"
        raise _refusal("prefix_cache", f"prefix_cache: {given}; say where on disk states are to lie:\n  {again}")
    refuse_several("prefill", "the training afterwards may have several")
    if recipe[KEY] is not None:
        text = (
            "drop: a model is shortened whole; run this once (max_steps: 1 will do), then name the folder `shorter` of its "
            "output_dir as model_name_or_path, with drop taken out"
        )
        raise RecipeError(Problem((KEY,), text))
    if loading(recipe).get("quantization_config") is not None or is_saved(model_path(recipe)):
        text = "a layer is loaded by itself, and packed with `quantize_frozen: nf4` in the layerpeft block"
        raise RecipeError(Problem((INIT,), f"{INIT}: {text}; name a model in 16 bit, and take quantization_config out"))
    if config.is_scheduled:
        raise _refusal("prefix_cache", f"prefix_cache is off: {CHANGES}")
    arguments = training_arguments(recipe)
    if seeing(arguments, None, None).fresh is not None:
        text = f"trainer: {recipe.trainer} makes its rows itself while it trains, so that none can be filled ahead"
        raise RecipeError(Problem(("trainer",), text))
    for key, why in CHANGING.items():
        if getattr(arguments, key, False):
            raise RecipeError(Problem((key,), f"{key}: {why}, so that nothing can be filled ahead; take it out"))
    if getattr(arguments, "neftune_noise_alpha", None) and config.drops_below:
        text = "adds noise below the lowest trained layer; lower_dropout: off in the layerpeft block leaves it out"
        raise RecipeError(Problem(("neftune_noise_alpha",), f"neftune_noise_alpha: {text}"))
    if needs(config.choosing) != "nothing":
        raise _unchosen(recipe)
    return setting


def _unchosen(recipe: Recipe) -> RecipeError:
    """A choice by weights or rows is made first, and written down."""
    choice = {k: v for k, v in recipe.config.choosing.to_dict().items() if k in CHOICE and v is not None}
    scores = {"by": str(recipe.output_dir / SCORED[0]), **choice}
    text = (
        f"select: {recipe.config.choosing.by} chooses layers by what it measures; choose first, then fill:\n"
        f"  {command_of(recipe, verb='score')}\n  {command_of(recipe, {'layerpeft.select': scores}, 'prefill')}"
    )
    return _refusal("select", text)


def checkpoint_folder(recipe: Recipe) -> Path:
    """Where the files of the checkpoint lie. Raises: RecipeError."""
    place, options = model_path(recipe), loading(recipe)
    where = {k: options[k] for k in ("revision", "subfolder", "cache_dir", "token") if options.get(k) is not None}
    found = from_hub(recipe, cached_file, place, "config.json", **where)
    folder = Path(found).parent
    if open_checkpoint(folder) is None:
        text = f"{place} has no weights as safetensors, which are read layer by layer"
        raise RecipeError(Problem(("model_name_or_path",), f"model_name_or_path: {text}"))
    return folder


def _lowest(recipe: Recipe, model: nn.Module) -> Below:
    """The blocks and the lowest that trains. Raises: RecipeError where what enters it is no fixed function of a row."""
    found, _ = wrapped(model, layer_config(recipe), [], Step())
    base = base_of(found.model)
    lowest = lowest_of(base, found.layers.names) if found.layers is not None else 0
    if not lowest or found.layers is None:
        raise _refusal("prefix_cache", "prefix_cache is off: nothing lies below the lowest layer that trains")
    below = Below(found.layers.names, lowest)
    why = why_off(base, below, recipe.config.drops_below)
    asked = recipe.config.distilling
    if why is None and asked is not None and min(layer_numbers(asked.layers, len(below.names))) < lowest:
        why = f"distill looks at layers below {lowest}"
    if why is not None:
        raise _refusal("prefix_cache", f"prefix_cache is off: {why}")
    return below


def _refusal(key: str, text: str) -> RecipeError:
    return RecipeError(Problem((BLOCK, key), text))


@contextlib.contextmanager
def _off() -> Iterator[None]:
    try:
        yield
    except LayerpeftError as error:
        raise _refusal("prefix_cache", f"prefix_cache is off: {error}") from error


# ---- filling --------------------------------------------------------------------------------------------------------


def _opened(plan: Prefill, lower: Lower, calls: Calls) -> Disk:
    """The store, whose folder goes by the weights below. Raises: SaveError where its limit is too small for the rows."""
    _check_room(plan, lower, calls)
    told = fingerprint.belongs(lower.model, plan.below, "")
    same = {k: told[k] for k in ("model", "attention", "transformers")} | _identity(plan, lower)
    same |= {"cut": plan.below.cut, "bits": plan.setting.bits}
    known = (a for _, a in all_ahead(plan.setting.root) if a.block == plan.below.block and not a.differs(**same))
    before = next((a for a in known if a.holds_of(plan.place)), None)
    if before is None:
        with tqdm(total=plan.below.cut, desc="reading layers", unit="layer") as bar:
            belongs = lower.belongs(partial(bar.update, 1))
    else:
        belongs = dict(before.belongs)
    return Disk(plan.setting.root, belongs, plan.setting.limit, plan.setting.bits)


def _check_room(plan: Prefill, lower: Lower, calls: Calls) -> None:
    """Raises: SaveError where the states of the rows take more than the limit."""
    tokens, limit, first = calls.tokens, plan.setting.limit, next(iter(calls), None)
    if tokens is None or limit is None or first is None:
        return
    hidden, _ = lower.entering(0, first)
    width = hidden[0, 0].numel()
    need = tokens * (width + SCALE if plan.setting.bits == 8 else width * hidden.element_size())
    if need > limit:
        raise _full(plan, f"the states of {tokens:,} tokens take {size_text(need)}")


def _full(plan: Prefill, text: str) -> SaveError:
    """Too little room for states."""
    given, half = plan.setting.limit, " or half of it (bits: 8)" * (plan.setting.bits is None)
    limit = "half of what is free on its disk" if given is None else size_text(given)
    return SaveError(
        f"prefix_cache: {text}, and its limit in {plan.setting.root} is {limit}; give it more room (limit){half}"
    )


def _identity(plan: Prefill, lower: Lower) -> dict[str, Any]:
    """How the lower part was loaded, in the words of `Ahead`."""
    config = model_config(plan.setup.recipe, *plan.setup.head)
    dtype = str(next(lower.model.parameters()).dtype).removeprefix("torch.")
    return {"config": config_digest(config), "dtype": dtype, "packed": dict(plan.packed)}


def _filled(plan: Prefill, lower: Lower, store: Disk, calls: Calls) -> Filling:
    """Raises: SaveError where not all of it fits."""
    with tqdm(total=calls.steps * plan.below.cut, desc="prefill", unit="block") as bar:
        filling = Filling(lower, store, plan.setting.root, bar.update)
        with _off():
            filling.fill(calls)
    if filling.lost and store.unwritten is not None:
        raise SaveError(f"{store.root} cannot be written to ({store.unwritten}); {_how_to_go_on(plan, store)}")
    if filling.lost:
        raise _full(plan, f"{store.rows:,} rows are filled, and others do not fit")
    return filling


@contextlib.contextmanager
def _on_disk(plan: Prefill, store: Disk) -> Iterator[None]:
    """Says how to go on where it is stopped. Raises: SaveError where the disk is full; KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(plan, store)) from None
    except OSError as error:
        if not disk_is_full(error, plan.setting.root):
            raise
        raise SaveError(f"no room is left on the disk of {store.root}; {_how_to_go_on(plan, store)}") from error


def _how_to_go_on(plan: Prefill, store: Disk) -> str:
    return f"{store.rows:,} rows are filled; go on with\n  {command_of(plan.setup.recipe, verb='prefill')}"


def _recorded(plan: Prefill, lower: Lower, store: Disk, filling: Filling) -> Ahead:
    """Written last: all rows are there."""
    note("taking the digests of the files of the checkpoint")
    held_out, train = ({k: n for k, n in filling.rows[mode].items()} for mode in (False, True))
    kept = store.get([next(iter(train))])
    found = Ahead(
        belongs=dict(store.belongs),
        cut=plan.below.cut,
        bits=plan.setting.bits,
        files=marks_of(plan.place),
        **_identity(plan, lower),
        cast=None if lower.cast is None else str(lower.cast).removeprefix("torch."),
        entering=str(kept[0].dtype).removeprefix("torch.") if kept else "",
        forms=tuple(map(form_number, plan.forms)),
        train=Filled(len(train), sum(train.values())),
        held_out=Filled(len(held_out), sum(held_out.values())),
    )
    write_ahead(store.folder, found)
    return found


def _tell(recipe: Recipe, plan: Prefill, ahead: Ahead, filling: Filling, store: Disk, seconds: float, say: Any) -> None:
    counts = [f"{ahead.train.rows:,} rows of training"]
    counts += [f"{ahead.held_out.rows:,} held out"] * bool(ahead.held_out.rows)
    tokens = ahead.train.tokens + ahead.held_out.tokens
    say(
        f"filled: what enters layer {ahead.cut} of {len(plan.below.names)}, of {' and '.join(counts)} ({tokens:,} tokens)"
    )
    say(
        f"{filling.computed:,} of them were computed now, in {seconds:.0f} s; all take {size_text(store.size)} in {store.folder}"
    )
    say(f"\nnext:\n  {command_of(recipe)}")

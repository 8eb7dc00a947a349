"""What a run has come to, as plain data: `run.json`, of which its card and its page are made. No place of the machine is in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from layerpeft.errors import SaveError
from layerpeft.integrations.distributed import world_size
from layerpeft.integrations.files import read_json, replace_file
from layerpeft.integrations.hub import license_of
from layerpeft.model.precisions import tensor_bytes
from layerpeft.planning.plan import plan
from layerpeft.planning.trace import gradient_bytes
from layerpeft.quantization.save import is_saved
from layerpeft.recipe import sources
from layerpeft.recipe.measure import state_bytes
from layerpeft.recipe.model import model_path
from layerpeft.recipe.plan import empty, told
from layerpeft.recipe.recipe import Recipe, layer_config, to_yaml, training_arguments
from layerpeft.recipe.samples import Sample
from layerpeft.recipe.shipped import SCHEME, license_that_ships
from layerpeft.recipe.surroundings import PATHS
from layerpeft.recipe.tasks.metrics import NAMES
from layerpeft.recipe.trainer import Setup
from layerpeft.recipe.yaml import dump, parse
from layerpeft.saving.naming import named
from layerpeft.text import note
from layerpeft.training.record import base_named, record_of

RUN = "run.json"
FORMAT = 1
PLANNED = 10.0  # seconds: of a shorter training a plan takes too large a part
PLACES = ("output_dir", "rewards", *PATHS)  # keys whose values are paths, or may be


class Reached(NamedTuple):
    """Numbers on held-out rows, answers, and seconds of training."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    samples: Sequence[Sample]
    seconds: float


class Memory(TrainerCallback):
    """Bytes of weights, gradients and optimizer states of a training, and the most that was taken."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.device = "cpu"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.device = str(args.device.type)
        if args.device.type != "cpu":
            self.device = str(getattr(torch, args.device.type).get_device_name())
            torch.accelerator.reset_peak_memory_stats()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if "gradients" not in self.found and model is not None:
            self.found |= {"weights": tensor_bytes(model), "gradients": gradient_bytes(model)}

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if optimizer is not None:
            self.found["optimizer"] = state_bytes(optimizer)
        if args.device.type != "cpu":
            self.found["peak of the device"] = int(torch.accelerator.max_memory_allocated())
        elif (most := _of_process()) is not None:
            self.found["peak of the process"] = most


def _of_process() -> int | None:
    """The most bytes that this process has ever had in memory; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def outcome(recipe: Recipe, setup: Setup, trainer: Any, model: Any, memory: Memory, reached: Reached) -> dict[str, Any]:
    """Everything that is kept of a run besides the adapter."""
    trainable, total = model.get_nb_trainable_parameters()
    planned = _planned(setup, model) if reached.seconds >= PLANNED and world_size() == 1 else None
    return {
        "format": FORMAT,
        "trainer": recipe.trainer,
        "method": recipe.method,
        "used": list(recipe.row.used),
        "base": _base(recipe, model),
        "hub": trainer.hub_model_id if trainer.args.push_to_hub else None,
        "data": _data(recipe, setup),
        "rows": {
            what: {k: v for k, v in asdict(found).items() if k != "first"} for what, found in setup.counts.items()
        },
        "names": NAMES,
        "before": dict(reached.before),
        "after": dict(reached.after),
        "seconds": reached.seconds,
        "steps": trainer.state.global_step,
        "device": memory.device,
        "trainable": trainable,
        "total": total,
        "memory": {"measured": memory.found, "planned": planned},
        "samples": [asdict(sample) for sample in reached.samples],
        "recipe": shown(recipe),
    }


def write_run(folder: Path, found: Mapping[str, Any]) -> None:
    """Leaves it in the folder."""
    replace_file(folder / RUN, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))


def read_run(folder: Path) -> dict[str, Any]:
    """What a run has left; empty where there is none, or one of another format."""
    try:
        found = read_json(folder / RUN, finite=False)
    except SaveError:
        return {}
    return found if found.get("format") == FORMAT else {}


def _base(recipe: Recipe, model: Any) -> dict[str, Any] | None:
    """What is said of the base. One that ships is known by its own name."""
    found = base_named(model)
    asked = str(recipe["model_name_or_path"])
    name = named(asked)
    ships = {"ships": True} if asked.startswith(SCHEME) else {}
    return None if found is None else found | ({"name": name.name, "local": True} if name.local else {}) | ships


def _data(recipe: Recipe, setup: Setup) -> list[dict[str, Any]]:
    """The data sets by name, each once, and what is known of them."""
    found = []
    for what, key in (("training", "dataset_name"), ("held out", "eval_dataset")):
        for each in sources.named(recipe[key]):
            for path in sources.paths(each.path):
                name = named(path)
                ours = license_that_ships(path)
                known = ours or license_of(path if name.local else name.name, name.revision, "dataset")
                said = {"name": name.name, "hub": not name.local, "license": known, "revision": name.revision}
                found.append({"what": what, **said})
    return found


def _planned(setup: Setup, model: Any) -> dict[str, int] | None:
    """Bytes by part that were to be expected of rows of full length; None where no plan can be made of it."""
    recipe = setup.recipe
    if recipe.row.writes or is_saved(model_path(recipe)):
        return None
    record = record_of(model.peft_config["default"])
    chosen = record.selection.placed if record is not None and record.selection is not None else recipe.select
    if recipe.config.choosing.is_scheduled:
        chosen = recipe.select
    on = training_arguments(recipe).device.type != "cpu"
    try:
        return dict(plan(empty(setup), layer_config(recipe, chosen), **told(recipe, setup, on)).parts)
    except Exception as error:  # the training is over, and must not be lost over a plan, whatever that trips over
        note(f"the page goes without a plan of memory: {type(error).__name__}: {error}")
        return None


# ---- a recipe to show -----------------------------------------------------------------------------------------------


def shown(recipe: Recipe) -> str:
    """The recipe as YAML, with names in the place of places of this machine."""
    said = parse(to_yaml(recipe)).data
    return dump({key: _hidden(value, key in PLACES) for key, value in said.items()})


def _hidden(value: Any, place: bool = False) -> Any:
    """A value without paths of the machine; `place`: texts in it are paths, or addresses."""
    if isinstance(value, Mapping):
        return {key: _hidden(item, place) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item, place) for item in value]
    if isinstance(value, str) and (place or _is_absolute(value)) and "://" not in value:
        found = named(value)
        return found.name if found.local and (os.path.exists(value) or _is_absolute(value)) else value
    return value


def _is_absolute(text: str) -> bool:
    """Whether a text is a path of the machine, and no prompt that begins with a slash."""
    return (text.startswith("~/") or os.path.isabs(text)) and "\n" not in text and text.count("/") > 1

"""sentence-transformers around a model that is there already: its modules, its trainer, and what it keeps beside the weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import patch

from torch import nn

from layerpeft.errors import SaveError
from layerpeft.integrations.files import read_json

MODULES, CONFIG = "modules.json", "config_sentence_transformers.json"
FILES = (MODULES, CONFIG, "sentence_bert_config.json")
LOSSES = "sentence_transformers.sentence_transformer.losses"


def around(model: nn.Module, place: str, **options: Any) -> Any:
    """The SentenceTransformer of a folder (or of a name on the hub), with `model` in the place of its transformer; one without
    modules of its own pools by the mean. Nothing of it trains but the model. Raises: whatever sentence-transformers raises."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer

    device = str(next(model.parameters()).device)
    with patch.object(Transformer, "_load_model", lambda *_, **__: model):
        made = SentenceTransformer(place, device=device, **options)
    for module in list(made.children())[1:]:
        module.requires_grad_(False)
    return made


def modules_of(place: str) -> list[tuple[str, str]]:
    """The modules that a folder (or a name on the hub) lists: the dotted class of each, and the folder in it where it lies ("": the
    first one's, which is the folder itself); none where it lists none."""
    listed = _read(place, MODULES)
    parts = [part for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
    return [(str(part.get("type")), str(part.get("path") or "")) for part in parts]


def foreign_modules(place: str) -> list[str]:
    """The classes among them that are not of sentence-transformers: code of the folder, or of other packages."""
    return [kind for kind, _ in modules_of(place) if not kind.startswith("sentence_transformers.")]


def longest_in(place: str) -> int | None:
    """The tokens that a model was made to read, where the file says that it had before it stood in the tokenizer's."""
    said = _read(place, FILES[2])
    most = said.get("max_seq_length") if isinstance(said, dict) else None
    return most if isinstance(most, int) and most > 0 else None


def _read(place: str, name: str) -> Any:
    """A file of JSON of a folder or of a name on the hub; None where it is not there or cannot be read."""
    from transformers.utils import cached_file

    try:
        path = Path(place) / name if os.path.isdir(place) else cached_file(place, name)
        return read_json(Path(str(path)), kind=(dict, list))
    except (OSError, ValueError, SaveError):
        return None


def parts_in(folder: Path) -> list[str]:
    """What lies in a folder for sentence-transformers beside a transformer, as paths below it: what `MODULES` lists and itself."""
    places = [place for _, place in modules_of(str(folder)) if place != ".." and place and Path(place).name == place]
    own = [name for name in FILES if places and (folder / name).is_file()]
    inside = [path for place in places for path in sorted((folder / place).rglob("*"))]
    return own + [str(path.relative_to(folder)) for path in inside if path.is_file()]


def write_parts(sentences: Any, folder: str | os.PathLike[str]) -> None:
    """Writes what makes an adapter or a transformer in this folder one that SentenceTransformer opens: pooling, other modules,
    prompts. The transformer itself is left to whoever saves it."""
    first = type(sentences[0])
    with patch.object(first, "save", lambda self, path, **_: self.save_config(path)):
        sentences.save(os.fspath(folder), create_model_card=False)


def trainer(kind: Any, judge: Callable[[Any, Any, Any], Mapping[str, float]], **given: Any) -> Any:
    """A SentenceTransformerTrainer (`kind`) of a SentenceTransformer around a PeftModel: it saves and reads that as Trainer does
    any other, and measures held-out rows, in their own order, by `judge(sentences, rows, arguments)` besides."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler
    from transformers import Trainer
    from transformers.trainer import TRAINING_ARGS_NAME

    class Held(kind):
        def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **more: Any) -> Any:
            if dataset is self.train_dataset:
                return super().get_batch_sampler(dataset, batch_size, drop_last, **more)
            return DefaultBatchSampler(SequentialSampler(dataset), batch_size, False, **more)  # type: ignore[arg-type]

        def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **more: Any) -> Any:
            found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **more)
            numbers = judge(self.model, self.eval_dataset, self.args) if self.eval_dataset is not None else {}
            found.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in numbers.items()})
            return found

        def add_model_card_callback(self, default_args_dict: Any) -> None:
            """A card of its own for every checkpoint would take examples from the rows; PEFT writes one."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            import torch

            if not self.args.should_save:  # Trainer asks every process
                return
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            self.model.transformers_model.save_pretrained(folder)
            write_parts(self.model, folder)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

        def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
            Trainer._load_from_checkpoint(self, checkpoint_path, self.model.transformers_model)

        def _load_best_model(self) -> None:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    return Held(**given)


def loss_names() -> tuple[str, ...]:
    """The losses that the installed sentence-transformers has."""
    from sentence_transformers.sentence_transformer import losses

    return tuple(name for name in losses.__all__ if name.endswith("Loss"))


def loss_options(name: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What a loss may be told besides its model, by name: its type, and of a function the names that there are, with what they
    mean. Other modules are left out."""
    from sentence_transformers.sentence_transformer import losses

    kind = getattr(losses, name)
    hints = get_type_hints(kind.__init__)
    found = {}
    for option, parameter in list(inspect.signature(kind.__init__).parameters.items())[2:]:
        default = parameter.default
        if default is parameter.empty or isinstance(default, nn.Module):
            continue
        found[option] = (hints.get(option, Any), _alike(default) if callable(default) else {})
    return found


def _alike(function: Any) -> dict[str, Any]:
    """The functions that may stand in the place of one: those of its own class, else similarities of as many sentences."""
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    holder = getattr(losses, function.__qualname__.rpartition(".")[0], None)
    if holder is not None:
        return {name: getattr(holder, name) for name in vars(holder) if not name.startswith("_")}
    names = [name for name in util.__all__ if name.endswith(("_sim", "_score"))]
    pairwise = function.__name__.startswith("pairwise_")
    return {name: getattr(util, name) for name in names if name.startswith("pairwise_") == pairwise}


def made_loss(name: str, sentences: Any, options: Mapping[str, Any]) -> Any:
    """A loss of sentence-transformers, told these options, functions by their names."""
    from sentence_transformers.sentence_transformer import losses

    known = loss_options(name)
    meant = {k: known[k][1].get(v, v) if k in known and isinstance(v, str) else v for k, v in options.items()}
    return getattr(losses, name)(sentences, **meant)

"""transformers' Trainer: the callback that every trainer built later gets by itself, and the moment before it clips gradients."""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from accelerate.state import GradientState
from torch.autograd import Variable
from torch.utils.data import IterableDataset

from layerpeft.integrations.engines.engine import Engine
from layerpeft.integrations.engines.known import asked_for
from layerpeft.integrations.files import read_json
from layerpeft.integrations.trackers import Shown, show

NAME = "LayerPeftCallback"
# TRL's trainers that write their own rows anew (by their arguments), and those with a reference, by what its arguments can ask
ONLINE = ("num_generations", "missing_eos_penalty")
REFERENCE = ("precompute_ref_log_probs",)


@dataclass(frozen=True)
class Seeing:
    """How often a training sees a row: in so many `epochs` (None: it is streamed), `again` for a reference or in evaluations; or
    never again after the next `fresh` rows, which the trainer makes itself (None: it does not). `loader`: of its batches."""

    epochs: int | None = None
    again: bool = False
    fresh: int | None = None
    loader: Any = None


def seeing(args: Any, state: Any, loader: Any) -> Seeing:
    """From a trainer's arguments, its state and the loader of its rows."""
    streamed = loader is not None and isinstance(getattr(loader, "dataset", None), IterableDataset)
    fresh = None
    if any(hasattr(args, name) for name in ONLINE):
        fresh = 4 * max(int(getattr(args, "generation_batch_size", 0) or 0), int(args.train_batch_size))
    reference = any(getattr(args, name, None) is False for name in REFERENCE)
    asked: Any = getattr(args, "eval_strategy", "no")
    evaluates = str(getattr(asked, "value", asked)) != "no"
    epochs = getattr(state, "num_train_epochs", 0) or 0  # 0: it does not say
    return Seeing(None if streamed else int(epochs), reference or evaluates, fresh, loader)


def announced(loader: Any, ready: Callable[[Any], None]) -> None:
    """Has a loader whose batches are made in this process tell of each one as soon as it is there, steps before it is used."""
    loader = getattr(loader, "base_dataloader", loader)  # Accelerate's stands around another, which makes the batches
    if getattr(loader, "num_workers", None) == 0 and callable(getattr(loader, "collate_fn", None)):
        loader.collate_fn = functools.partial(_told, loader.collate_fn, ready)


class Hooks(NamedTuple):
    """What is called of a trainer.

    `built(model, engine)` runs when a trainer is built, `engine` (None: DDP) as its arguments or `accelerate launch` ask for it.
    `begin(model, restored, merges, engine, optimizer, rows)` runs when training begins: `restored` is what `state(model)` gave at
    the checkpoint that is resumed (None otherwise), `merges`: TRL folds the adapter into the base and out again at every step.
    `end(model, output_dir, stepped)` runs when it ends, `stepped`: after an optimizer step. `news(model)`: what trackers are told,
    and `shown(model)`: what they are shown when training has ended. `packed` models go without DataParallel, which transformers
    spares what it has quantized. `resume`, `made`, `sharded`: of `_watch_checkpoints` and `_watch_optimizers`.
    """

    built: Callable[[Any, Engine | None], None]
    begin: Callable[..., None]
    end: Callable[..., None]
    state: Callable[..., dict[str, Any]]
    news: Callable[..., dict[str, float]]
    packed: Callable[[Any], bool]
    resume: Callable[[Any, str], bool]
    made: Callable[[Any, Any], Any]
    sharded: Callable[[Any, str], None]
    shown: Callable[[Any], AbstractContextManager[Sequence[Shown]]]


def install(hooks: Hooks) -> None:
    """Adds the callback to the trainer's default list, once."""
    import transformers.trainer as trainer
    from transformers.trainer_callback import ExportableState, TrainerCallback

    if any(getattr(c, "__name__", "") == NAME for c in trainer.DEFAULT_CALLBACKS):
        return
    _watch_checkpoints(trainer.Trainer, hooks.resume, hooks.sharded)
    _watch_optimizers(trainer.Trainer, hooks.made)

    class LayerPeftCallback(TrainerCallback, ExportableState):
        """Tells layerpeft when training begins and ends, and keeps the choice in `trainer_state.json`."""

        model: Any = None
        began = 0  # the step that training began at

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"records": hooks.state(self.model)}}

        def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.n_gpu > 1 and hooks.packed(kwargs.get("model")):
                args._n_gpu = 1
            hooks.built(kwargs.get("model"), asked_for(args))

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.model, self.began = kwargs.get("model"), state.global_step
            saved = (state.stateful_callbacks or {}).get(NAME)
            # A checkpoint of a run without this callback has no place for it, and Trainer would fail when it saves the next.
            state.stateful_callbacks = {**(state.stateful_callbacks or {}), NAME: saved or self.state()}
            attributes = saved.get("attributes", {}) if isinstance(saved, dict) else {}
            merges = bool(getattr(args, "use_vllm", False))
            restored = attributes.get("records") if state.global_step else None
            held, rows = kwargs.get("optimizer"), seeing(args, state, kwargs.get("train_dataloader"))
            hooks.begin(self.model, restored, merges, asked_for(args), held, rows)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if isinstance(logs, dict) and args.report_to:
                logs.update(hooks.news(self.model))  # the trackers come later in the list

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hooks.end(self.model, args.output_dir, state.global_step > self.began)
            # the trackers, which come later in the list, are still there
            show(args, state, functools.partial(hooks.shown, self.model))

    trainer.DEFAULT_CALLBACKS.append(LayerPeftCallback)  # pyright: ignore[reportArgumentType]


def _told(collate: Callable[[Any], Any], ready: Callable[[Any], None], rows: Any) -> Any:
    batch = collate(rows)
    ready(batch)
    return batch


def _watch_checkpoints(kind: Any, resume: Callable[[Any, str], bool], sharded: Callable[[Any, str], None]) -> None:
    """Trainer offers no moment between building the model's parts and reading a checkpoint into them, where `resume(model, folder)`
    says whether that is done by then; and it saves no folder of an adapter where every process is to save its own part, which is
    when `sharded(model, folder)` runs."""
    load, load_best, save = kind._load_from_checkpoint, kind._load_best_model, kind.save_model

    @functools.wraps(load)
    def _load_from_checkpoint(self: Any, folder: str, model: Any = None) -> Any:
        return None if resume(self.model, folder) else load(self, folder, model)

    @functools.wraps(load_best)
    def _load_best_model(self: Any) -> Any:
        return None if resume(self.model, self.state.best_model_checkpoint) else load_best(self)

    @functools.wraps(save)
    def save_model(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        found = save(self, output_dir, *args, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            sharded(self.model, output_dir or self.args.output_dir)
        return found

    kind._load_from_checkpoint, kind._load_best_model = _load_from_checkpoint, _load_best_model
    kind.save_model = save_model


def _watch_optimizers(kind: Any, made: Callable[[Any, Any], Any]) -> None:
    """Trainer offers no moment between its optimizer and the scheduler of that, where `made(model, optimizer)` runs."""
    create = kind.create_optimizer

    @functools.wraps(create)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.optimizer is None
        found = create(self, *args, **kwargs)
        if own and self.optimizer is not None:
            made(self.model, self.optimizer)
        return found

    kind.create_optimizer = create_optimizer


def records_in(folder: str) -> dict[str, Any]:
    """What `state(model)` gave when a checkpoint was saved, as it stands there; empty where nothing does. Raises: SaveError."""
    found: Any = read_json(os.path.join(folder, "trainer_state.json"), finite=False)
    for key in ("stateful_callbacks", NAME, "attributes", "records"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def last_micro_batch() -> bool:
    """Whether the running micro-batch is the last of its optimizer step; Trainer tells Accelerate before every forward pass."""
    return bool(GradientState().sync_gradients)


def at_backward_end(action: Callable[[], None]) -> None:
    """Called from inside a backward pass: runs `action` when it is over, after DDP has put the reduced gradients in place.

    Trainer offers no moment between backward and clipping, and the engine's callback, which DDP uses, is the only one there is.
    Where a later torch lacks it nothing happens, and the choice is made in the optimizer's hook, after clipping.
    """
    engine: Any = getattr(Variable, "_execution_engine", None)
    if hasattr(engine, "queue_callback"):
        # Twice, because DDP queues its own callback during the pass and ours stands before it.
        engine.queue_callback(lambda: engine.queue_callback(action))

"""The callback that every transformers and TRL trainer built later gets by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAME = "LayerPeftCallback"


def install(begin: Callable[..., None], end: Callable[..., None], state: Callable[[], dict[str, Any]]) -> None:
    """Adds the callback to the trainer's default list, once.

    `begin(model, optimizer, restored)` runs when training begins, `restored` being what `state()` gave at the checkpoint that
    is resumed (None otherwise); `end(model, output_dir)` when it ends.
    """
    from transformers import trainer
    from transformers.trainer_callback import ExportableState, TrainerCallback

    if any(getattr(c, "__name__", "") == NAME for c in trainer.DEFAULT_CALLBACKS):
        return

    class LayerPeftCallback(TrainerCallback, ExportableState):
        """Tells layerpeft when training begins and ends, and keeps the choice in `trainer_state.json`."""

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"records": state()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved = (state.stateful_callbacks or {}).get(NAME)
            attributes = saved.get("attributes", {}) if isinstance(saved, dict) else {}
            restored = attributes.get("records") if state.global_step else None
            begin(kwargs.get("model"), kwargs.get("optimizer"), restored)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            end(kwargs.get("model"), args.output_dir)

    trainer.DEFAULT_CALLBACKS.append(LayerPeftCallback)  # pyright: ignore[reportArgumentType]

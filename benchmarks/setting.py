"""The settings that models are trained under."""

from __future__ import annotations

from typing import Any, Literal

from peft import PeftModel

from benchmarks.arm import Ready

Setting = Literal["plain", "checkpointed"]


def prepare(ready: Ready, setting: Setting) -> Ready:
    """Training mode; `checkpointed` adds gradient checkpointing and, on PEFT models, inputs that require gradients, as TRL does."""
    model: Any = ready.model
    if setting == "checkpointed":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    model.train()
    return ready

"""DeepSpeed's ZeRO: 1 divides the optimizer's states, 2 gradients as well, 3 weights too."""

from typing import Any

from layerpeft.integrations.engines.engine import FIXED, Engine, launched


def _asked(args: Any) -> bool:
    return bool(getattr(args, "deepspeed", None)) or launched("DEEPSPEED")


ZERO = Engine(
    key="zero",
    name="DeepSpeed",
    argument="deepspeed",
    asked=_asked,
    divides=frozenset(("weights", "gradients", "states")),
    cannot={"schedule": FIXED},
)

"""How far the layers of an earlier run moved, `‖ΔW‖` over what trained in each; higher means "it moved more": train first.

`of` names the folder of that run (LoRA, projection or full weights), and the model that is scored is the base it began with. So the
evidence is a run of one's own: a short one, or one on a related task. ILA (arXiv 2410.17875) learns masks over such changes; Telly
(ISSTA 2023) compares the representations. `relative: true` divides by `‖W‖` of the same weights. Layers that did not train have 0.

Cost: the adapter's file is read once, tensor by tensor; products are of the rank's size, so that no `ΔW` of a LoRA is ever formed.
"""

from dataclasses import dataclass
from pathlib import Path

from layerpeft.errors import ScoreError
from layerpeft.selection.scorers import OF_TARGETS, Traits
from layerpeft.selection.scoring import Measured, Request

TRAITS = Traits(units=OF_TARGETS)

NO_RUN = "by: change needs the folder of an earlier run: {by: change, of: outputs/first, keep: 8}"


@dataclass(frozen=True)
class Options:
    """`of`: the folder of a run. `relative`: over the norm of the same weights."""

    of: str = ""
    relative: bool = False


def needs(options: Options) -> str:
    """The weights alone."""
    return "weights"


def score(request: Request, options: Options) -> Measured:
    """Numbers per layer, and per weight that trained. Raises: ScoreError, SaveError."""
    if not options.of or not isinstance(options.of, str | Path):  # a path from Python
        raise ScoreError(NO_RUN)
    if request.change_of is None:
        raise ScoreError("by: change reads folders of runs, which whoever asks must hand in (Request.change_of)")
    found = request.change_of(options.of, request.model, options.relative, request.layers)
    found.check(request.layers)
    return Measured(found.values, found.targets, {"folder": found.origin["folder"]})

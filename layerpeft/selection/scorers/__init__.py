"""Ways to score layers; one file each, the file name is the value of `by`. Another package adds one through an entry point of the
group `layerpeft.scorers`. Higher means "train this first".

A scorer holds

- `Options`, a frozen dataclass whose fields are the scorer's own keys in `select`, each with a default. A value has to fit its
  hint: whole numbers are from 1, others above 0, texts one of a `Literal`; for other bounds write the field as
  `share: float = checked(0.0, least=0, below=1)`, with `checked` from `layerpeft.selection.typecheck`. A field that means
  nothing beside some values of another says so (`of={"form": ("sum",)}`), and is refused there. Properties of it may be
  `least_batches`, how many a score takes (1), and `only_before`, why training's own batches cannot be measured (""), as text;
- `needs(options)`, which gives one of
  - `"nothing"` or `"weights"`: then it also has `score(request, options) -> Measured`;
  - `"forward"` or `"backward"`: then it also has `start(request, options) -> Measurement`, which watches batches go through the
    model (a forward pass, or a forward and backward pass each) and then gives its `result()`;
- `TRAITS = Traits(...)`, where one of the traits below is not at its default.

`request` is a `layerpeft.Request`. What is missing is told when the scorer is loaded.
"""

from dataclasses import dataclass

from layerpeft.selection.typecheck import checked

OF_TARGETS = ("layer", "sublayer", "target", "expert")  # of a score that is made of parts, one for every target
OF_STATES = ("layer", "sublayer")  # of a score of the states before and after something
STATES = "it is told by the states that are handed on from part to part"
OF_HEADS = (*OF_TARGETS, "head")  # of one that has a part for some columns of a weight, too

HOLDS = (("needs(options)",), ("score(request, options)", "start(request, options)"))  # of each, one or more


@dataclass(frozen=True)
class Traits:
    """`live_only`: watches training itself, and cannot score a model before it; `of_whole`: a score is of all of a layer's weights
    together, not of a share of them; `overlaps`: measures what layers do the same, where `request.overlaps` asks for it; `unseen`:
    what a layer counts as that has no score yet; `units`: what can be scored (`unit` in `select`), and the `reason` why nothing
    else. Of units below a layer `request.layers` is their map, `request.layers.whole` that of the layers. `ordered`: the order of
    rows says something, and a trainer shuffles them; `classes`: every row needs a class; `again_only`: says nothing before
    adapters have trained."""

    live_only: bool = False
    of_whole: bool = False
    overlaps: bool = False
    unseen: float = checked(0.0)
    units: tuple[str, ...] = checked(("layer",))
    reason: str = ""
    ordered: bool = False
    classes: bool = False
    again_only: bool = False

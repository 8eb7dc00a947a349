"""What is learned from a teacher beside training: its field in a config."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from layerpeft.errors import LayerpeftError, Problems
from layerpeft.model.layers import LayerMap
from layerpeft.selection.grammar import layer_numbers
from layerpeft.selection.typecheck import checked
from layerpeft.training.distill import BASE, Distill
from layerpeft.training.distilling import paired, teacher_of


@dataclass
class Taught:
    """A field of a config that chooses. `distill`: a `Distill`, or a dict of its fields."""

    distill: Any = checked(
        None, "A teacher beside training: {layers: all, weight: 1.0, loss: mse, kl: 0.0, teacher: base}. Default: none."
    )

    @property
    def distilling(self) -> Distill | None:
        """`distill`, parsed. Raises: ConfigError."""
        return self._parsed("distill", Distill.parse) if self.distill is not None else None  # type: ignore[attr-defined]

    def taught(self) -> dict[str, Any]:
        """The field as a recipe writes it; nothing where there is no teacher."""
        return {} if self.distilling is None else {"distill": self.distilling.plain()}

    def check_taught_layers(self, model: nn.Module, layers: LayerMap) -> None:
        """What can be known of the teacher before weights are. Raises: SelectionError, ConfigError."""
        asked = self.distilling
        if asked is None:
            return
        empty = next(model.parameters()).is_meta  # where weights are there, they are read for it once
        if asked.teacher == BASE or empty:
            paired(asked, model, layers, teacher_of(asked, model))
        else:
            layer_numbers(asked.layers, len(layers))


def check_taught(config: Any, in_place: bool, problems: Problems) -> None:
    """Adds what is wrong with the field; `in_place`: the method trains weights of the model itself."""
    try:
        asked = config.distilling
    except LayerpeftError as error:
        problems.absorb(error, "distill")
        return
    if asked is None or asked.teacher != BASE:
        return
    against = {
        f"method: {config.method} trains the model's own weights": in_place,
        f"bias={config.bias!r} trains the model's own biases": config.bias != "none",
    }
    for why in (why for why, is_so in against.items() if is_so):
        sentence = (
            f"teacher: base is the model with its adapter switched off, and {why}; name the folder of the teacher"
        )
        problems.add(sentence, "distill")

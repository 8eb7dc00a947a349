"""What a student is asked to learn from a teacher besides its task, and what that adds to the loss.

    task · L + weight · mean over pairs (s, t) of D(h_s, h_t) + kl · T² · KL(softmax(z_t / T) ‖ softmax(z_s / T))

`h_s` is what layer s of the student gives out, `h_t` what layer t of the teacher does. `loss: mse` is the mean of (h_s − h_t)²
over real tokens and features: TinyBERT's L_hidn (arXiv 1909.10351, formula 8), after the hints of FitNets (arXiv 1412.6550,
formula 3), both without the matrix W_h between the two, since widths are equal. `loss: cosine` is the mean over real tokens of
1 − cos(h_s, h_t) (DistilBERT, arXiv 1910.01108). The last term is Hinton et al.'s (arXiv 1503.02531), over the tokens that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerpeft.errors import ConfigError, Problems, unknown
from layerpeft.selection.grammar import check_grammar, layer_numbers
from layerpeft.selection.typecheck import check, checked

BASE = "base"
ROWS = 256  # tokens whose answers are compared at a time; what is between is computed again in the backward pass


@dataclass(frozen=True)
class Distill:
    """The field `distill` of a config. `layers`: of the student, by the grammar; `teacher`: `base`, the model itself with its
    adapter switched off, or a folder or hub id; `map`: layer of the student -> layer of the teacher, where their numbers
    differ; `weight`, `kl`, `task`: of the three terms. Raises: ConfigError naming every problem at once."""

    layers: Any = "all"
    weight: float = checked(1.0, least=0)
    loss: Literal["mse", "cosine"] = checked("mse")
    kl: float = checked(0.0, least=0)
    temperature: float = checked(1.0, above=0)
    task: float = checked(1.0, least=0)
    teacher: str = checked(BASE)
    map: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        problems = Problems("distill")
        check(Distill, vars(self), problems)
        check_grammar("layers", self.layers, problems)
        if not self.weight and not self.kl:
            problems.add("weight: 0 and kl: 0 leave nothing to learn from the teacher", "weight")
        if self.temperature != 1 and not self.kl:
            problems.add(
                f"temperature: {self.temperature:g} is of kl, which is 0; give kl a weight, too", "temperature"
            )
        whole = isinstance(self.map, Mapping) and all(
            type(n) is int and n >= 0 for n in (*self.map, *self.map.values())
        )
        if self.map is not None and not (whole and self.map):
            problems.add(
                f"map={self.map!r} is not layers of the student and the teacher's, such as {{0: 0, 1: 3}}", "map"
            )
        problems.raise_if_any(ConfigError)

    @classmethod
    def parse(cls, value: Any) -> Distill:
        """From a dict of its fields (as YAML and JSON give it, with texts for keys), or itself. Raises: ConfigError."""
        if isinstance(value, Distill):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"distill: expected a dict such as {{'layers': 'last:4', 'weight': 1.0}}, got {value!r}")
        problems = Problems("distill")
        own = [f.name for f in fields(cls)]
        for name in (n for n in value if n not in own):
            problems.add(unknown("key", str(name), own), str(name))
        problems.raise_if_any(ConfigError)
        pairs = value.get("map")
        if isinstance(pairs, Mapping):
            value = {
                **value,
                "map": {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in pairs.items()},
            }
        return cls(**value)

    def plain(self) -> dict[str, Any]:
        """What was asked for, defaults left out."""
        return {k: v for k, v in asdict(self).items() if v != getattr(Distill, k)}

    def pairs(self, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
        """Layers of the student and those of the teacher that they learn from, in stacks of so many.

        Raises: SelectionError for layers that there are not; ConfigError where it is not said which stands for which."""
        chosen = layer_numbers(self.layers, student)
        if self.map is None:
            if student != teacher:
                raise ConfigError(
                    f"distill: the model has {student} layers and its teacher {teacher}: say which learns from which, "
                    "such as map: {0: 0, 1: 3}"
                )
            return tuple((i, i) for i in chosen)
        chosen = tuple(sorted(self.map)) if self.layers == "all" else chosen
        problems = Problems("distill")
        for i in chosen:
            if i not in self.map or i >= student:
                problems.add(f"map: it has no layer {i}" if i < student else f"map: the model has no layer {i}", "map")
            elif self.map[i] >= teacher:
                problems.add(f"map: the teacher has no layer {self.map[i]} (it has {teacher})", "map")
        problems.raise_if_any(ConfigError)
        return tuple((i, self.map[i]) for i in chosen)

    def held(self, rows: int, length: int, pairs: int, width: int, vocabulary: int, itemsize: int) -> int:
        """Bytes that a step holds for it at most, besides the student's own activations.

        A teacher's states with what their distance keeps in float32 (`cosine`: of both); with `kl` a row of answers of the
        teacher for every token, and those of some tokens at a time in float32."""
        kept = 4 if self.loss == "mse" else 8
        answers = (
            rows * length * (vocabulary * itemsize + 2 * width * itemsize) + 16 * ROWS * vocabulary if self.kl else 0
        )
        return (rows * length * width * pairs * (itemsize + kept) if self.weight else 0) + answers


def distance(kind: str, student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """D of states (rows, tokens, …, width) over the tokens that are `real` (rows, tokens); None: all are. In float32 or wider."""
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    if kind == "cosine":
        each = 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)
    else:
        each = (student - teacher).square().mean(-1)
    if real is None:
        return each.mean()
    return each.where(real, 0).sum() / real.sum().clamp(min=1)


def divergence(states: torch.Tensor, head: nn.Module, answers: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(teacher ‖ student), the mean over tokens: states (tokens, width) of the student, which `head` makes answers of, and
    answers (tokens, classes) of the teacher."""

    def part(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head(rows)
        wide = torch.promote_types(logits.dtype, torch.float32)
        ours, theirs = (torch.log_softmax(z.to(wide) / temperature, -1) for z in (logits, wanted))
        return (theirs.exp() * (theirs - ours)).sum()

    parts = zip(states.split(ROWS), answers.split(ROWS), strict=True)
    total = sum((checkpoint(part, rows, wanted, use_reentrant=False) for rows, wanted in parts), states.new_zeros(()))
    return temperature**2 * total / max(1, len(states))

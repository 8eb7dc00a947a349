"""Soft choice: how much each of the chosen layers is trained, by its score."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from layerpeft.errors import Problems
from layerpeft.selection.select import Select
from layerpeft.selection.typecheck import checked


@dataclass
class Soft:
    """Fields of a config. `ranks="by_score"`: ranks in proportion to the scores, with no more parameters than `r` for all."""

    ranks: Literal["by_score"] | None = checked(
        None, "by_score: ranks in proportion to the scores, with as many parameters as r for all. Default: r for all."
    )
    min_rank: int | None = checked(None, "The least of them. Default: 1.", least=1)


SOFT = tuple(f.name for f in fields(Soft))
BY_SCORE = ("ranks", "min_rank")  # fields that say nothing of layers without scores


def has_scores(select: Select) -> bool:
    """Whether a choice is made by scores."""
    return select.by != "depth" or select.keep is not None


def choosing_by(config: Any, select: Any) -> Any:
    """A copy of a config with another choice; of layers that are chosen by place, all are trained alike. Raises: ConfigError."""
    return config.changed(select=select, **({} if has_scores(Select.parse(select)) else dict.fromkeys(BY_SCORE)))


def check_soft(config: Any, select: Select, trains_factors: bool, problems: Problems) -> None:
    """Adds what does not go together; `trains_factors`: the method has ranks that may differ."""
    if config.ranks is None:
        if config.min_rank is not None:
            problems.add(f"min_rank={config.min_rank!r} is of ranks='by_score'", "min_rank")
        return
    least = config.min_rank if isinstance(config.min_rank, int) else 1
    against = {
        "is of LoRA, whose factors have a rank (LayerLoraConfig, method: lora)": not trains_factors,
        "needs layers that are chosen by their scores, such as select={'by': 'gradient_norm', 'keep': 8}": not has_scores(
            select
        ),
        "gives more to higher scores, and pick: bottom wants the lowest": select.rule == "bottom",
        "needs one choice for all steps, and reselect_steps makes another": select.is_scheduled,
        "gives every target its rank, and so do rank_pattern and alpha_pattern": config.rank_pattern
        or config.alpha_pattern,
        "gives out ranks, and so does init_lora_weights='eva'": config.init_lora_weights == "eva",
        f"has min_rank={least}, above r={config.r}": isinstance(config.r, int) and least > config.r,
    }
    for why, is_so in against.items():
        if is_so:
            problems.add(f"ranks={config.ranks!r} {why}", "ranks")

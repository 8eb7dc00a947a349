"""Soft choice: how much each of the chosen layers is trained, by its score."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from layerpeft.errors import Problems
from layerpeft.selection.select import Select
from layerpeft.selection.typecheck import checked


@dataclass
class Soft:
    """Fields of a config. `ranks="by_score"`: ranks in proportion to the scores, with no more parameters than `r` for all.

    `layer_lr="by_score"`: learning rates in proportion to the scores; `layer_lr_decay`: each layer that many times that of the
    next.
    """

    ranks: Literal["by_score"] | None = checked(
        None, "by_score: ranks in proportion to the scores, with as many parameters as r for all. Default: r for all."
    )
    min_rank: int | None = checked(None, "The least of them. Default: 1.", least=1)
    layer_lr: Literal["by_score"] | None = checked(
        None,
        "by_score: the learning rate of the best layer is the whole one, that of others in proportion to their scores.",
    )
    layer_lr_decay: float | None = checked(
        None, "The learning rate of each layer over that of the next one; the last has the whole.", above=0, most=1
    )

    @property
    def is_rated(self) -> bool:
        """Whether layers have learning rates of their own."""
        return self.layer_lr is not None or self.layer_lr_decay is not None


SOFT = tuple(f.name for f in fields(Soft))
BY_SCORE = ("ranks", "min_rank", "layer_lr")  # fields that say nothing of layers without scores


def has_scores(select: Select) -> bool:
    """Whether a choice is made by scores."""
    return select.by != "depth" or select.keep is not None


def choosing_by(config: Any, select: Any) -> Any:
    """A copy of a config with another choice; of layers that are chosen by place, all are trained alike. Raises: ConfigError."""
    return config.changed(select=select, **({} if has_scores(Select.parse(select)) else dict.fromkeys(BY_SCORE)))


def check_soft(config: Any, select: Select, trains_factors: bool, problems: Problems) -> None:
    """Adds what does not go together; `trains_factors`: the method has ranks that may differ."""
    for name in (
        n for n in ("layer_lr", "layer_lr_decay") if getattr(config, n) is not None and select.unit != "layer"
    ):
        problems.add(
            f"{name} is the learning rate of whole layers, and unit: {select.unit} chooses parts of them", name
        )
    if config.layer_lr is not None:
        if config.layer_lr_decay is not None:
            problems.add(
                "layer_lr and layer_lr_decay both say the learning rate of each layer; write one", "layer_lr_decay"
            )
        _check_scores("layer_lr", config, select, problems)
    if config.ranks is None:
        if config.min_rank is not None:
            problems.add(f"min_rank={config.min_rank!r} is of ranks='by_score'", "min_rank")
        return
    _check_scores("ranks", config, select, problems)
    least = config.min_rank if isinstance(config.min_rank, int) else 1
    against = {
        "is of LoRA, whose factors have a rank (LayerLoraConfig, method: lora)": not trains_factors,
        "gives every weight one rank, and unit: expert chooses parts of weights": select.unit == "expert",
        "gives every target its rank, and so do rank_pattern and alpha_pattern": config.rank_pattern
        or config.alpha_pattern,
        "gives out ranks, and so does init_lora_weights='eva'": config.init_lora_weights == "eva",
        f"has min_rank={least}, above r={config.r}": isinstance(config.r, int) and least > config.r,
    }
    for why, is_so in against.items():
        if is_so:
            problems.add(f"ranks={config.ranks!r} {why}", "ranks")


def _check_scores(name: str, config: Any, select: Select, problems: Problems) -> None:
    """Adds why there is not one score for each layer, higher for more."""
    against = {
        "needs layers that are chosen by their scores, such as select={'by': 'fisher', 'keep': 8}": not has_scores(
            select
        ),
        "gives more to higher scores, and pick: bottom wants the lowest": select.rule == "bottom",
        "needs one choice for all steps, and reselect_steps makes another": select.is_scheduled,
    }
    for why in (why for why, is_so in against.items() if is_so):
        problems.add(f"{name}={getattr(config, name)!r} {why}", name)

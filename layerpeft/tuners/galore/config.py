"""Gradient projection on chosen layers: its config, and what PEFT sees of it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft import LoraConfig
from torch import nn

from layerpeft.errors import ConfigError, Problems
from layerpeft.integrations.engines.engine import Need
from layerpeft.integrations.peft import LayerPeftType
from layerpeft.model.experts import check_experts
from layerpeft.model.layers import Target, base_of
from layerpeft.selection.typecheck import checked
from layerpeft.text import note
from layerpeft.training.method import Method
from layerpeft.training.record import record_of
from layerpeft.tuners.config import LayerLoraConfig, options_given
from layerpeft.tuners.galore import saving
from layerpeft.tuners.galore.method import GaloreMethod
from layerpeft.tuners.galore.subspace import SIDES
from layerpeft.tuners.galore.watch import Refreshing
from layerpeft.tuners.lora.method import LoraMethod
from layerpeft.tuners.stock import RecordedLoraConfig, lora_fields

# LoRA's options that mean the same here; every other one is refused unless it is left alone
SHARED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "target_parameters", "exclude_modules", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying",
}  # fmt: skip
NOT_DAMPED = (
    "select: by: importance damps what an adapter adds to a layer and sees whether it is missed; a projection adds most of it to "
    "the weights themselves, so there is nothing to damp. Use by: gradient_norm, or method: lora (LayerLoraConfig)"
)
KINDS = ("linear", "conv1d", "experts")
IDENTITY = (
    "r", "update_proj_gap", "scale", "proj_type", "subspace", "basis", "moments", "stagger", "oversample", "gap_overlap", "seed",
)  # fmt: skip


@dataclass
class LayerGaloreConfig(LayerLoraConfig):
    """GaLore's updates (arXiv 2403.03507) on chosen layers, by any optimizer: `W + scale·B·Q`, with `Q` renewed now and then.

    `r`, `update_proj_gap`, `scale`, `proj_type`: named as in the reference. `subspace`: `sketch` (from the gradient probe; no full
    gradient is ever made), `svd` (exact, for equality with the reference) or `random`. `basis`: `aligned` turns a new basis
    within its span to lie nearest to the old one; `raw` is the reference's. `moments` of the optimizer at a refresh: `keep` (the
    reference), `project` or `reset`. `stagger` spreads refreshes over the gap. `gap_overlap`: a module whose new subspace
    overlaps the old by at least this much (0 to 1) waits twice as long. `fold`: where the original weights stay, `beside` (on
    their device) or `base` (on the CPU). `max_rank` of the saved adapter; None saves the exact sum. `select` and `batches` as
    in `LayerLoraConfig`, as is `target_parameters`: weights of experts in one 3-D tensor, with a basis per expert.
    Raises: ConfigError naming every problem at once.
    """

    r: int = checked(128, "Rank of the subspace, as in GaLore.", above=0)
    update_proj_gap: int = checked(200, "Optimizer steps of a layer between two subspaces.", above=0)
    scale: float = checked(0.25, "Factor of the update, as in GaLore.", above=0)
    proj_type: str = checked("right", "right, left, std or reverse_std, as in GaLore.", choices=SIDES)
    subspace: Literal["sketch", "svd", "random"] = checked("sketch", "Where it comes from.")
    basis: Literal["aligned", "raw"] = checked("aligned", "How a new basis lies in its span.")
    moments: Literal["keep", "project", "reset"] = checked("keep", "Moments at a refresh.")
    stagger: bool = checked(True, "Spread refreshes over the gap.")
    oversample: int = checked(16, "Random directions of a sketch besides the rank.", above=0)
    gap_overlap: float | None = checked(None, "Overlap from which on the gap doubles.", above=0, most=1)
    fold: Literal["beside", "base"] = checked("beside", "Where the original weights stay.")
    seed: int = checked(0, "Of random bases and sketches.")
    max_rank: int | None = checked(None, "Largest rank of the saved adapter.", above=0)
    kind: ClassVar[enum.Enum] = LayerPeftType.LAYER_GALORE
    method: ClassVar[str] = "galore"
    works_by: ClassVar[type[Method]] = GaloreMethod
    derived: ClassVar[tuple[str, ...]] = ("peft_type", "lora_alpha")

    def __post_init__(self, batches: Iterable[Any] | None = None) -> None:
        super().__post_init__(batches)
        self.lora_alpha = self.scale * self.r  # type: ignore[assignment]

    def refuse(self, problems: Problems) -> None:
        """Adds LoRA's own options, and choices that watch an adapter."""
        for name in options_given(self, SHARED):
            if name == "lora_alpha" and self.lora_alpha == self.scale * self.r:
                continue  # it was derived, in a config that this one is made from
            problems.add(f"{name}={getattr(self, name)!r}: LoRA's own, without a meaning for projection", name)
        by = self.select.get("by") if isinstance(self.select, Mapping) else getattr(self.select, "by", None)
        if by == "importance":
            problems.add(NOT_DAMPED, "select", "by")

    def at_rank(self, rank: int) -> dict[str, Any]:
        """Its scale has no rank in it."""
        return {"r": rank}

    def resolve(self, model: nn.Module, batches: Iterable[Any] | None = None, *, progress: bool = True) -> LoraConfig:
        """Never: a stock config would be ordinary LoRA. Raises: ConfigError."""
        raise ConfigError(
            "gradient projection has no stock config that means the same: give the config itself to get_peft_model or to a "
            "trainer's peft_config=, on a model without other adapters"
        )

    def settled(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What PEFT will be given to wrap that model by. Raises: as `resolve`, and ConfigError for experts of a kind not known."""
        stock = super().settled(model, *args, **kwargs)
        check_experts(base_of(model), stock.target_parameters or ())
        return stock

    def needs(self, batches: bool) -> frozenset[Need]:
        """What an engine must be able to do for it: projection of experts is a thing of its own."""
        return super().needs(batches) | (frozenset(("projected_experts",)) if self.target_parameters else frozenset())

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to go on where the other stopped."""
        return {name: getattr(self, name) for name in IDENTITY}

    @property
    def refreshing(self) -> Refreshing:
        """How bases are renewed."""
        return Refreshing(**{f.name: getattr(self, f.name) for f in fields(Refreshing)})

    @classmethod
    def loaded(cls, model: nn.Module, adapter: str, live: Any, trains: bool, folder: Path) -> Method:
        """Ordinary LoRA, which it says."""
        if trains:
            note(
                "trained further, this adapter is ordinary LoRA; a projection goes on where it stopped through load_adapter("
                "folder, adapter_name) on a model that LayerGaloreConfig has wrapped, as Trainer's resume_from_checkpoint does"
            )
        return LoraMethod(model, adapter, live)

    def stock(self, given: dict[str, Any], targets: Iterable[Target]) -> ProjectedLoraConfig:
        """LoRA with one factor fixed: ranks no larger than the weights, and the scale in the place of alpha/r.

        Raises: ConfigError for targets that cannot be projected.
        """
        targets = list(targets)
        unfit = [t for t in targets if t.kind not in KINDS]
        if unfit:
            raise ConfigError(
                f"gradient projection is for linear layers, Conv1D and experts, and {unfit[0].name} ({unfit[0].kind}) is none"
                f"{f', nor are {len(unfit) - 1} others' if len(unfit) > 1 else ''}; leave them out of target_modules and "
                "target_parameters"
            )
        small = {t.name: min(t.shape[-2:]) for t in targets if min(t.shape[-2:]) < self.r}
        ranks = {f"^{name.replace('.', chr(92) + '.')}$": rank for name, rank in small.items()}
        given |= {"rank_pattern": ranks, "alpha_pattern": {k: self.scale * r for k, r in ranks.items()}}
        return ProjectedLoraConfig(**given)


@dataclass
class ProjectedLoraConfig(RecordedLoraConfig):
    """What PEFT sees of a projection while it trains; its folder is a stock LoRA adapter, with the state to go on from."""

    projects: ClassVar[bool] = True

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As of any recorded one; of a pickled copy, which has no record, by the rank of the weights that are there."""
        rank = saving.rank_in(save_directory) if record_of(self) is None else None
        if rank is None:
            super().save_pretrained(save_directory, **kwargs)
        else:
            LoraConfig(**lora_fields(self) | saving.stock_options(rank)).save_pretrained(save_directory, **kwargs)

"""Rows of TRL's trainers, one each: the whole of what this package knows of them."""

from __future__ import annotations

from typing import Any

from layerpeft.recipe.trainers.row import Row
from layerpeft.selection.typecheck import Setting

CAUSAL = ("AutoModelForCausalLM", "CAUSAL_LM")
TASKS, BESIDE = "layerpeft.recipe.tasks", "layerpeft.recipe.beside"
ANSWERS = ("generate", "predict")  # rows have prompts, and nothing that would be right
REWARDS = {"rewards": Setting(str | list[Any] | dict[str, Any] | None)}
REWARDED: dict[str, Any] = {
    "keys": REWARDS, "needs": ("rewards",), "beside": (f"{BESIDE}.rewards",), "writes": True, "used": ANSWERS,
}  # fmt: skip
TEACHER: dict[str, Any] = {"needs": ("teacher_model_name_or_path",), "beside": (f"{BESIDE}.teachers",), "used": ANSWERS}
OWN: dict[str, Any] = {"trl": True, "alone": False}  # a loss of their own
HEAD: dict[str, Any] = OWN | {"fused_head": True}  # with the head's weight in it
PAIRS, PROMPTS = f"{TASKS}.preferences.PAIRS", f"{TASKS}.prompts.REWARDED"


def _at(place: str, name: str) -> tuple[str, str]:
    """The classes of a trainer and of its settings."""
    return f"{place}.{name}Trainer", f"{place}.{name}Config"


SFT = Row("sft", *_at("trl", "SFT"), *CAUSAL, trl=True, fused_head=True, answers=True)
ROWS = (
    SFT,
    Row("dpo", *_at("trl", "DPO"), *CAUSAL, PAIRS, **HEAD, each=2, reference=True),
    Row("kto", *_at("trl", "KTO"), *CAUSAL, f"{TASKS}.preferences.UNPAIRED", **HEAD, reference=True),
    Row(
        "reward", *_at("trl", "Reward"), "AutoModelForSequenceClassification", "SEQ_CLS", f"{TASKS}.preferences.JUDGED",
        **OWN, each=2, one_number=True, used=("eval",),
    ),
    Row("grpo", *_at("trl", "GRPO"), *CAUSAL, PROMPTS, **REWARDED, **HEAD, reference=True),
    Row("rloo", *_at("trl", "RLOO"), *CAUSAL, PROMPTS, **REWARDED, **HEAD, reference=True),
    Row("distillation", *_at("trl", "Distillation"), *CAUSAL, f"{TASKS}.prompts.TAUGHT", **TEACHER, **HEAD, writes=True),
    Row("orpo", *_at("trl.experimental.orpo", "ORPO"), *CAUSAL, PAIRS, **OWN, each=2),
    Row("cpo", *_at("trl.experimental.cpo", "CPO"), *CAUSAL, PAIRS, **OWN, each=2),
    Row(
        "online_dpo", *_at("trl.experimental.online_dpo", "OnlineDPO"), *CAUSAL, PROMPTS, **REWARDED, **OWN, each=2,
        evaluates=False, reference=True,
    ),
    Row("gkd", *_at("trl.experimental.gkd", "GKD"), *CAUSAL, f"{TASKS}.taught.TASK", **TEACHER, **OWN, writes=True),
)  # fmt: skip

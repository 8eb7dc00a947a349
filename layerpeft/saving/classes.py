"""The classes of transformers that adapters belong on, by what their adapter_config.json says."""

from collections.abc import Mapping
from typing import Any

MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def class_named(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that adapter_config.json names, by the task or as it is; None where it names none."""
    return MODELS.get(str(config.get("task_type"))) or (config.get("auto_mapping") or {}).get("base_model_class")

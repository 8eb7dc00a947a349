"""What the tests of docs/lora-options.md share: an example of every option, a register of tested rows, and a tiny Qwen2."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import nn

import layerpeft
from layerpeft import LayerLoraConfig, check_trained
from tests.helpers.models import MODELS, batch, loss_of

DOCS = Path(__file__).parents[2] / "docs" / "lora-options.md"
PENDING: dict[str, Any] = {"by": "gradient_norm", "keep": 1, "num_batches": 1}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
BLOCKS = {"target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "k_proj", "v_proj"]}
BLOCKS["target_modules_bd_b"] += ["gate_proj", "up_proj"]

# the options of the table as they are written there: an example of each
OPTIONS: dict[str, dict[str, Any]] = {
    "r": {"r": 2},
    "lora_alpha": {"lora_alpha": 32},
    "lora_dropout": {"lora_dropout": 0.1},
    "target_modules": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "exclude_modules": {"exclude_modules": ["up_proj"]},
    "target_parameters": {"target_parameters": EXPERTS},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    'bias="none"': {"bias": "none"},
    'bias="lora_only"': {"bias": "lora_only"},
    'bias="all"': {"bias": "all"},
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights=True": {"init_lora_weights": True},
    "init_lora_weights=False": {"init_lora_weights": False},
    'init_lora_weights="loftq"': {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()},
    'init_lora_weights="eva"': {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    'init_lora_weights="corda"': {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    'init_lora_weights="lora_ga"': {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "kasa_config": {"kasa_config": KasaConfig()},
    "velora_config": {"velora_config": VeloraConfig()},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "use_bdlora": {"use_bdlora": BdLoraConfig(**BLOCKS, nblocks=2)},  # type: ignore[arg-type]
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 5]},
    "ensure_weight_tying": {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
    # a token that stands in the shared batch: without one there is no gradient
    "alora_invocation_tokens": {"alora_invocation_tokens": [20], "task_type": "CAUSAL_LM"},
    "layers_to_transform": {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    "layers_pattern": {"layers_pattern": "layers", "layers_to_transform": 1, "target_modules": ["q_proj"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "train_new": {"train_new": False},
}
for _name in ("gaussian", "orthogonal", "mica", "pissa", "olora", "pissa_niter_4"):
    OPTIONS[f'init_lora_weights="{_name}"'] = {"init_lora_weights": _name}
TESTED: set[str] = set()


def row(*options: str) -> Callable[[Callable], Callable]:
    """Says which options of the table a test is about."""
    TESTED.update(options)
    return lambda test: test


def table() -> dict[str, tuple[str, str]]:
    """Option -> (with a choice, while it waits), from the docs."""
    found = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            option, choice, waiting = (cell.strip() for cell in line.strip("| ").split(" | "))
            found |= {name: (choice, waiting) for name in re.findall(r"`([^`]+)`", option)}
    return found


def build(name: str = "qwen2") -> Any:
    return MODELS[name]()


def wrap(select: Any = "last:1", model: Any = None, **options: Any) -> Any:
    config = LayerLoraConfig(select=select, **{"r": 4, "target_modules": "all-linear", **options})
    return layerpeft.get_peft_model(model or build(), config)


def logits(model: nn.Module, name: str = "qwen2") -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch(name, model)).logits


def moved(model: nn.Module, name: str = "qwen2", steps: int = 2) -> set[str]:
    """Trains, lets everything be verified, and names what moved, without PEFT's prefix."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    for _ in range(steps):
        loss_of(name, model).backward()
        optimizer.step()
        optimizer.zero_grad()
    check_trained(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[id(p)])}
    return {n.removeprefix("base_model.model.") for n in changed}


def besides(names: set[str]) -> set[str]:
    """What is no LoRA tensor of the last layer."""
    return {n for n in names if not (n.startswith("model.layers.2.") and ".lora_" in n)}


def reloads(model: Any, folder: Path, name: str = "qwen2", base: Any = None) -> bool:
    """Whether plain PEFT loads what was saved as the model that it is."""
    model.save_pretrained(str(folder))
    loaded = peft.PeftModel.from_pretrained(base or build(name), str(folder))
    return torch.allclose(logits(loaded, name), logits(model, name), atol=1e-5, rtol=0)

"""The cut under the defaults of TRL's trainers, and over bitsandbytes bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

from layerpeft import LayerLoraConfig
from tests.conftest import LLAMA
from tests.helpers.traffic import watched
from tests.training import test_backward
from tests.training.test_backward import ALL, LINEARS, TOP, llama, traffic

TARGETS = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
RUN = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
TRAINERS = ["SFT", "DPO", "Reward", "GRPO"]
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}


def tiny(kind: type = LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "vocab_size": 4096, "pad_token_id": 0}
    return kind(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options))


def trainer_of(name: str, config: peft.PeftConfig, folder: Path, **options: Any) -> Any:
    """One of TRL's trainers with its defaults."""
    import trl

    special = {"num_generations": 2, "max_completion_length": 4} if name == "GRPO" else {}
    args = getattr(trl, f"{name}Config")(str(folder), **{**QUIET, **RUN, **special, **options})
    assert args.gradient_checkpointing and args.bf16
    prompts = {"prompt": ["one and one is", "two and two is"] * 4}
    pairs = {**prompts, "chosen": [" two"] * 8, "rejected": [" five"] * 8}
    ids = torch.randint(5, 4000, (8, 12), generator=torch.Generator().manual_seed(3)).tolist()
    rows = {"SFT": {"input_ids": ids}, "GRPO": prompts}.get(name, pairs)
    rewards = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]} if name == "GRPO" else {}
    model = tiny(LlamaForSequenceClassification, num_labels=1) if name == "Reward" else tiny()
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    kind = getattr(trl, f"{name}Trainer")
    data = Dataset.from_dict(rows)
    return kind(model, args=args, train_dataset=data, peft_config=config, processing_class=tokenizer, **rewards)


class Gradients(TrainerCallback):
    """The gradients of each step that were to be clipped."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trained(name: str, config: peft.PeftConfig, folder: Path, **options: Any) -> tuple[tuple[str, str, str], Gradients]:
    """Traffic of two steps, and their gradients."""
    torch.manual_seed(1)
    trainer, gradients = trainer_of(name, config, folder, **options), Gradients()
    trainer.add_callback(gradients)
    with watched(trainer.model) as seen:
        torch.manual_seed(2)
        trainer.train()
    return (seen.text("forward"), seen.text("reached"), seen.text("recomputed")), gradients


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("reentrant", [False, True], ids=["default", "reentrant"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trl_with_default_arguments(name, reentrant, tmp_path):
    task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    options = REENTRANT if reentrant else {}
    heads = {"modules_to_save": ["score"]} if name == "Reward" else {}
    stock = peft.LoraConfig(layers_to_transform=[4, 5], layers_pattern="layers", task_type=task, **heads, **TARGETS)
    ours = LayerLoraConfig(select="last:2", task_type=task, **TARGETS)
    seen, mine = trained(name, ours, tmp_path, **options)
    plain, theirs = trained(name, stock, tmp_path, **options)
    two = [digits.replace("1", "2") for digits in (ALL, TOP)]
    assert seen == (two[0], two[1], two[1])
    assert plain == (two[0], two[0], two[0])
    assert len(mine.seen) == len(theirs.seen) == 2
    for found, reference in zip(mine.seen, theirs.seen, strict=True):
        assert found.keys() == reference.keys() and len(found) == (9 if name == "Reward" else 8)
        assert all(torch.equal(found[n], reference[n]) for n in found)


# bitsandbytes, made ready by prepare_model_for_kbit_training


def quantized(bits: int) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    model: Any = llama(width=64)  # bitsandbytes unpacks much smaller 4-bit weights wrongly on a CPU
    for block in model.model.layers:
        for name in LINEARS:
            old = block.get_submodule(name)
            new: Any
            if bits == 4:
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            block.set_submodule(name, new.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


@pytest.mark.matrix
@pytest.mark.parametrize("keywords", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_prepare_model_for_kbit_training(bits, keywords):
    found = []
    for make in (test_backward.wrap, test_backward.plain):
        ready = peft.prepare_model_for_kbit_training(quantized(bits), gradient_checkpointing_kwargs=keywords)
        model = make(ready)
        found.append((traffic(model), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (seen, mine), (plain, theirs) = found
    assert seen == (ALL, TOP, TOP) and plain == (ALL, ALL, ALL)
    assert mine.keys() == theirs.keys() and len(mine) == 28
    assert all(g is not None and torch.equal(g, theirs[n]) for n, g in mine.items())


@pytest.mark.parametrize("keywords", [None, {"use_reentrant": False}], ids=str)
def test_a_wrapped_model_may_be_made_ready_afterwards(keywords):
    model = test_backward.wrap(quantized(4))
    peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=keywords)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert traffic(model) == (ALL, TOP, TOP)

"""A Llama whose linears every precision can hold, and short trainings of it."""

from __future__ import annotations

import torch

import layerpeft
from layerpeft import LayerLoraConfig
from layerpeft.model.layers import base_of, find_module
from layerpeft.model.precisions import precision_of
from tests.helpers.loops import adamw, llama, make_batches

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
BATCHES = make_batches()
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def wide(dtype=torch.float32, **options):
    """Four layers of seven linears, 64 to 128 wide, embeddings and head apart."""
    return llama(**{**WIDE, "tie_word_embeddings": False, **options}).to(dtype)


def kinds(model):
    """Layer -> the set of precisions of its linears."""
    base = base_of(model)
    return {
        i: {precision_of(find_module(base, f"model.layers.{i}.{n}")) for n in LINEARS}
        for i in range(len(base.model.layers))
    }


def wrap(model=None, kind=LayerLoraConfig, batches=None, **options):
    """A tiny wrapped model; `options` as of the config, rank 4 unless said otherwise."""
    given = {"task_type": "CAUSAL_LM", "select": "last:2"} | ({} if "Full" in kind.__name__ else {"r": 4}) | options
    more = {} if batches is None else {"batches": batches}
    return layerpeft.get_peft_model(wide() if model is None else model, kind(**given), **more)


def train(model, steps=4, lr=1e-2):
    """Steps of AdamW over the batches in turn; what trained is checked at the end."""
    model.train()
    optimizer = adamw(model, lr)
    for i in range(steps):
        model(**BATCHES[i % len(BATCHES)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layerpeft.check_trained(model)
    return model


@torch.no_grad()
def logits(model):
    """Of the first batch, in evaluation mode."""
    return model.eval()(BATCHES[0]["input_ids"]).logits

"""What a plan knows of other libraries beyond their promises: TRL's head, quantizers, torch's operations, the hub's log."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from layerpeft.integrations import tracing
from tests.helpers.models import MODELS


def test_trl_folds_a_tile_through_two_functions_that_can_be_replaced(monkeypatch):
    from trl.kernels import chunked_logprob

    model = MODELS["llama"]().train()
    tracing.add_head(model)
    called = []
    for name in ("_forward_tile", "_backward_tile"):
        real = getattr(chunked_logprob, name)
        monkeypatch.setattr(
            chunked_logprob, name, lambda *a, real=real, name=name, **k: (called.append(name), real(*a, **k))
        )
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    assert called == ["_forward_tile", "_backward_tile"]
    with tracing.in_place():
        model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    assert len(called) == 2
    assert "add_fused_lm_head" in inspect.getsource(inspect.getmodule(_sft_trainer()))  # type: ignore[arg-type]
    assert 'outputs=("log_probs", "entropy", "is_top1")' in inspect.getsource(_sft_trainer())


def _sft_trainer():
    from trl import SFTTrainer

    return SFTTrainer


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_marks_what_it_quantizes(bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        model = MODELS["llama"]()
    before = tracing.weight_bytes(model)
    tracing.as_quantized(model, BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8), lambda *_: 1)
    marked = [m for m in model.modules() if hasattr(m, "source_cls")]
    assert len(marked) == 3 * 7 and getattr(model, f"is_loaded_in_{bits}bit")
    assert tracing.weight_bytes(model) < before


def test_torch_has_a_table_of_operations_without_this_attention():
    assert torch.ops.aten.mm in flop_registry
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    assert cpu not in flop_registry, "torch counts it now; take it out of counting.py"


def test_the_hub_tells_of_its_retries_in_one_place():
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    assert _http.logger is logging.getLogger("huggingface_hub.utils._http")
    assert "HF_HUB_OFFLINE" in inspect.getsource(constants.is_offline_mode)


def test_transformers_sends_grouped_products_through_one_function_that_can_be_replaced(monkeypatch):
    from transformers.integrations import moe

    seen = []

    def counted(input, weight, offs):
        seen.append((input.shape, weight.shape, len(offs)))
        return input @ weight[0]

    monkeypatch.setattr(moe, "_grouped_mm", counted)
    model = MODELS["mixtral"]()
    assert model.config._experts_implementation in ("eager", "grouped_mm")
    model.set_experts_implementation("grouped_mm")
    model(input_ids=torch.arange(8)[None])
    experts = model.config.num_local_experts
    assert len(seen) == 2 * model.config.num_hidden_layers
    assert all(x[-1] == w[1] and w[0] == e == experts for x, w, e in seen)

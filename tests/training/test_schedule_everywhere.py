"""Schedules under what training meets elsewhere: checkpointing, compiled code, experts, 4-bit bases, TRL's trainers."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, check_trained, get_peft_model
from layerpeft.errors import ConfigError
from tests.helpers.loops import llama
from tests.helpers.models import MODELS
from tests.helpers.repeating import repeated, some
from tests.helpers.scheduling import METHODS, switcher_of
from tests.helpers.short import LAYERS, short_llama
from tests.helpers.training import gsm8k_rows, sft

UNIFORM = {"pick": "uniform", "keep": 1, "reselect_steps": 2}
GRADIENT = {"by": "gradient_norm", "keep": 1, "reselect_steps": 2}
OUTLIERS = {"by": "outliers", "M": 2.0, "keep": 1, "reselect_steps": 2}
TASK = {"task_type": "CAUSAL_LM"}


def trained(model, call=None, steps=7):
    """Windows of a short run that ended as its check wants it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    call = model if call is None else call
    torch.manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(3, 60, (2, 8))
        call(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_trained(model)
    windows = [h["layers"] for h in switcher_of(model).plain()["history"]]
    assert len(windows) == steps // 2 + 1
    return windows


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("select", [UNIFORM, GRADIENT, OUTLIERS], ids=["uniform", "gradient", "outliers"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(method, select, reentrant):
    def wrapped(checkpointed):
        model = llama()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        return get_peft_model(model, METHODS[method](select)).train()

    models = [wrapped(c) for c in (False, True)]
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert trained(models[0]) == trained(models[1])
    there = dict(models[1].named_parameters())
    assert all(torch.equal(p, there[n]) for n, p in models[0].named_parameters())


@pytest.mark.parametrize(
    ("select", "backend"),
    [(UNIFORM, "eager"), repeated((UNIFORM, "aot_eager")), repeated((GRADIENT, "aot_eager"))],
    ids=["uniform, traced alone", "uniform", "gradient"],
)
@pytest.mark.slow  # tests/training/test_deferred_loops.py and test_backward.py compile
def test_compiled(select, backend):
    config = LayerLoraConfig(select={**select, "seed": 2}, r=4, target_modules=["c_attn", "c_fc"])
    plain, model = (get_peft_model(MODELS["nanogpt"](), config) for _ in range(2))
    windows = trained(model, torch.compile(model, backend=backend), steps=3)
    assert windows == trained(plain, steps=3) and len({tuple(w) for w in windows}) > 1


EXPERTS = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"], **TASK}
MOE = {
    "lora": LayerLoraConfig(select=UNIFORM, **EXPERTS),
    "galore": LayerGaloreConfig(select=UNIFORM, **EXPERTS),
    "full": LayerFullConfig(select=UNIFORM, **TASK),
    "full by gradient, routers not measured": LayerFullConfig(select=GRADIENT, **TASK),
}


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", MOE)
def test_experts(name):
    assert all(len(w) == 1 for w in trained(get_peft_model(MODELS["mixtral"](), MOE[name])))


def test_encoder_and_decoder():
    model = get_peft_model(MODELS["t5"](), LayerFullConfig(select=UNIFORM, task_type="SEQ_2_SEQ_LM"))
    assert all(len(w) == 1 for w in trained(model))


def four_bit():
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(short_llama(), quantization_config=config)


@pytest.mark.spread(2)
@pytest.mark.parametrize("select", [UNIFORM, GRADIENT], ids=["uniform", "gradient"])
def test_a_base_in_four_bits(select):
    model = peft.prepare_model_for_kbit_training(four_bit())
    config = LayerLoraConfig(select=select, r=4, target_modules=["q_proj", "v_proj"], **TASK)
    assert all(len(w) == 1 for w in trained(get_peft_model(model, config), steps=5))


def test_packed_weights_cannot_train_themselves():
    with pytest.raises(ConfigError, match=f"{7 * LAYERS} modules are quantized and cannot be trained themselves"):
        get_peft_model(four_bit(), LayerFullConfig(select=UNIFORM, **TASK))


@pytest.mark.parametrize("method", some(["lora", "full"], ["full"]))
def test_trl_sft_with_its_defaults(method, tmp_path):
    config = METHODS[method](GRADIENT if method == "lora" else UNIFORM)
    trainer = sft(gsm8k_rows(), tmp_path, config, max_steps=5, bf16=True)
    trainer.train()
    assert [h["step"] for h in switcher_of(trainer.model).plain()["history"]] == [0, 2, 4]


def test_trl_dpo_whose_reference_is_the_model_itself(tmp_path):
    from trl import DPOConfig, DPOTrainer

    rows = gsm8k_rows().map(
        lambda r: {"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no"}, remove_columns=["completion"]
    )
    options = {"max_steps": 5, "per_device_train_batch_size": 2, "max_length": 48, "use_cpu": True, "bf16": False}
    args = DPOConfig(str(tmp_path), report_to=[], disable_tqdm=True, **options)
    trainer = DPOTrainer(str(short_llama()), args=args, train_dataset=rows, peft_config=METHODS["lora"](GRADIENT))
    trainer.train()
    assert [h["step"] for h in switcher_of(trainer.model).plain()["history"]] == [0, 2, 4]

"""What layers keep for their backward pass, in closed form beside counted passes of real models, layer by layer."""

from __future__ import annotations

import pytest
import torch

from layerpeft import LayerFullConfig, LayerLoraConfig, get_peft_model, layer_map
from layerpeft.errors import LayerMapError
from layerpeft.model.costs import kept_of
from layerpeft.model.load import Load
from layerpeft.planning.trace import Step, parted
from tests.helpers.models import _DECODER, MODELS, _causal
from tests.helpers.repeating import some

NAMES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2", "granite", "smollm3",
    "starcoder2", "gpt2", "gpt_neox", "opt", "bert", "roberta",
]  # fmt: skip
ALL = {"r": 4, "target_modules": "all-linear"}
SOME = r".*(q_proj|qkv_proj|c_attn|query_key_value|query|down_proj|fc2|c_proj|dense)"
FEW = {"r": 8, "target_modules": SOME, "lora_dropout": 0.1}
BUILT = {
    **MODELS,
    "gemma": _causal("Gemma", **_DECODER, head_dim=8),
    "olmo": _causal("Olmo", **_DECODER),
    "smollm3": _causal("SmolLM3", **_DECODER),
}
CASES = {
    "factors": (LayerLoraConfig, ALL, Load(2, 16), {}),
    "few factors": (LayerLoraConfig, FEW, Load(3, 24, padded=True), {"dtype": torch.bfloat16}),
    "weights": (LayerFullConfig, {}, Load(1, 33, low=2), {}),
    "narrow weights": (LayerFullConfig, {}, Load(2, 20), {"dtype": torch.bfloat16}),
    "narrow factors": (LayerLoraConfig, ALL, Load(2, 16, low=2), {"dtype": torch.bfloat16}),
    "eager": (LayerLoraConfig, ALL, Load(2, 12, padded=True), {"attn_implementation": "eager"}),
    "checkpointing": (LayerLoraConfig, ALL, Load(2, 16, again=True), {}),
}


@pytest.mark.parametrize("name", some(NAMES, ["qwen3"]))
def test_layers_keep_what_a_pass_is_counted_to_keep(name):
    for case, (kind, options, load, how) in CASES.items():
        built = {k: v for k, v in how.items() if k != "dtype"}
        config, model = kind(select=[0, 1], **options), BUILT[name](**built).to(how.get("dtype", torch.float32))
        layers, targets = layer_map(model), config.targets_in(model, layer_map(model))
        # whether norms round before they weigh is what shapes do not say
        forms = [kept_of(model, layers, targets, load, config.works_by.work(config), late) for late in (False, True)]
        wrapped = get_peft_model(model, config).train()
        if load.again:
            wrapped.get_base_model().activation_checkpointing_enable()
        step = Step(autocast=torch.bfloat16 if load.low else None, padded=load.padded)
        blocks = [wrapped.get_base_model().get_submodule(n) for n in layers.names]
        parts = {p.place: p for p in parted(wrapped, load.rows, load.length, step, None, blocks)[0].parts}
        counted = [parts["forward", i].end - parts["forward", i].start for i in range(3)]
        gone = parts["after", 1].start - parts["after", 1].end  # of what the second one read
        said = [([form[0].lowest, form[1].trained, form[2].frozen], form[1].let_go[1]) for form in forms]
        agree = [own == pytest.approx(counted, rel=0.02) and let_go == gone for own, let_go in said]
        assert any(agree), (case, counted, gone, said)


def test_layers_keep_less_where_nothing_below_trains():
    model, config = MODELS["llama"](), LayerLoraConfig(**ALL)
    layers = layer_map(model)
    work, targets = config.works_by.work(config), config.targets_in(model, layers)
    short, long = (kept_of(model, layers, targets, Load(2, n), work)[1] for n in (32, 64))
    assert short.lowest < short.trained and short.frozen < short.trained
    assert (long.lowest, long.trained, long.frozen) == (2 * short.lowest, 2 * short.trained, 2 * short.frozen)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "jamba", "mamba", "modernbert", "deberta_v2", "t5", "nanogpt"])
def test_blocks_that_are_written_otherwise_have_no_closed_form(name):
    model = MODELS[name]()
    layers = layer_map(model)
    with pytest.raises(LayerMapError, match="alone|activations|norm|positions"):
        kept_of(model, layers, layers.targets, Load(), LayerLoraConfig().works_by.work(LayerLoraConfig()))

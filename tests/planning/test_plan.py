"""The plan against the real thing: bytes by part, operations, and where the backward pass stops."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from layerpeft import LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.errors import ConfigError, SelectionError
from layerpeft.integrations.tracing import weight_bytes
from layerpeft.model.precisions import tensor_bytes
from layerpeft.planning.plan import peak_bytes, plan
from layerpeft.planning.trace import Step, count, gradient_bytes, trace
from layerpeft.recipe import shipped
from tests.helpers.models import MODELS, batch
from tests.helpers.repeating import repeated, some
from tests.helpers.short import short_llama

pytestmark = pytest.mark.usefixtures("shallow")

NAMES = ["llama", "gpt2", "qwen3", "gemma2", "opt", "phi3", "gpt_neox", "mistral"]


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", some(NAMES, ["gpt2", "gemma2"]))
def test_the_plan_predicts_what_is_measured(name):
    model = MODELS[name]()
    config = LayerLoraConfig(select="last:1", target_modules="all-linear", r=4)
    found = plan(model, config, batch_size=2, length=32)
    real = get_peft_model(model, config).train()
    kept = trace(real, 2, 32)
    real.get_base_model().activation_checkpointing_enable()
    recomputed = trace(real, 2, 32)
    ids = torch.zeros(2, 32, dtype=torch.long)
    optimizer = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad])
    real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    optimizer.step()
    states = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    weights = sum(t.nbytes for t in [*real.parameters(), *real.buffers()])
    assert found.parts["weights"] == pytest.approx(weights, rel=0.02)
    assert found.parts["gradients"] == pytest.approx(gradients, rel=0.02)
    assert found.parts["optimizer"] == pytest.approx(states, rel=0.02)
    assert found.kept.peak == pytest.approx(kept.peak, rel=0.15)
    assert found.recomputed.peak == pytest.approx(recomputed.peak, rel=0.15)
    assert found.kept.flops == pytest.approx(kept.flops, rel=0.02)
    assert found.recomputed.flops == pytest.approx(recomputed.flops, rel=0.02)
    assert found.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.stop.layer == len(found.rows) - 1 and [r.trains for r in found.rows][-1]
    assert found.flops < found.flops_full


@pytest.mark.parametrize("name", some(["qwen3", "llama", "mistral", "olmo2", "phi3"], ["qwen3"]))
def test_grouped_keys_are_repeated_where_a_real_step_repeats_them(name):
    """Rows of one length need no mask, and keys stay grouped; padded ones do not."""
    config = LayerLoraConfig(select="last:2", target_modules="all-linear", r=4)
    real, found = get_peft_model(MODELS[name](), config).train(), []
    ones = torch.ones(2, 32, dtype=torch.long)
    inputs = {"input_ids": ones, "labels": ones}
    given = {"batch_size": 2, "length": 32, "optimizer": "sgd", "checkpointing": False}
    for padded in (False, True):
        mask = torch.ones_like(ones)
        mask[1, 20:] = 0
        batch = inputs | ({"attention_mask": mask} if padded else {})
        live = count(lambda batch=batch: real(**batch, use_cache=False).loss.backward(), real, batch.values()).peak
        found.append(live)
        taken = weight_bytes(real) + gradient_bytes(real) + live
        real.zero_grad()
        assert peak_bytes(MODELS[name](), config, step=Step(padded=padded), **given) == taken
    assert found[0] < 0.99 * found[1]
    masked = plan(MODELS[name](), config, inputs=inputs | {"attention_mask": ones})  # nothing, that is
    assert masked.kept.peak == pytest.approx(found[0], rel=0.02)


def test_no_weight_is_read_and_the_model_is_left_alone(monkeypatch):
    import safetensors

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors, "safe_open", forbidden)
    found = plan(short_llama(3), LayerLoraConfig(select={"by": "gradient_norm", "keep": 2}), batch_size=1, length=16)
    assert sum(r.trains for r in found.rows) == 2 and found.rows[0].trains
    assert "is not known yet: the lowest are assumed" in str(found)
    assert "backward pass: down to the bottom (the first layer trains)" in str(found)


def test_fewer_layers_and_a_higher_cut_cost_less():
    selects = ("last:1", "last:2", "all")
    plans = [plan(short_llama(3), LayerLoraConfig(select=s), batch_size=2, length=64) for s in selects]
    for cheap, dear in zip(plans, plans[1:], strict=False):
        assert cheap.flops < dear.flops and cheap.peak_bytes < dear.peak_bytes and cheap.trainable < dear.trainable


def test_a_choice_that_does_not_fit_is_refused_before_weights(llama_path):
    with pytest.raises(SelectionError, match="asks for 40 layers of 12"):
        plan(llama_path, LayerLoraConfig(select="last:40"))
    with pytest.raises(ConfigError, match="Did you mean 'adamw_torch'"):
        plan(llama_path, LayerLoraConfig(), optimizer="adamw_trch")


def test_every_problem_of_a_plan_is_said_at_once(llama_path):
    with pytest.raises(ConfigError, match="4 problems") as caught:
        plan(llama_path, LayerLoraConfig(select="last:40"), optimizer="adamw_trch", batch_size=0, length=0)
    for fragment in ("batch_size=0", "length=0", "Did you mean 'adamw_torch'", "asks for 40 layers of 12"):
        assert fragment in str(caught.value)


def test_recomputing_holds_one_layer_at_a_time():
    """Peaks grow with depth by what a layer keeps; with checkpointing by its input alone."""
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    plans = []
    for depth in (2, 4):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, num_hidden_layers=depth))
        plans.append(plan(model, LayerLoraConfig(target_modules="all-linear", r=4), batch_size=2, length=64))
    hidden = 2 * 64 * 64 * 4
    assert plans[1].recomputed.peak - plans[0].recomputed.peak <= 2 * 2 * hidden
    assert plans[1].kept.peak - plans[0].kept.peak >= 2 * 10 * hidden
    assert plans[1].recomputed.flops > plans[1].kept.flops
    assert "with checkpointing" in str(plans[0]) and "without checkpointing *" in str(plans[0])


def test_operations_are_those_of_torch_and_of_attention():
    model = MODELS["llama"]().train()
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    ours = trace(model, 2, 32).flops
    heads, length, width, layers = 4, 32, 8, 3
    product = 2 * 2 * heads * length * length * width  # one product of batch 2, in multiplications and additions
    assert ours == counter.get_total_flops() + layers * (2 + 5) * product  # forward has two, backward five


@pytest.mark.parametrize(
    ("name", "stack", "trained"),
    [
        ("t5", "encoder", "encoder.block.2"),
        repeated(("t5", None, "decoder.block.2")),
        repeated(("bart", "encoder", "model.encoder.layers.2")),
        repeated(("whisper", "encoder", "model.encoder.layers.2")),
        repeated(("vit", None, "vit.layers.2")),
    ],
)
def test_the_table_shows_the_stack_that_was_chosen(name, stack, trained):
    model = MODELS[name]()
    select = {"layers": "last:1"} | ({"stack": stack} if stack else {})
    config = LayerLoraConfig(select=select, target_modules="all-linear", r=4)
    inputs = batch(name, model)
    found = plan(model, config, inputs=inputs)
    real = get_peft_model(model, config).train()
    assert [row.name for row in found.rows if row.trains] == [trained] and trained in str(found)
    assert sum(row.trainable for row in found.rows) + _elsewhere(found) == found.trainable
    assert found.kept.peak == pytest.approx(trace(real, 2, 8, inputs=inputs).peak, rel=0.15)


def _elsewhere(found):
    lines = [line for line in str(found).splitlines() if "outside of these" in line]
    return int(lines[0].split()[4].replace(",", "")) if lines else 0


@pytest.mark.slow  # tests/recipe/test_measure.py holds one in four bits against a step
@pytest.mark.parametrize("double", [False, True])
def test_a_quantized_base_is_planned_at_its_size(double):
    llama_path = short_llama()
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    config = LayerLoraConfig(select="last:2", target_modules="all-linear", r=4)
    found = plan(llama_path, config, batch_size=1, length=32, step=Step(quantization=settings))
    real = AutoModelForCausalLM.from_pretrained(llama_path, quantization_config=settings)
    wrapped = get_peft_model(real, config).train()
    assert found.weights == pytest.approx(tensor_bytes(wrapped), rel=0.02)
    assert found.weights < 0.5 * plan(llama_path, config, batch_size=1, length=32).weights
    counted = trace(wrapped, 1, 32)
    assert found.kept.peak == pytest.approx(counted.peak, rel=0.15)
    assert found.flops == pytest.approx(counted.flops, rel=0.02)


@pytest.mark.parametrize("fold", ["beside", repeated("base")])
def test_gradient_projection_is_planned_as_such(fold):
    config = LayerGaloreConfig(select="last:2", target_modules="all-linear", r=8, fold=fold, subspace="random")
    base = AutoModelForCausalLM.from_pretrained(short_llama(3), dtype=torch.float32)
    found = plan(base, config, batch_size=2, length=32)
    real = get_peft_model(base, config).train()
    counted = trace(real, 2, 32)
    trained = [p for p in real.parameters() if p.requires_grad]
    assert found.trainable == sum(p.numel() for p in trained)
    assert found.gradients == sum(p.nbytes for p in trained) and found.states == 2 * found.gradients
    assert found.kept.peak == pytest.approx(counted.peak, rel=0.15)
    assert found.flops == pytest.approx(counted.flops, rel=0.02)
    held = sum(t.nbytes for t in [*real.parameters(), *real.buffers()])
    originals = sum(
        m.base_layer.weight.nbytes for m in real.modules() if hasattr(m, "_layerpeft") and hasattr(m, "base_layer")
    )
    assert originals > 0 and found.weights == held + (originals if fold == "beside" else 0)


def test_the_command_plans_a_recipe(capsys, tmp_path):
    words = ["plan", "quickstart", "layerpeft.select=last:2", "layerpeft.target_modules=[q_proj]"]
    words.append(f"model_name_or_path={short_llama(3)}")
    assert main([*words, f"output_dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "backward pass: down to layer 1" in text and "together" in text
    assert "optimizer, adamw_torch_fused" in text and "without checkpointing *" in text
    assert main([*words, "--json", "gradient_checkpointing=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpointing"] and found["recomputed"]["peak"] == found["parts"]["activations"]
    assert found["recomputed"]["peak"] < found["kept"]["peak"]


def test_a_plan_for_an_accelerator_is_made_without_one(capsys, tmp_path):
    """On one, TRL's default is bfloat16, and its head folds tiles in place."""
    text = shipped.recipes()["quickstart"].read_text().replace("bf16: false\n", "")
    (tmp_path / "r.yaml").write_text(text)
    plans, folder = [], ["layerpeft.target_modules=[q_proj]", f"model_name_or_path={short_llama(3)}"]
    for more in ([], ["--accelerator"]):
        assert main(["plan", str(tmp_path / "r.yaml"), "--json", "layerpeft.select=last:2", *more, *folder]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[1]["kept"]["peak"] < 0.7 * plans[0]["kept"]["peak"]


def test_a_folder_without_weights_is_planned_and_not_trained(capsys, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in short_llama(3).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    settings = [f"model_name_or_path={folder}", f"output_dir={tmp_path / 'out'}"]
    assert main(["plan", "last_layers", *settings]) == 0
    said = capsys.readouterr()
    assert "has no weights" in said.err and "together" in said.out
    assert main(["train", "last_layers", *settings]) == 2
    assert "has no weights" in capsys.readouterr().err


@pytest.mark.parametrize("how", some(["eager", "grouped_mm"], ["grouped_mm"]))
@pytest.mark.parametrize("name", some(["mixtral", "qwen3_moe"], 1))
def test_experts_are_planned_whatever_way_they_are_computed(name, how):
    model = MODELS[name]()
    model.set_experts_implementation(how)
    config = LayerLoraConfig(select="last:1", target_modules=["q_proj"], r=4, task_type="CAUSAL_LM")
    found = plan(model, config, batch_size=4, length=32)
    real = trace(get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).train(), 4, 32)
    assert found.kept.flops == real.flops
    assert found.kept.peak == pytest.approx(real.peak, rel=0.15)
    assert model.config._experts_implementation == how
    experts = [f"experts.{n}" for n in ("gate_up_proj", "down_proj")]
    options = {"select": "last:1", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    projected = plan(model, LayerGaloreConfig(**options, target_parameters=experts), batch_size=4, length=32)
    assert projected.kept.flops > plan(model, LayerGaloreConfig(**options), batch_size=4, length=32).kept.flops

"""What trained is checked: planted faults are found and named, and what is legitimate passes."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import layerpeft
from layerpeft import LayerLoraConfig, check_trained, layer_report
from layerpeft.errors import TrainingError
from tests.helpers import loops
from tests.helpers.loops import record, step

WIDTH, LAYERS = 16, 3


def llama(noise=0.0):
    model = loops.llama(num_hidden_layers=LAYERS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise)
    return model


@pytest.fixture(scope="module")
def batch():
    return loops.make_batches()[0]


def wrap(select="last:2", model=None, **options):
    base = llama() if model is None else model
    config = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}
    return layerpeft.get_peft_model(base, LayerLoraConfig(select=select, **config))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def parameter(model, part):
    return next(p for n, p in model.named_parameters() if part in n)


def nudge(model, part):
    with torch.no_grad():
        parameter(model, part).view(-1)[3] += 1e-6


def test_a_sound_run_passes_and_its_steps_are_counted(batch):
    model = wrap()
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    for _ in range(3):
        step(model, optimizer, batch)
    check_trained(model)
    assert record(model).steps_trained == {1: 3, 2: 3}
    assert [r.steps for r in layer_report(model).rows] == [0, 3, 3]
    assert record(model).checks == {
        "first_step": "every chosen target moved",
        "end": "every chosen target moved, and no frozen parameter did",
        "unmoved": [],
    }


@pytest.mark.parametrize("select", ["last:2", {"by": "gradient_norm", "keep": 2}], ids=["last", "deferred"])
def test_warm_up_steps_with_a_learning_rate_of_zero_are_no_fault_and_no_training(batch, select):
    model = wrap(select)
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, max(0, n - 1) / 2))  # 0, 0, 0.5, 1
    for _ in range(4):
        step(model, optimizer, batch)
        scheduler.step()
    check_trained(model)
    layers = record(model).selection.layers
    assert len(layers) == 2 and record(model).steps_trained == dict.fromkeys(layers, 2)


def test_accumulated_micro_batches_are_one_step(batch):
    model = wrap()
    optimizer = torch.optim.SGD(trained(model), 0.1)
    for _ in range(3):
        model(**batch).loss.backward()
    optimizer.step()
    check_trained(model)
    assert record(model).steps_trained == {1: 1, 2: 1}


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """Attention-free: a linear, running statistics, and four experts of which a token reaches one."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x, which):
        x = self.norm(x + self.mix(x))
        return x + sum(
            (self.experts[e](x) * (which == e)[:, None] for e in which.unique().tolist()), torch.zeros_like(x)
        )


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x, labels, which):
        for block in self.blocks:
            x = block(x, which)
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


def tokens(*experts):
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (8,), generator=draw)
    which = torch.tensor(experts).repeat(8)[:8]
    return {"x": torch.randn(8, WIDTH, generator=draw), "labels": labels, "which": which}


@pytest.mark.parametrize("select", ["last:1", {"by": "gradient_norm", "keep": 1}], ids=["last", "deferred"])
def test_experts_that_no_token_reached_are_listed_and_buffers_may_change(select):
    torch.manual_seed(0)
    config = LayerLoraConfig(select=select, target_modules=["mix", "up", "down"], r=2)
    model = layerpeft.get_peft_model(Experts().train(), config)
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    statistics = [b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")]

    def train(*experts):
        model(**tokens(*experts))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    train(0, 1)
    (layer,) = record(model).selection.layers
    unreached = {f"blocks.{layer}.experts.{e}.{part}" for e in (2, 3) for part in ("up", "down")}
    assert set(record(model).idle_experts) == unreached
    train(0, 2)
    check_trained(model)
    assert set(record(model).idle_experts) == {t for t in unreached if ".experts.3." in t}
    now = [b for n, b in model.named_buffers() if n.endswith("running_mean")]
    assert not any(torch.equal(a, b) for a, b in zip(statistics, now, strict=True))


def test_a_head_and_trained_tokens_are_asked_for(batch):
    model = wrap(modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    step(model, optimizer, {"input_ids": batch["input_ids"] % 4, "labels": batch["labels"]})
    check_trained(model)
    assert record(model).checks["unmoved"] == []


def test_biases_of_the_chosen_layers_train_and_those_of_the_others_do_not(batch):
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=16))
    model = wrap("last:1", base, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained(model), 1e-2)
    for _ in range(2):
        step(model, optimizer, batch)
    check_trained(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in moved if ".lora_" not in n} == {"base_model.model.transformer.h.2.attn.c_attn.base_layer.bias"}
    assert len(moved) == 3


def test_a_bias_left_out_of_the_optimizer(batch):
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=16))
    model = wrap("last:1", base, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if ".lora_" in n], 1e-2)
    with pytest.raises(TrainingError, match=r"h\.2\.attn\.c_attn: not in the optimizer: bias"):
        step(model, optimizer, batch)


# planted faults before the first update


def test_a_target_left_out_of_the_optimizer(batch):
    model = wrap()
    left_out = {id(p) for n, p in model.named_parameters() if "layers.2.self_attn.v_proj" in n}
    optimizer = torch.optim.AdamW([p for p in trained(model) if id(p) not in left_out], 1e-3)
    before = [p.detach().clone() for p in trained(model)]
    with pytest.raises(TrainingError, match="stopped before the first update") as error:
        step(model, optimizer, batch)
    assert "model.layers.2.self_attn.v_proj: not in the optimizer: lora_A.weight, lora_B.weight" in str(error.value)
    assert "q_proj" not in str(error.value)
    assert all(torch.equal(p, b) for p, b in zip(trained(model), before, strict=True))


def test_one_tensor_left_out_of_the_optimizer(batch):
    model = wrap()
    optimizer = torch.optim.AdamW(
        [p for p in trained(model) if p is not parameter(model, "1.self_attn.q_proj.lora_A")], 1e-3
    )
    with pytest.raises(TrainingError, match=r"layers\.1\.self_attn\.q_proj: not in the optimizer: lora_A\.weight$"):
        step(model, optimizer, batch)


def test_a_chosen_tensor_that_was_frozen(batch):
    model = wrap()
    parameter(model, "layers.1.self_attn.q_proj.lora_B").requires_grad_(False)
    for params in (trained(model), list(model.parameters())):
        with pytest.raises(
            TrainingError, match=r"layers\.1\.self_attn\.q_proj: requires_grad is switched off for lora_B"
        ):
            step(model, torch.optim.AdamW(params, 1e-3), batch)


def test_a_target_that_got_no_gradient(batch):
    model = wrap()
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    model(**batch).loss.backward()
    for part in ("lora_A", "lora_B"):
        parameter(model, f"layers.2.self_attn.q_proj.{part}").grad = None
    with pytest.raises(TrainingError, match=r"layers\.2\.self_attn\.q_proj: no gradient arrived"):
        optimizer.step()


@pytest.mark.matrix
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("select", ["last:2", {"by": "gradient_norm", "keep": LAYERS}], ids=["last", "deferred"])
def test_a_gradient_that_is_not_finite(batch, value, select):
    model = wrap(select)
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    model(**batch).loss.backward()
    parameter(model, "layers.2.self_attn.q_proj.lora_B").grad[0, 0] = value
    with pytest.raises(TrainingError, match=r"layers\.2\.self_attn\.q_proj: its gradient is not finite"):
        optimizer.step()


def test_a_frozen_weight_that_someone_opened(batch):
    model = wrap()
    parameter(model, "layers.0.mlp.up_proj").requires_grad_(True)
    with pytest.raises(TrainingError, match=r"layers\.0\.mlp\.up_proj\.weight: it is trainable and was not chosen"):
        step(model, torch.optim.AdamW(trained(model), 1e-3), batch)


def test_all_faults_are_told_at_once(batch):
    model = wrap()
    parameter(model, "layers.1.self_attn.q_proj.lora_A").requires_grad_(False)
    parameter(model, "embed_tokens").requires_grad_(True)
    params = [p for p in trained(model) if p is not parameter(model, "layers.2.self_attn.v_proj.lora_B")]
    with pytest.raises(TrainingError) as error:
        step(model, torch.optim.AdamW(params, 1e-3), batch)
    text = str(error.value)
    assert "switched off" in text and "not in the optimizer" in text and "embed_tokens.weight: it is trainable" in text


# planted faults in and after training


@pytest.mark.parametrize(
    "part",
    [
        "layers.0.mlp.up_proj.weight",
        "layers.2.mlp.down_proj.weight",
        "embed_tokens.weight",
        "lm_head.weight",
        "layers.1.input_layernorm.weight",
        "layers.2.self_attn.q_proj.base_layer.weight",
    ],
)
def test_a_frozen_weight_that_was_nudged(batch, part):
    model = wrap()
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    step(model, optimizer, batch)
    nudge(model, part)
    step(model, optimizer, batch)
    with pytest.raises(TrainingError, match="what trained is not what was chosen") as error:
        check_trained(model)
    assert f"{part.replace('.base_layer', '')} is frozen and changed" in str(error.value)
    assert str(error.value).count("frozen and changed") == 1


@pytest.mark.matrix
@pytest.mark.parametrize("select", ["last:1", {"by": "gradient_norm", "keep": 1}], ids=["depth", "deferred"])
@pytest.mark.parametrize("part", ["lm_head.weight", "layers.0.self_attn.q_proj.weight", "layers.2.mlp.up_proj.weight"])
def test_a_frozen_weight_nudged_between_wrapping_and_the_first_step(batch, part, select):
    model = wrap(select)
    part = (
        part
        if any(n.endswith(part) for n, _ in model.named_parameters())
        else part.replace(".weight", ".base_layer.weight")
    )
    nudge(model, part)
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    before = [p.detach().clone() for p in trained(model)]
    with pytest.raises(TrainingError, match="stopped before the first update") as error:
        step(model, optimizer, batch)
    assert f"{part.replace('.base_layer', '')} is frozen and changed after" in str(error.value)
    assert str(error.value).count("frozen and changed") == 1
    if isinstance(select, str):
        assert all(torch.equal(p, q) for p, q in zip(trained(model), before, strict=True))


def test_weights_that_are_loaded_or_cast_after_wrapping_are_no_fault(batch):
    model, other = wrap("last:1"), wrap("last:1", model=llama(0.01))
    model.load_state_dict(other.state_dict())
    model.base_model.model.lm_head.to(torch.bfloat16).float()
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    step(model, optimizer, batch)
    check_trained(model)
    nudge(model, "layers.0.mlp.up_proj.weight")
    with pytest.raises(TrainingError, match=r"layers\.0\.mlp\.up_proj\.weight is frozen and changed"):
        check_trained(model)


def test_a_model_that_was_cast_after_training_is_not_said_to_have_changed(batch):
    model = wrap("last:1")
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    step(model, optimizer, batch)
    model.base_model.model.lm_head.to(torch.bfloat16)
    check_trained(model)
    assert record(model).checks["end"]


def test_a_trainer_that_merges_for_its_engine_leaves_rounding_in_the_chosen_targets_only(batch):
    model = wrap("last:1")
    follower = model.base_model.model.__dict__["_layerpeft"].tether.followers[0]
    follower.begin(None, merges=True)
    optimizer = torch.optim.AdamW(trained(model), 1e-1)
    step(model, optimizer, batch)
    before = parameter(model, "layers.2.self_attn.v_proj.base_layer.weight").clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(parameter(model, "layers.2.self_attn.v_proj.base_layer.weight"), before)
    check_trained(model)
    nudge(model, "layers.1.self_attn.v_proj.weight")
    with pytest.raises(TrainingError, match=r"layers\.1\.self_attn\.v_proj\.weight is frozen and changed"):
        check_trained(model)


def test_a_second_adapter_that_starts_from_the_weights_is_no_fault(batch):
    model = wrap("last:1")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if ".default." in n], 1e-3)
    step(model, optimizer, batch)
    check_trained(model)
    assert record(model).checks["end"]


def test_a_frozen_weight_nudged_after_a_deferred_choice(batch):
    model = wrap({"by": "gradient_norm", "keep": 1})
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    step(model, optimizer, batch)
    other = next(i for i in range(LAYERS) if i not in record(model).selection.layers)
    nudge(model, f"layers.{other}.self_attn.q_proj.weight")
    with pytest.raises(TrainingError, match=rf"layers\.{other}\.self_attn\.q_proj\.weight is frozen and changed"):
        check_trained(model)


def test_a_target_whose_learning_rate_is_zero(batch):
    model = wrap()
    mine = [p for n, p in model.named_parameters() if "layers.2.self_attn.v_proj.lora" in n]
    rest = [p for p in trained(model) if all(p is not m for m in mine)]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": mine, "lr": 0.0}], 1e-3)
    with pytest.raises(
        TrainingError, match=r"(?s)first update left.*layers\.2\.self_attn\.v_proj did not move.*learning rate"
    ):
        step(model, optimizer, batch)


def test_a_target_put_back_by_hand(batch):
    model = wrap()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "layers.1.self_attn.v_proj.lora" in n}
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    step(model, optimizer, batch)
    with torch.no_grad():
        for name, value in start.items():
            parameter(model, name).copy_(value)
    with pytest.raises(TrainingError, match=r"layers\.1\.self_attn\.v_proj did not move"):
        check_trained(model)


def test_training_with_a_learning_rate_of_zero_throughout(batch):
    model = wrap()
    optimizer = torch.optim.AdamW(trained(model), 0.0)
    for _ in range(2):
        step(model, optimizer, batch)
    with pytest.raises(TrainingError, match="nothing was trained: all 2 optimizer steps had a learning rate of zero"):
        check_trained(model)


def test_updates_that_round_to_nothing_are_named_with_cause_and_cure(batch):
    model = wrap(model=llama().to(torch.bfloat16), init_lora_weights=False)
    model.to(torch.bfloat16)
    with torch.no_grad():
        for p in trained(model):
            p.copy_(torch.full_like(p, 0.5))
    optimizer = torch.optim.AdamW(trained(model), 1e-6, weight_decay=0.0)
    with pytest.raises(TrainingError, match="first update left chosen targets as they were") as error:
        step(model, optimizer, batch)
    text = str(error.value)
    assert "learning rate 1.0e-06" in text and "round to nothing in bfloat16" in text
    assert "float32 (autocast_adapter_dtype=True) or raise the learning rate" in text


def test_single_tensors_whose_updates_round_to_nothing_are_named_at_the_end(batch, caplog):
    base = llama().to(torch.bfloat16)
    model = wrap(model=base, modules_to_save=["model.norm"])
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(trained(model), 1e-4, weight_decay=0.0)
    for _ in range(3):
        step(model, optimizer, batch)
    with caplog.at_level("INFO", logger="layerpeft"):
        check_trained(model)
    assert "model.norm.modules_to_save.default.weight" in record(model).checks["unmoved"]
    (said,) = [r.getMessage() for r in caplog.records if "norm" in r.getMessage()]
    assert "did not move" in said and "bfloat16" in said and "float32" in said


# with a Trainer


class Nudge(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            nudge(model, "layers.0.mlp.gate_proj")


def trainer(model, folder, batch, callbacks=(), **options):
    options = {"max_steps": 3, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, **options}
    rows = [{k: v[0].tolist() for k, v in batch.items()}] * 8
    return Trainer(model, args=TrainingArguments(str(folder), **options), train_dataset=rows, callbacks=list(callbacks))


def test_a_trainer_saves_the_adapter_aside_before_it_stops(batch, tmp_path):
    model = wrap()
    with pytest.raises(TrainingError) as error:
        trainer(model, tmp_path, batch, [Nudge()]).train()
    folder = tmp_path / "unverified"
    assert f"saved to {folder}" in str(error.value) and "gate_proj.weight is frozen and changed" in str(error.value)
    assert {"adapter_config.json", "adapter_model.safetensors", "layerpeft.json"} <= {f.name for f in folder.iterdir()}
    again = layerpeft.load(folder, llama())
    model.eval()
    nudge(again, "layers.0.mlp.gate_proj")
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-5)


def test_a_trainer_with_warm_up_and_sound_training_saves_nothing_aside(batch, tmp_path):
    model = wrap()
    trainer(model, tmp_path, batch, warmup_steps=2, max_steps=4).train()
    assert record(model).checks["end"] and record(model).steps_trained == {1: 3, 2: 3}
    assert not (tmp_path / "unverified").exists()


def test_a_trainer_stops_before_the_first_update_too(batch, tmp_path):
    model = wrap()
    optimizer = torch.optim.SGD([parameter(model, "layers.1.self_attn.q_proj.lora_A")], 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    made = trainer(model, tmp_path, batch)
    made.optimizer, made.lr_scheduler = optimizer, scheduler
    with pytest.raises(TrainingError, match=r"layers\.2\.self_attn\.v_proj: not in the optimizer"):
        made.train()

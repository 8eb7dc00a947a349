"""Single experts where all experts of a layer are one 3-D tensor: the picked alone train, and memory is paid for them alone."""

from __future__ import annotations

import copy
import io
import json

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, plan, score_layers
from layerpeft.errors import ConfigError, SelectionError, TrainingError
from layerpeft.integrations.engines.deepspeed import ZERO
from layerpeft.integrations.engines.fsdp import FSDP1, FSDP2
from layerpeft.model.layers import base_of
from layerpeft.planning.trace import count
from layerpeft.training.report import layer_report
from tests.helpers import scheduling
from tests.helpers.expert_models import EXPERTS, batches, build
from tests.helpers.loops import adamw, record
from tests.helpers.models import MODELS, batch

HOW = ("eager", "batched_mm", "grouped_mm")
MOE = ("mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "qwen3_next", "jamba")
ESFT = {"by": "routing", "unit": "expert", "within": "layer", "keep": 2, "num_batches": 2}
PLACED = {"layers": [1, 3, 8], "unit": "expert"}
NAMES = ("model.layers.0.mlp.experts.1", "model.layers.0.mlp.experts.3", "model.layers.2.mlp.experts.0")
KINDS = {"full": LayerFullConfig, "lora": LayerLoraConfig}


def config(method, select=PLACED, **options):
    given = {} if method == "full" else {"r": 4, "target_modules": [], "target_parameters": EXPERTS}
    return KINDS[method](select=select, task_type="CAUSAL_LM", **given | options)


def wrapped(method, select=PLACED, model=None, **options):
    base = build() if model is None else model
    torch.manual_seed(3)
    return layerpeft.get_peft_model(base, config(method, select, **options), batches=batches(2)).train()


def trained(model):
    """Target -> its tensors."""
    return record(model).bound.tensors()


def run(model, steps=3, optimizer=None, start=0):
    optimizer = adamw(model) if optimizer is None else optimizer
    for one in batches(6)[start : start + steps]:
        model(**one).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def stacked(state, name):
    """An expert of the tensors of a model: its matrices (and biases)."""
    owner, _, number = name.rpartition(".")
    return {k: t[int(number)] for k, t in state.items() if k.startswith(f"{owner}.")}


@pytest.mark.parametrize("method", KINDS)
def test_the_picked_experts_alone_train_through_every_door(method, tmp_path):
    start, data = build().state_dict(), batch("mixtral", MODELS["mixtral"](), length=16)
    model = wrapped(method, ESFT)
    selection = record(model).selection
    shares = score_layers(
        build(), "routing", unit="expert", batches=batches(2), target_modules=[], target_parameters=EXPERTS
    )
    want = [i for n in range(3) for i in sorted(sorted(range(4 * n, 4 * n + 4), key=lambda i: -shares.values[i])[:2])]
    assert list(selection.layers) == want and selection.unit == "expert" and selection.num_layers == 12
    plain = build()(**data).logits
    assert method == "lora" or torch.equal(model(**data).logits, plain)
    optimizer = run(model)
    layerpeft.check_trained(model)
    held = [p for group in trained(model).values() for p in group.values()]
    size = {"full": 6 * (96 * 32 + 32 * 48), "lora": 6 * 4 * (96 + 32 + 32 + 48)}[method]
    assert sum(p.numel() for p in held) == size == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim()) == 2 * 4 * size
    here = model(**data).logits
    with model.disable_adapter():  # DPO's reference
        assert torch.equal(model(**data).logits, plain)
    assert torch.equal(model(**data).logits, here)
    report = layer_report(model)
    assert {r.layer for r in report.rows if r.change} == {r.layer for r in report.rows if r.steps == 3} == set(want)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "layerpeft.json").read_text())["selection"]
    assert said["unit"] == "expert" and said["targets"] == list(selection.targets)
    assert (tmp_path / "layers.csv").read_text().startswith("expert,name") and (tmp_path / "layers.png").is_file()
    for loaded in (peft.PeftModel.from_pretrained(build(), tmp_path), layerpeft.load(tmp_path, build())):
        torch.testing.assert_close(loaded.train()(**data).logits, here, atol=1e-5, rtol=1e-4)
    again = layerpeft.load(tmp_path, build(), is_trainable=True).train()
    torch.testing.assert_close(again(**data).logits, here, atol=1e-6, rtol=1e-5)
    assert trained(again).keys() == trained(model).keys()
    run(again, 1)
    layerpeft.check_trained(again)
    given = {"of": str(tmp_path), "target_modules": [], "target_parameters": EXPERTS}
    change = score_layers(build(), "change", unit="expert", **given)
    assert [i for i, v in enumerate(change.values) if v] == want
    whole = score_layers(build(), "change", **given)
    parts = torch.tensor(change.values).view(3, 4).square().sum(1).sqrt()
    torch.testing.assert_close(parts, torch.tensor(whole.values), rtol=1e-5, atol=0)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**data).logits, here, atol=1e-5, rtol=1e-4)
    now = merged.state_dict()
    assert now.keys() == start.keys()
    for name in [f"model.layers.{i}.mlp.experts.{e}" for i in range(3) for e in range(4)]:
        before, after = stacked(start, name), stacked(now, name)
        assert len(before) == 2 and all(torch.equal(before[k], after[k]) != (name in selection.names) for k in before)
    assert all(torch.equal(t, now[k]) for k, t in start.items() if ".experts." not in k)


FORMS = [("mixtral", "grouped_mm"), ("gpt_oss", "eager")]


@pytest.mark.parametrize(
    ("name", "how"),
    FORMS + [pytest.param(n, h, marks=pytest.mark.slow) for n in MOE for h in HOW if (n, h) not in FORMS],
)
def test_the_gradient_of_a_picked_expert_is_that_of_whole_training(name, how):
    dtype = torch.float32 if how == "grouped_mm" else torch.float64  # torch's grouped matmul knows no float64
    plain = build(name, how, dtype)
    start, data = plain.state_dict(), batch(name, plain, length=16)
    layers = 1 if name == "jamba" else 3  # Jamba has experts in every second layer only
    select = {"layers": [0, 4 * layers - 1], "unit": "expert"}
    loss = plain(**data).loss
    loss.backward()
    whole = {n: p.grad for n, p in plain.named_parameters()}
    parameters = [".".join(n.split(".")[-2:]) for n in whole if ".experts." in n and whole[n].dim() == 3]
    for method in KINDS:
        options = {} if method == "full" else {"target_parameters": sorted(set(parameters)), "init_lora_weights": False}
        model = wrapped(method, select, build(name, how, dtype), **options)
        if method == "lora":
            with torch.no_grad():
                for group in trained(model).values():
                    group["lora_B"].zero_()
        found = model(**data).loss
        assert torch.equal(found, loss)
        found.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        for target, group in trained(model).items():
            owner, number, leaf = target.rsplit(".", 2) if method == "lora" else (*target.rsplit(".", 1), None)
            if leaf is None:
                for n, p in group.items():
                    want = whole[f"{owner}.{n}"][int(number)]
                    torch.testing.assert_close(p.grad, want, rtol=1e-6, atol=1e-9)
                continue
            want = whole[f"{owner}.{leaf}"][int(number)]
            want = (
                want
                if want.shape[1] == group["lora_A"].shape[1] and want.shape[0] == group["lora_B"].shape[0]
                else want.T
            )
            scale = 8 / 4
            torch.testing.assert_close(
                group["lora_B"].grad, (scale * want @ group["lora_A"].T).to(dtype), rtol=1e-4, atol=1e-7
            )
        biases = [n for group in trained(model).values() for n in group if n.endswith("bias")]
        assert bool(biases) == (name == "gpt_oss" and method == "full")
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in start.items())


class Largest(TorchDispatchMode):
    """The largest storage that an operation makes."""

    def __init__(self, but):
        super().__init__()
        self.but, self.most = {t.untyped_storage()._cdata for t in but}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.but:
                self.most = max(self.most, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("how", ["grouped_mm", *(pytest.param(h, marks=pytest.mark.slow) for h in HOW[:2])])
def test_the_backward_pass_makes_nothing_larger_than_one_experts_gradient(how):
    for method, most in {
        "full": 96 * 32 * 4,
        "lora": 4 * 96 * 32 * 4 - 1,
    }.items():  # bytes of its gate and up; of all experts'
        model = wrapped(method, {"layers": 5, "unit": "expert"}, build("mixtral", how))
        loss = model(**batch("mixtral", model, length=4, rows=1)).loss
        with Largest(model.parameters()) as seen:
            loss.backward()
        assert 0 < seen.most <= most or how == "batched_mm"  # which makes the weights of every token anew


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_plan_holds_what_a_step_holds(method):
    small, select = {"num_hidden_layers": 2}, {"layers": [1, 3, 4], "unit": "expert"}
    model = wrapped(method, select, build(**small))
    found = plan(MODELS["mixtral"](**small), config(method, select), batch_size=2, length=16)
    data = {k: v for k, v in batch("mixtral", MODELS["mixtral"](), length=16).items() if k in ("input_ids", "labels")}
    real = count(lambda: model(**data).loss.backward(), model)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert sum(g.nbytes for g in grads) == found.gradients == 4 * found.trainable
    optimizer = adamw(model)
    optimizer.step()
    assert sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim()) == found.states
    base, beside = build(**small), 0 if method == "full" else found.gradients
    assert found.weights == beside + sum(t.nbytes for t in [*base.parameters(), *base.buffers()])
    assert [row.units for row in found.rows] == [(2, 4), (1, 4)]
    assert found.stop.layer is None and abs(real.peak - found.kept.peak) < 0.35 * real.peak


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_experts_take_turns_and_a_resumed_run_equals_the_unbroken_one(method, tmp_path):
    select = {"pick": "cycle", "unit": "expert", "keep": 4, "reselect_steps": 2}

    def trainer(folder):
        return scheduling.trainer_of(wrapped(method, select), tmp_path / folder, 4, save_steps=2)

    whole, broken = trainer("whole"), trainer("broken")
    whole.train()
    broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    one, other = scheduling.found(whole), scheduling.found(broken)
    assert one["standing"] == other["standing"] and one["losses"][-2:] == other["losses"][-2:]
    assert all(torch.equal(p, other["weights"][n]) for n, p in one["weights"].items())
    turns = [set(entry["layers"]) for entry in one["standing"]["history"]]
    assert turns[0] != turns[1] and all(len(t) == 4 for t in turns)
    layerpeft.check_trained(whole.model)


def test_a_choice_that_waits_for_the_first_step_picks_experts():
    model = layerpeft.get_peft_model(build(), config("full", ESFT | {"num_batches": 1})).train()
    run(model)
    layerpeft.check_trained(model)
    given = {"batches": batches(1), "target_modules": [], "target_parameters": EXPERTS}
    shares = score_layers(build(), "routing", unit="expert", **given).values
    want = [i for n in range(3) for i in sorted(sorted(range(4 * n, 4 * n + 4), key=lambda i: -shares[i])[:2])]
    selection, start = record(model).selection, build().state_dict()
    assert list(selection.layers) == want and trained(model).keys() == set(selection.names)
    now = model.merge_and_unload().state_dict()
    for name in [f"model.layers.{i}.mlp.experts.{e}" for i in range(3) for e in range(4)]:
        before, after = stacked(start, name), stacked(now, name)
        assert all(torch.equal(before[k], after[k]) != (name in selection.names) for k in before)


@pytest.mark.slow
@pytest.mark.parametrize("method", KINDS)
def test_a_run_goes_on_where_it_stopped(method, tmp_path):
    def trainer(folder):
        return scheduling.trainer_of(wrapped(method), tmp_path / folder, 4, save_steps=2)

    whole, broken = trainer("whole"), trainer("broken")
    whole.train()
    broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), broken.model.parameters(), strict=True))
    with pytest.raises(SelectionError, match="trains other targets"):
        other = scheduling.trainer_of(wrapped(method, {**PLACED, "layers": [0, 3, 8]}), tmp_path / "other", 4)
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_copies_state_dicts_and_casts_keep_what_was_trained(method):
    model = wrapped(method)
    run(model)
    data = batches(1)[0]
    here, twin = model(**data).logits, copy.deepcopy(model)
    run(twin, 1)
    assert torch.equal(model(**data).logits, here) and not torch.equal(twin(**data).logits, here)
    other = wrapped(method)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**data).logits, here)
    run(other, 1)
    layerpeft.check_trained(other)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(**data).logits, here)
    low = copy.deepcopy(model).to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in low.named_parameters() if p.requires_grad}
    run(low, 1)
    assert before and all(not torch.equal(p, before[n]) for n, p in low.named_parameters() if n in before)
    with low.disable_adapter():
        torch.testing.assert_close(low(**data).logits, build().to(torch.bfloat16)(**data).logits, atol=0.02, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", KINDS)
def test_checkpointing_changes_nothing(method, reentrant):
    plain, model, data = wrapped(method), wrapped(method), batches(1)[0]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for each in (plain, model):
        each(**data).loss.backward()
    pairs = zip(trained(plain).values(), trained(model).values(), strict=True)
    assert all(torch.equal(a[n].grad, b[n].grad) for a, b in pairs for n in a)


@pytest.mark.slow
@pytest.mark.parametrize("method", KINDS)
def test_compiled_models_train_them(method):
    model, data = wrapped(method), batches(1)[0]
    model(**data).loss.backward()
    want = {t: {n: p.grad.clone() for n, p in group.items()} for t, group in trained(model).items()}
    model.zero_grad()
    torch.compile(model, backend="eager")(**data).loss.backward()
    for target, group in trained(model).items():
        for n, p in group.items():
            torch.testing.assert_close(p.grad, want[target][n], rtol=1e-5, atol=1e-7)


def test_experts_that_no_token_reaches_have_zeros_as_in_whole_training():
    for method in KINDS:
        model = wrapped(method, {"layers": "all", "unit": "expert"})
        one = {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]])}
        loss = model(**one).logits.square().sum()
        loss.backward()
        grads = [p.grad for group in trained(model).values() for p in group.values()]
        assert all(g is not None for g in grads) and any(not g.any() for g in grads) and any(g.any() for g in grads)


def test_what_cannot_be_is_refused_by_name(monkeypatch):
    with pytest.raises(ConfigError, match="unit: expert: method galore keeps what it trains of all experts"):
        LayerGaloreConfig(select=PLACED, r=4, target_modules=[], target_parameters=EXPERTS).examine(build())
    with pytest.raises(
        ConfigError, match=r"no target lies in an expert; .*target_parameters names: \['experts.gate_up_proj'"
    ):
        config("lora", target_modules=["q_proj"], target_parameters=None).examine(build())
    with pytest.raises(ConfigError, match="which no module called experts holds"):
        config("full").examine(MODELS["granitemoe"]()) if "granitemoe" in MODELS else config("full").examine(
            _elsewhere()
        )
    with pytest.raises(ConfigError, match="training of single experts does not know"):
        layerpeft.get_peft_model(_elsewhere("experts"), config("full"))
    for engine in (FSDP1, FSDP2, *ZERO):
        assert any("single experts" in s for s in engine.refusals(["expert_views"]))
    assert all("single_experts" in e.cannot for e in (FSDP1, FSDP2, ZERO[2]))
    assert "single_experts" in config("lora").needs(batches=True)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(True)
    for method in KINDS:
        model = build()
        with pytest.raises(
            ConfigError, match="single experts of a 3-D tensor are followed while it is whole, and FSDP2"
        ):
            layerpeft.get_peft_model(model, config(method))
        assert not any(p.grad is not None for p in model.parameters()) and ".lora_" not in str(list(model.state_dict()))


def test_a_lora_adapter_of_single_experts_is_none_that_is_copied():
    model = wrapped("lora")
    with pytest.raises(ConfigError, match="trains single experts of a 3-D tensor: 'ref' cannot be a copy"):
        model.add_adapter("ref", model.peft_config["default"])
    assert set(model.peft_config) == {"default"}


def test_rows_of_other_experts_are_zero_in_the_folder(tmp_path):
    model = wrapped("lora")
    run(model)
    model.save_pretrained(tmp_path)
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        picked = {e for n in NAMES if f"{n.rpartition('.')[0]}." in key for e in [int(n.rpartition(".")[2])]}
        rows = tensor.view(4, 4, -1) if ".lora_A." in key else tensor.view(-1, 4, 4).permute(2, 0, 1)
        assert picked and {e for e in range(4) if rows[e].any()} == picked


def test_an_expert_that_was_not_picked_is_not_to_change():
    model = wrapped("full")
    run(model, 1)
    with torch.no_grad():
        base_of(model).model.layers[0].mlp.experts.original_module.down_proj[2, 0, 0] += 1
    with pytest.raises(TrainingError, match=r"down_proj\[2:3\] is frozen and changed"):
        layerpeft.check_trained(model)


def _elsewhere(name="moe"):
    """A model whose experts are held by a module of another name, or used in another way."""
    model = MODELS["llama"]()

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 4
            self.down_proj = torch.nn.Parameter(torch.randn(4, 32, 32) / 8)

        def forward(self, x, which, weights):
            return torch.einsum("td,ehd->th", x, self.down_proj)

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, Experts())

        def forward(self, x):
            flat = x.flatten(0, -2)
            return getattr(self, name)(flat, torch.zeros(len(flat), 1, dtype=torch.long), flat[:, :1]).view_as(x)

    for layer in model.model.layers:
        layer.mlp = Mixture()
    return model

"""Which uses of the weights of experts projection knows, and what it refuses before anything is wrapped; what `plan` says."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import moe

import layerpeft
from layerpeft import LayerGaloreConfig, LayerLoraConfig
from layerpeft.errors import ConfigError, TrainingError
from layerpeft.model.experts import check_experts
from layerpeft.tuners.galore.projection import basis_of, like_trained, state_of, trained_of
from tests.helpers.expert_models import EXPERTS, RANK, batches, build, modules, run, wrap
from tests.helpers.loops import adamw


class Loop(nn.Module):
    """Experts of one's own; `how` multiplies rows with the weight of one expert."""

    def __init__(self, how):
        super().__init__()
        self.num_experts, self.how = 4, how
        self.up_proj = nn.Parameter(torch.randn(4, 48, 32) / 8)

    def forward(self, x, which, weights):
        found = torch.zeros(len(x), 48)
        for expert in which.unique():
            rows = (which == expert).any(-1)
            found[rows] += self.how(self.up_proj, x[rows], int(expert))
        return found[:, :32]


class Block(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.experts, self.gate = Loop(how), nn.Linear(32, 4)

    def forward(self, x):
        top = self.gate(x).topk(2)
        return x + self.experts(x, top.indices, top.values)


class Own(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layers = nn.ModuleList(Block(how) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


KNOWN = {
    "linear": lambda w, x, e: nn.functional.linear(x, w[e]),
    "matmul": lambda w, x, e: x @ w[e].T,
    "mm": lambda w, x, e: x.mm(w[e].t()),
    "in another type": lambda w, x, e: nn.functional.linear(x.double(), w[e].double()).float(),
}
UNKNOWN = {
    "einsum": lambda w, x, e: torch.einsum("ti,oi->to", x, w[e]),
    "unbind": lambda w, x, e: nn.functional.linear(x, w.unbind(0)[e]),
    "add": lambda w, x, e: nn.functional.linear(x, w[e] + 0),
    "mul": lambda w, x, e: (w[e] * x[:, None]).sum(-1),
    "view": lambda w, x, e: nn.functional.linear(x, w.view(192, 32)[48 * e : 48 * e + 48]),
    "stack": lambda w, x, e: nn.functional.linear(x, torch.stack([w[e], w[e]])[0]),
    "__getitem__": lambda w, x, e: nn.functional.linear(x, w[e][:48]),
    "without any call": lambda w, x, e: x.new_ones(len(x), 48),
}


def own(how):
    torch.manual_seed(0)
    return Own(how)


@pytest.mark.parametrize("how", KNOWN)
def test_loops_of_known_forms_train_as_the_full_gradient_says(how):
    plain = own(KNOWN[how])
    config = LayerGaloreConfig(select="last:1", r=4, target_modules=[], target_parameters=["experts.up_proj"])
    model = layerpeft.get_peft_model(copy.deepcopy(plain), config)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    (layer,) = modules(model).values()
    wanted = plain.layers[2].experts.up_proj.grad @ basis_of(layer).mT
    torch.testing.assert_close(like_trained(layer, trained_of(layer).grad.contiguous()), wanted, atol=1e-4, rtol=1e-4)
    assert bool(wanted.any())


@pytest.mark.parametrize("how", UNKNOWN)
def test_a_use_that_is_not_known_is_refused_before_anything_is_wrapped(how):
    model = own(UNKNOWN[how])
    config = LayerGaloreConfig(select="last:1", r=4, target_modules=[], target_parameters=["experts.up_proj"])
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=rf"layers.2.experts.up_proj.*does not know \({how}.*target_parameters"):
        layerpeft.get_peft_model(model, config)
    assert [n for n, _ in model.named_modules()] == before and all(p.requires_grad for p in model.parameters())


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "head_dim": 8, "vocab_size": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, pad_token_id=0))


@pytest.mark.parametrize("ask", [layerpeft.get_peft_model, layerpeft.plan])
def test_experts_of_llama4_are_refused_by_name(ask):
    config = LayerGaloreConfig(select="last:1", r=4, target_modules=[], target_parameters=EXPERTS)
    with pytest.raises(ConfigError, match="feed_forward.experts.*Llama4TextExperts takes other arguments"):
        ask(llama4(), config)


@pytest.mark.matrix
@pytest.mark.parametrize("ask", [layerpeft.get_peft_model, layerpeft.plan])
@pytest.mark.parametrize("how", ["sonicmoe", "deepgemm"])
def test_kernels_that_hide_their_products_are_refused_by_name(ask, how):
    model = build()
    model.config._experts_implementation_internal = how
    config = LayerGaloreConfig(select="last:1", r=4, target_modules=[], target_parameters=EXPERTS)
    with pytest.raises(ConfigError, match=f"experts_implementation='{how}'"):
        ask(model, config)


def test_an_implementation_that_changes_after_wrapping_is_found_out_at_the_first_use(monkeypatch):
    model = wrap()

    def other(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states + torch.einsum("eoi->i", self.gate_up_proj)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "other", other)
    model.base_model.model.config._experts_implementation_internal = "other"
    with pytest.raises(ConfigError, match="gate_up_proj.*einsum"):
        model(**batches(1)[0])


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_optimizers_that_take_a_tensor_for_one_matrix_are_refused(name):
    from transformers import Adafactor

    model = wrap()
    held = [p for p in model.parameters() if p.requires_grad]
    plain = {"scale_parameter": False, "relative_step": False}
    optimizer = torch.optim.Muon(held, lr=1e-3) if name == "Muon" else Adafactor(held, lr=1e-3, **plain)
    with pytest.raises(TrainingError, match=f"{name} looks at what it trains as one matrix.*experts"):
        run(model, 1, optimizer)


def test_parameters_that_are_no_experts_are_refused():
    with pytest.raises(ConfigError, match=r"mlp.gate.weight \(parameter\) is none.*target_parameters"):
        wrap(target_parameters=["mlp.gate.weight"])


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_plan_counts_experts_and_their_originals(name):
    model = build(name, "batched_mm", num_hidden_layers=1)
    options = {"r": RANK, "target_modules": [], "target_parameters": EXPERTS, "select": "last:1"}
    lora = layerpeft.plan(model, LayerLoraConfig(**options), batch_size=2, length=8)
    ours = layerpeft.plan(model, LayerGaloreConfig(**options), batch_size=2, length=8)
    layer = model.get_submodule("model.layers.0.mlp.experts")
    assert ours.trainable == 4 * RANK * (96 + 32) and lora.trainable == ours.trainable + 4 * RANK * (32 + 48)
    assert ours.flops < lora.flops
    assert ours.weights - lora.weights == layer.gate_up_proj.nbytes + layer.down_proj.nbytes


# ways to train


@pytest.mark.spread(3)
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_autocast_and_factors_in_16_bit(how):
    model = run(wrap(build(how=how), update_proj_gap=2), 3)
    found = []
    for autocast in (False, True):
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = twin(**batches(1)[0]).loss
        loss.backward()
        found.append([trained_of(layer).grad for layer in modules(twin).values()])
    for one, other in zip(*found, strict=True):
        assert 0 < float((one - other).norm()) < 0.05 * float(one.norm())
    options = {"r": 8, "target_modules": [], "target_parameters": EXPERTS, "update_proj_gap": 2}
    base = build(how=how, dtype=torch.bfloat16)
    config = LayerGaloreConfig(select="last:1", **options)
    short = layerpeft.get_peft_model(base, config, autocast_adapter_dtype=False).train()
    assert {trained_of(layer).dtype for layer in modules(short).values()} == {torch.bfloat16}
    run(short, 6, rate=5e-2)
    layerpeft.check_trained(short)
    assert all(state_of(layer).folds.count >= 2 for layer in modules(short).values())


@pytest.mark.slow  # as tests/tuners/galore/test_galore_loops.py has it for linears
def test_compiled_models_run_their_experts_as_they_are():
    plain, model = (wrap(build(num_hidden_layers=1), "all", update_proj_gap=1) for _ in range(2))
    compiled, optimizer = torch.compile(model, backend="eager"), adamw(model)
    run(compiled, 2, optimizer)
    run(plain, 2)
    for one, other in zip(modules(model).values(), modules(plain).values(), strict=True):
        torch.testing.assert_close(trained_of(one), trained_of(other), atol=1e-5, rtol=1e-4)
        assert state_of(one).refreshes == state_of(other).refreshes >= 2 and state_of(one).failed == 0


def test_another_adapter_finds_the_original_weights():
    model, data = run(wrap(update_proj_gap=2), 5), batches(1)[0]
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.eval()
    with torch.no_grad():
        trained = model(**data).logits
        model.set_adapter("other")
        assert torch.equal(model(**data).logits, build().eval()(**data).logits)
        model.set_adapter("default")
        assert torch.equal(model(**data).logits, trained)


def test_experts_are_chosen_by_their_gradients_and_a_choice_in_training_is_refused():
    by = {"by": "gradient_norm", "keep": 1}
    model = wrap(select=by, batches=batches(2))
    run(model, 3)
    layerpeft.check_trained(model)
    assert len(modules(model)) == 2 and len({n.split(".layers.")[1][0] for n in modules(model)}) == 1
    with pytest.raises(ConfigError, match="experts are measured before they are wrapped"):
        wrap(select=by)


def test_trying_large_experts_takes_no_memory_and_no_time():
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=2, vocab_size=64))  # 1.4 billion weights a layer
    names = [f"model.layers.1.mlp.{n}" for n in EXPERTS]
    for how in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(how)
        with Largest() as seen:
            check_experts(model, names)
        assert 0 < seen.bytes < 1 << 20


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result

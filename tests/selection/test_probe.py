"""The gradient probe against exact norms, exact norms against plain backward, and nothing left behind."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from layerpeft import LayerLoraConfig, get_peft_model, layer_map, score_layers
from layerpeft.errors import ScoreError
from layerpeft.selection.probe import Exact, Probe, Sketch
from tests.helpers.repeating import some
from tests.helpers.short import LAYERS


def plain_norms(model, batches) -> list[float]:
    """The definition: full gradients of all linears, batch by batch."""
    targets = layer_map(model).targets
    squares: dict[int, float] = defaultdict(float)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for t in targets:
            squares[t.layer] += float(model.get_submodule(t.name).weight.grad.double().square().sum()) / len(batches)
    model.zero_grad()
    return [squares[i] ** 0.5 for i in sorted(squares)]


@pytest.fixture
def llama(short):
    return short


@pytest.fixture(scope="module")
def small_llama(_short):
    return copy.deepcopy(_short).eval()


@pytest.fixture(scope="module")
def exact(small_llama, gsm8k_batches):
    return score_layers(small_llama, exact=True, batches=gsm8k_batches, target_modules="all-linear", progress=False)


def test_exact_norms_equal_a_plain_backward(small_llama, gsm8k_batches, exact):
    expected = plain_norms(small_llama, gsm8k_batches)
    for got, want in zip(exact.values, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.spread(2)
@pytest.mark.parametrize("seed", some(range(5), 2))
def test_the_probe_ranks_layers_as_exact_norms_do(small_llama, gsm8k_batches, exact, seed):
    probed = score_layers(
        small_llama, batches=gsm8k_batches, target_modules="all-linear", k=8, seed=seed, progress=False
    )
    for got, want in zip(probed.values, exact.values, strict=True):
        assert got == pytest.approx(want, rel=0.2)
    for i, j in itertools.permutations(range(LAYERS), 2):
        if exact.values[i] > 1.25 * exact.values[j]:
            assert probed.values[i] > probed.values[j], (i, j)
    assert set(probed.ranked()[:3]) == set(exact.ranked()[:3])


def test_the_estimate_is_unbiased():
    generator = torch.Generator().manual_seed(3)
    gy = torch.randn(64, 48, generator=generator) * torch.logspace(0, -3, 48)
    x = torch.randn(64, 40, generator=generator) * torch.logspace(0, -2, 40)
    true = float((gy.T @ x).double().square().sum())
    ratios = [float(Sketch(k=8, seed=s).energy("t", 0, gy, x)) / true for s in range(200)]
    assert sum(ratios) / 200 == pytest.approx(1.0, abs=0.02)
    assert min(ratios) > 0.5 and max(ratios) < 1.5
    assert float(Exact().energy("t", 0, gy, x)) == pytest.approx(true, rel=1e-6)


class Shapes(TorchDispatchMode):
    """Counts tensors of given shapes that operations make."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.made = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            # transposes and detached views of the weights themselves are not new tensors
            if isinstance(leaf, torch.Tensor) and tuple(leaf.shape) in self.shapes and leaf._base is None:
                self.made += func.__name__.split(".")[0] not in (
                    "t",
                    "transpose",
                    "detach",
                    "view",
                    "_unsafe_view",
                    "alias",
                )
        return result


@pytest.mark.parametrize(("is_exact", "most"), [(False, 0), (True, None)])
def test_no_tensor_of_a_weights_shape_is_made_in_probe_mode(is_exact, most):
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    )
    x = torch.randint(0, 64, (2, 11))
    shapes = {t.shape for t in layer_map(model).targets}
    for p in model.parameters():
        p.requires_grad_(False)
    probe = Probe({t.name: t for t in layer_map(model).targets}, Exact() if is_exact else Sketch())
    probe.attach(model)
    loss = model(input_ids=x, labels=x).loss
    with Shapes(shapes) as watched:
        loss.backward()
    probe.next_batch()
    probe.detach()
    assert len(probe.sums()) == 14
    if most is None:
        assert watched.made >= 14  # the counter does see full gradients where they are made
    else:
        assert watched.made == most


def state_of(model):
    return (
        {n: (p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()},
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


@pytest.mark.matrix
@pytest.mark.parametrize("by", ["gradient_norm", "outliers", "random"])
@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_as_it_was(llama, gsm8k_batches, by, training):
    llama.train(training)
    llama.model.layers[3].eval()
    llama.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    llama.model.norm.weight.grad = torch.ones_like(llama.model.norm.weight)
    before, random_state = state_of(llama), torch.get_rng_state()
    options = {"M": 3} if by == "outliers" else {}
    score_layers(llama, by, batches=gsm8k_batches[:2], progress=False, **options)
    after = state_of(llama)
    assert torch.equal(random_state, torch.get_rng_state())
    assert before[1:] == after[1:]
    for name, (value, flag, grad) in before[0].items():
        assert torch.equal(value, after[0][name][0]) and flag == after[0][name][1], name
        assert grad is None and after[0][name][2] is None or torch.equal(grad, after[0][name][2])
    assert llama.config.use_cache is True


def test_hooks_come_off_when_the_model_raises(llama):
    with pytest.raises(ScoreError, match="no loss"):
        score_layers(llama, batches=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}], progress=False)
    assert all(not m._forward_hooks for m in llama.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_score(llama, gsm8k_batches, reentrant):
    plain = score_layers(llama, batches=gsm8k_batches[:2], exact=True, progress=False)
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    llama.train()
    kept = score_layers(llama, batches=gsm8k_batches[:2], exact=True, progress=False)
    assert kept.values == pytest.approx(plain.values, rel=1e-5)


def test_a_module_called_twice_counts_its_summed_gradient():
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)) for _ in range(2)
            )

        def forward(self, x, labels=None):
            for _ in range(3):
                for block in self.blocks:
                    x = x + block(x)
            return {"loss": x.square().mean()}

    model = Twice()
    batches = [{"x": torch.randn(5, 8)}, {"x": torch.randn(7, 8)}]
    expected = [0.0, 0.0]
    for batch in batches:
        model.zero_grad()
        model(**batch)["loss"].backward()
        for i, block in enumerate(model.blocks):
            expected[i] += sum(float(p.grad.square().sum()) for n, p in block.named_parameters() if "weight" in n) / 2
    for kwargs, tolerance in (({"exact": True}, 1e-5), ({"k": 8}, 1e-4)):  # k = 8 spans these 8-wide layers
        got = score_layers(model, batches=batches, target_modules="all-linear", progress=False, **kwargs)
        assert got.values == pytest.approx([e**0.5 for e in expected], rel=tolerance)


@pytest.mark.parametrize("normalize", ["numel", "weight"])
def test_normalised_norms_are_the_plain_ones_divided(small_llama, gsm8k_batches, normalize):
    kwargs = {"batches": gsm8k_batches[:2], "target_modules": "all-linear", "progress": False, "exact": True}
    plain = score_layers(small_llama, **kwargs)
    got = score_layers(small_llama, normalize=normalize, **kwargs)
    for layer in layer_map(small_llama).layers:
        weights = [small_llama.get_submodule(t.name).weight.detach().double() for t in layer.targets]
        size = (
            sum(w.numel() for w in weights) if normalize == "numel" else sum(float(w.square().sum()) for w in weights)
        )
        assert got.values[layer.index] == pytest.approx(plain.values[layer.index] / size**0.5, rel=1e-5)


def test_signal_is_the_norm_of_the_mean_gradient(small_llama, gsm8k_batches):
    batches = gsm8k_batches[:4]
    small_llama.zero_grad()
    for batch in batches:
        (small_llama(**batch).loss / 4).backward()
    want = [
        sum(float(small_llama.get_submodule(t.name).weight.grad.square().sum()) for t in layer.targets) ** 0.5
        for layer in layer_map(small_llama).layers
    ]
    small_llama.zero_grad()
    got = score_layers(
        small_llama, batches=batches, signal=True, k=64, target_modules="all-linear", progress=False
    ).values
    assert got == pytest.approx(want, rel=0.25)
    both = score_layers(small_llama, batches=batches, k=64, target_modules="all-linear", progress=False).values
    assert all(g < b for g, b in zip(got, both, strict=True))  # averaging gradients first can only lose norm
    with pytest.raises(ScoreError, match="cannot be exact"):
        score_layers(small_llama, batches=batches, signal=True, exact=True, progress=False)


@pytest.mark.spread(2)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases_are_scored_in_eval_mode(llama, gsm8k_batches, bits):
    bnb = pytest.importorskip("bitsandbytes")
    full = score_layers(llama, batches=gsm8k_batches[:4], target_modules="all-linear", progress=False)
    for t in layer_map(llama).targets:
        parent, _, name = t.name.rpartition(".")
        old = llama.get_submodule(t.name)
        if bits == 4:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        else:
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
        setattr(llama.get_submodule(parent), name, new.to("cpu"))
    llama.eval()
    packed = {n: p.detach().clone() for n, p in llama.named_parameters()}
    got = score_layers(llama, batches=gsm8k_batches[:4], target_modules="all-linear", progress=False)
    assert got.values == pytest.approx(full.values, rel=0.35)
    assert all(torch.equal(packed[n], p) for n, p in llama.named_parameters())
    setattr(llama, f"is_loaded_in_{bits}bit", True)  # what transformers' loader leaves for PEFT to see
    wrapped = get_peft_model(llama, LayerLoraConfig(select="last:2", target_modules="all-linear")).train()
    wrapped(
        **gsm8k_batches[0]
    ).loss.backward()  # on some CPUs an evaluation forward repacks 4-bit weights and breaks this
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


def test_a_target_that_is_never_called_is_an_error_not_a_zero():
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)}) for _ in range(2)
            )

        def forward(self, x):
            for layer in self.layers:
                x = layer["a"](x) @ layer["b"].weight  # b is used, never called
            return {"loss": x.sum()}

    with pytest.raises(ScoreError, match=r"2 target\(s\) got no gradient.*layers\.0\.b"):
        score_layers(Odd(), batches=[{"x": torch.randn(3, 4)}], target_modules="all-linear", progress=False)


def test_gradients_that_are_all_zero_are_an_error(llama, gsm8k_batches):
    batch = dict(gsm8k_batches[0]) | {"labels": gsm8k_batches[0]["labels"].clone()}
    llama.lm_head = torch.nn.Linear(192, 4096, bias=False)
    torch.nn.init.zeros_(llama.lm_head.weight)
    with pytest.raises(ScoreError, match="all gradients are exactly zero"):
        score_layers(llama, batches=[batch], progress=False)


def test_the_probe_costs_no_gradient_memory_in_the_wrapped_model(llama, gsm8k_batches):
    config = LayerLoraConfig(select={"by": "gradient_norm", "keep": 2}, target_modules="all-linear")
    model = get_peft_model(llama, config)
    names = set(model.state_dict())
    model.train()
    model(**gsm8k_batches[0]).loss.backward()
    assert set(model.state_dict()) == names and not any("probe" in n or "omega" in n.lower() for n in names)
    assert all("lora_" in n for n, p in model.named_parameters() if p.grad is not None)


def test_the_estimate_is_unbiased_on_real_gradients(small_llama, gsm8k_batches):
    targets = [t for t in layer_map(small_llama).targets if t.layer == 3]
    pairs = []
    for p in small_llama.parameters():
        p.requires_grad_(False)

    def watch(name):
        def hook(_module, args, y) -> None:
            x = args[0].detach().flatten(0, 1)
            y.requires_grad_(True).register_hook(lambda g: pairs.append((name, g.flatten(0, 1), x)))

        return small_llama.get_submodule(name).register_forward_hook(hook)

    hooks = [watch(t.name) for t in targets]
    small_llama(**gsm8k_batches[0]).loss.backward()
    for hook in hooks:
        hook.remove()
    assert {name for name, _, _ in pairs} == {t.name for t in targets}
    true = sum(float(Exact().energy(n, 0, gy, x)) for n, gy, x in pairs)
    ratios = [sum(float(Sketch(k=8, seed=s).energy(n, 0, gy, x)) for n, gy, x in pairs) / true for s in range(200)]
    assert sum(ratios) / 200 == pytest.approx(1.0, abs=0.02)

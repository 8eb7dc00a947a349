"""Scorers for bits by layer, and rounding on trial: values made by hand, models left as they were, processes that agree."""

from __future__ import annotations

import copy

import pytest
import torch

from layerpeft import layer_map, score_layers
from layerpeft.errors import ConfigError, ScoreError
from layerpeft.model.outputs import counted_tokens
from layerpeft.model.precisions import KEPT, Storage, rounded
from layerpeft.model.rounding import output_kl, rounded_weights
from layerpeft.quantization.budget import Unit, kl_table
from layerpeft.selection.scorers import output_kl as output_kl_scorer
from layerpeft.selection.scorers import quantization_error, salience
from layerpeft.selection.scoring import Request
from tests.helpers.models import MODELS, batch
from tests.helpers.together import Group

STORAGE = Storage()
FAMILIES = ("llama", "gpt2", "bert", "t5", "whisper", "vit", "nanogpt")
BY = {
    "quantization_error": {},
    "quantization_error with inputs": {"activations": True},
    "output_kl": {},
    "entropy": {},
    "salience": {},
}


def state_of(model) -> dict[str, tuple[int, torch.Tensor]]:
    return {n: (t.data_ptr(), t.detach().clone()) for n, t in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, before) -> None:
    after = state_of(model)
    assert before.keys() == after.keys()
    for name, (place, value) in before.items():
        assert after[name][0] == place, f"{name} lies elsewhere now"
        assert torch.equal(after[name][1], value), name


def request_of(model, **more) -> Request:
    layers = layer_map(model)
    return Request(model, layers, layers.targets, **more)


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_every_kind_of_model_the_same_twice_and_nothing_touched(family, by):
    model = MODELS[family]()
    model.train()
    before = state_of(model)
    torch.manual_seed(5)

    def run(seed: int = 0):
        batches = [batch(family, model, seed=s) for s in (1, 2)]
        return score_layers(
            model, by.split()[0], batches=batches, target_modules="all-linear", progress=False, seed=seed, **BY[by]
        )

    first = run()
    assert first == run()
    assert len(first.values) == len(layer_map(model)) and all(v > 0 for v in first.values)
    assert_untouched(model, before)
    assert all(m.training for m in model.modules())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    draws = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(draws, torch.rand(3)), "the global random state has moved"


@pytest.fixture
def llama(short):
    return short


@pytest.mark.parametrize("kind", ["quantization_error", "output_kl"])
def test_precisions_are_names_or_bits_and_what_rounds_nothing_is_refused(llama, gsm8k_batches, kind):
    short = [{k: v[:1, :16] for k, v in gsm8k_batches[0].items()}]

    def run(precision):
        return score_layers(llama, kind, batches=short, progress=False, precision=precision)

    assert run(4).values == run("nf4").values
    assert run(4).options["precision"] == "nf4"
    with pytest.raises(ScoreError, match="Did you mean 'nf4'"):
        run("nf5")
    with pytest.raises(ScoreError, match="leaves weights as they are"):
        run(16)


# ---- the error of weights --------------------------------------------------------------------------------------------


def test_the_error_is_the_squared_difference_to_the_rounded_weight():
    model = MODELS["llama"]()
    for precision in ("nf4", "int8", "hqq2"):
        got = score_layers(model, "quantization_error", precision=precision, target_modules="all-linear")
        for layer, value in zip(layer_map(model).layers, got.values, strict=True):
            weights = [model.get_submodule(t.name).weight.detach() for t in layer.targets]
            errors = [float((w.double() - rounded(w, precision, STORAGE).double()).square().sum()) for w in weights]
            assert value == pytest.approx(sum(errors), rel=1e-6)
            assert [got.targets[t.name] for t in layer.targets] == pytest.approx(errors, rel=1e-6)


def test_nf4_rounding_by_hand(llama):
    """NF4's levels between -1 and 1, a scale for 64 weights (arXiv 2305.14314)."""
    levels = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
              0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    weight = llama.get_submodule("model.layers.0.mlp.down_proj").weight.detach()
    groups = weight.double().flatten().view(-1, 64)
    scales = groups.abs().amax(1, keepdim=True)
    near = torch.tensor(levels, dtype=torch.float64)
    found = near[(groups / scales)[..., None].sub(near).abs().argmin(-1)] * scales
    got = score_layers(llama, "quantization_error", target_modules=["mlp.down_proj"])
    assert got.values[0] == pytest.approx(float((groups - found).square().sum()), rel=1e-4)


def test_relative_errors_are_shares_of_the_weights(llama):
    model = llama
    plain = score_layers(model, "quantization_error", target_modules="all-linear")
    share = score_layers(model, "quantization_error", target_modules="all-linear", relative=True)
    sizes = [
        sum(float(model.get_submodule(t.name).weight.detach().double().square().sum()) for t in layer.targets)
        for layer in layer_map(model).layers
    ]
    assert share.values == pytest.approx([v / s for v, s in zip(plain.values, sizes, strict=True)], rel=1e-6)
    assert all(0.001 < v < 0.05 for v in share.values)


def test_with_activations_columns_weigh_what_their_inputs_do(llama, gsm8k_batches):
    batches, inputs = gsm8k_batches[:2], []
    name = "model.layers.3.mlp.down_proj"
    handle = llama.get_submodule(name).register_forward_hook(lambda _m, args, _y: inputs.append(args[0].detach()))
    llama.eval()
    with torch.no_grad():
        for one in batches:
            llama(**one)
    handle.remove()
    weight = llama.get_submodule(name).weight.detach()
    lost = (weight - rounded(weight, "nf4", STORAGE)).double().square().sum(0)
    norms = torch.cat([x.flatten(0, -2) for x in inputs]).double().square().sum(0)
    got = score_layers(
        llama, "quantization_error", batches=batches, activations=True, target_modules=[name], progress=False
    )
    assert got.targets[name] == pytest.approx(float((lost * norms).sum()), rel=1e-5)
    assert got.values[3] == got.targets[name] and got.values[2] == 0.0


def test_experts_are_rounded_one_by_one_and_kernels_are_refused():
    model = MODELS["qwen3_moe"]()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    got = score_layers(model, "quantization_error", target_modules=["o_proj"], target_parameters=names)
    for which in names:
        stored = model.get_submodule("model.layers.1.mlp.experts").get_parameter(which.rpartition(".")[2]).detach()
        errors = [(w - rounded(w.contiguous(), "nf4", STORAGE)).double().square().sum() for w in stored]
        assert got.targets[f"model.layers.1.mlp.{which}"] == pytest.approx(float(sum(errors)), rel=1e-6)
    weighed = {"activations": True, "batches": [batch("qwen3_moe", model)], "progress": False}
    found = score_layers(model, "quantization_error", target_modules=["o_proj"], target_parameters=names, **weighed)
    assert all(found.targets[f"model.layers.1.mlp.{n}"] > 0 for n in names)
    with pytest.raises(ScoreError, match="output_kl rounds linears and Conv1D; not .*experts"):
        score_layers(model, "output_kl", target_modules=["o_proj"], target_parameters=names, batches=[])
    mamba = MODELS["mamba"]()
    with pytest.raises(ScoreError, match="not on .*conv1d"):
        score_layers(mamba, "quantization_error", target_modules=["conv1d"])


def test_shapes_that_do_not_fit_are_named():
    model = MODELS["llama"]()
    with pytest.raises(ScoreError, match=r"6 target\(s\) do not fit hqq1 in groups of 96: .*q_proj"):
        score_layers(model, "quantization_error", precision=1, group_size=96, target_modules=["q_proj", "o_proj"])
    with pytest.raises(ConfigError, match=r"q_proj \(32, 32\) does not fit hqq1 in groups of 96"):
        score_layers(model, "output_kl", precision=1, group_size=96, target_modules=["q_proj"], batches=[{}])


# ---- the divergence of the output ------------------------------------------------------------------------------------


def by_hand(model, inputs, counted, names) -> float:
    """KL in float64, with the weights changed by hand."""
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits.double().log_softmax(-1)
        kept = {n: model.get_submodule(n).weight.data.clone() for n in names}
        for name, weight in kept.items():
            model.get_submodule(name).weight.copy_(rounded(weight, "nf4", STORAGE))
        after = model(**inputs).logits.double().log_softmax(-1)
        for name, weight in kept.items():
            model.get_submodule(name).weight.copy_(weight)
    each = (before.exp() * (before - after)).sum(-1)
    return float(each[counted].mean())


def test_the_divergence_by_hand_over_the_tokens_that_predict_a_label(llama, gsm8k_batches):
    inputs = {k: v.clone() for k, v in gsm8k_batches[0].items()}
    inputs["labels"][:, :20] = -100  # a prompt
    counted = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    counted[:, :-1] = inputs["labels"][:, 1:] != -100
    layers = layer_map(llama).layers
    wanted = {i: by_hand(llama, inputs, counted, [t.name for t in layers[i].targets]) for i in (0, 3)}
    got = score_layers(llama, "output_kl", batches=[inputs], target_modules="all-linear", progress=False)
    assert got.values[0] == pytest.approx(wanted[0], rel=1e-4)
    assert got.values[3] == pytest.approx(wanted[3], rel=1e-4)
    whole = [{t.name: "nf4" for t in layers[3].targets}, {}]
    assert output_kl(llama, [inputs], whole, STORAGE, progress=False) == pytest.approx([wanted[3], 0.0], rel=1e-4)


def test_which_tokens_count():
    def count(family, **inputs):
        model = MODELS[family]()
        return counted_tokens(model, inputs, torch.zeros(2, 4, 9)).int().tolist()

    labels = torch.tensor([[-100, -100, 5, 6], [-100, 5, -100, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert count("llama", labels=labels, attention_mask=mask) == [[0, 1, 1, 0], [1, 0, 1, 0]]
    assert count("t5", labels=labels) == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert count("llama", attention_mask=mask) == mask.tolist()
    assert count("llama", input_ids=labels) == [[1] * 4] * 2
    assert counted_tokens(MODELS["bert"](), {"labels": labels[:, 0], "attention_mask": mask}, torch.zeros(2, 3)).all()


def test_batches_weigh_by_their_tokens_and_nothing_to_count_is_an_error(llama, gsm8k_batches):
    short = {k: v[:1, :30] for k, v in gsm8k_batches[1].items()}
    kinds = [{t.name: "hqq2" for t in layer_map(llama).layers[2].targets}]

    def run(*batches):
        return output_kl(llama, batches, kinds, STORAGE, progress=False)[0]

    a, b = {k: v[:2, :60] for k, v in gsm8k_batches[0].items()}, short
    n = [int((x["labels"][:, 1:] != -100).sum()) for x in (a, b)]
    assert run(a, b) == pytest.approx((run(a) * n[0] + run(b) * n[1]) / sum(n), rel=1e-6)
    with pytest.raises(ScoreError, match="batches is empty"):
        run()
    with pytest.raises(ScoreError, match="must be a mapping"):
        run(torch.ones(1, 3))
    with pytest.raises(ScoreError, match="no token counts"):
        run({**a, "labels": torch.full_like(a["labels"], -100)})
    bare = MODELS["llama_bare"]()
    with pytest.raises(ScoreError, match="holds no logits"):
        score_layers(bare, "output_kl", batches=[batch("llama_bare", bare)], progress=False)


def test_a_table_holds_every_unit_in_every_precision_it_can_have(short, gsm8k_batches):
    layers = layer_map(short).layers
    costs = {"hqq2": 1, "int8": 2, KEPT: 3}
    units = [Unit(f"layer {i}", tuple(t.name for t in layers[i].targets), 1, 0.0, costs) for i in (0, 3)]
    units.append(Unit("head side", (layers[4].targets[0].name,), 1, 0.0, {"int8": 1}))
    data = [{k: v[:1, :40] for k, v in one.items()} for one in gsm8k_batches[:2]]
    table = kl_table(short, units, ("hqq2", "int8", KEPT, "nf4"), data, STORAGE, progress=False)
    assert {name: set(own) for name, own in table.items()} == {
        "layer 0": {"hqq2", "int8", KEPT},
        "layer 3": {"hqq2", "int8", KEPT},
        "head side": {"int8"},
    }
    for name in ("layer 0", "layer 3"):
        assert table[name]["hqq2"] > 100 * table[name]["int8"] > table[name][KEPT] == 0.0
    again = score_layers(short, "output_kl", batches=data, precision=2, target_modules="all-linear", progress=False)
    assert table["layer 3"]["hqq2"] == pytest.approx(again.values[3], rel=1e-9)


def test_the_noise_of_16_bit_arithmetic_is_taken_off(_llama, gsm8k_batches):
    llama = copy.deepcopy(_llama)  # of few layers there is more noise than this
    layers = layer_map(llama).layers
    costs = {"nf4": 1, "int8": 2, KEPT: 3}
    units = [Unit(f"layer {i}", tuple(t.name for t in layers[i].targets), 1, 0.0, costs) for i in (0, 1)]
    data = gsm8k_batches[:2]
    exact = kl_table(llama, units, tuple(costs), data, STORAGE, progress=False)
    llama.to(torch.bfloat16)
    before = state_of(llama)
    found = kl_table(llama, units, tuple(costs), data, STORAGE, progress=False)
    assert_untouched(llama, before)
    raw = output_kl(llama, data, [dict.fromkeys(units[1].modules, "int8")], STORAGE, progress=False)[0]
    assert raw > 20 * exact["layer 1"]["int8"], "there is no noise to take off"
    for unit in ("layer 0", "layer 1"):
        for kind in ("nf4", "int8"):
            assert found[unit][kind] == pytest.approx(exact[unit][kind], rel=0.1, abs=0.4 * raw), (unit, kind)
        assert found[unit][KEPT] == 0.0


def test_weights_come_back_after_an_error_and_only_the_named_ones_change():
    model = MODELS["llama"]()
    before = state_of(model)
    names = [t.name for t in layer_map(model).layers[1].targets]
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        rounded_weights(model, dict.fromkeys(names, "nf4"), STORAGE),
    ):
        for name, parameter in model.named_parameters():
            same = torch.equal(parameter, before[name][1])
            assert same is (name.removesuffix(".weight") not in names), name
        raise RuntimeError("in the middle")
    assert_untouched(model, before)
    with (
        pytest.raises(ConfigError) as caught,
        rounded_weights(model, {names[0]: "nf4", "model.norm": "nf4", "model.embed_tokens": "int8"}, STORAGE),
    ):
        pass
    assert all(f"model.{n}" in str(caught.value) for n in ("norm", "embed_tokens"))
    assert_untouched(model, before)


def test_weights_come_back_when_a_batch_fails(llama, gsm8k_batches):
    before, calls = state_of(llama), []

    def fail(*_):
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("in the middle of a layer")

    handle = llama.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        score_layers(llama, "output_kl", batches=gsm8k_batches[:1], progress=False)
    handle.remove()
    assert_untouched(llama, before)
    assert not llama._forward_hooks


def test_a_live_measurement_reads_the_batch_without_dropout_and_keeps_training_as_it_was():
    model = MODELS["gpt2"]().train()  # has dropout
    one = batch("gpt2", model)
    want = score_layers(model, "output_kl", batches=[one], target_modules="all-linear", progress=False)
    measurement = output_kl_scorer.start(request_of(model, live=True, outer=model), output_kl_scorer.Options())
    measurement.attach()
    loss = model(**one, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    gradient = model.transformer.h[0].attn.c_attn.weight.grad.clone()
    measurement.next_batch(0.5)
    measurement.detach()
    assert measurement.batches == 1
    assert measurement.result().values == pytest.approx(want.values, rel=1e-6)
    assert torch.equal(gradient, model.transformer.h[0].attn.c_attn.weight.grad)
    assert all(m.training for m in model.modules()) and not model._forward_hooks


# ---- salience --------------------------------------------------------------------------------------------------------


def published_salience(weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """As the paper has it: the upper Cholesky factor of the inverse of GPTQ's damped Hessian, in float64."""
    weight, inputs = weight.double(), inputs.flatten(0, -2).double()
    hessian = 2 * inputs.T @ inputs
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return float((weight[:, ~dead].square() / factor.diagonal()[~dead].square()).sum())


def test_salience_is_what_the_published_formula_gives(llama, gsm8k_batches):
    names = ["model.layers.3.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    inputs = {name: [] for name in names}
    with torch.no_grad():  # an input that is always 0
        llama.model.layers[1].input_layernorm.weight[7] = 0
    handles = [llama.get_submodule(n).register_forward_hook(lambda _m, args, _y, n=n: inputs[n].append(args[0].detach())) for n in names]  # fmt: skip  # noqa: E501
    with torch.no_grad():
        for one in gsm8k_batches[:2]:
            llama.eval()(**one)
    for handle in handles:
        handle.remove()
    got = score_layers(llama, "salience", batches=gsm8k_batches[:2], target_modules=names, progress=False)
    for name, layer in zip(names, (3, 1), strict=True):
        rows = torch.cat([x.flatten(0, -2) for x in inputs[name]])
        want = published_salience(llama.get_submodule(name).weight.detach(), rows)
        assert got.targets[name] == got.values[layer] == pytest.approx(want, rel=1e-4)
    assert got.values[2] == 0.0


def test_salience_by_hand():
    """H = 2 · [[4, 2], [2, 5]] and no damping: of input 0 stays 8 - 4²/10 = 6.4 behind input 1, of which 10 are whole."""
    gram = torch.tensor([[4.0, 2.0, 0.0], [2.0, 5.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert salience.residuals(gram.clone(), 0.0).tolist() == pytest.approx([6.4, 10, 0])
    damped = salience.residuals(gram.clone(), 0.01).tolist()  # the mean of 8, 10 and a dead column's 1
    assert damped == pytest.approx([8 + 0.19 / 3 - 16 / (10 + 0.19 / 3), 10 + 0.19 / 3, 0])
    assert salience.residuals(gram * torch.nan, 0.01) is None


def test_salience_of_experts_counts_the_tokens_that_each_got():
    model = MODELS["qwen3_moe"]()
    one = {k: v[:1, :3] for k, v in batch("qwen3_moe", model).items() if v.dim() > 1}  # few, so that some get none
    got = score_layers(model, "salience", batches=[one], target_parameters=["experts.down_proj"], target_modules=["o_proj"], progress=False)  # fmt: skip  # noqa: E501
    assert all(v > 0 for v in got.targets.values()) and len(got.targets) == 2 * len(got.values)
    sums = [sum(v for n, v in got.targets.items() if f"layers.{i}." in n) for i in range(len(got.values))]
    assert got.values == pytest.approx(sums)
    mamba = MODELS["mamba"]()
    with pytest.raises(ScoreError, match="not on .*conv1d"):
        score_layers(mamba, "salience", target_modules=["conv1d"], batches=[batch("mamba", mamba)])


# ---- several processes -----------------------------------------------------------------------------------------------


def test_processes_agree_on_divergences_and_errors(monkeypatch):
    models = [MODELS["llama"]() for _ in range(2)]
    data = [[batch("llama", models[0], rows=1 + rank, seed=5 + rank)] for rank in range(2)]
    names = [t.name for t in layer_map(models[0]).layers[0].targets]
    kinds = [dict.fromkeys(names, "hqq3"), dict.fromkeys(names, "int8")]
    alone = output_kl(models[0], data[0] + data[1], kinds, STORAGE, progress=False)
    scorers = ((output_kl_scorer, {}), (quantization_error, {"activations": True}), (salience, {}))
    singles = [
        score_layers(
            models[0],
            s.__name__.rpartition(".")[2],
            batches=data[0] + data[1],
            target_modules="all-linear",
            progress=False,
            **o,
        )
        for s, o in scorers
    ]
    group = Group(monkeypatch, 2)

    def run(rank: int):
        found = [output_kl(models[rank], data[rank], kinds, STORAGE, progress=False)]
        for scorer, options in scorers:
            measurement = scorer.start(request_of(models[rank]), scorer.Options(**options))
            measurement.attach()
            with torch.no_grad():
                models[rank].eval()(**data[rank][0])
            measurement.next_batch()
            measurement.detach()
            measurement.combine(group.add)
            found.append(measurement.result().values)
        return found

    first, second = group.run(run)
    assert first == second
    assert first[0] == pytest.approx(alone, rel=1e-6)
    assert first[1] == pytest.approx(singles[0].values, rel=1e-5)
    assert first[2] == pytest.approx(singles[1].values, rel=1e-5)
    assert first[3] == pytest.approx(singles[2].values, rel=1e-4)

"""Scorers that watch training with some layers frozen, against numbers made by hand; and Spectrum's ratio."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerpeft import score_layers
from layerpeft.errors import ScoreError
from layerpeft.model.layers import base_of, layer_map
from layerpeft.selection import plugins, scoring
from layerpeft.selection.scorers import adapter_gradient, importance, snr
from layerpeft.selection.scoring import Request
from layerpeft.selection.select import Select

N = 4


def tiny(seed: int = 0) -> peft.PeftModel:
    """Four layers with LoRA on two targets each, whose adapters already give something out."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=N, num_attention_heads=2, head_dim=8
    )
    lora = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.train()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def request(model, **more) -> Request:
    layers = layer_map(model)
    targets = tuple(t for t in layers.targets if t.name.endswith(("q_proj", "down_proj")))
    return Request(base_of(model), layers, targets, live=True, outer=model, **more)


def freeze(model, *layers: int) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(not any(f"layers.{i}." in name for i in layers))


def norms_by_hand(model, batches) -> list[list[list[float]]]:
    """Batch, layer, tensor: the norms of the adapters' gradients."""
    found = []
    for one in batches:
        model.zero_grad()
        model(**one).loss.backward()
        found.append(
            [
                [
                    float(p.grad.double().norm())
                    for n, p in model.named_parameters()
                    if f"layers.{i}." in n and p.grad is not None
                ]
                for i in range(N)
            ]
        )
    model.zero_grad()
    return found


# ---- adapter_gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["published", "norm"])
def test_adapter_gradient_by_hand(form):
    model, batches = tiny().eval(), [batch(s) for s in range(3)]
    freeze(model, 1)
    hand = norms_by_hand(model, batches)
    measurement = adapter_gradient.start(request(model), adapter_gradient.Options(form))
    measurement.attach()
    for one in batches:
        model(**one).loss.backward()
        measurement.next_batch()
    measurement.detach()
    got = measurement.result().values
    assert got[1] is None and measurement.batches == 3
    for i in (0, 2, 3):
        parts = [n for b in hand for n in b[i]]
        assert len(parts) == 3 * 4
        published = math.sqrt(sum(math.sqrt(n) for n in parts))
        want = published if form == "published" else math.sqrt(sum(n * n for n in parts) / 3)
        assert got[i] == pytest.approx(want, rel=1e-5)
    before = measurement.result()
    model(**batches[0]).loss.backward()
    measurement.next_batch()
    assert measurement.result() == before  # nothing is left on the model
    assert not any(p._backward_hooks for p in model.parameters())


def test_the_published_score_presses_a_hundredfold_gradient_together():
    for tensors in (1, 10):
        big, small = (math.sqrt(tensors * math.sqrt(g)) for g in (100.0, 1.0))
        assert big / small == pytest.approx(3.1623, abs=1e-4)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)) for _ in range(2)])
    model.forward = lambda x: sum((100.0 if i else 1.0) * block(x).sum() for i, block in enumerate(model.blocks))
    layers = layer_map(model)
    for form, ratio in (("published", 10**0.5), ("norm", 100.0)):
        measurement = adapter_gradient.start(
            Request(model, layers, layers.targets, live=True), adapter_gradient.Options(form)
        )
        measurement.attach()
        model(torch.ones(1, 1)).backward()
        measurement.next_batch()
        measurement.detach()
        low, high = measurement.result().values
        assert high / low == pytest.approx(ratio)


@pytest.mark.parametrize("form", ["published", "norm"])
def test_scales_of_losses_are_divided_out_where_all_are_known(form):
    def measured(scales, known):
        model = tiny().eval()
        measurement = adapter_gradient.start(request(model), adapter_gradient.Options(form))
        measurement.attach()
        for seed, scale in enumerate(scales):
            (model(**batch(seed)).loss * scale).backward()
            measurement.next_batch(scale if known else None)
        return measurement.result().values

    plain = measured([1.0, 1.0], True)
    assert measured([0.25, 1024.0], True) == pytest.approx(plain, rel=1e-4)
    as_it_came = 4**0.25 if form == "published" else 4.0  # where one is not known, all count as they came
    assert measured([4.0, 4.0], False) == pytest.approx([v * as_it_came for v in plain], rel=1e-4)


def test_batches_that_are_not_finite_are_left_out():
    model = tiny().eval()
    measurement = adapter_gradient.start(request(model), adapter_gradient.Options())
    measurement.attach()
    (model(**batch(0)).loss * float("inf")).backward()
    measurement.next_batch()
    assert measurement.batches == 0
    with pytest.raises(ScoreError, match="no tensor that trains"):
        measurement.result()
    model(**batch(0)).loss.backward()
    measurement.next_batch()
    assert measurement.batches == 1 and all(math.isfinite(v) and v < 100 for v in measurement.result().values)


def test_layers_that_begin_to_train_later_are_seen():
    model = tiny()
    freeze(model, 0, 2)
    measurement = adapter_gradient.start(request(model), adapter_gradient.Options())
    measurement.attach()
    freeze(model, 1)
    model(**batch()).loss.backward()
    measurement.next_batch()
    assert [v is None for v in measurement.result().values] == [False, True, False, False]


def test_processes_add_their_gradients_up():
    def watch(batches):
        model = tiny().eval()
        freeze(model, 3)
        measurement = adapter_gradient.start(request(model), adapter_gradient.Options("norm"))
        measurement.attach()
        for one in batches:
            model(**one).loss.backward()
            measurement.next_batch(1.0)
        return measurement

    together = watch([batch(0), batch(1), batch(2)]).result().values
    parts = watch([batch(0)]), watch([batch(1), batch(2)])
    sent: list[list[torch.Tensor]] = [[], []]
    for part, box in zip(parts, sent, strict=True):
        copy.copy(part).combine(lambda t, box=box: box.append(t) or t)
    for part in parts:
        queue = iter([a + b for a, b in zip(*sent, strict=True)])
        part.combine(lambda t, queue=queue: next(queue))
        got = part.result().values
        assert got[3] is together[3] is None and got[:3] == pytest.approx(together[:3], rel=1e-5)


@pytest.mark.parametrize("by", ["adapter_gradient", "importance"])
def test_live_scorers_refuse_to_measure_beforehand(llama, gsm8k_batches, by):
    assert plugins.traits("layerpeft.scorers", by).live_only
    with pytest.raises(ScoreError, match=f"by: {by} is measured on adapters while they train.*reselect_steps"):
        score_layers(llama, by, batches=gsm8k_batches[:1])


def test_a_layer_not_seen_is_no_number_in_a_file():
    model = tiny()
    freeze(model, 1)
    select = Select.parse({"by": "adapter_gradient", "keep": 2, "reselect_steps": 1})
    layers = layer_map(model)
    targets = tuple(t for t in layers.targets if t.name.endswith(("q_proj", "down_proj")))
    measurement = scoring.start(model, select, layers, targets, live=True)
    measurement.attach()
    model(**batch()).loss.backward()
    measurement.next_batch()
    with pytest.raises(ScoreError, match=r"not finite for layer\(s\) 1"):
        scoring.make_scores(select, layers, measurement.result(), 1)
    assert adapter_gradient.TRAITS.unseen == 1000.0


# ---- importance ------------------------------------------------------------------------------------------------------


def test_importance_golden_values():
    zero = dict.fromkeys(range(3), 0.0)
    got = importance.moved(zero, [(0,), (1,), (2,)], [1.0, 0.9, 1.1], 10.0)
    assert [got[i] for i in range(3)] == pytest.approx([-0.00307, 0.09366, -0.09059], abs=5e-6)
    # a layer in two subsets takes both steps from where it was
    both = importance.moved({0: 0.5, 1: 0.0}, [(0,), (0, 1)], [1.0, 0.5], 10.0)
    p, reward = 1 / (1 + math.exp(-0.5)), [math.exp(-1.0), math.exp(-0.5)]
    mean = sum(reward) / 2
    assert both[0] == pytest.approx(0.5 + sum(r - mean for r in reward) * p * (1 - p) * 10)
    assert both[1] == pytest.approx((reward[1] - mean) * 2.5)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 32])
def test_subsets_are_distinct_halves_and_the_search_ends(layers):
    for seed in range(20):
        found = importance.subsets(dict.fromkeys(range(layers), 0.0), 3, seed)
        assert len(found) == len(set(found)) == min(3, math.comb(layers, max(1, layers // 2)))
        assert all(len(set(s)) == max(1, layers // 2) for s in found)
        assert found == importance.subsets(dict.fromkeys(range(layers), 0.0), 3, seed)
    steep = {i: (800.0 if i < 2 else -800.0) for i in range(4)}  # one subset takes all the weight
    assert len(importance.subsets(steep, 6, 0)) == 6


def test_unimportant_layers_are_damped_more_often():
    found = [i for s in range(600) for i in importance.subsets({0: 3.0, 1: 0.0, 2: 0.0, 3: -3.0}, 1, s)[0]]
    assert found.count(0) > found.count(1) > found.count(3) * 2


def measured(model, scale=1.0, **more):
    measurement = importance.start(request(model, **more), importance.Options())
    measurement.attach()
    model(**batch(1), num_items_in_batch=torch.tensor(99)).loss.backward()
    measurement.next_batch(scale)
    model(**batch(2), num_items_in_batch=torch.tensor(99)).loss.backward()
    measurement.next_batch(scale)
    measurement.detach()
    return measurement


def test_importance_by_hand():
    model = tiny()
    before = (0.5, None, -1.0, 0.0)
    measurement = measured(model, before=before, seed=6)
    losses = []
    for damped in measurement.damped:
        other = copy.deepcopy(model).eval()
        for name, module in other.named_modules():
            if hasattr(module, "lora_B") and any(f"layers.{i}." in name for i in damped):
                module.lora_B["default"].weight.data *= 0.25
        with torch.no_grad():
            losses.append(float(other(**batch(2)).loss))  # the last batch's own mean, without dropout
    assert len(set(losses)) == 3
    want = importance.moved({0: -0.5, 1: 0.0, 2: 1.0, 3: 0.0}, measurement.damped, losses, 10.0)
    assert measurement.result().values == pytest.approx([-want[i] for i in range(4)], abs=1e-6)
    assert measurement.batches == 2


def test_importance_leaves_the_model_as_it_was():
    model = tiny()
    base_of(model).model.layers[1].eval()
    measurement = measured(model)
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    weights = {n: p.clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    scales = [dict(m.scaling) for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    state, cache = torch.get_rng_state(), model.config.use_cache
    measurement.result()
    assert [m.training for m in model.modules()] == modes and not all(modes)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert hooks[0] == (0, 0)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert gradients and all(torch.equal(model.get_parameter(n).grad, g) for n, g in gradients.items())
    assert [dict(m.scaling) for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)] == scales
    assert torch.equal(torch.get_rng_state(), state) and model.config.use_cache == cache
    assert torch.is_grad_enabled()


def test_importance_of_adapters_that_give_nothing_out_yet_says_nothing():
    model = tiny()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert measured(model).result().values == (0.0,) * N


def test_a_harmful_adapter_is_found_unimportant():
    """Layer 2's adapter spoils the output: damping it raises the reward, so its score sinks below all others'."""
    model = tiny()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter, std=8.0 if "layers.2.self_attn" in name or "layers.2.mlp" in name else 1e-3
            )
    with torch.no_grad(), model.eval().disable_adapter():
        labels = model(input_ids=batch(2)["input_ids"]).logits.argmax(-1)
    model.train()
    known: tuple[float | None, ...] = ()
    for seed in range(8):
        measurement = importance.start(request(model, before=known, seed=seed), importance.Options())
        measurement.attach()
        shifted = torch.cat([labels[:, :1], labels[:, :-1]], 1)
        model(input_ids=batch(2)["input_ids"], labels=shifted).loss.backward()
        measurement.next_batch()
        measurement.detach()
        known = measurement.result().values
    assert min(range(N), key=lambda i: known[i]) == 2


def test_importance_takes_the_hook_off_inside_of_the_forward_pass():
    """Who watches forward passes puts the measurement on in a pre-hook of the same call and takes it off in its hook."""
    model = tiny()
    measurement = importance.start(request(model), importance.Options())
    model.register_forward_pre_hook(lambda *_: measurement.attach())
    model.register_forward_hook(lambda *_: measurement.detach())
    model(**batch()).loss.backward()
    measurement.next_batch()
    assert measurement.batches == 1 and all(math.isfinite(v) for v in measurement.result().values)


def test_importance_without_batches_or_labels_or_lora_is_an_error():
    model = tiny()
    measurement = importance.start(request(model), importance.Options())
    with pytest.raises(ScoreError, match="none has been seen"):
        measurement.result()
    measurement.attach()
    model(input_ids=batch()["input_ids"])
    with pytest.raises(ScoreError, match="needs the labels"):
        measurement.result()
    model(**{**batch(), "labels": torch.full((2, 7), -100)})
    with pytest.raises(ScoreError, match="damped forward pass is nan"):
        measurement.result()
    bare = tiny().unload()
    measurement = importance.start(request(bare), importance.Options())
    measurement.attach()
    bare(**batch())
    with pytest.raises(ScoreError, match=r"layer \d has none; it goes with method: lora"):
        measurement.result()


def test_importance_means_losses_over_processes():
    measurement = measured(tiny())
    mine = measurement._run()
    others = [2.0, 3.0, 4.0]
    measurement.combine(lambda t: t + torch.tensor([*others, 1.0], dtype=torch.float64))
    mean = [(a + b) / 2 for a, b in zip(mine, others, strict=True)]
    want = importance.moved(dict.fromkeys(range(N), 0.0), measurement.damped, mean, 10.0)
    assert measurement.result().values == pytest.approx([-want[i] for i in range(N)])


# ---- snr (Spectrum) --------------------------------------------------------------------------------------------------


def test_spectrum_golden_values():
    assert snr.ratio(torch.tensor([10, 5, 4, 3, 2, 1, 0.5, 0.1]), (8, 16)) == pytest.approx(0.14151, abs=5e-6)
    assert snr.ratio(torch.tensor([3.0]), (1, 4096)) == pytest.approx(1.0)
    assert snr.ratio(torch.zeros(4), (4, 4)) == 0.0


def test_pure_noise_in_a_wide_weight_counts_as_all_signal():
    """The published threshold is no test for noise: a strong signal of rank eight lowers the ratio."""
    torch.manual_seed(0)
    noise = 0.02 * torch.randn(512, 2048)
    left, right = torch.linalg.qr(torch.randn(512, 8))[0], torch.linalg.qr(torch.randn(2048, 8))[0]
    found = [snr.ratio(torch.linalg.svdvals(w), (512, 2048)) for w in (noise, noise + 3 * left @ right.T)]
    assert found == [pytest.approx(331, rel=0.03), pytest.approx(144, rel=0.03)]


def test_snr_of_layers_by_hand():
    model = tiny().unload()
    found = {a: score_layers(model, "snr", target_modules=["q_proj", "up_proj"], across=a) for a in ("rank", "mean")}
    ratios: dict[str, list[float]] = {"self_attn.q_proj": [], "mlp.up_proj": []}
    for layer in model.model.layers:
        for kind, values in ratios.items():
            weight = layer.get_submodule(kind).weight.detach().double()
            values.append(snr.ratio(torch.linalg.svdvals(weight), tuple(weight.shape)))
    q, up = ratios.values()
    assert found["mean"].values == pytest.approx([(a + b) / 2 for a, b in zip(q, up, strict=True)], rel=1e-4)
    places = [[sorted(v).index(x) / (N - 1) for x in v] for v in (q, up)]
    assert found["rank"].values == pytest.approx([(a + b) / 2 for a, b in zip(*places, strict=True)])
    assert found["rank"].targets["model.layers.2.mlp.up_proj"] == pytest.approx(up[2], rel=1e-4)

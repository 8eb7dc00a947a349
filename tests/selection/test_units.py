"""Units below a layer: how they are found, scored, chosen, and what of them trains, through every door."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, Select, Selection, layer_map, score_layers
from layerpeft.errors import ConfigError, ScoreError, SelectionError
from layerpeft.model.names import lying_in
from layerpeft.model.targets import match_targets
from layerpeft.model.units import in_units
from layerpeft.selection import plugins
from layerpeft.selection.picks import split
from layerpeft.selection.scorers import OF_HEADS
from tests.helpers.loops import llama, make_batches
from tests.helpers.mixtures import mixture
from tests.helpers.models import MODELS

PARTS = {
    "llama": ["self_attn", "mlp"],
    "gpt2": ["attn", "mlp"],
    "opt": ["self_attn", "fc1+fc2"],
    "bert": ["attention", "intermediate+output"],
    "distilbert": ["attention", "ffn"],
    "t5": ["layer.0", "layer.1", "layer.2"],
    "bart": ["self_attn", "encoder_attn", "fc1+fc2"],
    "mamba": ["mixer"],
    "qwen2_moe": ["self_attn", "mlp"],
}


@pytest.mark.parametrize("name", [n if n in PARTS else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_every_target_lies_in_one_part_of_its_layer(name):
    model = MODELS[name]()
    try:
        layers = layer_map(model)
    except Exception as error:  # shared weights
        pytest.skip(str(error))
    units, held = in_units(layers, "sublayer", layers.targets)
    assert [t.name for t in held] == [t.name for u in units.layers for t in u.targets]
    assert sorted(t.name for t in held) == sorted(t.name for t in layers.targets)
    assert all(lying_in([units.names[t.layer]])(t.name) for t in held)
    assert all(lying_in([units.block(i).name])(n) for i, n in enumerate(units.names))
    assert len(set(units.names)) == len(units) and units.fingerprint != layers.fingerprint
    if name in PARTS:
        first = units.block(0).index
        own = [units.place(u.name, u.index) for u in units.layers if u.block == first]
        assert own == PARTS[name]


def test_numbers_count_what_may_train():
    layers = layer_map(llama())
    targets = match_targets(layers, ["q_proj", "down_proj"])
    units, held = in_units(layers, "target", targets)
    assert units.names[:3] == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
    )
    assert [t.layer for t in held] == list(range(8)) and Counter(u.kind for u in units.layers) == {
        "self_attn.q_proj": 4,
        "mlp.down_proj": 4,
    }


ADDITIVE = {  # how the numbers of a layer's units make up its own
    "gradient_norm": lambda values, sizes: math.sqrt(sum(v * v for v in values)),
    "weight_norm": lambda values, sizes: math.sqrt(sum(v * v for v in values)),
    "quantization_error": lambda values, sizes: sum(values),
    "salience": lambda values, sizes: sum(values),
    "fisher": lambda values, sizes: sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes),
    "outliers": lambda values, sizes: sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes),
}


SUMS = [(by, "sublayer") for by in ADDITIVE] + [("gradient_norm", "target")]
SUMS += [pytest.param(by, "target", marks=pytest.mark.slow) for by in ADDITIVE if by != "gradient_norm"]


@pytest.mark.parametrize(("by", "unit"), SUMS)
def test_the_sum_of_the_parts_is_the_layers_score(by, unit):
    model, options = llama(), {"precision": "int8"} if by == "quantization_error" else {}
    options |= {"M": 2.0} if by == "outliers" else {}
    given = {"batches": make_batches()[:2], "target_modules": "all-linear", **options}
    whole, parts = score_layers(model, by, **given), score_layers(model, by, unit=unit, **given)
    units, _ = in_units(layer_map(model), unit, layer_map(model).targets)
    assert len(parts.values) == len(units) and parts.unit == unit and parts.fingerprint == units.fingerprint
    for layer, value in enumerate(whole.values):
        own = [u for u in units.layers if u.block == layer]
        found = ADDITIVE[by]([parts.values[u.index] for u in own], [u.params for u in own])
        assert found == pytest.approx(value, rel=1e-5)
    if unit == "target" and by != "outliers":
        assert dict(zip(units.names, parts.values, strict=True)) == pytest.approx(dict(whole.targets), rel=1e-5)


def test_other_statistics_of_gradients_add_up_too():
    model, given = llama(), {"batches": make_batches()[:2], "target_modules": "all-linear"}
    for options in ({"statistic": "l1"}, {"statistic": "nuclear"}, {"statistic": "credit", "steps": 3, "k": 2}):
        whole = score_layers(model, "gradient_norm", **given, **options)
        parts = score_layers(model, "gradient_norm", unit="sublayer", **given, **options)
        summed = [a + b for a, b in zip(parts.values[::2], parts.values[1::2], strict=True)]
        assert summed == pytest.approx(whole.values, rel=1e-5), options


def test_scores_of_units_survive_files_and_fit_those_units_alone(tmp_path):
    model = llama()
    scores = score_layers(model, "snr", unit="target", target_modules="all-linear", across="mean")
    scores.save(tmp_path / "s.json")
    again = type(scores).load(tmp_path / "s.json")
    assert again == scores and "unit" not in score_layers(model, "snr", target_modules="all-linear").to_dict()
    with pytest.raises(ScoreError, match="they are of targets, and the choice is among layers"):
        again.check(layer_map(model))


def spectrum(model, share):
    """Spectrum's own rule in a few lines: within each type of module the highest SNR / S_max, the number rounded down."""
    types = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            s = torch.linalg.svdvals(module.weight.detach().double())
            upper, lower = torch.quantile(s, 0.75), torch.quantile(s, 0.25)
            rows, columns = sorted(module.weight.shape)
            above = s > (upper - lower) / 1.349 * (1 + math.sqrt(rows / columns))
            snr = float(s[above].sum() / (s[~above].sum() if (~above).any() else 1.0) / s.max())
            types.setdefault(name.split(".", 3)[3], []).append((-snr, name))
    return {n for ranked in types.values() for _, n in sorted(ranked)[: int(len(ranked) * share)]}


def config(select, kind=LayerLoraConfig, **options):
    options = ({} if kind is LayerFullConfig else {"r": 2, "target_modules": "all-linear"}) | options
    return kind(select=select, task_type="CAUSAL_LM", **options)


def choice(select, model=None, kind=LayerLoraConfig, **options):
    from layerpeft.selection.choose import choose_among

    model = llama() if model is None else model
    found = config(select, kind, **options).examine(model)
    return choose_among(model, found.select, found.layers, found.targets, make_batches()[:2])


@pytest.mark.parametrize("kind", [LayerLoraConfig, LayerFullConfig])
@pytest.mark.parametrize("across", ["rank", "mean"])
def test_spectrum_as_published(kind, across):
    model = llama()
    select = {"by": "snr", "unit": "target", "within": "kind", "keep": "25%", "across": across}
    options = {"target_modules": "all-linear"} if kind is LayerFullConfig else {}
    assert set(choice(select, model, kind, **options).targets) == spectrum(model, 0.25)


def test_rules_within_groups():
    drawn = choice({"by": "random", "unit": "target", "within": "kind", "keep": 2})
    kinds = Counter(t.split(".", 3)[3] for t in drawn.targets)
    assert set(kinds.values()) == {2} and len(kinds) == 7
    layers = choice({"by": "gradient_norm", "unit": "sublayer", "within": "layer", "keep": 1})
    assert [t.split(".")[2] for t in layers.names] == ["0", "1", "2", "3"]
    assert "8 sublayers, by gradient_norm (pick: top, within each layer" in layers.why
    # a kind of its own seed: other layers are drawn for each
    assert len({tuple(t.split(".")[2] for t in drawn.targets if t.endswith(k.split(".")[-1])) for k in kinds}) > 1


def test_the_grammar_counts_units():
    assert choice({"layers": "last:1", "unit": "sublayer"}).names == ("model.layers.3.mlp",)
    found = choice({"layers": [0, -1], "exclude": -1, "unit": "target"})
    assert found.targets == found.names == ("model.layers.0.self_attn.q_proj",) and found.num_layers == 28
    assert choice({**found.placed}).targets == found.targets
    assert Selection.from_dict(found.to_dict()) == found
    with pytest.raises(SelectionError, match="8 is out of range; sublayers are 0 to 7"):
        choice({"layers": 8, "unit": "sublayer"})
    with pytest.raises(SelectionError, match="keep: 9 sublayers are asked for, and there are 8"):
        choice({"by": "random", "keep": 9, "unit": "sublayer"})


def test_nothing_is_written_of_whole_layers():
    assert "unit" not in Select.parse("all").to_dict() and "unit" not in choice("last:1").to_dict()
    assert "unit" not in choice({"layers": 1, "unit": "layer"}).placed


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"unit": "head", "by": "snr", "keep": 1}, "by: snr gives a score to .* not to heads; .*gradient_norm"),
        ({"unit": "sublayr"}, "unknown unit 'sublayr'. Did you mean 'sublayer'"),
        ({"unit": ["layer"]}, "unknown unit"),
        (
            {"unit": "target", "by": "entropy", "keep": 1},
            "by: entropy gives a score to layers and sublayers, not to targets, since it is told by the states.*gradient_norm",
        ),
        ({"unit": "target", "by": "importance", "keep": 1, "reselect_steps": 2}, "importance gives a score to layers"),
        ({"within": "kind", "by": "snr", "keep": 1}, "within: is of units below a layer"),
        ({"within": "kind", "unit": "target"}, "within: needs keep"),
        ({"within": "type", "unit": "target", "by": "snr", "keep": 1}, "unknown within 'type'"),
    ],
)
def test_what_cannot_be_asked(select, message):
    with pytest.raises(SelectionError, match=message):
        Select.parse(select)


def test_scorers_say_what_they_score():
    for name in plugins.names("layerpeft.scorers"):
        units = plugins.traits("layerpeft.scorers", name).units
        assert units and set(units) <= set(OF_HEADS), name


def test_targets_in_no_unit():
    full = choice({"layers": "all", "unit": "sublayer"}, kind=LayerFullConfig)
    assert not any("norm" in t for t in full.targets) and len(full.targets) == 28
    with pytest.raises(ConfigError, match="input_layernorm.* lie in no sublayer"):
        choice({"layers": 0, "unit": "sublayer"}, kind=LayerFullConfig, target_modules=["q_proj", "input_layernorm"])


def test_experts_that_nobody_names_are_refused():
    with pytest.raises(ConfigError, match="no target lies in an expert; the experts of a layer are in tensors here"):
        choice({"layers": 0, "unit": "expert"}, MODELS["mixtral"](), target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="the model has no experts"):
        choice({"layers": 0, "unit": "expert"})
    assert (
        LayerGaloreConfig(select={"unit": "target", "layers": 0}, r=2, target_modules=["q_proj"]).choosing.unit
        == "target"
    )


# ---- experts that are modules of their own, as model code from the hub keeps them -----------------------------------


@pytest.mark.parametrize("statistic", ["tokens", "gates"])
def test_routing_is_the_share_of_a_layers_tokens_or_gates(statistic):
    model, data = mixture(), make_batches()[:2]
    scores = score_layers(
        model, "routing", unit="expert", batches=data, target_modules="all-linear", statistic=statistic
    )
    assert len(scores.values) == 12
    for layer in (1, 2, 3):
        gates, which = (torch.cat(part) for part in zip(*model.model.layers[layer].mlp.seen, strict=True))
        weights = gates if statistic == "gates" else torch.ones_like(gates)
        want = torch.zeros(4).index_add(0, which.flatten(), weights.flatten())
        own = scores.values[4 * layer - 4 : 4 * layer]
        assert own == pytest.approx((want / want.sum()).tolist(), rel=1e-5) and sum(own) == pytest.approx(1)


def test_esft_takes_experts_up_to_a_share_in_each_layer():
    select = {"by": "routing", "unit": "expert", "within": "layer", "keep": "auto", "split": "cumulative", "share": 0.6}
    model = mixture()
    found = choice(select, model)
    values = found.scores.values
    for layer in (1, 2, 3):
        own = [i for i in found.layers if f".{layer}.mlp" in found.layer_names[i]]
        assert sum(values[i] for i in own) >= 0.6 > sum(values[i] for i in own) - min(values[i] for i in own)
    assert all(".experts." in t for t in found.targets) and len(found.targets) == 2 * len(found.layers)
    whole = choice(select, model, LayerFullConfig)
    assert whole.names == found.names and whole.targets == found.targets
    kinds = choice({"by": "gradient_norm", "unit": "target", "within": "kind", "keep": 1}, model)
    assert sum("experts" in t for t in kinds.targets) == 2  # an up_proj and a down_proj of all experts


def test_routing_says_what_it_needs():
    with pytest.raises(SelectionError, match="routing gives a score to experts, not to layers"):
        Select.parse({"by": "routing", "keep": 1})
    model = mixture()
    model.model.layers[2].mlp.gate = torch.nn.Sequential(torch.nn.Linear(32, 4))
    with pytest.raises(ScoreError, match="no softmax over one linear's output.*statistic: tokens"):
        score_layers(
            model, "routing", unit="expert", batches=make_batches(), statistic="gates", target_modules="all-linear"
        )


def test_cumulative():
    how = partial(split.Options, "cumulative")
    assert split.pick([0.1, 0.5, 0.2, 0.2], None, 0, how(share=0.7)) == [1, 2]
    assert split.pick([0.25] * 4, None, 0, how(share=0.5)) == [0, 1]
    with pytest.raises(SelectionError, match="a share of the scores' sum"):
        split.pick([0.0, 0.0], None, 0, how())


def test_threshold():
    cosines = [0.2, 0.9, 0.85, 0.84, 0.99]  # LS-LoRA: all layers below 0.85
    scores = [1 - c for c in cosines]
    picked = split.pick(scores, None, 0, split.Options("threshold", threshold=1 - 0.85))
    assert picked == [i for i, c in enumerate(cosines) if c < 0.85]
    assert split.pick([0.3, 0.3], None, 0, split.Options("threshold")) == [0, 1]
    with pytest.raises(SelectionError, match=r"no score is above 0\.15, the highest is 0\.1$"):
        split.pick([0.1, 0.05], None, 0, split.Options("threshold"))

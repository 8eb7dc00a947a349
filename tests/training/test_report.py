"""The table of what trained, against weights merged by PEFT itself; the CSV file and the picture."""

import copy
import csv
import functools
import io
import logging
import os
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from layerpeft.errors import ConfigError
from layerpeft.integrations import drawing
from layerpeft.model.layers import layer_map
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import Selection
from layerpeft.training import pictures, report
from layerpeft.training.record import Record
from layerpeft.training.report import Row
from tests.helpers.processes import without_the_package
from tests.helpers.repeating import repeated

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | options, num_key_value_heads=1, tie_word_embeddings=False))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16))


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    return MixtralForCausalLM(config)


def train(model, size=0.05):
    """Moves every adapter tensor, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "hada_" in name:
                parameter.add_(size * torch.randn_like(parameter))
    return model


def merged_changes(model, names, matches):
    """‖W_merged − W‖/‖W‖ per layer, from the whole model merged by PEFT."""
    before = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters() if "lora_" not in n}
    after = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    changes = []
    for layer in names:
        keys = [n for n in after if n.startswith(layer + ".") and matches(n)]
        delta = sum(float((after[n] - before[n]).double().square().sum()) for n in keys)
        changes.append((delta / sum(float(before[n].double().square().sum()) for n in keys)) ** 0.5)
    return changes


CASES = {
    "lora": (llama, {"target_modules": ["q_proj", "down_proj"]}, ("q_proj.weight", "down_proj.weight")),
    "rslora": (llama, {"target_modules": ["up_proj"], "use_rslora": True, "r": 4}, ("up_proj.weight",)),
    "ranks": (llama, {"target_modules": ["up_proj"], "rank_pattern": {"layers.1.mlp.up_proj": 7}}, ("up_proj.weight",)),
    "dora": (llama, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}, ("q_proj.weight", "up_proj.weight")),
    "dora, transposed": (gpt2, {"target_modules": ["c_fc"], "use_dora": True, "fan_in_fan_out": True}, "c_fc.weight"),
    "transposed": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, ("c_attn.weight",)),
    "experts": (
        mixtral,
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "bias ignored": (llama, {"target_modules": ["v_proj"], "bias": "none", "lora_alpha": 64}, ("v_proj.weight",)),
}


@pytest.mark.parametrize("case", CASES)
def test_change_is_that_of_the_merged_weights(case):
    build, options, ends = CASES[case]
    model = train(peft.get_peft_model(build(), peft.LoraConfig(**{"r": 2} | options)))
    found = report.layer_report(model)
    expected = merged_changes(model, [row.name for row in found.rows], lambda name: name.endswith(ends))
    assert [row.change for row in found.rows] == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 1e-4 and not found.notes


@pytest.mark.parametrize("dora", [False, True])
def test_no_change_is_formed_whole_that_is_the_product_of_two_factors(dora, monkeypatch):
    model = train(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora)))
    names = [f"model.layers.{i}" for i in range(3)]
    expected = merged_changes(model, names, lambda name: name.endswith("q_proj.weight"))

    @functools.wraps(peft.tuners.lora.Linear.get_delta_weight)
    def never(*_):
        raise AssertionError("a whole change")

    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", never)
    monkeypatch.setattr(report, "PIECE", 32)  # two rows
    assert [row.change for row in report.layer_report(model).rows] == pytest.approx(expected, rel=1e-4)


def test_change_of_an_untrained_adapter_is_zero_and_the_model_is_left_alone():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    before = copy.deepcopy(model.state_dict())
    assert [row.change for row in report.layer_report(model).rows] == pytest.approx([0, 0, 0], abs=1e-6)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_change_is_the_same_while_the_adapter_is_merged():
    model = train(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    apart = [row.change for row in report.layer_report(model).rows]
    model.merge_adapter()
    assert [row.change for row in report.layer_report(model).rows] == pytest.approx(apart, rel=1e-4)
    model.unmerge_adapter()
    dora = train(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)))
    dora.merge_adapter()
    found = report.layer_report(dora)
    assert all(row.change is None for row in found.rows) and "unmerge first" in found.notes[0]


@pytest.mark.matrix
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_change_on_a_quantized_base(bits, dora):
    bnb = pytest.importorskip("bitsandbytes")
    model = llama(hidden_size=64)  # bitsandbytes unpacks much smaller 4-bit weights wrongly on a CPU
    weights = {}
    for index, layer in enumerate(model.model.layers):
        old = layer.self_attn.q_proj
        weights[index] = old.weight.detach().clone()
        if bits == 4:
            new = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        layer.self_attn.q_proj = new.to("cpu")
    model = train(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora)))
    for row in report.layer_report(model).rows:
        layer = model.get_base_model().model.layers[row.layer].self_attn.q_proj
        expected = delta = layer.get_delta_weight("default").detach()
        if dora:
            base = weights[row.layer]
            moved = base + delta
            factor = layer.lora_magnitude_vector["default"].weight.detach() / moved.norm(dim=1)
            expected = factor[:, None] * moved - base
        assert row.change == pytest.approx(float(expected.norm() / weights[row.layer].norm()), rel=0.02)


@pytest.mark.parametrize(
    "config, reason",
    [
        (peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "IA3 does not add"),
        (peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]), "OFT does not add"),
        (peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1]), "ALoraLinearVariant"),
    ],
)
def test_what_cannot_be_told_is_left_out_with_the_reason(config, reason):
    found = report.layer_report(peft.get_peft_model(llama(), config))
    assert [(row.chosen, row.change) for row in found.rows] == [(True, None)] * 3
    assert reason in found.notes[0] and "model.layers.0" in found.notes[0]


def test_additive_methods_besides_lora():
    model = train(peft.get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)))
    found = report.layer_report(model)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    expected = layer.get_delta_weight("default").detach().norm() / layer.base_layer.weight.norm()
    assert found.rows[1].change == pytest.approx(float(expected), rel=1e-5)


def test_weights_that_went_to_nan_are_named_and_others_still_shown():
    model = train(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.q_proj.lora_B["default"].weight[0, 0] = float("nan")
    found = report.layer_report(model)
    assert found.rows[1].change is None and found.rows[0].change is not None
    assert found.notes == ("change is unknown for model.layers.1: its weights hold NaN or infinity",)


# ---- rows -----------------------------------------------------------------------------------------------------------


def recorded(by="gradient_norm", scores=True):
    """A model with an adapter on layers 0 and 2 whose config carries a record."""
    model = llama()
    found = layer_map(model)
    targets = tuple(t.name for t in found.targets if t.layer != 1 and t.name.endswith(("q_proj", "up_proj")))
    names = tuple(layer.name for layer in found.layers)
    kept = Scores((0.25, 1e-5, 3.0), by, found.fingerprint, found.stack) if scores else None
    selection = Selection(
        (0, 2), targets, 3, names, found.stack, found.fingerprint, "the 2 largest of 3", kept, {"by": by, "keep": 2}
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets)))
    model.peft_config["default"]._layerpeft = Record({}, "lora", selection, {0: 7, 2: 6})
    return train(model)


def test_rows_join_record_and_weights():
    model = recorded()
    rows = report.layer_report(model).rows
    shown = [(row.layer, row.name, row.score, row.chosen, row.steps) for row in rows]
    assert shown == [
        (0, "model.layers.0", 0.25, True, 7),
        (1, "model.layers.1", 1e-5, False, 0),
        (2, "model.layers.2", 3.0, True, 6),
    ]
    ends = ("q_proj.weight", "up_proj.weight")
    expected = merged_changes(model, [rows[0].name, rows[2].name], lambda name: name.endswith(ends))
    assert [rows[0].change, rows[2].change] == pytest.approx(expected, rel=1e-4) and rows[1].change is None
    assert report.rows(model) == list(rows)


def test_rows_of_a_record_alone_know_everything_but_the_change():
    model = recorded()
    alone = report.rows(model.peft_config["default"]._layerpeft)
    assert [(r.score, r.chosen, r.steps, r.change) for r in alone] == [
        (0.25, True, 7, None), (1e-5, False, 0, None), (3.0, True, 6, None),
    ]  # fmt: skip


def test_depth_is_no_score():
    model = recorded(by="depth")
    assert [row.score for row in report.layer_report(model).rows] == [None] * 3
    assert "depth: the 2 largest of 3" in str(report.layer_report(recorded(by="depth", scores=False)))


def test_table_has_a_line_per_layer_and_says_who_chose_and_why():
    lines = str(report.layer_report(recorded())).splitlines()
    assert lines[0].split() == ["layer", "name", "score", "chosen", "steps", "change"]
    assert lines[1].split()[:5] == ["0", "model.layers.0", "0.25", "yes", "7"] and lines[1].endswith("%")
    assert lines[2].split() == ["1", "model.layers.1", "1e-05", "no", "0", "-"]
    assert lines[4:] == ["gradient_norm: the 2 largest of 3"]
    assert len({len(line) for line in lines[:4]}) == 1


def test_layers_past_nine_are_not_mixed_up():
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"num_hidden_layers": 12}, num_key_value_heads=1)
    targets = ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj"]
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=targets))
    assert [row.layer for row in report.layer_report(model).rows if row.chosen] == [1, 11]


def test_pending_choice_says_so():
    model = recorded()
    model.peft_config["default"]._layerpeft.selection = None
    found = report.layer_report(model)
    assert found.rows == () and "not chosen yet" in str(found)
    assert report.rows(model.peft_config["default"]._layerpeft) == []


def test_chosen_targets_without_an_adapter_are_named():
    model = recorded()
    layer = model.get_base_model().model.layers[2].mlp
    layer.up_proj = layer.up_proj.base_layer
    note = report.layer_report(model).notes[0]
    assert note == "1 chosen targets carry no adapter 'default': model.layers.2.mlp.up_proj"


def test_models_of_transformers_and_wrapped_ones_are_reported():
    model = llama()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    found = report.layer_report(model, "mine")
    assert [(row.name, row.chosen, row.steps) for row in found.rows][1] == ("model.layers.1", True, None)
    assert "records no choice" in str(found)
    compiled = torch.compile(recorded(), backend="eager")
    assert [row.chosen for row in report.layer_report(compiled).rows] == [True, False, True]


def test_a_model_without_layers_has_a_row_per_wrapped_module():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = train(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"])))
    found = report.layer_report(model)
    assert [row.name for row in found.rows] == ["0", "2"] and all(row.change for row in found.rows)
    assert "no repeated layers" in found.notes[0]


def test_what_is_wrapped_outside_the_layers_is_counted():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert report.layer_report(model).notes == ("1 wrapped modules lie outside the layers and are not listed",)


def test_no_adapter_and_an_unknown_one_are_errors():
    with pytest.raises(ConfigError, match="has no adapter"):
        report.layer_report(llama())
    with pytest.raises(ConfigError, match="unknown adapter 'defualt'.*'default'"):
        report.layer_report(recorded(), "defualt")


# ---- files ----------------------------------------------------------------------------------------------------------


def made_up(count, scored=True, changed=True):
    chosen = [i % 4 == 1 for i in range(count)]
    changes = [0.01 if changed and chosen[i] else None for i in range(count)]
    scores = [0.1 + i % 7 if scored else None for i in range(count)]
    return [Row(i, f"model.layers.{i}", scores[i], chosen[i], 3, changes[i]) for i in range(count)]


def test_csv_holds_every_digit_and_leaves_the_unknown_empty(tmp_path):
    rows = [Row(0, "a,b", 0.1 + 0.2, True, 3, 1e-9), Row(1, "c", None, False, None, None)]
    pictures.write_csv(rows, tmp_path / "layers.csv")
    text = (tmp_path / "layers.csv").read_text()
    assert text.splitlines()[0] == "layer,name,score,chosen,steps,change"
    read = list(csv.DictReader(io.StringIO(text)))
    assert float(read[0]["score"]) == 0.1 + 0.2 and float(read[0]["change"]) == 1e-9
    assert (read[0]["name"], read[0]["chosen"], read[1]["chosen"]) == ("a,b", "true", "false")
    assert read[1]["score"] == read[1]["steps"] == read[1]["change"] == ""


def picture(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size < 60_000
    return (image[..., :3] * 255).round().astype(int)


def pixels(image, colour):
    return int((np.abs(image - np.array(colour)).max(axis=-1) <= 2).sum())


BLUE, GREY, RED = (0x00, 0x72, 0xB2), (0xC9, 0xCE, 0xD3), (0xD5, 0x5E, 0x00)


@pytest.mark.matrix
@pytest.mark.pictures
@pytest.mark.parametrize("count", [2, 80, repeated(12), repeated(200)])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("changed", [True, False])
def test_picture_is_a_small_png_that_shows_the_chosen_layers(tmp_path, count, scored, changed):
    rows = made_up(count, scored, changed)
    assert pictures.write_png(rows, tmp_path / "layers.png", "LlamaForCausalLM: gradient_norm")
    image = picture(tmp_path / "layers.png")
    height, width = image.shape[:2]
    assert 600 <= width <= 1200 and 150 <= height <= 650
    legend = 400  # pixels of one patch of the legend, at most
    assert pixels(image, BLUE) > legend and pixels(image, GREY) > legend
    assert (pixels(image, RED) > legend) == changed
    nothing = [Row(row.layer, row.name, row.score, False, 0, row.change) for row in rows]
    pictures.write_png(nothing, tmp_path / "none.png", "nothing chosen")
    assert pixels(picture(tmp_path / "none.png"), BLUE) < legend


@pytest.mark.pictures
def test_a_dark_style_of_the_users_program_changes_nothing(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    pictures.write_png(made_up(12), tmp_path / "plain.png", "title")
    with matplotlib.rc_context({"text.color": "white", "axes.facecolor": "black", "figure.facecolor": "black"}):
        pictures.write_png(made_up(12), tmp_path / "dark.png", "title")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "dark.png").read_bytes()


def test_without_rows_there_is_no_picture(tmp_path):
    assert pictures.write_png([], tmp_path / "layers.png", "empty") is False and not list(tmp_path.iterdir())


def test_without_matplotlib_one_warning_and_no_failure(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    drawing.warn_no_matplotlib.cache_clear()
    with caplog.at_level(logging.WARNING, logger="layerpeft.integrations.drawing"):
        assert pictures.write_png(made_up(3), tmp_path / "layers.png", "x") is False
        assert pictures.write_png(made_up(3), tmp_path / "layers.png", "x") is False
    assert len(caplog.records) == 1 and "pip install matplotlib" in caplog.text and not list(tmp_path.iterdir())


def test_a_failed_picture_leaves_the_old_file(tmp_path, monkeypatch):
    pictures.write_csv(made_up(3), tmp_path / "layers.csv")
    before = (tmp_path / "layers.csv").read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        pictures.write_csv(made_up(5), tmp_path / "layers.csv")
    assert (tmp_path / "layers.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_matplotlib_is_imported_late_and_pyplot_never():
    code = (
        "import sys, tempfile, os; sys.path.insert(0, sys.argv[1]); from layerpeft.training import pictures, report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert pictures.write_png([report.Row(0, 'a', 1.0, True, 1, None)], os.path.join(tempfile.mkdtemp(), 'x.png'), 't')\n"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    ended = without_the_package(code, ROOT)
    assert ended.stdout.split() == ["True", "False"], ended.stderr

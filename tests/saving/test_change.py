"""How far the layers of an earlier run moved: against what that run's own report measured, and by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import layerpeft
from layerpeft import LayerFullConfig, LayerLoraConfig, Scores, score_layers
from layerpeft.errors import SaveError, ScoreError
from layerpeft.saving.change import change_of
from layerpeft.saving.manifest import read_manifest
from tests.helpers.loops import llama, record
from tests.helpers.models import MODELS
from tests.test_before_the_move import FOLDER, base


def moved(folder: Path, name: str = "llama", **options):
    """A folder of an adapter that nobody trained, whose factors are of some size, and the change of each target."""
    build = MODELS[name] if name != "llama" else llama
    model = layerpeft.get_peft_model(build(), LayerLoraConfig(**{"select": "last:2", "r": 4, **options}))
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(n) + p.numel()))
    model.save_pretrained(folder)
    squares: dict[int, float] = {}
    for n, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A:
            layer = int(re.search(r"\.(?:layers|h)\.(\d+)\.", n)[1])
            delta = module.get_delta_weight("default").detach().double()
            squares[layer] = squares.get(layer, 0.0) + float(delta.square().sum())
    return build(), {i: s**0.5 for i, s in squares.items()}


@pytest.mark.parametrize("name", ["lora", "projection", "weights"])
def test_it_is_what_the_run_reported(name):
    told = [row["change"] or 0.0 for row in read_manifest(FOLDER / name)["report"]]
    model = base()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = change_of(FOLDER / name, model, relative=True)
    assert isinstance(found, Scores) and found.by == "change"
    assert found.values == pytest.approx(told, rel=1e-4) and any(told)
    plain = change_of(FOLDER / name, model)
    weight = LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32)
    for i, layer in enumerate(layerpeft.layer_map(model).layers):
        held = [weight.get_submodule(t.name).weight for t in layer.targets if t.name.endswith(("q_proj", "down_proj"))]
        norm = float(torch.cat([w.detach().flatten() for w in held]).double().norm())
        assert plain.values[i] == pytest.approx(told[i] * norm, rel=1e-4)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
        ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"]}),
    ],
)
def test_factors_of_every_kind(tmp_path, name, options):
    plain, want = moved(tmp_path, name, **options)
    found = change_of(tmp_path, plain)
    assert {i: v for i, v in enumerate(found.values) if v} == pytest.approx(want, rel=1e-5)
    assert sum(v**2 for v in found.targets.values()) == pytest.approx(sum(v**2 for v in want.values()), rel=1e-5)


def test_layers_are_chosen_by_it(tmp_path):
    plain, want = moved(tmp_path, target_modules=["q_proj", "down_proj"])
    best = max(want, key=lambda i: want[i])
    select = {"by": "change", "of": str(tmp_path), "keep": 1}
    model = layerpeft.get_peft_model(plain, LayerLoraConfig(select=select, r=2))
    assert record(model).selection.layers == (best,)
    assert record(model).selection.scores.origin["folder"] == str(tmp_path)
    found = score_layers(llama(), "change", of=str(tmp_path), relative=True)
    assert found.values[0] == 0 and found == score_layers(llama(), "change", of=str(tmp_path), relative=True)
    assert found.ranked()[0] in want


@pytest.mark.parametrize("kind", [LayerLoraConfig, LayerFullConfig])
def test_parts_of_layers_are_told_of_runs_by_parts_too(tmp_path, kind):
    select, options = {"unit": "sublayer", "layers": [1, 4]}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    if kind is LayerLoraConfig:
        moved(tmp_path, select=select, **options)
    else:
        model = layerpeft.get_peft_model(llama(), LayerFullConfig(select=select, **options))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.requires_grad)
        model.save_pretrained(tmp_path)
    whole = score_layers(llama(), "change", of=str(tmp_path)).values
    assert [i for i, v in enumerate(whole) if v] == [0, 2]
    for unit, held in (("sublayer", [1, 4]), ("target", [2, 6, 7])):
        found = score_layers(llama(), "change", unit=unit, of=str(tmp_path), **options)
        assert found.unit == unit and [i for i, v in enumerate(found.values) if v] == held
        each = 3 if unit == "target" else 2
        for layer, value in enumerate(whole):
            parts = found.values[layer * each : (layer + 1) * each]
            assert math.sqrt(sum(v * v for v in parts)) == pytest.approx(value, rel=1e-5)


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(ScoreError, match="needs the folder of an earlier run.*of: outputs"):
        score_layers(llama(), "change")
    with pytest.raises(SaveError, match="is not a folder"):
        score_layers(llama(), "change", of=str(tmp_path / "nowhere"))
    moved(tmp_path / "dora", use_dora=True)
    with pytest.raises(ScoreError, match="use_dora=True: B·A is not the change"):
        score_layers(llama(), "change", of=str(tmp_path / "dora"))
    with pytest.raises(ScoreError, match="trained another model"):
        score_layers(llama(num_hidden_layers=3), "change", of=str(tmp_path / "dora"))
    shutil.copytree(FOLDER / "lora", tmp_path / "broken")
    manifest = json.loads((tmp_path / "broken" / "layerpeft.json").read_text(encoding="utf-8"))
    (tmp_path / "broken" / "layerpeft.json").write_text(json.dumps(manifest | {"method": "x"}), encoding="utf-8")
    with pytest.raises(SaveError, match="altered"):
        score_layers(base(), "change", of=str(tmp_path / "broken"))

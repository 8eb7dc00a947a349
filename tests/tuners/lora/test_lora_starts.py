"""Initialisations of LoRA together with a choice of layers; rows of docs/lora-options.md, too."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import layerpeft
from layerpeft import LayerLoraConfig
from tests.helpers.lora_options import OPTIONS, besides, build, logits, moved, reloads, row, wrap
from tests.helpers.models import batch, loss_of

STARTS = ["gaussian", "orthogonal", "mica", "pissa", "olora", True, False]


@pytest.mark.spread(2)
@row(*(f"init_lora_weights={s!r}".replace("'", '"') for s in STARTS))
@pytest.mark.parametrize("start", STARTS)
def test_starts(start, tmp_path):
    untouched = dict(build().named_parameters())
    model = wrap(init_lora_weights=start)
    assert torch.allclose(logits(model), logits(build()), atol=1e-5, rtol=0) is (start is not False)
    changed = {
        n.replace("base_model.model.", "").replace(".base_layer", "")
        for n, p in model.named_parameters()
        if "lora_" not in n
        and not torch.equal(p, untouched[n.replace("base_model.model.", "").replace(".base_layer", "")])
    }
    assert bool(changed) is (start in ("pissa", "olora"))
    assert all(n.startswith("model.layers.2.") for n in changed)
    tensors = moved(model)
    assert not besides(tensors) and any("lora_A" in n for n in tensors)
    assert any("lora_B" in n for n in tensors) is (start != "mica")  # MiCA never trains B
    assert reloads(model, tmp_path)


def collect(model: nn.Module, rows: int, backward: bool = False) -> Callable[[], None]:
    def run() -> None:
        for seed in range(8):
            loss = loss_of("qwen2", model, rows=rows, length=32, seed=seed)
            if backward:
                loss.backward()

    return run


def start_from_data(start: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Does what PEFT asks for before such an initialisation; gives the options of the config."""
    options = OPTIONS.get(f'init_lora_weights="{start}"', {})
    config = LayerLoraConfig(select="last:1", r=4, target_modules="all-linear", **options)
    if start == "corda":
        # PEFT imports attrs here without depending on it
        monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config.resolve(model), run_model=collect(model, rows=1))
    elif start == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model, config.resolve(model), collect(model, rows=2, backward=True))
    return options


@row('init_lora_weights="pissa_niter_4"', 'init_lora_weights="corda"', 'init_lora_weights="lora_ga"')
@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga"])
def test_starts_that_cannot_be_repeated(start, tmp_path, monkeypatch, capsys):
    base = build()
    options = start_from_data(start, base, monkeypatch)
    touched = {n for n, m in base.named_modules() if hasattr(m, "eigens") or hasattr(m, "_peft_loraga_grad")}
    assert all(n.startswith("model.layers.2.") for n in touched) and bool(touched) is (start != "pissa_niter_4")
    monkeypatch.setenv("LAYERPEFT_QUIET", "0")
    model = wrap("last:1", base, **options)
    assert "path_initial_model_for_weight_conversion" in capsys.readouterr().err
    assert torch.allclose(logits(model), logits(build()), atol=1e-5, rtol=0)
    model.save_pretrained(str(tmp_path / "start"))
    assert not besides(moved(model))
    model.save_pretrained(str(tmp_path / "done"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    for loaded in (
        peft.PeftModel.from_pretrained(build(), str(tmp_path / "done")),
        layerpeft.load(tmp_path / "done", build()),
    ):
        assert loaded.peft_config["default"].r == 8
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


@row('init_lora_weights="eva"')
def test_eva_shares_its_ranks_among_the_chosen_layers(tmp_path):
    model = wrap("last:2", **OPTIONS['init_lora_weights="eva"'])
    loader = [batch("qwen2", build(), rows=4, length=16, seed=seed) for seed in range(40)]
    peft.initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    layers = {n: m.r["default"] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert {n.split(".")[4] for n in layers} == {"1", "2"}
    assert len(set(layers.values())) > 1 and sum(layers.values()) == 4 * 14
    assert all(n.startswith(("model.layers.1.", "model.layers.2.")) for n in moved(model)) and reloads(model, tmp_path)


@row('init_lora_weights="loftq"')
def test_loftq_quantizes_the_chosen_layers_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(LoraLayer, "loftq_init", lambda self, adapter, *_: seen.append(self.get_base_layer()))
    model = wrap(**OPTIONS['init_lora_weights="loftq"'])
    names = {n.removeprefix("model.") for n, m in model.base_model.named_modules() if any(m is s for s in seen)}
    assert len(seen) == 7 and all(n.startswith("model.layers.2.") for n in names)
    assert model.peft_config["default"].loftq_config == {"loftq_bits": 4, "loftq_iter": 1}

"""What every LoRA option means together with a choice of layers: one test or more for each row of docs/lora-options.md."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import layerpeft
from layerpeft import LayerLoraConfig, check_trained, layer_report, score_layers
from layerpeft.errors import ConfigError, SelectionError
from tests.helpers.lora_options import (
    DOCS,
    EXPERTS,
    OPTIONS,
    PENDING,
    TESTED,
    besides,
    build,
    logits,
    moved,
    reloads,
    row,
    table,
    wrap,
)
from tests.helpers.models import batch
from tests.helpers.repeating import some
from tests.tuners.lora import test_lora_starts

# ---- the table itself ------------------------------------------------------------------------------------------------


def test_every_row_is_tested_and_every_option_has_a_row():
    rows = table()
    assert test_lora_starts.STARTS and rows.keys() == OPTIONS.keys() == TESTED
    named = set(re.findall(r"`(\w+)", DOCS.read_text(encoding="utf-8")))
    fields = {f.name for f in dataclasses.fields(LayerLoraConfig)}
    assert fields <= named


@pytest.mark.spread(3)
@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_while_the_choice_waits(option):
    options, (choice, waiting) = OPTIONS[option], table()[option]
    name = "mixtral" if option == "target_parameters" else "qwen2"
    if waiting.startswith("error"):
        with pytest.raises(ConfigError, match="select" if choice.startswith("error") else "pass batches=") as error:
            wrap(PENDING, build(name), **options)
        assert re.split(r"\W", option)[0] in str(error.value)
        return
    assert waiting == "the same"
    model = wrap(PENDING, **options)
    untrained = logits(build())
    torch.testing.assert_close(logits(model), untrained, atol=1e-6, rtol=0)
    changed = moved(model)
    assert len({n.split(".")[2] for n in changed if ".lora_" in n}) == 1
    rows = layer_report(model).rows
    assert [r.steps for r in rows if r.chosen] == [2]


WAIT = sorted(o for o in OPTIONS if not table()[o][1].startswith("error"))


@pytest.mark.spread(2)
@pytest.mark.parametrize("option", some(WAIT, WAIT[::3]))
def test_a_waiting_choice_ends_like_one_with_batches(option):
    early = wrap(PENDING, **OPTIONS[option], batches=[batch("qwen2", build())])
    late = wrap(PENDING, **OPTIONS[option])
    moved(late, steps=1)
    kept = [{n for n, _ in m.named_parameters() if ".lora_" in n} for m in (early, late)]
    assert kept[0] == kept[1]


# ---- row by row ------------------------------------------------------------------------------------------------------


@row("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")
def test_ranks_and_patterns(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 8, r"layers\.0\..*": 3}, "alpha_pattern": {"v_proj": 3}}
    model = wrap(r=2, lora_alpha=6, lora_dropout=0.25, **patterns)
    layers = {n.rpartition(".")[2]: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 7
    assert {
        n: (m.r["default"], m.scaling["default"]) for n, m in layers.items() if n in ("q_proj", "v_proj", "o_proj")
    } == {
        "q_proj": (8, 6 / 8),
        "v_proj": (2, 1.5),
        "o_proj": (2, 3.0),
    }
    assert layers["q_proj"].lora_dropout["default"].p == 0.25
    assert not besides(moved(model)) and reloads(model, tmp_path)
    wrong = {"rank_pattern": {"q_porj": 8}, "alpha_pattern": {r"layers\\.0": 3}}
    with pytest.raises(ConfigError, match=r"rank_pattern: 'q_porj' matches no(.|\n)*alpha_pattern: .* matches no"):
        wrap(**wrong)


@row("target_modules")
@pytest.mark.parametrize(
    ("given", "ends"),
    [
        (["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
        (["model.layers.2.self_attn.k_proj", "q_proj"], {"k_proj", "q_proj"}),
        (r".*\.self_attn\.(q|o)_proj", {"q_proj", "o_proj"}),
        (None, {"q_proj", "v_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_target_modules(given, ends):
    model = wrap(target_modules=given)
    assert {n.split(".")[6] for n, _ in model.named_parameters() if "lora_A" in n} == ends
    assert not besides(moved(model))


@row("target_modules")
def test_target_modules_outside_the_layers_are_an_error():
    for given, match in ((["q_proj", "lm_head"], "'lm_head'"), (["q_porj"], "Did you mean 'q_proj'"), ("q_", "regex")):
        with pytest.raises(SelectionError, match=match):
            wrap(target_modules=given)


@row("exclude_modules")
def test_exclude_modules():
    for given in (["up_proj", "lm_head"], r".*up_proj", ["model.layers.2.mlp.up_proj"]):
        model = wrap(exclude_modules=given)
        wrapped = {n.split(".")[6] for n, _ in model.named_parameters() if "lora_A" in n}
        assert len(wrapped) == 6 and "up_proj" not in wrapped
    assert sum("lora_A" in n for n, _ in wrap(exclude_modules=["lm_head"]).named_parameters()) == 7
    for typo in (["up_porj"], ["mlp"], r".*lm_heads"):
        with pytest.raises(SelectionError, match="exclude_modules"):
            wrap(exclude_modules=typo)


@row("exclude_modules")
def test_what_is_excluded_is_not_scored():
    batches = [batch("qwen2", build())]
    select = {"by": "gradient_norm", "keep": 1, "exact": True}
    config = LayerLoraConfig(select=select, target_modules="all-linear", exclude_modules=["down_proj", "lm_head"])
    model = layerpeft.get_peft_model(build(), config, batches=batches)
    alone = score_layers(
        build(), batches=batches, exact=True, target_modules="all-linear", exclude_modules=["down_proj"], progress=False
    )
    assert model.peft_config["default"]._layerpeft.selection.scores.values == alone.values
    assert not any("down_proj" in name for name in alone.targets)


@row("target_parameters")
def test_target_parameters(tmp_path):
    stock = peft.get_peft_model(build("mixtral"), peft.LoraConfig(target_parameters=list(EXPERTS)))
    theirs = {n for n, _ in stock.named_parameters() if "lora_" in n and "layers.2." in n}
    for modules in (None, []):
        alone = wrap("last:1", build("mixtral"), target_modules=modules, target_parameters=EXPERTS)
        assert {n for n, _ in alone.named_parameters() if "lora_" in n} == theirs
    changed = moved(alone, "mixtral")
    assert len(changed) == 4 and all("layers.2.mlp.experts" in n for n in changed)
    assert reloads(alone, tmp_path / "alone", "mixtral")
    both = wrap("last:1", build("mixtral"), target_modules=["q_proj"], target_parameters=EXPERTS)
    assert len(moved(both, "mixtral")) == 6 and reloads(both, tmp_path / "both", "mixtral")
    router = wrap("last:1", build("mixtral"), target_modules=[], target_parameters=["gate.weight"])
    assert len(moved(router, "mixtral")) == 2 and reloads(router, tmp_path / "router", "mixtral")
    with pytest.raises(SelectionError, match="experts.gate_up_proj"):
        wrap("last:1", build("mixtral"), target_modules=[], target_parameters=["experts.up_proj"])


@pytest.mark.matrix
@row('bias="none"', 'bias="lora_only"', 'bias="all"')
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_bias(bias, name, tmp_path):
    model = wrap("last:1", build(name), bias=bias)
    last = f"{'gpt_neox' if name == 'gpt_neox' else 'model'}.layers.2."
    names = {n.removeprefix("base_model.model.") for n, _ in model.named_parameters()}
    biases = {n for n in names if n.endswith(".bias") and n.startswith(last)}
    wanted = {"none": set(), "all": biases, "lora_only": {n for n in biases if ".base_layer." in n}}[bias]
    assert {n for n in moved(model, name) if ".lora_" not in n} == wanted
    assert reloads(model, tmp_path, name) and (bias == "none" or wanted)


@row('bias="all"')
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_all_biases_and_a_head(task):
    model = wrap("last:1", build("bert"), bias="all", modules_to_save=["classifier"], task_type=task)
    heads = {n for n in moved(model, "bert") if "classifier" in n}
    assert heads == {f"classifier.modules_to_save.default.{n}" for n in ("weight", "bias")}


@row("use_dora", "use_rslora", "lora_bias")
@pytest.mark.parametrize("option", ["use_dora", "use_rslora", "lora_bias"])
def test_variants(option, tmp_path):
    model = wrap(r=4, lora_alpha=8, **{option: True})
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    assert layer.scaling["default"] == (4.0 if option == "use_rslora" else 2.0)
    changed = moved(model)
    assert not besides(changed) and reloads(model, tmp_path)
    assert any("magnitude" in n for n in changed) is (option == "use_dora")
    assert any(n.endswith("lora_B.default.bias") for n in changed) is (option == "lora_bias")


@pytest.mark.spread(2)
@row("kasa_config", "velora_config", "monteclora_config", "use_bdlora")
@pytest.mark.parametrize("option", ["kasa_config", "velora_config", "monteclora_config", "use_bdlora"])
def test_variants_with_a_config(option, tmp_path):
    model = wrap(**OPTIONS[option])
    others = {n: p for n, p in model.named_parameters() if ".layers.2." not in n}
    theirs = dict(build().named_parameters())
    assert all(torch.equal(p, theirs[n.removeprefix("base_model.model.")]) for n, p in others.items())
    assert all(n.startswith("model.layers.2.") for n in moved(model)) and reloads(model, tmp_path)


@row("modules_to_save")
def test_modules_to_save(tmp_path):
    for names, besides_it in (
        (["lm_head"], {"lm_head.modules_to_save.default.weight"}),
        (["input_layernorm"], {f"model.layers.{i}.input_layernorm.modules_to_save.default.weight" for i in range(3)}),
    ):
        model = wrap(modules_to_save=names)
        assert besides(moved(model)) == besides_it
        assert reloads(model, tmp_path / names[0])


@row("modules_to_save")
@pytest.mark.parametrize("select", ["last:1", PENDING])
def test_modules_to_save_that_hold_targets_are_an_error(select):
    with pytest.raises(ConfigError, match="modules_to_save: 'mlp' holds .*exclude_modules"):
        wrap(select, modules_to_save=["mlp", "lm_head"])
    assert wrap(modules_to_save=["mlp"], target_modules=["q_proj"]) is not None


@row("trainable_token_indices")
@pytest.mark.parametrize("given", [[3, 5], {"embed_tokens": [3, 5]}])
def test_trainable_token_indices(given, tmp_path):
    model = wrap(trainable_token_indices=given)
    changed = besides(moved(model))
    assert len(changed) == 1 and changed.pop().startswith("model.embed_tokens.token_adapter.trainable_tokens_delta")
    assert reloads(model, tmp_path)


@row("ensure_weight_tying")
def test_ensure_weight_tying(tmp_path):
    def tied() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**build("llama").config.to_dict(), "tie_word_embeddings": True}))

    model = wrap("last:1", tied(), **OPTIONS["ensure_weight_tying"])
    inner = model.get_base_model()
    assert besides(moved(model)) == {"model.embed_tokens.modules_to_save.default.weight"}
    copies = [m.modules_to_save["default"].weight for m in (inner.model.embed_tokens, inner.lm_head)]
    assert copies[0] is copies[1]
    assert reloads(model, tmp_path, base=tied())


@row("alora_invocation_tokens")
def test_alora():
    model = wrap(**OPTIONS["alora_invocation_tokens"])
    ids = torch.tensor([[7, 8, 9, 20, 10, 11]])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_trained(model)
    change = (model.eval()(input_ids=ids).logits - build().eval()(input_ids=ids).logits).abs().amax(-1)[0]
    assert not change[:3].any() and change[3:].all()
    assert {n.split(".")[4] for n, _ in model.named_parameters() if "lora_A" in n} == {"2"}


@row("layers_to_transform", "layers_pattern", "layer_replication")
@pytest.mark.parametrize("option", ["layers_to_transform", "layers_pattern", "layer_replication"])
def test_pefts_own_ways_to_choose(option):
    with pytest.raises(ConfigError, match=f"{option}=.*select"):
        LayerLoraConfig(select="last:1", **OPTIONS[option])
    plain = LayerLoraConfig(**{"target_modules": ["q_proj"], **OPTIONS[option]})
    wrapped = layerpeft.get_peft_model(build(), plain)
    layers = {n.split(".")[4] for n, _ in wrapped.named_parameters() if "lora_A" in n}
    assert layers == ({"0", "1", "2", "3"} if option == "layer_replication" else {"1"})


@row("train_new")
def test_train_new(tmp_path):
    build("llama").save_pretrained(str(tmp_path / "base"))

    def classifier() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    one = {"input_ids": torch.tensor([[7, 8, 9], [5, 6, 7]]), "labels": torch.tensor([0, 2])}
    for train_new, select, new in ((True, "last:1", True), (False, "last:1", False), (True, "all", False)):
        model = wrap(select, classifier(), target_modules=["q_proj"], train_new=train_new)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(**one).loss.backward()
        optimizer.step()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        heads = {n for n in changed if "lora_" not in n}
        assert heads == ({"base_model.model.score.modules_to_save.default.weight"} if new else set())
        model.save_pretrained(str(tmp_path / f"{train_new}-{select}"))
        loaded = peft.PeftModel.from_pretrained(classifier(), str(tmp_path / f"{train_new}-{select}"))
        torch.testing.assert_close(loaded.eval()(**one).logits, model.eval()(**one).logits, atol=1e-5, rtol=0)

"""Every architecture from a tiny config: choose its last layer, wrap, train, save, load in plain PEFT, merge; and score it."""

from __future__ import annotations

from functools import cache
from typing import Any

import peft
import pytest
import torch
from torch import nn

from layerpeft import LayerLoraConfig, check_trained, get_peft_model, layer_map, layer_report, score_layers
from layerpeft.errors import ConfigError, LayerMapError, ScoreError
from layerpeft.model.layers import LayerMap, find_module
from layerpeft.model.targets import match_targets
from tests.helpers.models import FAMILIES, MODELS, NanoMLP, batch, loss_of
from tests.helpers.repeating import some

MAPPED = sorted(set(MODELS) - {"albert"})
OTHER_STACKS = [("t5", "encoder"), ("bart", "encoder"), ("whisper", "encoder"), ("gemma3_vlm", "vision")]
CASES = [(name, None) for name in MAPPED] + OTHER_STACKS
FEW = [case for case in CASES if case[0] in FAMILIES]
HEADS = {"bert", "roberta", "distilbert", "deberta_v2", "modernbert"}  # PEFT trains the head of a SEQ_CLS task
MOE = ("mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "qwen3_next", "jamba")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
PREFIX = "base_model.model."
# weights that the model reads without calling the module: PEFT refuses Mamba's out_proj, and no LoRA can act on dt_proj
MODULES = {"mamba": ["in_proj", "x_proj"], "jamba": r".*(q|k|v|o|in|x|gate|up|down)_proj"}
# Zamba2 ties the weights of a transformer block that several of its layers use, each through modules of its own
EXCLUDED = {
    "zamba2": r".*\.shared_transformer\..*",
    # PEFT takes these names for the experts of all layers
    "qwen3_next": ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"],
}


def targets_of(name: str) -> dict[str, Any]:
    return {"target_modules": MODULES.get(name, "all-linear"), "exclude_modules": EXCLUDED.get(name)}


def build(name: str) -> nn.Module:
    model = MODELS[name]()
    if name == "gemma3_vlm":  # its projector starts at zero, so that no gradient reaches the vision tower
        projector = model.get_parameter("model.multi_modal_projector.mm_input_projection_weight")
        nn.init.normal_(projector, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def outcome(name: str, model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out = model(**batch(name, model))
    return out.last_hidden_state if name == "llama_bare" else out.logits


def train(name: str, model: nn.Module, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss_of(name, model).backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved_since(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {n.removeprefix(PREFIX) for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.spread(3)
@pytest.mark.parametrize(("name", "stack"), some(CASES, FEW))
def test_choose_train_save_load_merge(name, stack, tmp_path):
    model = build(name)
    found = layer_map(model, stack)
    untrained = outcome(name, model)
    last = found.layers[-1]
    chosen = [t.name for t in match_targets(found, **targets_of(name)) if t.layer == last.index]
    select = {"layers": "last:1", "stack": stack}
    options: dict[str, Any] = {"task_type": "SEQ_CLS"} if name in HEADS else {}
    wrapped = get_peft_model(model, LayerLoraConfig(select=select, r=2, lora_alpha=8, **targets_of(name), **options))
    torch.testing.assert_close(outcome(name, wrapped), untrained, atol=1e-6, rtol=0)

    before = snapshot(wrapped)
    train(name, wrapped)
    check_trained(wrapped)
    moved = moved_since(wrapped, before)
    heads = {n for n in moved if ".modules_to_save." in n}
    assert all(n.startswith(f"{last.name}.") and ".lora_" in n for n in moved - heads)
    assert bool(heads) is (name in HEADS)
    assert {n.partition(".lora_")[0] for n in moved - heads} == set(chosen)
    rows = layer_report(wrapped).rows
    assert [r.layer for r in rows if r.chosen] == [last.index] and rows[-1].steps == 2 and rows[-1].change
    trained = outcome(name, wrapped)
    assert not torch.allclose(trained, untrained, atol=1e-5)

    wrapped.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(build(name), str(tmp_path))
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(outcome(name, loaded), trained, atol=1e-5, rtol=0)
    merged = loaded.merge_and_unload()
    assert not any("lora_" in n for n, _ in merged.named_modules())
    torch.testing.assert_close(outcome(name, merged), trained, atol=1e-4, rtol=0)


@cache
def mapped(name: str, stack: str | None = None) -> tuple[nn.Module, LayerMap]:
    model = build(name).eval()
    return model, layer_map(model, stack)


def true_norms(model: nn.Module, found: LayerMap, names: list[str], batches: list[dict[str, Any]]) -> list[float]:
    """`sqrt(mean over batches of Σ‖G_b‖²)` by layer, from a plain backward pass that makes every gradient."""
    owner = {t.name: t.layer for t in found.targets}
    weights = []
    for name in names:
        module, leaf = find_module(model, name), name.rpartition(".")[2]
        weights.append(getattr(module, leaf) if "experts" in name else module.weight)
    squares = [0.0] * len(found)
    for one in batches:
        gradients = torch.autograd.grad(model(**one).loss, weights)
        for name, gradient in zip(names, gradients, strict=True):
            squares[owner[name]] += float(gradient.double().square().sum()) / len(batches)
    return [s**0.5 for s in squares]


@pytest.mark.spread(3)
@pytest.mark.parametrize(("name", "stack"), [case for case in some(CASES, FEW) if case != ("llama_bare", None)])
def test_gradient_norms(name, stack):
    model, found = mapped(name, stack)
    batches = [batch(name, model, length=16, seed=seed) for seed in range(3)]
    options: dict[str, Any] = {"batches": batches, "stack": stack, "progress": False, **targets_of(name)}
    names = [t.name for t in match_targets(found, **targets_of(name))]
    flags = [p.requires_grad for p in model.parameters()]
    truth = true_norms(model, found, names, batches)
    exact = score_layers(model, "gradient_norm", exact=True, **options)
    probe = score_layers(model, "gradient_norm", **options)
    assert len(truth) == len(found) and min(truth) > 0
    assert exact.values == pytest.approx(truth, rel=1e-5)
    assert probe.values == pytest.approx(truth, rel=0.2)
    assert set(probe.targets) == set(names)
    assert all(p.grad is None for p in model.parameters()) and flags == [p.requires_grad for p in model.parameters()]


def test_a_model_without_a_loss_cannot_be_scored():
    model, _ = mapped("llama_bare")
    with pytest.raises(ScoreError, match="no loss"):
        score_layers(model, "gradient_norm", batches=[batch("llama_bare", model)], progress=False)


@pytest.mark.spread(2)
@pytest.mark.matrix
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MOE)
def test_gradient_norms_of_experts(name, how):
    model, found = mapped(name)
    model.set_experts_implementation(how)  # type: ignore[operator]
    batches = [batch(name, model, length=16, seed=seed) for seed in range(2)]
    options: dict[str, Any] = {"batches": batches, "target_modules": [], "target_parameters": EXPERTS}
    names = [t.name for t in found.targets if t.kind == "experts"]
    truth = true_norms(model, found, names, batches)
    exact = score_layers(model, "gradient_norm", exact=True, progress=False, **options)
    probe = score_layers(model, "gradient_norm", progress=False, **options)
    assert exact.values == pytest.approx(truth, rel=1e-5) and max(truth) > 0
    assert probe.values == pytest.approx(truth, rel=0.2)
    assert set(exact.targets) == set(names)


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", MOE)
def test_lora_on_experts(name, tmp_path):
    model = build(name)
    layer = {"jamba": 1}.get(name, 2)  # Jamba has experts in every second layer only
    config = LayerLoraConfig(select=layer, r=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    if name == "qwen3_next":  # its last layer alone has full attention
        config = LayerLoraConfig(select=layer, r=2, target_modules=[], target_parameters=EXPERTS)
    wrapped = get_peft_model(model, config)
    before = snapshot(wrapped)
    train(name, wrapped)
    check_trained(wrapped)
    moved = moved_since(wrapped, before)
    assert moved and all(n.startswith(f"{layer_map(model).layers[layer].name}.") for n in moved)
    assert len({n for n in moved if "experts" in n}) == 4  # A and B of both parameters
    trained = outcome(name, wrapped)
    wrapped.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(build(name), str(tmp_path))
    torch.testing.assert_close(outcome(name, loaded), trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(outcome(name, loaded.merge_and_unload()), trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_chosen_by_their_gradients(name):
    model, found = mapped(name)
    batches = [batch(name, model, seed=seed) for seed in range(2)]
    config = LayerLoraConfig(
        select={"by": "gradient_norm", "keep": 1}, r=2, target_modules=[], target_parameters=EXPERTS
    )
    stock = config.resolve(model, batches, progress=False)
    scores = score_layers(
        model, "gradient_norm", batches=batches, target_modules=[], target_parameters=EXPERTS, progress=False
    )
    best = found.layers[scores.ranked()[0]].name
    assert sorted(stock.target_parameters or []) == [
        f"{best}.mlp.experts.down_proj",
        f"{best}.mlp.experts.gate_up_proj",
    ]


class Plain(nn.Module):
    """No repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_shared_layers_are_plain_lora_or_an_error(tmp_path):
    model = MODELS["albert"]()
    wrapped = get_peft_model(model, LayerLoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    train("albert", wrapped)
    trained = outcome("albert", wrapped)
    wrapped.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(MODELS["albert"](), str(tmp_path))
    torch.testing.assert_close(outcome("albert", loaded), trained, atol=1e-5, rtol=0)
    for select in ("last:1", {"by": "gradient_norm", "keep": 1}, {"by": "random", "keep": 1}):
        with pytest.raises(LayerMapError, match='share one set of weights.*select="all"'):
            get_peft_model(MODELS["albert"](), LayerLoraConfig(select=select, target_modules=["query"]))


@pytest.mark.parametrize("build", [Plain, NanoMLP, lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))])
def test_models_without_blocks_are_plain_lora_or_an_error(build):
    wrapped = get_peft_model(build(), LayerLoraConfig(target_modules="all-linear"))
    assert sum("lora_A" in n for n, _ in wrapped.named_parameters()) == 2
    for select in ("last:1", 0, {"by": "gradient_norm", "keep": 0.5}):
        with pytest.raises(LayerMapError, match='no repeated blocks.*select="all".*Linear'):
            get_peft_model(build(), LayerLoraConfig(select=select, target_modules="all-linear"))


def test_weights_that_are_read_without_a_call_are_named():
    with pytest.raises(ValueError, match="out_proj"):
        get_peft_model(MODELS["mamba"](), LayerLoraConfig(select="last:1", target_modules=["out_proj"]))
    model = MODELS["jamba"]()
    with pytest.raises(ScoreError, match="dt_proj.*without calling"):
        score_layers(model, batches=[batch("jamba", model)], target_modules="all-linear", progress=False)


def test_names_that_peft_takes_for_experts_are_refused():
    model = MODELS["qwen3_next"]()
    kept = {n: type(m) for n, m in model.named_modules()}
    for select in ("last:1", {"by": "gradient_norm", "keep": 1}):
        with pytest.raises(ConfigError, match="experts of every layer.*exclude_modules=.*'shared_expert.down_proj'"):
            get_peft_model(model, LayerLoraConfig(select=select, target_modules="all-linear"))
    assert {n: type(m) for n, m in model.named_modules()} == kept


def test_a_name_that_ends_like_a_chosen_one_is_left_alone(tmp_path):
    def build() -> nn.Module:
        model, tower = nn.Module(), nn.Module()
        for holder in (model, tower):
            holder.layers = nn.ModuleList(NanoMLP() for _ in range(2))
        model.tower = tower
        return model

    wrapped = get_peft_model(
        build(), LayerLoraConfig(select={"layers": "last:1", "stack": "layers"}, target_modules="all-linear")
    )
    wrapped.save_pretrained(str(tmp_path))
    for model in (wrapped, peft.PeftModel.from_pretrained(build(), str(tmp_path))):
        names = {n for n, _ in model.named_parameters() if "lora_A" in n}
        assert names == {f"{PREFIX}layers.1.{n}.lora_A.default.weight" for n in ("c_fc", "c_proj")}

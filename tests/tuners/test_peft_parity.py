"""`select="all"` is LoRA to the bit, and a model with chosen layers does all that PEFT's users do with one."""

from __future__ import annotations

import copy
import gc
import json
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, LoraModel, PeftType
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import layerpeft
from layerpeft import LayerLoraConfig, check_trained, layer_report
from tests.helpers.models import MODELS, batch, loss_of
from tests.helpers.repeating import repeated

CHOICES: dict[str, Any] = {"place": "last:1", "data": {"by": "gradient_norm", "keep": 1, "num_batches": 1}}


class Chain(nn.Module):
    """Layers one after the other, by name, in the manner of PEFT's own custom-model tests."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            inner = getattr(layer, "base_layer", layer)
            x = layer(x, x, x)[0] if isinstance(inner, nn.MultiheadAttention) else layer(x)
        return x


def mlp() -> nn.Module:
    return Chain(lin0=nn.Linear(10, 20), relu=nn.ReLU(), drop=nn.Dropout(0.5), lin1=nn.Linear(20, 4))


def embedding() -> nn.Module:
    return Chain(
        emb=nn.Embedding(100, 5), conv1d=Conv1D(6, 5), relu=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(60, 4)
    )


def conv1d() -> nn.Module:
    return Chain(conv=nn.Conv1d(2, 4, 3), relu=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(32, 4))


def conv2d() -> nn.Module:
    return Chain(conv=nn.Conv2d(2, 8, 3), relu=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(8 * 9, 4))


def attention() -> nn.Module:
    return Chain(mha=nn.MultiheadAttention(8, 2), relu=nn.ReLU(), lin0=nn.Linear(8, 4))


INPUTS = {
    mlp: lambda: torch.randn(6, 10),
    embedding: lambda: torch.arange(60).view(6, 10),
    conv1d: lambda: torch.randn(6, 2, 10),
    conv2d: lambda: torch.randn(6, 2, 5, 5),
    attention: lambda: torch.randn(6, 3, 8),
}
CUSTOM: list[tuple[Any, dict[str, Any]]] = [
    (mlp, {"target_modules": ["lin0"]}),
    (mlp, {"target_modules": "all-linear", "lora_dropout": 0.1, "r": 4}),
    (mlp, {"target_modules": r"lin\d", "use_dora": True}),
    (mlp, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (mlp, {"target_modules": ["lin0", "lin1"], "bias": "all", "rank_pattern": {"lin1": 2}, "use_rslora": True}),
    (mlp, {"target_modules": "all-linear", "exclude_modules": ["lin1"], "init_lora_weights": "pissa", "r": 3}),
    (mlp, {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    (embedding, {"target_modules": ["emb"]}),
    (embedding, {"target_modules": ["emb", "conv1d", "lin0"], "init_lora_weights": False}),
    (embedding, {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 7]}}),
    (conv1d, {"target_modules": ["conv"]}),
    (conv2d, {"target_modules": ["conv"], "use_dora": True}),
    (conv2d, {"target_modules": ["conv", "lin0"], "lora_alpha": 32}),
    (attention, {"target_modules": ["mha"]}),
    (attention, {"target_modules": ["mha", "lin0"], "init_lora_weights": False}),
]


def fit(model: nn.Module, x: torch.Tensor, steps: int = 2) -> None:
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def traces(model: nn.Module) -> dict[str, Any]:
    """All that a package could leave on modules: their attributes, and how many hooks of each kind."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks")},
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(("build", "options"), CUSTOM)
def test_all_layers_are_lora_to_the_bit(build, options, tmp_path):
    x = INPUTS[build]()
    models = []
    for kind, wrap in ((LoraConfig, peft.get_peft_model), (LayerLoraConfig, layerpeft.get_peft_model)):
        torch.manual_seed(0)
        models.append(wrap(build(), kind(**copy.deepcopy(options))))
    stock, ours = models
    assert traces(ours) == traces(stock)
    for (name, mine), (theirs_name, theirs) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert name == theirs_name and torch.equal(mine, theirs) and mine.requires_grad is theirs.requires_grad
    for model, name in ((stock, "stock"), (ours, "ours")):
        fit(model, x)
        model.save_pretrained(str(tmp_path / name))
    assert torch.equal(ours(x), stock(x))
    files = [{f.name for f in (tmp_path / name).iterdir()} for name in ("stock", "ours")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("stock", "ours")]
    assert plain(configs[0]) == plain(configs[1]) and configs[1]["peft_type"] == "LORA"
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "ours")]
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    live = ours.peft_config["default"]
    assert isinstance(live, LoraConfig) and live.peft_type is PeftType.LORA and not hasattr(live, "_layerpeft")


def plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, list) else v for k, v in config.items()}


@pytest.mark.parametrize(("build", "options"), CUSTOM)
def test_custom_models_do_what_pefts_own_tests_ask(build, options, tmp_path):
    x = INPUTS[build]()
    torch.manual_seed(0)
    base = build().eval()
    untrained = base(x)
    model = layerpeft.get_peft_model(copy.deepcopy(base), LayerLoraConfig(**copy.deepcopy(options)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, x)
    # PEFT folds attention's update into the base weight and out again at every forward pass, so that its last bits move
    moved = {n for n, p in model.named_parameters() if not torch.allclose(p, before[n], atol=1e-6, rtol=0)}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    trained = model(x)
    assert not torch.allclose(trained, untrained, atol=1e-5)
    if options.get("bias", "none") == "none" and options.get("init_lora_weights") != "pissa":
        with model.disable_adapter():
            torch.testing.assert_close(model(x), untrained, atol=1e-6, rtol=0)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(x), trained, atol=1e-5, rtol=0)
    model.merge_adapter()
    torch.testing.assert_close(model(x), trained, atol=1e-4, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), trained, atol=1e-4, rtol=0)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(x), trained, atol=1e-4, rtol=0)
    assert type(merged) is type(base) and not any("lora" in n for n, _ in merged.named_modules())


# ---- with a choice ---------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    return MODELS["llama"]()


def choose(select: Any = "last:1", model: nn.Module | None = None, seed: int = 0, **options: Any) -> Any:
    """A tiny Llama with LoRA on the chosen layers, its B drawn at random so that the adapter has something to say."""
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": "all-linear", **options}
    wrapped = layerpeft.get_peft_model(model or llama(), LayerLoraConfig(select=select, **options))
    return shake(wrapped)


def shake(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def logits(model: nn.Module, seed: int = 0) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch("llama", model, seed=seed)).logits


def step(model: nn.Module, steps: int = 1) -> torch.optim.Optimizer:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss_of("llama", model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-6) -> bool:
    return torch.allclose(a, b, atol=atol, rtol=0)


def global_hooks() -> list[int]:
    module = nn.modules.module
    return [len(v) for k, v in sorted(vars(module).items()) if k.startswith("_global_") and k.endswith("_hooks")]


def test_the_live_model_is_stock():
    hooks = global_hooks()
    assert len(hooks) > 5
    for select in CHOICES.values():
        model = choose(select, task_type="CAUSAL_LM")
        assert type(model) is peft.PeftModelForCausalLM and type(model.base_model) is LoraModel
        config = model.peft_config["default"]
        assert model.peft_type is PeftType.LORA and config.peft_type is PeftType.LORA and isinstance(config, LoraConfig)
        assert not isinstance(config, LayerLoraConfig) and model.active_adapters == ["default"]
        assert model.get_model_status().peft_types == {"default": "LORA"}
    assert global_hooks() == hooks


def test_disable_merge_unmerge_unload():
    base = logits(llama())
    model = choose()
    adapted = logits(model)
    assert not same(adapted, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    assert same(logits(model), adapted) and any("lora_A" in n for n, _ in model.named_modules())
    model.unmerge_adapter()
    assert same(logits(model), adapted)
    merged = copy.deepcopy(model).merge_and_unload()
    assert same(logits(merged), adapted) and [n for n, _ in merged.named_parameters()] == parameter_names()
    assert torch.equal(logits(choose().unload()), base)


def parameter_names() -> list[str]:
    return [n for n, _ in llama().named_parameters()]


def test_several_adapters(tmp_path):
    first, second = choose("last:1", seed=1), choose("first:1", seed=2)
    alone = logits(first), logits(second)
    second.save_pretrained(str(tmp_path))
    first.load_adapter(str(tmp_path), "other")
    assert torch.equal(logits(first), alone[0])
    first.set_adapter("other")
    assert same(logits(first), alone[1])
    first.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    first.set_adapter("both")
    layers = {n.split(".")[4] for n, _ in first.named_parameters() if ".both." in n}
    assert layers == {"0", "2"} and not same(logits(first), alone[0])
    first.set_adapter("default")
    first.delete_adapter("other")
    assert torch.equal(logits(first), alone[0]) and set(first.peft_config) == {"default", "both"}
    step(first)
    assert layer_report(first).rows[-1].steps == 1


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_weighted_adapters_of_the_same_layers(how, tmp_path):
    model = choose(seed=1)
    one = logits(model)
    choose(seed=2).save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path), "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "mix", combination_type=how)
    model.set_adapter("mix")
    assert same(logits(model), one, atol=1e-5)


def test_hot_swap(tmp_path):
    model, other = choose(seed=1), choose(seed=2)
    wanted = logits(other)
    other.save_pretrained(str(tmp_path))
    assert not same(logits(model), wanted)
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert torch.equal(logits(model), wanted)


@pytest.mark.slow  # tests/training/test_backward.py compiles both
@pytest.mark.parametrize(("choice", "backend"), [("place", "aot_eager"), repeated(("data", "eager"))])
def test_compiled_models_train_alike(choice, backend):
    seen = []
    for compiled in (False, True):
        torch.manual_seed(0)
        config = LayerLoraConfig(select=CHOICES[choice], r=4, target_modules=["q_proj"])
        model = layerpeft.get_peft_model(MODELS["llama"](num_hidden_layers=2), config)
        runner = torch.compile(model, backend=backend) if compiled else model
        step(runner, steps=2)  # type: ignore[arg-type]
        check_trained(model)
        seen.append((logits(model), [r.layer for r in layer_report(model).rows if r.chosen]))
    torch.compiler.reset()
    assert seen[0][1] == seen[1][1] and len(seen[0][1]) == 1
    assert same(seen[0][0], seen[1][0], atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_add_adapter_of_transformers(choice, tmp_path):
    model = llama()
    hooks = global_hooks()
    model.add_adapter(LayerLoraConfig(select=CHOICES[choice], r=4, target_modules=["q_proj"]))  # type: ignore[operator]
    gc.collect()
    assert global_hooks() == hooks
    step(model, steps=2)
    check_trained(model)
    rows = layer_report(model).rows
    trained = {n.split(".")[2] for n, _ in model.named_parameters() if "lora_A" in n}
    assert trained == {str(r.layer) for r in rows if r.chosen} and len(trained) == 1
    after = logits(model)
    model.save_pretrained(str(tmp_path))  # type: ignore[operator]
    assert same(logits(peft.PeftModel.from_pretrained(llama(), str(tmp_path))), after)
    model.disable_adapters()  # type: ignore[operator]
    assert torch.equal(logits(model), logits(llama()))

"""What a recipe says of its model means the same to `plan`, which builds it without weights, and to `train`, which loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layerpeft.errors import RecipeError
from layerpeft.recipe.model import empty_model, loading
from layerpeft.recipe.plan import arguments_of, options_of
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import load_model, prepare
from tests.helpers.short import LAYERS

pytestmark = pytest.mark.usefixtures("shallow")

SFT = """\
trainer: sft
model_name_or_path: layerpeft://llama-6m
dataset_name: rows.jsonl
output_dir: out
layerpeft: {select: last:2, r: 2}
"""
CLASSES = SFT.replace("sft", "classification").replace("rows.jsonl", "classes.jsonl")
INIT = "model_init_kwargs: "
# a recipe's settings: the type of its weights, layers, kind of attention
MEANINGS: dict[str, tuple[torch.dtype, int, str]] = {
    "": (torch.float32, LAYERS, "sdpa"),
    "dtype: bfloat16": (torch.bfloat16, LAYERS, "sdpa"),
    "dtype: auto": (torch.bfloat16, LAYERS, "sdpa"),
    INIT + "{dtype: bfloat16}": (torch.bfloat16, LAYERS, "sdpa"),
    INIT + "{torch_dtype: float16}": (torch.float16, LAYERS, "sdpa"),
    "attn_implementation: eager": (torch.float32, LAYERS, "eager"),
    INIT + "{num_hidden_layers: 3, dtype: bfloat16}": (torch.bfloat16, 3, "sdpa"),
    INIT + "{use_cache: false, device_map: cpu}": (torch.float32, LAYERS, "sdpa"),
    "model_revision: main": (torch.float32, LAYERS, "sdpa"),
}
# what cannot be meant: where, and what is said
WRONG: dict[str, tuple[str, str]] = {
    INIT + "{dtype: bf16}": ("dtype", "unknown dtype 'bf16'. Did you mean 'bfloat16'?"),
    "dtype: float16\n" + INIT + "{dtype: bfloat16}": ("dtype", "'bfloat16' here and 'float16' as dtype above"),
    INIT + "{num_hiden_layers: 3}": ("num_hiden_layers", "Did you mean 'num_hidden_layers'?"),
    INIT + "{load_in_4bit: true}": ("load_in_4bit", "{quantization_config: {load_in_4bit: true}}"),
    INIT + "{quantization_config: {load_in_4bt: true}}": ("quantization_config", "Did you mean 'load_in_4bit'?"),
    INIT + "{quantization_config: {}}": ("quantization_config", "quantizes nothing"),
    INIT + "{quantization_config: {load_in_4bit: true, load_in_8bit: true}}": ("quantization_config", "load_in_8bit"),
    INIT + "{num_labels: 3}": ("num_labels", "classes are those of the rows"),
    INIT + '\'{"dtype": "bfloat16"}\'': ("model_init_kwargs", "expected a mapping"),
    "attn_implementation: sdp": ("attn_implementation", "Did you mean 'sdpa'?"),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "Why?", "completion": " So."}\n' * 4)
    Path("classes.jsonl").write_text('{"text": "yes", "label": "a"}\n{"text": "no", "label": "b"}\n' * 2)
    return tmp_path


def read(text: str) -> Any:
    Path("recipe.yaml").write_text(text)
    return load_recipe("recipe.yaml")


@pytest.mark.parametrize("start", [SFT, CLASSES], ids=["sft", "classes"])
def test_plan_and_train_build_the_same_model(start: str) -> None:
    for lines, (dtype, layers, attention) in MEANINGS.items() if start is SFT else list(MEANINGS.items())[3:4]:
        recipe = read(start + lines + "\n")
        setup = prepare(recipe)
        bare, loaded = empty_model(recipe, *setup.head), load_model(setup)
        assert {n: (p.shape, p.dtype) for n, p in bare.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in loaded.named_parameters()
        }, lines
        assert {p.dtype for p in loaded.parameters()} == {dtype}, lines
        for model in (bare, loaded):
            config: Any = model.config
            assert (config.num_hidden_layers, config._attn_implementation) == (layers, attention), lines
            assert getattr(config, "use_cache", None) is ("use_cache" not in lines)
            assert config.num_labels == len(setup.labels) or start is SFT


def test_plan_and_train_take_the_same_numbers_from_a_recipe() -> None:
    lines = "max_length: 96\ngradient_checkpointing: false\nper_device_train_batch_size: 3\noptim: sgd\nfp16: false\n"
    recipe = read(SFT + lines + INIT + "{quantization_config: {load_in_4bit: true, bnb_4bit_quant_type: nf4}}\n")
    options, arguments = options_of(recipe, arguments_of(recipe), False), arguments_of(recipe)
    assert (options["length"], options["batch_size"], options["optimizer"]) == (96, 3, "sgd")
    assert options["checkpointing"] is arguments.gradient_checkpointing is False
    assert options["step"].quantization is not None
    assert options["step"].quantization.to_dict() == loading(recipe)["quantization_config"].to_dict()


@pytest.mark.parametrize("lines", WRONG)
def test_what_cannot_be_meant(lines: str) -> None:
    with pytest.raises(RecipeError) as error:
        read(SFT + lines + "\n")
    assert [(p.path[-1], WRONG[lines][1] in p.text) for p in error.value.problems] == [(WRONG[lines][0], True)], error

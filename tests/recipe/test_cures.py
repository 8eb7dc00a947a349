"""What is printed in the place of other tools' keys and of values that do not fit: applied as printed, the recipe is sound."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from layerpeft.cli import main
from layerpeft.errors import RecipeError
from layerpeft.recipe.read import load_recipe

pytestmark = pytest.mark.usefixtures("shallow")

BASE: dict[str, Any] = {
    "trainer": "sft",
    "model_name_or_path": "layerpeft://llama-6m",
    "dataset_name": "layerpeft://gsm8k_train.jsonl",
    "columns": {"prompt": "{question}", "completion": "{answer}"},
    "output_dir": "out",
    "layerpeft": {"select": "last:2"},
}
OUT: dict[str, Any] = {}  # the key goes


def full(**more: Any) -> dict[str, Any]:
    return {"layerpeft": {"method": "full", **more}}


def block(**settings: Any) -> dict[str, Any]:
    return {"layerpeft": settings}


def packed(**settings: Any) -> dict[str, Any]:
    return {"model_init_kwargs": {"quantization_config": settings}}


UNIFORM = {"pick": "uniform", "keep": 2, "reselect_steps": 20}
CYCLE = {"pick": "cycle", "keep": 1, "reselect_steps": 50, "state": "clear"}
PATTERN = r"{'.*\.layers\.4\..*q_proj$': 32}"
NO_FLASH = {"attn_implementation": "sdpa"}  # flash_attn is not installed where the tests run

# a line of a recipe: what is to be written in its place
CURES: dict[str, dict[str, Any]] = {
    # LLaMA-Factory
    "finetuning_type: lora": block(method="lora"),
    "finetuning_type: full": full(select="all"),
    "finetuning_type: freeze": full(select="last:2"),
    "finetuning_type: freeze\nfreeze_trainable_layers: -4": full(select="first:4"),
    "freeze_trainable_layers: -4": full(select="first:4"),
    "freeze_trainable_layers: 3": full(select="last:3"),
    "freeze_trainable_layers: 0": full(select="last:2"),
    "freeze_trainable_modules: all": OUT,
    "freeze_trainable_modules: self_attn,mlp": full(target_modules=["self_attn", "mlp"]),
    "freeze_extra_modules: embed_tokens,norm": block(modules_to_save=["embed_tokens", "norm"]),
    "freeze_vision_tower: true": OUT,
    "lora_rank: 16": block(r=16),
    "lora_target: q_proj,v_proj": block(target_modules=["q_proj", "v_proj"]),
    "lora_target: all": block(target_modules="all-linear"),
    "additional_target: embed_tokens,lm_head": block(modules_to_save=["embed_tokens", "lm_head"]),
    "pissa_init: true": block(init_lora_weights="pissa"),
    "pissa_iter: 4": block(init_lora_weights="pissa_niter_4"),
    "use_galore: true": block(method="galore", r=128, update_proj_gap=200, scale=0.25),
    "use_galore: false": OUT,
    "galore_rank: 64": block(method="galore", r=64),
    "galore_update_interval: 50": block(method="galore", update_proj_gap=50),
    "galore_scale: 2.0": block(method="galore", scale=2.0),
    "galore_target: q_proj,k_proj": block(method="galore", target_modules=["q_proj", "k_proj"]),
    "galore_layerwise: true": OUT,
    "use_badam: true": full(select=CYCLE),
    "badam_switch_interval: 9": full(select=CYCLE | {"reselect_steps": 9}),
    "badam_switch_mode: random": full(select=CYCLE | {"order": "permutation"}),
    "badam_mode: layer": OUT,
    "use_apollo: true": OUT,
    "val_size: 0.1": {"eval_dataset": "held_out.jsonl"},
    "val_size: 0": OUT,
    "flash_attn: fa2": NO_FLASH,
    "flash_attn: sdpa": {"attn_implementation": "sdpa"},
    "flash_attn: disabled": {"attn_implementation": "eager"},
    "flash_attn: auto": OUT,
    "quantization_bit: 8": packed(load_in_8bit=True),
    "quantization_type: nf4": packed(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "double_quantization: true": packed(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "template: llama3": OUT,
    "dataset_dir: data": OUT,
    "preprocessing_num_workers: 2": {"dataset_num_proc": 2},
    "plot_loss: true": OUT,
    # axolotl
    "adapter: qlora": block(method="lora", quantize_trained="nf4"),
    "lora_target_linear: true": block(target_modules="all-linear"),
    "lora_target_linear: false": OUT,
    f"lora_rank_pattern: {PATTERN}": block(rank_pattern={r".*\.layers\.4\..*q_proj$": 32}),
    r"lora_alpha_pattern: {'layers\.[34]\..*': 4}": block(alpha_pattern={r"layers\.[34]\..*": 4}),
    "lora_modules_to_save: [embed_tokens]": block(modules_to_save=["embed_tokens"]),
    "peft_layers_to_transform: [3, 4]": block(select=[3, 4]),
    "unfrozen_parameters: [model.layers.3.mlp]": full(select=[3], target_modules=["mlp"]),
    r"unfrozen_parameters: ['^lm_head.weight$', '^model.embed_tokens.weight$[:100]', 'model.layers.[2-4].self_attn']": full(
        select="2-4", target_modules=["self_attn"], modules_to_save=["lm_head", "embed_tokens"]
    ),
    r"unfrozen_parameters: [model.layers.3.mlp, model.layers.4.self_attn]": full(
        select=[3, 4], target_modules=["3.mlp", "4.self_attn"]
    ),
    "unfrozen_parameters: ['model.layers.[34]']": full(select=[3, 4]),
    "load_in_8bit: false": OUT,
    "load_in_4bit: true": packed(load_in_4bit=True),
    "bf16: auto": {"bf16": False},  # there is no accelerator where the tests run
    "fp16: auto": {"fp16": False},
    "flash_attention: true": NO_FLASH,
    "sdp_attention: true": {"attn_implementation": "sdpa"},
    "xformers_attention: true": OUT,
    "val_set_size: 0.05": {"eval_dataset": "held_out.jsonl"},
    "datasets: [{path: held_out.jsonl, type: alpaca}]": {"dataset_name": "held_out.jsonl"},
    "test_datasets: [{path: held_out.jsonl}]": {"eval_dataset": "held_out.jsonl"},
    "saves_per_epoch: 1": {"save_strategy": "epoch"},
    "saves_per_epoch: 4": {"save_strategy": "steps", "save_steps": 0.08333},
    "evals_per_epoch: 0": {"eval_strategy": "no"},
    "train_on_inputs: false": {"completion_only_loss": True},
    "lisa_n_layers: 3": full(select=UNIFORM | {"keep": 3}),
    "lisa_layers_attribute: model.layers": OUT,
    "spectrum_top_fraction: 0.5": full(select={"by": "snr", "keep": 0.5}),
    "spectrum_model_name: a/b": OUT,
    "relora_steps: 10": OUT,
    "early_stopping_patience: 3": OUT,
    "wandb_entity: me": OUT,
    "gradient_checkpointing: unsloth": {"gradient_checkpointing": True},
    "lora_model_dir: old": OUT,
    # unsloth
    "full_finetuning: true": full(select="all"),
    "use_gradient_checkpointing: unsloth": {"gradient_checkpointing": True},
    # TRL's command line, PEFT's config
    "use_peft: true": block(method="lora"),
    "use_peft: false": full(select="all"),
    "lora_target_modules: [q_proj]": block(target_modules=["q_proj"]),
    "use_bnb_nested_quant: true": packed(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "bnb_4bit_quant_type: nf4": packed(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "llm_int8_threshold: 5.0": packed(load_in_8bit=True, llm_int8_threshold=5.0),
    "use_dora: true": block(use_dora=True),
    "r: 4": block(r=4),
    "target_modules: [q_proj]": block(target_modules=["q_proj"]),
    "layers_to_transform: [1]": block(select=[1]),
    "layers_pattern: layers": OUT,
    "peft_type: LORA": OUT,
    "revision: main": {"model_revision": "main"},
    "device_map: cpu": {"model_init_kwargs": {"device_map": "cpu"}},
    "select: first:3": block(select="first:3"),
    # torchtune
    "optimizer: {_component_: torch.optim.AdamW, lr: 2.0e-05}": {"optim": "adamw_torch", "learning_rate": 2e-5},
    "lr_scheduler: {_component_: x.get_cosine_schedule_with_warmup, num_warmup_steps: 5}": {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
    },
    "model: {_component_: x.lora_llama3_8b, lora_attn_modules: [q_proj, output_proj], lora_rank: 8}": block(
        r=8, target_modules=["q_proj", "o_proj"]
    ),
    "enable_activation_checkpointing: true": {"gradient_checkpointing": True},
    "dtype: bf16": {"dtype": "bfloat16"},
    "device: cuda": OUT,
    "metric_logger: {_component_: torchtune.DiskLogger}": OUT,
    # mlx-lm
    "num_layers: 4": block(select="last:4"),
    "num_layers: -1": block(select="all"),
    "lora_parameters: {rank: 8, scale: 2.0, dropout: 0.0}": block(r=8, lora_alpha=16, lora_dropout=0.0),
    "iters: 10": {"max_steps": 10},
    "mask_prompt: true": {"completion_only_loss": True},
    # nothing behind a key
    "lora_r:": OUT,
    "max_seq_length:": OUT,
    "learning_rate:": OUT,
    "wandb_project:": OUT,
    "fsdp_final_state_dict_type:": OUT,
    "warmup_ratio: 3": {"warmup_steps": 3},
}
# inside of the block: what is written there in the place of it
INSIDE: dict[str, dict[str, Any]] = {
    "rank: 8": {"r": 8},
    "targets: all": {"target_modules": "all-linear"},
    "lora_target: 'q_proj,v_proj'": {"target_modules": ["q_proj", "v_proj"]},
    "layers_to_transform: [1]": {"select": [1]},
    "layers_pattern: h": OUT,
    "layers: [2, 3, 4]": {"select": {"layers": [2, 3, 4]}},
    "exclude: 3": {"select": {"layers": "last:2", "exclude": 3}},
    "keep: 1": {"select": {"layers": "last:2", "keep": 1}},
    "r:": OUT,
    "task_type: CAUSAL_LM": OUT,
    "update_proj_gap: 9": OUT,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with held-out rows, in which loading any model is a failure."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"question": "Why?", "answer": "So."}\n' * 2)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(refuse))
    return tmp_path


def told(recipe: dict[str, Any], lines: str = "") -> dict[str, str]:
    """What is said of each key of a recipe."""
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False) + lines)
    try:
        load_recipe("recipe.yaml")
    except RecipeError as error:
        assert all(p.path for p in error.problems), error
        return {p.path[-1]: p.text for p in error.problems}
    return {}


def printed(sentence: str) -> dict[str, Any]:
    """The settings that a sentence says to write, read as YAML."""
    found = re.findall(r"`([a-z0-9_]+: [^`]*)`", re.sub(r"\([^()]*`[^`]*`\)", "", sentence) or sentence)
    assert found or "take it out" in sentence, sentence
    return merged(*(yaml.safe_load(text) for text in found)) if found else OUT


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict) and key != "select"
            out[key] = merged(out[key], value) if both else value
    return out


def clash(one: Any, two: Any) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return any(clash(one[k], two[k]) for k in {*one} & {*two})
    return one != two


def sound_together(cures: list[dict[str, Any]]) -> None:
    """Recipes with these settings pass; those that do not contradict each other stand in one, to be quick."""
    groups: list[tuple[str, dict[str, Any]]] = []
    for given in cures:
        method = given.get("layerpeft", {}).get("method", "lora")
        kind = "packed" if "model_init_kwargs" in given or "quantize_trained" in str(given) else method
        one = merged(given, block(method=method))
        group = next((g for k, g in groups if k == kind and (kind != "packed" or g == one) and not clash(g, one)), None)
        if group is None:
            groups.append((kind, group := {}))
        group.update(merged(group, one))
    for _, group in groups:
        assert told(merged(BASE, group)) == {}, group


def test_the_cures_of_foreign_keys_are_applied_as_printed(place: Path) -> None:
    rounds: list[dict[str, str]] = []  # a key stands once in a recipe
    for text in CURES:
        key = text.partition(":")[0]
        spot = next((r for r in rounds if key not in r and "\n" not in text), None)
        if spot is None:
            rounds.append(spot := {})
        spot[key] = text
    cures = []
    for lines in rounds:
        own = {k: v for k, v in BASE.items() if k not in lines}
        said = told(own, "\n".join(lines.values()) + "\n")
        assert main(["train", "recipe.yaml"]) == 2
        for key, text in lines.items():
            assert printed(said[key]) == CURES[text], (text, said[key])
            cures.append(printed(said[key]))
    sound_together(cures)


@pytest.mark.parametrize("text", INSIDE)
def test_the_cures_inside_of_the_block(text: str, place: Path) -> None:
    key, _, value = text.partition(":")
    said = told(merged(BASE, block(**{key: yaml.safe_load(value)})))
    assert printed(said[key]) == INSIDE[text], said
    assert told(merged(BASE, block(**INSIDE[text]))) == {}

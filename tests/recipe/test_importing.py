"""`layerpeft import`: what another tool's file would train is what its recipe trains; no key of it goes without a word."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import layerpeft
from layerpeft.cli import main
from layerpeft.errors import UsageError
from layerpeft.model.precisions import missing_packages
from layerpeft.recipe.importing.convert import import_file
from layerpeft.recipe.importing.shell import PROGRAM
from layerpeft.recipe.importing.tools import TOOLS
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import Recipe, layer_config, made
from layerpeft.recipe.yaml import parse
from tests.helpers.fulling import trains
from tests.helpers.loops import llama
from tests.helpers.repeating import some

FILES = Path(__file__).parents[1] / "fixtures" / "importing"
DEPTH = 4


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of other tools and their rows."""
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory, llama_path: Path) -> Path:
    """The folder of a small Llama, in which all is but its weights."""
    tokenizer, folder = PreTrainedTokenizerFast.from_pretrained(llama_path), tmp_path_factory.mktemp("models") / "four"
    tokenizer.save_pretrained(folder)
    model(DEPTH, len(tokenizer)).config.save_pretrained(folder)
    return folder


def model(depth: int = DEPTH, words: int = 64) -> Any:
    return llama(num_hidden_layers=depth, vocab_size=words)


def imported(file: str, four: Path, model: str | None = None) -> Recipe:
    """The recipe of a file, without a problem on that model as far as no row is looked at."""
    import_file(file, model=model)
    return load_recipe("recipe.yaml", [f"model_name_or_path={four}"], "plan")


def names(depth: int = DEPTH) -> list[str]:
    return [name for name, _ in model(depth).named_parameters()]


def trained(recipe: Recipe) -> set[str]:
    """The tensors that train with the recipe, by their names in the model; of adapters the modules that have one."""
    wrapped: Any = layerpeft.get_peft_model(model(), layer_config(recipe))
    return {name.partition(".lora_")[0] for name in trains(wrapped)}


def said(text: str) -> str:
    """Comments as one runs on, without the signs of a comment."""
    return " ".join(text.replace("#", " ").split())


KINDS = ("ranks.yaml", "spectrum.yaml", "freeze.yaml", "badam.yaml", "components.yaml", "llama_pro.yaml", "swift.sh")


@pytest.mark.parametrize("file", some(KINDS, 1))
def test_plan_takes_what_import_writes_as_import_says(
    file: str, four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", file, "--model", str(four)]) == 0
    said, text = capsys.readouterr().out, Path("recipe.yaml").read_text()
    needs = "quantization_config" in text and missing_packages(("nf4",))
    assert ("`layerpeft plan` takes it\nLook at it, then\n  layerpeft plan recipe.yaml" in said) == (not needs)
    assert main(["plan", "recipe.yaml"]) == (2 if needs else 0)
    assert "refuses" not in text or needs


def test_what_plan_will_refuse_is_said_when_it_is_written(
    four: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "bitsandbytes" else there(name, *of)
    )
    Path("rows.jsonl").write_text('{"body": "text"}\n' * 4)
    Path("four.yaml").write_text(
        f"base_model: {four}\nadapter: qlora\nload_in_4bit: true\ndatasets: [{{path: rows.jsonl, type: alpaca}}]\n"
    )
    assert main(["import", "four.yaml"]) == 0
    shown, text = capsys.readouterr().out, Path("recipe.yaml").read_text()
    assert main(["plan", "recipe.yaml"]) == 2
    refused = capsys.readouterr().err
    told = [line.removeprefix("  - ") for line in shown.splitlines() if line.startswith("  - ")]
    assert told and all(line in refused and line[-40:] in said(text) for line in told), (told, refused)
    assert "`layerpeft plan` refuses it as things are here:" in shown and "Mend that, then" in shown
    assert "# what `layerpeft plan` refused when this was written:" in text
    assert any("pip install bitsandbytes" in line for line in told) and any("instruction" in line for line in told)
    assert not parse(text).faults
    Path("hub.yaml").write_text(AXOLOTL + "adapter: lora\n")
    assert main(["import", "hub.yaml", "--force", "--model", str(four)]) == 0
    assert (
        "`layerpeft plan` takes it, as far as is known without the rows, which are on the hub"
        in capsys.readouterr().out
    )


# ---- what six kinds of files would train, by the rule of each tool ---------------------------------------------------


def by_patterns(patterns: Iterable[str], depth: int = DEPTH) -> set[str]:
    """axolotl: a parameter trains whose name begins as a pattern says, in which a point is a point but before a plus."""
    found = [re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)) for pattern in patterns]
    return {name for name in names(depth) if any(pattern.match(name) for pattern in found)}


def by_parts(layers: Iterable[int], modules: list[str], extra: list[str]) -> set[str]:
    """LLaMA-Factory: a parameter trains in whose name `.N.module` of a layer stands, or the name of an extra module."""
    parts = [f".{layer}.{module}" for layer in layers for module in modules] + extra
    return {name for name in names() if any(part in name for part in parts)}


def test_picked_parameters_of_axolotl(four: Path) -> None:
    recipe = imported("spectrum.yaml", four)
    patterns = parse(Path("spectrum.yaml").read_text()).data["unfrozen_parameters"]
    assert trained(recipe) == by_patterns(patterns) and len(by_patterns(patterns)) == 7
    assert (recipe.method, recipe.select) == ("full", [0, 1, 3])
    assert (recipe["max_length"], recipe["packing"], recipe["eval_dataset"]) == (256, True, "25%")
    assert recipe["warmup_steps"] == 0.1 and recipe["learning_rate"] == 2e-5 and recipe["save_strategy"] == "epoch"
    text = said(Path("recipe.yaml").read_text())
    assert (
        "deepspeed: deepspeed_configs/zero2.json -- is said at launch: `layerpeft recipes copy accelerate/zero2`"
        in text
    )
    assert "without a value there: wandb_project" in text and "max_length: 256 sequence_len" in text


def test_frozen_layers_and_extra_modules_of_llama_factory(four: Path) -> None:
    recipe = imported("freeze.yaml", four)
    assert trained(recipe) == by_parts(range(2, 4), ["mlp", "self_attn"], ["embed_tokens", "lm_head"])
    assert recipe.values["dataset_name"] == "data/lessons.jsonl" and recipe["dataset_num_proc"] == 2


def test_layers_by_turns_of_badam(four: Path) -> None:
    recipe = imported("badam.yaml", four)
    wrapped: Any = layerpeft.get_peft_model(model(), layer_config(recipe)).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    ids = torch.arange(8)[None]
    at: list[set[str]] = []
    for _ in range(6):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        at.append({name for name, p in wrapped.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    # BAdam: blocks are what the names up to a layer's number tell apart; the last one first, so many steps each
    blocks = list(dict.fromkeys(found[0] for name in names() if (found := re.findall(r".*layers\.\d+\.", name))))
    here = [
        {name.replace("base_model.model.", "").replace("modules_to_save.default.", "") for name in step} for step in at
    ]
    for step, found in enumerate(here):
        assert found == {name for name in names() if name.startswith(blocks[-1 - step // 2])}
    assert recipe["dtype"] == "bfloat16"


def test_ranks_by_pattern_of_axolotl(four: Path) -> None:
    recipe = imported("ranks.yaml", four)
    given = parse(Path("ranks.yaml").read_text()).data  # axolotl hands these on to PEFT
    stock = peft.LoraConfig(
        r=given["lora_r"], lora_alpha=given["lora_alpha"], lora_dropout=given["lora_dropout"], use_rslora=True,
        target_modules=given["lora_target_modules"], layers_to_transform=given["peft_layers_to_transform"],
        rank_pattern=given["lora_rank_pattern"], alpha_pattern=given["lora_alpha_pattern"], task_type="CAUSAL_LM",
    )  # fmt: skip

    def adapters(wrapped: Any) -> dict[str, Any]:
        sizes = {n: tuple(p.shape) for n, p in wrapped.named_parameters() if p.requires_grad}
        return sizes | {n: s for n, m in wrapped.named_modules() if isinstance(s := getattr(m, "scaling", None), dict)}

    ours = adapters(layerpeft.get_peft_model(model(), layer_config(recipe)))
    theirs = adapters(peft.get_peft_model(model(), stock))
    assert ours == theirs and len(ours) == 3 * 3 * 3  # A, B and the scaling of three linears in three layers
    assert recipe["columns"] == {"prompt": "Q: {question}\nA:", "completion": "{answer}"}
    assert "optim: adamw_8bit_of_mine -- is none that is known here; the nearest is" in said(
        Path("recipe.yaml").read_text()
    )


def test_components_of_torchtune(four: Path) -> None:
    recipe = imported("components.yaml", four)
    options = parse(Path("components.yaml").read_text()).data["model"]
    # its builders name the linears of a layer in their own way, and those of checkpoints are these
    known = {"q_proj": "self_attn.q_proj", "v_proj": "self_attn.v_proj", "output_proj": "self_attn.o_proj"}
    inside = [known[name] for name in options["lora_attn_modules"]] + [f"mlp.{n}_proj" for n in ("gate", "down", "up")]
    assert trained(recipe) == {f"model.layers.{layer}.{name}" for layer in range(DEPTH) for name in inside}
    assert (recipe.block["r"], recipe.block["lora_alpha"], recipe.block["lora_dropout"]) == (4, 12, 0.0)
    assert recipe["model_init_kwargs"]["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert (recipe["max_steps"], recipe["max_grad_norm"], recipe["weight_decay"], recipe["use_cpu"]) == (
        10,
        0.0,
        0.01,
        True,
    )
    assert (recipe["optim"], recipe["lr_scheduler_type"], recipe["warmup_steps"]) == ("adamw_torch_fused", "cosine", 7)
    assert recipe["columns"] == {"prompt": "{question}", "completion": "{answer}"} and recipe["packing"] is True


def test_added_layers_of_llama_pro(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "llama_pro.yaml"]) == 2  # how many layers there are is not in the file
    assert "use_llama_pro: which layers were added follows from how many there are" in capsys.readouterr().err
    assert not Path("recipe.yaml").exists()
    recipe = imported("llama_pro.yaml", four, str(four))
    stride = DEPTH // 2  # LLaMA-Factory: the last layer of each of so many groups
    assert trained(recipe) == by_parts(range(stride - 1, DEPTH + stride - 1, stride), [""], [])
    assert (recipe.trainer, recipe["beta"], recipe["loss_weights"]) == ("dpo", 0.2, [1.0, 0.5])


@pytest.mark.parametrize(
    "patterns",
    [
        ["model.layers.1"],  # 10 and 11 begin so, too
        ["model.layers.1."],
        ["model.layers.1.*"],
        ["model.layers.[37].mlp", "lm_head"],
        ["model.layers.[0-9]+.self_attn.(q|k)_proj.weight$", "model.norm.weight"],
        ["^model.layers.4.input_layernorm.weight$", "model.layers.4.mlp.up_proj.weight"],
        ["model.layers.2.mlp.down_proj", "model.layers.9."],
        ["model.layers.5.+_proj"],
        ["model.layers.6.mlp.up_proj$", "model.layers.7.mlp"],  # the first is the name of no parameter
    ],
    ids=lambda patterns: patterns[0],
)
def test_patterns_mean_what_they_mean_there(patterns: list[str]) -> None:
    Path("patterns.yaml").write_text(f"{AXOLOTL}unfrozen_parameters: {patterns}\n")
    import_file("patterns.yaml")
    block = parse(Path("recipe.yaml").read_text()).data["layerpeft"]
    config = made("sft", block.pop("method"), block.pop("select"), block)
    wrapped: Any = layerpeft.get_peft_model(model(12), config)
    assert trains(wrapped) == by_patterns(patterns, 12)


def test_all_weights_and_those_outside_of_the_layers(four: Path) -> None:
    """What no adapter and no choice stand for, and LISA, whose draws are of layers alone."""
    for text, always in (
        ("", names()),
        ("lisa_n_layers: 1\nlisa_step_interval: 3", [n for n in names() if "layers." not in n]),
    ):
        Path("whole.yaml").write_text(f"{AXOLOTL}{text}\n".replace("base_model: a/b", f"base_model: {four}"))
        import_file("whole.yaml", force=True)
        block = parse(Path("recipe.yaml").read_text()).data["layerpeft"]
        wrapped: Any = layerpeft.get_peft_model(model(), made("sft", block.pop("method"), block.pop("select"), block))
        assert trains(wrapped) == set(names())  # of LISA the pool, out of which layers are drawn
        assert set(always) <= trains(wrapped) and ("lm_head" in block["modules_to_save"])


# ---- the other tools, and what the tables hold -----------------------------------------------------------------------


def test_a_command_of_ms_swift(four: Path) -> None:
    import_file("swift.sh")
    recipe = load_recipe("recipe.yaml", [f"model_name_or_path={four}"], "plan")
    assert trained(recipe) == {f"model.layers.{i}.self_attn.{n}_proj" for i in range(DEPTH) for n in "qv"}
    assert (recipe.block["r"], recipe.block["lora_alpha"], recipe.block["lora_dropout"]) == (4, 16, 0.05)
    assert recipe["model_init_kwargs"]["quantization_config"]["load_in_4bit"] is True
    assert (recipe["max_train_samples"], recipe["eval_dataset"], recipe["learning_rate"]) == (3, "25%", 1e-4)
    assert "accelerate launch --config_file zero3.yaml" in said(Path("recipe.yaml").read_text())


def test_a_script_of_lmflow() -> None:
    import_file("lisa.sh")
    found = parse(text := Path("recipe.yaml").read_text()).data
    assert found["layerpeft"]["select"] == {"pick": "uniform", "keep": 2, "reselect_steps": 20}
    assert found["layerpeft"]["modules_to_save"] == ["embed_tokens", "norm", "lm_head"]
    assert (found["max_length"], found["optim"], found["model_name_or_path"]) == (
        256,
        "paged_adamw_32bit",
        "acme/four-layers",
    )
    assert "the names are those of Llama" in said(text) and "jq -c '.instances[]'" in said(text)


AXOLOTL = "base_model: a/b\ndatasets: [{path: a/rows, type: alpaca}]\n"
FACTORY = "model_name_or_path: a/b\ndataset: lessons\ncutoff_len: 64\n"
PAIRS = "model_name_or_path: a/b\ndataset: better\ncutoff_len: 64\nstage: dpo\n"
TUNE = "model: {_component_: torchtune.models.x.lora_x, lora_attn_modules: [q_proj]}\ncheckpointer: {checkpoint_dir: a/b}\n"
BODY = "type: completion, field: body"
SWIFT = "#!/bin/sh\nswift sft --model a/b --dataset a/rows "
# a file: what its recipe says, in part (a dotted key lies in a mapping)
MEANT: dict[str, dict[str, Any]] = {
    # adapters, and what they stand on
    f"{AXOLOTL}adapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nlora_r: 8": {
        "layerpeft.method": "lora", "layerpeft.target_modules": "all-linear",
        "model_init_kwargs.quantization_config.load_in_4bit": True,
    },
    f"{AXOLOTL}adapter: lora\nload_in_8bit: true\npeft_use_dora: true": {
        "layerpeft.use_dora": True, "model_init_kwargs": {"quantization_config": {"load_in_8bit": True}},
    },
    FACTORY: {"layerpeft.r": 8, "layerpeft.lora_alpha": 16, "layerpeft.target_modules": "all-linear", "max_length": 64},
    f"{FACTORY}lora_rank: 4\nlora_target: q_proj,v_proj\nadditional_target: lm_head\npissa_init: true\npissa_iter: 4": {
        "layerpeft.lora_alpha": 8, "layerpeft.target_modules": ["q_proj", "v_proj"], "layerpeft.modules_to_save": ["lm_head"],
        "layerpeft.init_lora_weights": "pissa_niter_4",
    },
    # weights
    f"{AXOLOTL}lisa_n_layers: 3\nlisa_step_interval: 7": {
        "layerpeft.select": {"pick": "uniform", "keep": 3, "reselect_steps": 7}, "layerpeft.method": "full",
    },
    f"{AXOLOTL}spectrum_top_fraction: 0.25": {
        "layerpeft.select": {"by": "snr", "unit": "target", "within": "kind", "keep": 0.25},
    },
    f"{FACTORY}finetuning_type: freeze\nfreeze_trainable_layers: -2": {"layerpeft.select": "first:2"},
    f"{FACTORY}finetuning_type: full\nuse_badam: true\nbadam_switch_mode: fixed\nbadam_start_block: 5": {"layerpeft.select": [5]},
    f"{SWIFT} --train_type full --freeze_parameters_ratio 1 --trainable_parameters model.layers.3. model.layers.4.": {
        "layerpeft.select": [3, 4],
    },
    f"{SWIFT} --train_type full --lisa_activated_layers 2": {
        "layerpeft.select": {"pick": "uniform", "keep": 2, "reselect_steps": 20},
    },
    # projections
    f"{FACTORY}finetuning_type: full\nuse_galore: true\ngalore_rank: 64\ngalore_target: mlp,self_attn": {
        "layerpeft.method": "galore", "layerpeft.r": 64, "layerpeft.scale": 2.0, "layerpeft.update_proj_gap": 200,
        "layerpeft.target_modules": ["mlp", "self_attn"], "layerpeft.proj_type": "std",
    },
    f"{FACTORY}finetuning_type: full\nuse_apollo: true\napollo_rank: 32": {
        "layerpeft.method": "galore", "layerpeft.r": 32, "layerpeft.subspace": "random",
    },
    f"{AXOLOTL}optimizer: galore_adamw_8bit\noptim_args: rank=32, scale=0.5\noptim_target_modules: [.*mlp.*, self_attn]": {
        "optim": "adamw_bnb_8bit", "layerpeft.r": 32, "layerpeft.scale": 0.5, "layerpeft.target_modules": ["mlp", "self_attn"],
    },
    f"{SWIFT} --train_type full --use_galore true": {"layerpeft.r": 128, "layerpeft.update_proj_gap": 50, "layerpeft.scale": 1.0},
    # trainers
    f"{AXOLOTL}rl: simpo\nadapter: lora\nrl_beta: 0.3": {"trainer": "cpo", "loss_type": "simpo", "beta": 0.3},
    f"{AXOLOTL}rl: orpo\norpo_alpha: 0.2\nadapter: lora": {"trainer": "orpo", "beta": 0.2},
    f"{AXOLOTL}reward_model: true\nadapter: lora": {"trainer": "reward"},
    f"{PAIRS}pref_loss: orpo\npref_beta: 0.3": {"trainer": "orpo", "beta": 0.3},
    f"{PAIRS}pref_loss: ipo": {"trainer": "dpo", "loss_type": ["ipo"], "columns.chosen": "{good}"},
    "#!/bin/sh\nswift rlhf --rlhf_type kto --model a/b --dataset a/rows --beta 0.2": {"trainer": "kto", "beta": 0.2},
    "base_model: a/b\npretraining_dataset: [{path: a/rows, text_column: body}]\nmax_steps: 5": {
        "trainer": "causal_lm", "columns": {"text": "{body}"},
    },
    f"{TUNE}dataset: {{_component_: a.stack_exchange_paired_dataset}}\nloss: {{_component_: a.DPOLoss, beta: 0.2}}": {
        "trainer": "dpo", "beta": 0.2, "dataset_name": "lvwerra/stack-exchange-paired", "columns.chosen": "{response_j}",
    },
    # rows
    "base_model: a/b\nadapter: lora\ndatasets: [{path: a/talk, type: chat_template, split: 'train[:90%]', name: en}]": {
        "assistant_only_loss": True, "dataset_config": "en", "dataset_train_split": "train[:90%]",
    },
    "base_model: a/b\nadapter: lora\ntrain_on_inputs: true\ndatasets: [{path: a/talk, type: sharegpt}]": {
        "completion_only_loss": False,
    },
    f"base_model: a/b\nadapter: lora\ndatasets: [{{path: a/b, {BODY}}}, {{path: a/c, {BODY}}}]": {
        "dataset_name": [{"path": "a/b"}, {"path": "a/c"}], "columns": {"text": "{body}"},
    },
    "base_model: a/b\nadapter: lora\nrl: dpo\ndatasets: [{path: a/b, type: chatml.intel}]": {
        "columns": {"prompt": "{question}", "chosen": "{chosen}", "rejected": "{rejected}"},
    },
    f"{TUNE}dataset: {{_component_: torchtune.datasets.chat_dataset, source: a/talk, conversation_column: conversations}}": {
        "dataset_name": "a/talk", "assistant_only_loss": True,
    },
    # settings
    f"{AXOLOTL}adapter: lora\nmicro_batch_size: 2\nbatch_size: 16": {"gradient_accumulation_steps": 8},
    f"{AXOLOTL}adapter: lora\nlearning_rate: '2e-4'\ncosine_min_lr_ratio: 0.1\nlr_scheduler: cosine": {
        "learning_rate": 2e-4, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    },
    f"{AXOLOTL}adapter: lora": {"max_length": 512, "num_train_epochs": 1, "lr_scheduler_type": "cosine"},
    f"{FACTORY}learning_rate: 1.0e-4\nlr_scheduler_type: cosine\nwarmup_ratio: 0.1": {
        "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
    },
    f"{FACTORY}disable_gradient_checkpointing: true\nneat_packing: true": {"gradient_checkpointing": False, "packing": True},
}  # fmt: skip


def at(found: Any, key: str) -> Any:
    for part in key.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("text", MEANT, ids=lambda text: re.sub(r"\W+", "-", text)[-60:])
def test_what_files_mean(text: str) -> None:
    file = "given.sh" if text.startswith("#!") else "given.yaml"
    Path(file).write_text(text)
    import_file(file)
    found = parse(Path("recipe.yaml").read_text())
    assert not found.faults
    assert {key: at(found.data, key) for key in MEANT[text]} == MEANT[text]


# a file: what is said of it, and no recipe is written
REFUSED: dict[str, tuple[str, ...]] = {
    f"{AXOLOTL}adapter: llama-adapter\nrl: bco": ("adapter: 'llama-adapter' is not in this version", "rl: 'bco' is no trainer"),
    f"{AXOLOTL}adapter: lora\nunfrozen_parameters: [lm_head]": ("unfrozen_parameters: adapters on some layers and weights",),
    f"{AXOLOTL}unfrozen_parameters: ['^model.embed_tokens.weight$[:32000]']": ("names rows of a tensor",),
    f"{AXOLOTL}unfrozen_parameters: [lm_head]": ("names no layer",),
    f"{AXOLOTL}unfrozen_parameters: ['.*norm.*']": ("names no layer by its number",),
    f"{FACTORY}stage: ppo\nfinetuning_type: oft": ("stage: 'ppo' is no trainer", "grpo and rloo", "finetuning_type: 'oft'"),
    f"{FACTORY}finetuning_type: full\nuse_badam: true\nbadam_mode: ratio": ("badam_mode: shares of a tensor",),
    f"{FACTORY}quantization_bit: 4\nquantization_method: hqq": ("quantization_bit: 4 bits by hqq",),
    f"{SWIFT} --train_type llamapro": ("train_type: llamapro puts new layers into the model",),
    f"{SWIFT} --train_type full --freeze_parameters_ratio 0.5": ("freeze_parameters_ratio: a share of all weights",),
    "#!/bin/sh\nswift sft --model $WHERE --dataset a/rows": ("does not set WHERE",),
    "#!/bin/sh\necho nothing": ("no command in it trains",),
    "cutoff_len: 5\nstage: sft": ("model_name_or_path: the file names no model", "dataset_name: the file names no rows"),
    "learning_rate: 1.0": ("whose file this is cannot be told", "--from axolotl or"),
    "base_model: a\nbase_model: b": ("'base_model' is written twice",),
    "- one\n- two": ("the file must hold `key: value` lines",),
    "base_model: a/b\nadapter: lora\ndatasets: [{path: a/b, type: alpaca}, {path: a/c, type: completion}]": (
        "rows are of one form here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: re.sub(r"\W+", "-", text)[-60:])
def test_what_cannot_be_said_is_refused_all_at_once(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = "given.sh" if text.startswith("#!") else "given.yaml"
    Path(file).write_text(text)
    assert main(["import", file]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in REFUSED[text]), error
    assert not Path("recipe.yaml").exists()


WEIRD: tuple[Any, ...] = (
    None, True, 0, -1, 0.3, "", "x", "a,b", "auto", [], [1], ["a"], [None], {}, {"a": 1}, [{"path": "a/b"}], [{}], [[1]],
    {"_component_": None}, float("inf"), "x: # y\n\x1b[31m", "é",
)  # fmt: skip
STARTS: dict[str, tuple[dict[str, Any], ...]] = {
    "axolotl": ({"base_model": "a/b", "datasets": [{"path": "a/b"}]}, {"adapter": "qlora", "load_in_4bit": True, "rl": "dpo"}),
    "llamafactory": ({"model_name_or_path": "a/b", "dataset": "x"}, {"finetuning_type": "full", "use_galore": True}),
    "ms-swift": ({"model": "a/b", "dataset": "x"}, {"train_type": "full", "freeze_parameters_ratio": 1}),
    "torchtune": (
        {"model": {"_component_": "t.lora_x", "lora_attn_modules": ["q_proj"]}, "checkpointer": {"checkpoint_dir": "a/b"}},
        {"dataset": {"_component_": "d.alpaca_dataset"}},
    ),
    "lmflow": ({"model_name_or_path": "a/b", "dataset_path": "x"}, {"use_qlora": 1}),
}  # fmt: skip


@pytest.mark.parametrize("tool", STARTS)
def test_whatever_stands_at_a_key_is_said_or_refused(tool: str) -> None:
    draw, (start, more) = random.Random(tool), STARTS[tool]
    keys = sorted({*TOOLS[tool].table, *TOOLS[tool].marks, *start, *more} - {PROGRAM})
    good = 0
    for _ in range(60):
        key, value = draw.choice(keys).rstrip("*"), draw.choice(WEIRD)
        data = {**start, **(more if draw.random() < 0.5 else {}), key: value}
        Path("odd.json").write_text(json.dumps(data))
        try:
            import_file("odd.json", tool=tool, force=True)
        except UsageError as error:
            assert len(str(error)) > 20
            continue
        good += 1
        assert not parse(text := Path("recipe.yaml").read_text()).faults and "\x1b" not in text
        assert key in text or value is None and key not in start, (key, value)
    assert good > 15  # not all is a matter of what trains


def test_nothing_goes_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    """Every key of a file stands in the recipe: as a key, beside one, or among those that were left out."""
    for file in sorted(FILES.glob("*.yaml")):
        import_file(file.name, model="layerpeft://llama-6m" if file.stem == "llama_pro" else None, force=True)
        text = Path("recipe.yaml").read_text()
        lost = [key for key in parse(file.read_text()).data if not re.search(rf"\b{key}\b", text)]
        assert not lost, file.name
    Path("more.yaml").write_text(
        AXOLOTL + "adapter: lora\nsequnce_len: 5\nhub_token: hf_abc\nlora_ranks: 3\nmy_own: [1, 2]\n"
    )
    capsys.readouterr()
    assert main(["import", "more.yaml", "--force"]) == 0
    shown = capsys.readouterr().out
    assert "left out: sequnce_len: 5 -- is no key that is known of axolotl. Did you mean 'sequence_len'?" in shown
    assert "left out: my_own: [1, 2] -- is no key that is known of axolotl." in shown
    Path("engines.yaml").write_text(FACTORY + "deepspeed: examples/ds_z3_config.json\n")
    assert main(["import", "engines.yaml", "--force"]) == 0
    assert "layerpeft recipes copy accelerate/zero3" in capsys.readouterr().out
    assert "left out: lora_ranks: 3 -- is no key that is known of axolotl. Did you mean" in shown


def test_a_file_that_is_there_stays_and_the_same_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "badam.yaml"]) == 0
    text = Path("recipe.yaml").read_text()
    assert main(["import", "freeze.yaml"]) == 2
    assert "recipe.yaml exists already; name another file, or write over it (--force)" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == text
    assert main(["import", "badam.yaml", "--force"]) == 0 and Path("recipe.yaml").read_text() == text
    assert main(["import", "badam.yaml", "--out", "gone/recipe.yaml"]) == 2
    assert main(["import", "gone.yaml", "--force"]) == 2 and Path("recipe.yaml").read_text() == text


def test_a_file_whose_keys_do_not_tell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("given.json").write_text('{"model_name_or_path": "a/b", "dataset_path": "a/rows", "cutoff_len": 3}')
    assert main(["import", "given.json"]) == 2
    assert main(["import", "given.json", "--from", "lm-flow"]) == 2
    assert "Did you mean 'lmflow'?" in capsys.readouterr().err
    assert main(["import", "given.json", "--from", "lmflow"]) == 0
    assert parse(Path("recipe.yaml").read_text()).data["dataset_name"] == "a/rows"


def test_a_recipe_elsewhere_finds_rows_beside_the_file(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    import_file("../freeze.yaml", model=str(four))
    assert parse(Path("recipe.yaml").read_text()).data["dataset_name"] == "../data/lessons.jsonl"
    assert load_recipe("recipe.yaml", purpose="plan")["eval_dataset"] == "25%"

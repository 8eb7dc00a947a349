"""The experiment folders for PEFT's MetaMathQA comparison: what its loader asks of a folder, and what its training loop does."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import benchmarks
import layerpeft
from tests.helpers.processes import without_the_package

HERE = Path(benchmarks.__file__).parent / "MetaMathQA"
FOLDERS = sorted(path.parent.relative_to(HERE) for path in HERE.rglob("adapter_config.json"))
STOCK = [folder for folder in FOLDERS if folder.parts[1] == "lora"]
OURS = [folder for folder in FOLDERS if folder.parts[1] == "layerpeft"]
CHOOSES = next(folder for folder in OURS if "galore" not in folder.name)

# Facts about the harness (method_comparison/MetaMathQA of huggingface/peft): the only keys that training_params.json may have, each
# laid over the value in default_training_params.json; any other key is refused.
KEYS = {
    *(
        "model_id",
        "dtype",
        "max_seq_length",
        "batch_size",
        "batch_size_eval",
        "max_steps",
        "eval_steps",
        "compile",
        "use_gc",
    ),
    *("query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp"),
    *("autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix"),
}


def llama(shape: dict[str, int] | None = None, device: str = "cpu") -> LlamaForCausalLM:
    """A model with the 28 layers of Llama-3.2-3B, small unless its shape is given."""
    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=28, tie_word_embeddings=True, **(shape or small)))


def wrapped(folder: Path, model: torch.nn.Module) -> peft.PeftModel:
    """As the harness does: the config of the folder, PEFT's own `get_peft_model`."""
    config = peft.PeftConfig.from_pretrained(str(HERE / folder))
    return peft.get_peft_model(model, config, autocast_adapter_dtype=True)


def test_there_are_folders_of_both_kinds_and_a_control():
    assert len(STOCK) >= 3 and len(OURS) >= 3
    assert any("random" in folder.name for folder in OURS)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_the_folder_is_where_the_harness_looks_and_holds_what_it_reads(folder):
    assert len(folder.parts) == 3 and folder.parts[0] == "experiments"
    assert {path.name for path in (HERE / folder).iterdir()} <= {"adapter_config.json", "training_params.json"}
    path = HERE / folder / "training_params.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    assert set(given) <= KEYS
    assert given.get("use_gc", False) is folder.name.endswith("-gc")


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_all_rows_train_as_many_parameters_as_peft_s_own_rank_32(folder):
    shape = {
        **{"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192},
        **{"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    }
    config = peft.PeftConfig.from_pretrained(str(HERE / folder))
    if isinstance(config, layerpeft.LayerLoraConfig) and config.is_deferred:
        config.select = "last:14"  # which 14 does not change the number
    model = llama(shape, "meta")
    assert sum(p.numel() for p in model.parameters()) == 3_212_749_824
    if isinstance(config, layerpeft.LayerLoraConfig) and not isinstance(config, layerpeft.LayerGaloreConfig):
        config = config.resolve(model)
    with torch.device("meta"):
        trained = peft.get_peft_model(model, config)
    assert trained.get_nb_trainable_parameters()[0] == 9_175_040


def test_stock_folders_need_nothing_but_peft():
    code = (
        "import sys, peft\n"
        "for path in sys.argv[1:]:\n"
        "    config = peft.PeftConfig.from_pretrained(path)\n"
        "    assert type(config) is peft.LoraConfig, path\n"
        "assert 'layerpeft' not in sys.modules\n"
        f"try:\n    peft.PeftConfig.from_pretrained({str(HERE / CHOOSES)!r})\n"
        "except KeyError as error:\n    print(error)\n"
    )
    done = without_the_package(code, *(HERE / f for f in STOCK))
    assert done.returncode == 0, done.stderr
    assert "LAYER_LORA" in done.stdout  # without layerpeft the others are refused, and not taken for something else


@pytest.mark.spread(4)
@pytest.mark.parametrize("folder", OURS, ids=str)
def test_the_harness_trains_and_saves_our_folders(folder, tmp_path):
    """The steps of its loop, in its order: a loss without gradients, steps with clipping, the size of the file, the log."""
    config = peft.PeftConfig.from_pretrained(str(HERE / folder))
    assert isinstance(config, layerpeft.LayerLoraConfig)
    base = llama()
    gc = (HERE / folder / "training_params.json").is_file()
    if gc:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable()
    model = wrapped(folder, base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.randint(0, 64, (4, 12))
    model.eval()
    with torch.inference_mode():
        before = model(input_ids=ids, labels=ids).loss.item()
    model.train()
    for _ in range(14):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=44).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        assert model(input_ids=ids, labels=ids).loss.item() < before
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    chosen = json.loads((tmp_path / "layerpeft.json").read_text())["selection"]["layers"]
    assert len(chosen) == 14 and (chosen == list(range(14, 28))) == folder.name.endswith(("last14-gc", "galore14"))
    logged = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    assert json.loads(json.dumps(logged))["peft_type"] == config.kind.value


def test_checkpointing_rows_stop_where_the_lowest_layer_trains():
    base = llama()
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable()
    model = wrapped(Path("experiments/layerpeft/llama-3.2-3B-rank64-last14-gc"), base).train()
    below, above = [], []
    base.model.layers[13].register_forward_hook(lambda m, a, out: below.append(out.requires_grad))
    base.model.layers[14].register_forward_hook(lambda m, a, out: above.append(out.requires_grad))
    ids = torch.randint(0, 64, (1, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert below == [False] and above[0] is True


def test_launch_hands_over_to_the_harness_with_our_types_known(tmp_path, monkeypatch, capsys):
    (tmp_path / "neighbour.py").write_text("from peft import PeftConfig\n", encoding="utf-8")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom neighbour import PeftConfig\n"
        "if __name__ == '__main__':\n    print(sys.argv[0], type(PeftConfig.from_pretrained(sys.argv[1])).__name__)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py", str(HERE / CHOOSES)])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    runpy.run_path(str(HERE / "launch.py"), run_name="__main__")
    del sys.modules["neighbour"]
    assert capsys.readouterr().out.split() == ["run.py", "LayerLoraConfig"]
    (tmp_path / "run.py").unlink()
    with pytest.raises(SystemExit, match="no run.py here"):
        runpy.run_path(str(HERE / "launch.py"), run_name="__main__")


def test_the_readme_names_every_folder():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert {str(folder.relative_to("experiments")) for folder in FOLDERS} == {
        line.split("`")[1] for line in text.splitlines() if line.startswith("| `")
    }

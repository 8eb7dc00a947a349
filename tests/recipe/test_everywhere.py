"""An adapter saved by each path loads in plain PEFT, in a process where layerpeft cannot be imported, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerpeft
from layerpeft.cli import main
from tests.conftest import DATA
from tests.helpers.processes import without_the_package
from tests.helpers.short import short_llama

pytestmark = pytest.mark.usefixtures("shallow")

PLAIN = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "layerpeft":
            raise ImportError("layerpeft is not here")

sys.meta_path.insert(0, Block())
import peft, torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
base, x = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
found = []
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        found.append(model(input_ids=x).logits[0, -1].tolist())
assert "layerpeft" not in sys.modules
print(json.dumps(found))
"""
TOKENS = [17, 250, 999, 12, 345, 678, 90, 4]


def base():
    return AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)


def config(**options):
    return layerpeft.LayerLoraConfig(
        select={"by": "random", "keep": 2, "seed": 3}, target_modules="all-linear", **options
    )


def steps(model) -> None:
    ids = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_get_peft_model(folder: Path):
    model = layerpeft.get_peft_model(base(), config(), batches=None).train()
    steps(model)
    model.save_pretrained(folder)
    return model


def by_plain_get_peft_model(folder: Path):
    model = peft.get_peft_model(base(), config(task_type="CAUSAL_LM", use_rslora=True)).train()
    steps(model)
    model.save_pretrained(folder)
    return model


def by_add_adapter(folder: Path):
    model = base()
    model.add_adapter(config())
    steps(model.train())
    model.save_pretrained(folder)
    layerpeft.save_record(model, folder)
    return model


def by_trl(folder: Path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    lines = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [{"prompt": r["question"], "completion": r["answer"]} for r in map(json.loads, lines)]
    arguments = SFTConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        learning_rate=1e-2,
    )
    trainer = SFTTrainer(
        base(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(short_llama()),
        peft_config=layerpeft.LayerLoraConfig(select={"by": "gradient_norm", "keep": 2}, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.model


def by_heads(folder: Path):
    select = {"by": "weight_norm", "unit": "head", "keep": 3}
    model = layerpeft.get_peft_model(base(), layerpeft.LayerHeadConfig(select=select)).train()
    steps(model)
    model.save_pretrained(folder)
    return model


def by_recipe(folder: Path):
    settings = ["max_steps=2", "warmup_steps=0", "max_train_samples=16", "max_eval_samples=4", "sample_tokens=0"]
    settings += ["layerpeft.select.num_batches=2", f"model_name_or_path={short_llama()}"]
    assert main(["train", "quickstart", f"output_dir={folder}", *settings]) == 0
    return layerpeft.load(folder, base())


PATHS = [by_get_peft_model, by_plain_get_peft_model, by_add_adapter, by_trl, by_heads, by_recipe]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    found = {}
    for make in PATHS:
        folder = tmp_path_factory.mktemp(make.__name__) / "adapter"
        model = make(folder).eval()
        with torch.no_grad():
            found[make.__name__] = (folder, model(input_ids=torch.tensor([TOKENS])).logits[0, -1])
    return found


def test_plain_peft_gives_equal_logits(saved):
    folders = [str(folder) for folder, _ in saved.values()]
    done = without_the_package(PLAIN, short_llama(), json.dumps(TOKENS), *folders)
    assert done.returncode == 0, done.stderr[-2000:]
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    untouched = base().eval()(input_ids=torch.tensor([TOKENS])).logits[0, -1]
    for got, (name, (_, want)) in zip(logits, saved.items(), strict=True):
        assert torch.allclose(got, want, atol=1e-5), name
        assert not torch.allclose(got, untouched, atol=1e-4), f"{name} trained nothing"


@pytest.mark.parametrize("make", PATHS, ids=lambda m: m.__name__)
def test_the_folder_is_stock_and_carries_its_record(saved, make):
    folder, want = saved[make.__name__]
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and not {"select", "train_new", "batches"} & set(written)
    assert {"layerpeft.json", "layers.csv", "layers.png", "adapter_model.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    model = layerpeft.load(folder, base()).eval()
    assert torch.allclose(model(input_ids=torch.tensor([TOKENS])).logits[0, -1], want, atol=1e-5)
    chosen = [r for r in layerpeft.layer_report(model).rows if r.chosen]
    assert chosen and all(r.score is not None and r.change for r in chosen)

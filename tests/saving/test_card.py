"""The card of a saved adapter is filled, holds what is known and nothing else, and a text of somebody's own is left alone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM

from layerpeft import LayerFullConfig, LayerLoraConfig, LayerUnlockConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.model.precisions import missing_packages
from layerpeft.saving.card import CARD, GAP, card, is_ours, write_card
from layerpeft.saving.naming import Name, named
from tests.helpers.hub import refused
from tests.helpers.loops import llama
from tests.helpers.repeating import some
from tests.helpers.short import short_llama

LORA = {"select": "last:1", "r": 2, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}


def adapter() -> Any:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(short_llama(2)), LayerLoraConfig(**LORA))


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_bare_save_says_what_is_known_and_no_more(tmp_path: Path) -> None:
    model, folder = adapter(), tmp_path / "adapter"
    for _ in range(2):  # PEFT writes into the card that is there
        model.save_pretrained(str(folder))
        text = (folder / CARD).read_text()
        assert GAP not in text and not refused(text) and is_ours(text)
        assert str(short_llama(2)) not in text and not re.search(r"(?<![\w.<])/(tmp|root|home|usr)\b", text)
        said = front(text)
        assert said["base_model"] == "llama" and said["library_name"] == "peft" and "layerpeft" in said["tags"]
        assert said["pipeline_tag"] == "text-generation" and "datasets" not in said
        assert "Why these: 1 of 2 layers, by place" in text and "| yes" in text
        for absent in ("held-out", "## Recipe", "## Rows", "Memory:", "Time:"):
            assert absent not in text
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    assert code.startswith("from peft import PeftModel") and 'from_pretrained(base, ".")' in code


def test_a_text_of_ones_own_stays(tmp_path: Path) -> None:
    model, path = adapter(), tmp_path / CARD
    path.write_text("# Mine\n")
    model.save_pretrained(str(tmp_path))  # PEFT puts its own lines into it
    assert "# Mine" in path.read_text() and "Why these" not in path.read_text()
    path.unlink()
    model.save_pretrained(str(tmp_path))
    path.write_text(path.read_text().replace("## Layers", "## My layers"))
    assert not write_card(tmp_path) and "## My layers" in path.read_text()


def test_cards_that_libraries_fill_in_by_themselves_give_way(tmp_path: Path) -> None:
    blank = ModelCard.from_template(ModelCardData()).content
    assert is_ours(blank) and not is_ours(blank.replace(GAP, "Known", 1))
    assert is_ours("It has been trained using [TRL](https://github.com/huggingface/trl).")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / CARD).write_text(blank)
    assert write_card(tmp_path) and GAP not in (tmp_path / CARD).read_text()
    (tmp_path / CARD).unlink()
    (tmp_path / CARD).symlink_to(tmp_path / "adapter_config.json")
    assert not write_card(tmp_path)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("Qwen/Qwen3-0.6B", Name("Qwen/Qwen3-0.6B", False)),
        ("/home/me/my models/llama", Name("llama")),
        (r"C:\models\llama", Name("llama")),
        ("./llama/", Name("llama")),
        ("layerpeft://llama-6m", Name("llama-6m")),
        ("/c/hub/models--a--b/snapshots/0123abcdef", Name("a/b", False, "0123abcdef")),
    ],
)
def test_a_base_goes_by_its_name(place: str, found: Name) -> None:
    assert named(place) == found


def test_a_base_of_the_hub_and_a_run_are_told_in_full() -> None:
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "a/b"}
    base = {"name": "a/b", "local": False, "revision": "abc123", "license": "mit"}
    manifest = {
        "method": "lora",
        "base": base,
        "head": {"id2label": {"0": "no", "1": "yes"}},
        "versions": {"peft": "9"},
    }
    run = {
        "trainer": "classification", "used": ["predict"], "hub": "me/mine", "names": {"eval_loss": "held-out loss"},
        "before": {"eval_loss": 2.0}, "after": {"eval_loss": 1.0}, "seconds": 3.2, "steps": 7, "device": "cpu",
        "data": [{"what": "training", "name": "c/d", "hub": True, "license": "cc-by-4.0", "revision": "r1"}],
        "memory": {"measured": {"weights": 2048}}, "recipe": "x: '```'\n",
    }  # fmt: skip
    text = card(config, manifest, run)
    assert not refused(text) and is_ours(text)
    said = front(text)
    assert said["base_model"] == "a/b" and said["license"] == "mit" and said["datasets"] == ["c/d"]
    assert "base_model:adapter:a/b" in said["tags"] and said["pipeline_tag"] == "text-classification"
    for words in (
        "revision `abc123`", "2.0000 | 1.0000", "7 optimizer steps, 3 s", "weights 2.0 KiB", "(licence cc-by-4.0, revision `r1`)",
        'from_pretrained("a/b", revision="abc123", num_labels=2)', 'PeftModel.from_pretrained(base, "me/mine")',
        'layerpeft.load(snapshot_download("me/mine"))', "layerpeft predict .", "````yaml\nx: '```'\n````", "- PEFT 9",
    ):  # fmt: skip
        assert words in text
    assert "layerpeft generate" not in text


def test_code_and_commands_work_in_the_folder_whose_base_was_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "it's mine").symlink_to(short_llama(2))
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("bases/it's mine")
    get_peft_model(model, LayerLoraConfig(**LORA)).save_pretrained("my run")
    text = Path("my run", CARD).read_text()
    assert "base_model:" not in text, "it is no address of the hub"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my run").rename(tmp_path / "elsewhere" / "my run")
    monkeypatch.chdir(tmp_path / "elsewhere" / "my run")
    assert "`it's mine` stands for the folder of the base" in text
    Path("it's mine").symlink_to(short_llama(2))
    codes, commands = (re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("python", "bash"))
    for code in codes:
        known: dict[str, Any] = {}
        exec(code, known)
        assert isinstance(known["model"], peft.PeftModel)
    assert len(codes) == 2 and 'layerpeft.load(".", base)' in codes[1]
    lines = [shlex.split(line, comments=True) for line in commands[0].splitlines()]
    assert [words[1] for words in lines] == ["generate", "export", "merge"]
    for words in lines:
        more = ["max_new_tokens=2"] if words[1] == "generate" else []
        assert main([*words[1:], *more]) == 0, words
    assert AutoModelForCausalLM.from_pretrained("merged").config.num_hidden_layers == 2


def test_a_base_without_a_record_that_lies_near_is_no_name_on_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "stock"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "bases/llama"}')
    assert write_card(folder) and "huggingface.co/bases/llama" in (folder / CARD).read_text()
    (tmp_path / "bases" / "llama").mkdir(parents=True)
    assert write_card(folder) and "huggingface.co" not in (text := (folder / CARD).read_text())
    assert "`llama` stands for the folder of the base" in text and front(text)["base_model"] == "llama"


KINDS: dict[str, tuple[str, Any]] = {
    "biases": ("AutoModelForCausalLM", LayerUnlockConfig(select="last:1", task_type="CAUSAL_LM")),
    "scales": ("AutoModelForCausalLM", LayerUnlockConfig(select="last:1", biases=False, task_type="CAUSAL_LM")),
    "weights": ("AutoModelForCausalLM", LayerFullConfig(select="last:1", task_type="CAUSAL_LM")),
    "classes": ("AutoModelForSequenceClassification", LayerLoraConfig(**LORA | {"task_type": "SEQ_CLS"})),
    "bits": ("AutoModelForCausalLM", LayerLoraConfig(**LORA, quantize_frozen="nf4")),
}


@pytest.mark.parametrize("kind", some(KINDS, ("biases",)))
def test_what_is_printed_makes_the_model_that_was_trained(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bits" and missing_packages(["nf4"]):
        pytest.skip("without bitsandbytes")
    monkeypatch.chdir(tmp_path)
    llama(hidden_size=64, intermediate_size=128).save_pretrained("base")
    name, config = KINDS[kind]
    more = {"num_labels": 3, "pad_token_id": 0} if kind == "classes" else {}
    model = get_peft_model(getattr(transformers, name).from_pretrained("base", **more), config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape) if parameter.requires_grad else 0
    model.save_pretrained("run")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    monkeypatch.chdir("run")
    Path("base").symlink_to("../base")
    plain, ours = (made(code, ids) for code in re.findall(r"```python\n(.*?)```", Path(CARD).read_text(), re.S))
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert torch.allclose(plain, wanted, atol=0.5 if kind == "bits" else 1e-5), "over a base that was not rounded"


def made(code: str, ids: torch.Tensor) -> torch.Tensor:
    """What the model says that a card's code makes."""
    known: dict[str, Any] = {}
    exec(code, known)
    with torch.no_grad():
        return known["model"].eval()(input_ids=ids).logits


def test_bases_that_are_had_elsewhere_are_given_as_they_are_called_there() -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "/x/llama-6m"}
    manifest = {"method": "lora", "base": {"name": "llama-6m", "local": True}}
    ships = card(config, manifest, {"base": {"name": "llama-6m", "local": True, "ships": True}, "used": ["predict"]})
    assert 'from_pretrained(resolve("layerpeft://llama-6m"))' in ships and "`llama-6m` stands" not in ships
    assert "layerpeft merge . merged --base layerpeft://llama-6m" in ships
    assert "predict . rows.jsonl --out answers.csv --base" in ships and "a file of yours" in ships
    shorter = card(config, manifest | {"dropped": {"layers": [1]}, "quant": {"why": "nf4"}}, {})
    assert 'from_pretrained("shorter")' in shorter and "merge . merged --base shorter" in shorter
    assert 'layerpeft.quantize(base, ".")' in shorter
    cached = card(config | {"base_model_name_or_path": "/c/models--a--b/snapshots/0123abcdef"}, {}, {})
    assert (
        'from_pretrained("a/b", revision="0123abcdef")' in cached and "generate . --prompt Hello --base a/b" in cached
    )
    plain = card(config | {"base_model_name_or_path": "a/b"}, {}, {})
    assert "--base" not in plain and 'from_pretrained("a/b")' in plain
    unknown = card({"peft_type": "PROMPT_TUNING"}, {}, {})
    assert "has no name here" in unknown and "merge" not in unknown
    taken = card(config | {"base_model_name_or_path": "./merged"}, {}, {})
    assert "merge . merged-model --base merged" in taken, "it goes into another folder than the base's"
    t5 = card(
        {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": "a/t5"},
        {},
        {"used": ["generate"]},
    )
    assert "layerpeft generate" in t5 and "vllm" not in t5


@pytest.mark.slow
def test_trl_saves_a_filled_card_without_a_recipe(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        str(tmp_path),
        max_steps=2,
        save_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=2,
    )
    rows = Dataset.from_list([{"text": "a sentence to learn"}] * 4)
    model = AutoModelForCausalLM.from_pretrained(short_llama(2))
    tokenizer = AutoTokenizer.from_pretrained(short_llama(2))
    config = LayerLoraConfig(**LORA)
    trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=config, processing_class=tokenizer)
    trainer.train()
    assert "trained using [TRL]" in (tmp_path / CARD).read_text()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        text = (folder / CARD).read_text()
        assert "Why these: 1 of 2 layers" in text and not refused(text)
        assert ("Checked when training ended: every chosen target moved" in text) == (folder == tmp_path)
        assert GAP not in text and str(short_llama(2)) not in text and "## Recipe" not in text

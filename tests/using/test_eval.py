"""Numbers of trained folders: those of Trainer, unknown labels counted, and the line for lm-evaluation-harness."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.recipe.shipped import resolve
from tests.helpers.short import short_llama
from tests.using.test_predict import NAMES, adapter, named

ROWS = [
    {"prompt": "Natalia sold clips to", "completion": " 48 of her friends in April."},
    {"prompt": "Weng earns", "completion": " 12 dollars an hour, and yesterday she did 50 minutes of babysitting."},
    {"prompt": "How many", "completion": " clips?"},
]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    config = LayerLoraConfig(select="last:2", r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.5)
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(short_llama()).save_pretrained(folder)
    return folder


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def test_the_loss_is_that_of_trainer(writer, tmp_path, capsys):
    import peft
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    out = tmp_path / "numbers.json"
    assert main(["eval", str(writer), lines(tmp_path / "rows.jsonl", ROWS), "--out", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    base = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(writer))
    given = {"output_dir": str(tmp_path / "t"), "report_to": "none", "bf16": False, "use_cpu": True}
    arguments = SFTConfig(**given, per_device_eval_batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(writer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    data = Dataset.from_list(ROWS)
    trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    assert found["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(torch.tensor(found["loss"]).exp().item(), rel=1e-5)
    assert main(["eval", str(writer), str(tmp_path / "rows.jsonl"), "--batch-size", "1"]) == 0  # by tokens, not by rows
    one = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss: "))
    assert float(one.split()[1]) == pytest.approx(found["loss"], rel=1e-5)
    assert f"lm_eval --model hf --model_args pretrained={short_llama()},peft={writer}" in said


def test_classes_are_counted_and_unknown_ones_named(tmp_path, capsys):
    folder = adapter(
        resolve("layerpeft://toy-bert"), tmp_path / "a", "SequenceClassification", "SEQ_CLS", **named(NAMES)
    )
    texts = [f"late again {i}" for i in range(6)]
    rows = lines(tmp_path / "rows.jsonl", [{"text": t} for t in texts])
    assert main(["predict", str(folder), rows, "--out", str(tmp_path / "p.jsonl")]) == 0
    said = [json.loads(line)["label"] for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    other = next(name for name in NAMES.values() if name != said[0])
    wanted = [other, *said[1:4], "fremd", None]
    rows = lines(tmp_path / "rows.jsonl", [{"text": t, "label": w} for t, w in zip(texts, wanted, strict=True)])
    out = tmp_path / "found.json"
    assert main(["eval", str(folder), rows, "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["rows"] == 4 and found["accuracy"] == 0.75 and found["unknown_labels"] == {"fremd": 1}
    assert found["left_out"] == {"has no label": 1} and sum(map(sum, found["confusion"])) == 4
    assert found["confusion"][list(NAMES.values()).index(other)][list(NAMES.values()).index(said[0])] == 1
    assert {row["class"]: row["rows"] for row in found["classes"]}[other] == wanted[:4].count(other)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "unknown label 'fremd': 1 row" in (text := capsys.readouterr().out) and "naja – ü" in text


@pytest.mark.slow
def test_margins_of_pairs_against_the_base(writer, tmp_path, capsys):
    """By DPO's own numbers: the log-probabilities of both answers, with the adapter and without it."""
    (writer / "recipe.yaml").write_text("trainer: dpo\nbeta: 0.5\n")
    try:
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no."} for r in ROWS]
        out = tmp_path / "m.json"
        assert main(["eval", str(writer), lines(tmp_path / "pairs.jsonl", rows), "--out", str(out)]) == 0
    finally:
        (writer / "recipe.yaml").unlink()
    found = json.loads(out.read_text())
    tokenizer = AutoTokenizer.from_pretrained(writer)
    import peft

    base = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(writer)).eval()

    def log_probability(prompt: str, answer: str) -> float:
        before = tokenizer(prompt)["input_ids"]
        ids = [*before, *tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(scores[i - 1, ids[i]]) for i in range(len(before), len(ids)))

    margins = []
    for row in rows:
        now = [log_probability(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        with model.disable_adapter():
            then = [log_probability(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        margins.append(0.5 * ((now[0] - then[0]) - (now[1] - then[1])))
    assert any(abs(margin) > 1e-3 for margin in margins)
    assert found["rewards/margins"] == pytest.approx(sum(margins) / 3, rel=1e-3)
    assert found["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / 3)


@pytest.mark.slow
def test_the_ready_line_runs_on_a_local_task(writer, tmp_path, capsys, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    assert lm_eval is not None
    assert main(["eval", str(writer), lines(tmp_path / "rows.jsonl", ROWS)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("lm_eval"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines(tasks / "data.jsonl", [{"question": "Natalia sold", "choices": [" clips", " dollars"], "gold": 0}] * 2)
    (tasks / "local.yaml").write_text(
        "task: local_task\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'data.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: acc\n"
    )
    from lm_eval.__main__ import cli_evaluate

    words = [*shlex.split(line.replace("TASK", "local_task")), "--include_path", str(tasks), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*words, "--batch_size", "1"])
    cli_evaluate()
    assert "local_task" in capsys.readouterr().out


@pytest.mark.slow
def test_columns_of_other_names_are_asked_for_by_the_words_that_work(writer, tmp_path, capsys):
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in ROWS]
    words = ["eval", str(writer), lines(tmp_path / "rows.jsonl", rows)]
    (recipe := writer / "recipe.yaml").write_text("columns: {prompt: 'It is\\n: {x}', completion: ' {y}'}\n")
    try:
        assert main(words) == 2
        flags = shlex.split(capsys.readouterr().err.partition(", as in ")[2])
        assert flags == ["--column", "prompt=It is\\n: {q}", "--column", "completion= {a}"]
        recipe.unlink()
        assert main(words) == 2
        said = capsys.readouterr().err.partition(", as in ")[2]
        flags = subprocess.run(
            ["bash", "-c", f"printf '%s|' {said}"], capture_output=True, text=True, check=True
        ).stdout
        assert flags == "--column|prompt={q}\n|--column|completion={a}|"
        assert main([*words, *flags.split("|")[:-1]]) == 0 and "loss: " in capsys.readouterr().out
    finally:
        recipe.unlink(missing_ok=True)


def test_exact_answers_are_those_that_it_generates(writer, tmp_path, capsys):
    prompts = [{"prompt": r["prompt"]} for r in ROWS]
    words = [lines(tmp_path / "rows.jsonl", prompts), "--out", str(tmp_path / "p.jsonl"), "max_new_tokens=3"]
    assert main(["predict", str(writer), *words]) == 0
    said = [json.loads(line)["text"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    rows = [{**p, "completion": t} for p, t in zip(prompts, [*said[:2], f"{said[2]} no"], strict=True)]
    assert main(["eval", str(writer), lines(tmp_path / "rows.jsonl", rows), "--answers", "max_new_tokens=3"]) == 0
    assert "exact_match: 0.666667" in capsys.readouterr().out

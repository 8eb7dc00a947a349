"""Numbers of preferences are those that their trainer measured at the end of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerpeft.cli import main
from tests.helpers.short import short_llama

PAIRS = [
    {"prompt": f"How many {thing} ?", "chosen": f" {n} {thing}.", "rejected": f" no{' no' * (n % 3)}."}
    for n, thing in enumerate(["clips", "dollars", "friends", "hours"], 3)
]
LIKED = [
    {"prompt": r["prompt"], "completion": r[n], "label": n == "chosen"} for r in PAIRS for n in ("chosen", "rejected")
]
NUMBERS = {"reward": ("margin", "accuracy"), "kto": ("rewards/margins", "kl")}
KINDS = [
    pytest.param(name, marks=() if name == "kto" else pytest.mark.slow)
    for name in ("kto", "reward", "orpo", "cpo", "dpo")
]


@pytest.mark.parametrize("trainer", KINDS)
def test_numbers_are_those_of_its_trainer(trainer, tmp_path, capsys):
    def written(name: str, rows: list[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    rows, folder, out = written("rows.jsonl", PAIRS), tmp_path / "run", tmp_path / "numbers.json"
    (tmp_path / "r.yaml").write_text(
        f"trainer: {trainer}\nmodel_name_or_path: {short_llama(2)}\ndataset_name: rows.jsonl\neval_dataset: rows.jsonl\n"
        "layerpeft: {method: lora, select: last:1, r: 2, target_modules: all-linear}\nbf16: false\nmax_steps: 2\n"
        f"learning_rate: 1.0e-2\nsave_strategy: 'no'\nreport_to: none\nmax_length: 64\noutput_dir: {folder}\n"
    )
    assert main(["train", str(tmp_path / "r.yaml")]) == 0
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert main(["eval", str(folder), rows, "--out", str(out), "--batch-size", "8"]) == 0
    assert "loss: " in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {"loss", *NUMBERS.get(trainer, ("rewards/margins", "rewards/accuracies"))} <= set(found)
    for name, value in found.items():
        if f"eval_{name}" in last:
            assert value == pytest.approx(last[f"eval_{name}"], rel=1e-5, abs=1e-6), name
    if trainer == "kto":
        words = ["eval", str(folder), written("liked.jsonl", LIKED), "--out", str(out), "--overwrite"]
        assert main(words) == 0
        assert json.loads(out.read_text())["rewards/margins"] == pytest.approx(found["rewards/margins"], rel=1e-4)
    assert Path(folder / "adapter_model.safetensors").is_file()

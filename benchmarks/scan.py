"""What the gradient-norm scan costs, and how near it comes to exact norms.

    python benchmarks/scan.py            # prints a table and writes benchmarks/results/scan.json

Times are medians of interleaved repeats, as ratios to a rank-8 LoRA forward and backward pass over the same batches.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerpeft

HERE = Path(__file__).parent
DATA = Path(layerpeft.__file__).parent / "data"
REPEATS = 5


def batches(count: int = 8, rows: int = 4, length: int = 128) -> list[dict[str, torch.Tensor]]:
    """GSM8K rows as (rows, length) token batches with labels."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "llama-6m")
    lines = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(map(str, json.loads(line).values())) for line in lines[: count * rows]]
    found = []
    for start in range(0, len(texts), rows):
        coded = tokenizer(
            texts[start : start + rows], return_tensors="pt", padding="max_length", truncation=True, max_length=length
        )
        labels = coded["input_ids"].masked_fill(coded["attention_mask"] == 0, -100)
        found.append({"input_ids": coded["input_ids"], "attention_mask": coded["attention_mask"], "labels": labels})
    return found


def model() -> torch.nn.Module:
    """The small Llama in float32."""
    return AutoModelForCausalLM.from_pretrained(DATA / "llama-6m", dtype=torch.float32)


def lora_pass(wrapped: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> None:
    """Forward and backward of a rank-8 LoRA on all linears."""
    for batch in data:
        wrapped(**batch).loss.backward()
        wrapped.zero_grad()


def timed(function) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Measures, prints, and writes the JSON."""
    torch.set_num_threads(1)
    data, base = batches(), model()
    wrapped = peft.get_peft_model(model(), peft.LoraConfig(r=8, target_modules="all-linear"))

    def scan(**options) -> layerpeft.Scores:
        return layerpeft.score_layers(base, batches=data, target_modules="all-linear", progress=False, **options)

    arms = {"LoRA r 8": lambda: lora_pass(wrapped, data), "probe": scan, "exact": lambda: scan(exact=True)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for function in arms.values():
        function()
    for _ in range(REPEATS):
        for name, function in arms.items():
            seconds[name].append(timed(function))
    exact = scan(exact=True)
    errors = [
        max(abs(a / b - 1) for a, b in zip(scan(seed=seed).values, exact.values, strict=True)) for seed in range(20)
    ]
    unit = statistics.median(seconds["LoRA r 8"])
    result = {
        "case": "gradient-norm scan, small Llama, 8 batches of 4 x 128 tokens, one thread",
        "ratio to LoRA r 8": {n: round(statistics.median(s) / unit, 3) for n, s in seconds.items()},
        "spread (min, max)": {n: [round(min(s) / unit, 3), round(max(s) / unit, 3)] for n, s in seconds.items()},
        "largest relative error of a layer, 20 seeds": {
            "median": round(statistics.median(errors), 4),
            "max": round(max(errors), 4),
        },
        "versions": {p: version(p) for p in ("layerpeft", "torch", "transformers", "peft")},
        "machine": platform.processor() or platform.machine(),
    }
    (HERE / "results" / "scan.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

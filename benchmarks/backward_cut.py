"""What the backward cut saves under TRL's defaults: LoRA on the last 3 of 12 layers, gradient checkpointing, input gradients.

    python benchmarks/backward_cut.py    # prints and writes benchmarks/results/backward_cut.json

Counts first (floating-point operations, peak live bytes), then step times as ratios of interleaved medians within one process.
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import layerpeft
from layerpeft.plan import Live

HERE = Path(__file__).parent
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
REPEATS = 7


def llama() -> LlamaForCausalLM:
    """12 layers, width 384, vocabulary 4,096."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def arms() -> dict[str, torch.nn.Module]:
    """The three models, each as TRL would set it up."""
    made = {
        "peft, all layers": peft.get_peft_model(llama(), peft.LoraConfig(r=8, target_modules=LINEARS)),
        "peft, layers_to_transform": peft.get_peft_model(
            llama(),
            peft.LoraConfig(r=8, target_modules=LINEARS, layers_to_transform=[9, 10, 11], layers_pattern="layers"),
        ),
        "layerpeft, last:3": layerpeft.get_peft_model(
            llama(), layerpeft.LayerLoraConfig(r=8, target_modules=LINEARS, select="last:3")
        ),
    }
    for model in made.values():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    return made


def main() -> None:
    """Measures, prints, and writes the JSON."""
    torch.set_num_threads(1)
    x = torch.randint(0, 4096, (2, 256), generator=torch.Generator().manual_seed(1))
    models = arms()

    def step(model: torch.nn.Module) -> None:
        model(input_ids=x, labels=x).loss.backward()
        model.zero_grad()

    flops, bytes_, seconds = {}, {}, {name: [] for name in models}
    for name, model in models.items():
        step(model)
        with FlopCounterMode(display=False) as counter:
            step(model)
        flops[name] = counter.get_total_flops()
        with Live(set()) as live:
            step(model)
        bytes_[name] = live.peak
    for _ in range(REPEATS):
        for name, model in models.items():
            start = time.perf_counter()
            step(model)
            seconds[name].append(time.perf_counter() - start)
    reference = "peft, layers_to_transform"
    unit = statistics.median(seconds[reference])
    result = {
        "case": "LoRA r 8 on the last 3 of 12 layers, width 384, batch 2 x 256, checkpointing and input gradients as TRL sets them",
        "floating-point operations, ratio": {n: round(f / flops[reference], 3) for n, f in flops.items()},
        "peak live bytes, ratio": {n: round(b / bytes_[reference], 3) for n, b in bytes_.items()},
        "step time, ratio of medians": {n: round(statistics.median(s) / unit, 3) for n, s in seconds.items()},
        "step time, spread": {n: [round(min(s) / unit, 3), round(max(s) / unit, 3)] for n, s in seconds.items()},
        "versions": {p: version(p) for p in ("layerpeft", "torch", "transformers", "peft")},
        "machine": platform.processor() or platform.machine(),
    }
    (HERE / "results" / "backward_cut.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""What the backward cut costs, in counts that do not depend on the machine: operations, live bytes, gradients, backward calls.

python -m tests.training.test_counts    # writes tests/counts.json anew, where the counts are meant to change
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.planning.trace import Live, gradient_bytes
from tests.conftest import LLAMA
from tests.helpers import models
from tests.helpers.repeating import some
from tests.helpers.traffic import watched
from tests.training import test_backward

LINEARS = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
TOP = {"layers_to_transform": [9, 10, 11], "layers_pattern": "layers"}
X = torch.randint(0, 2048, (2, 128), generator=torch.Generator().manual_seed(1))

# the setting of the claim (12 layers, width 384, vocabulary 4,096, batch 2 x 256) with every size halved: the same ratios


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=6, use_cache=False))


def model_of(arm: str, **options: Any) -> Any:
    torch.manual_seed(4)
    options = {"target_modules": LINEARS, "init_lora_weights": False, "lora_dropout": 0.1, **options}
    if arm == "ours":
        return get_peft_model(llama(), LayerLoraConfig(select="last:3", **options)).train()
    return peft.get_peft_model(llama(), peft.LoraConfig(**TOP, **options)).train()


def loss_by_hand(model: Any, checkpointed: bool) -> torch.Tensor:
    """A loop as one writes it for oneself: the layers below the lowest that trains run under no_grad."""
    outer, positions = model.base_model.model, torch.arange(X.shape[1])[None]
    inner = outer.model
    with torch.no_grad():
        hidden = inner.embed_tokens(X)
        rotary = inner.rotary_emb(hidden, position_ids=positions)
        for block in inner.layers[:9]:
            hidden = block(hidden, position_ids=positions, position_embeddings=rotary)
    for block in inner.layers[9:]:
        run = partial(block, position_ids=positions, position_embeddings=rotary)
        hidden = checkpoint(run, hidden, use_reentrant=False) if checkpointed else run(hidden)
    return outer.loss_function(logits=outer.lm_head(inner.norm(hidden)), labels=X, vocab_size=2048)


def counted(model: Any, loss: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Counts of one forward and backward pass; bytes kept are those alive when only the loss is in hand."""
    gc.collect()
    torch.manual_seed(9)
    with Live({t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), X]}) as live:
        value = loss()
        kept = live.now
        value.backward()
    return {"flops": live.flops, "peak": live.peak, "kept": kept, "gradients": gradient_bytes(model)}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "autocast"),
    some([("none", False), ("non-reentrant", False), ("reentrant", True)], [("non-reentrant", False)]),
)
def test_cost_is_that_of_a_loop_by_hand_that_runs_the_lower_layers_under_no_grad(kind, autocast):
    hand, ours = model_of("plain"), model_of("ours")
    if kind != "none":
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
    ours.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bar = counted(hand, lambda: loss_by_hand(hand, kind != "none"))
        found = counted(ours, lambda: ours(input_ids=X, labels=X).loss)
    if kind == "reentrant":  # it recomputes what is not needed any more, and has one gradient more at the cut
        assert found["flops"] <= 1.02 * bar["flops"] and found["peak"] <= 1.05 * bar["peak"]
    else:
        assert found == bar
    mine, reference = gradients(ours), gradients(hand)
    assert mine.keys() == reference.keys() and len(mine) == 42
    assert all(torch.equal(mine[n], reference[n]) for n in mine)
    if kind == "non-reentrant" and not autocast:
        plain = model_of("plain")
        test_backward.as_trl_does(plain)
        assert found["flops"] <= 0.55 * counted(plain, lambda: plain(input_ids=X, labels=X).loss)["flops"]


def trained(config: peft.PeftConfig, folder: Path) -> tuple[int, int, dict[str, torch.Tensor]]:
    """One step of TRL's SFTTrainer with default arguments: operations as torch counts them (without attention on a CPU), with
    attention, and the gradients that were to be clipped."""
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen: dict[str, torch.Tensor] = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            seen.update({n: g.clone() for n, g in gradients(model).items()})

    rows = Dataset.from_dict({"input_ids": X.repeat(2, 1).tolist()})
    sizes = {"per_device_train_batch_size": 2, "max_steps": 1}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    args = SFTConfig(str(folder), **sizes, **quiet)
    assert args.gradient_checkpointing and args.bf16
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    made = SFTTrainer(llama(), args=args, train_dataset=rows, peft_config=config, processing_class=tokenizer)
    made.add_callback(Gradients())
    with FlopCounterMode(display=False) as counter, Live(set()) as live:
        made.train()
    return counter.get_total_flops(), live.flops, seen


def test_sft_with_default_arguments_takes_at_most_055_of_the_operations_of_layers_to_transform(tmp_path):
    *flops, mine = trained(LayerLoraConfig(select="last:3"), tmp_path)
    *bars, theirs = trained(peft.LoraConfig(**TOP), tmp_path)
    ratios = [found / bar for found, bar in zip(flops, bars, strict=True)]
    assert max(ratios) <= 0.55
    assert ratios == pytest.approx([0.538, 0.520], abs=0.002)
    assert mine.keys() == theirs.keys() and len(mine) == 12
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


# every count of the main cases, held against tests/counts.json

RECORD = Path(__file__).parents[1] / "counts.json"
PACKAGES = ("torch", "transformers", "peft")
ADVICE = "; where this is meant, write the counts anew: python -m tests.training.test_counts"


def switched(name: str, select: Any = "last:2") -> dict[str, Any]:
    """A small Llama under one switch."""
    model = test_backward.wrap(test_backward.llama(), select)
    test_backward.SWITCHES[name][0](model)
    return record(model, lambda: model(input_ids=test_backward.X, labels=test_backward.X).loss)


def built(name: str, stack: str | None, reentrant: bool) -> dict[str, Any]:
    """An architecture whose last layer trains, with checkpointing."""
    torch.manual_seed(5)
    config = LayerLoraConfig(select={"layers": "last:1", "stack": stack}, r=4, target_modules="all-linear")
    model: Any = get_peft_model(models.MODELS[name](), config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return record(model, lambda: models.loss_of(name, model), stack)


def record(model: Any, loss: Callable[[], torch.Tensor], stack: str | None = None) -> dict[str, Any]:
    with watched(model, stack) as seen:
        torch.manual_seed(7)
        loss().backward()
    model.zero_grad()
    calls = {"backward calls": seen.text("reached"), "recomputed": seen.text("recomputed")}
    return {**counted(model, loss), **calls}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"llama, {name}": partial(switched, name) for name in test_backward.SWITCHES},
    "llama, all layers": partial(switched, "TRL's order", "all"),
    **{
        f"{name}, {stack or 'text'}, {'reentrant' if reentrant else 'non-reentrant'}": partial(
            built, name, stack, reentrant
        )
        for name, stack in [("t5", "encoder"), ("t5", "decoder"), ("whisper", "encoder"), ("whisper", "decoder")]
        + [("bart", "decoder"), ("gemma3_vlm", None), ("gemma3_vlm", "vision")]
        for reentrant in (False, True)
    },
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def grown(found: dict[str, Any], bar: dict[str, Any], room: float) -> list[str]:
    """What differs: any count under the versions of the record (room 0), a larger one under others."""
    sizes = {k: v for k, v in bar.items() if isinstance(v, int)}
    faults = [f"{k}: {found[k]:,}, was {v:,}" for k, v in sizes.items() if found[k] > (1 + room) * v]
    if not room:
        faults += [f"{k}: only {found[k]:,}, was {v:,}" for k, v in sizes.items() if found[k] < v]
    return faults + [f"{k}: {found[k]}, was {v}" for k, v in bar.items() if k not in sizes and found[k] != v]


@pytest.mark.spread(4)
@pytest.mark.parametrize("case", some(CASES, [case for case in CASES if "llama" in case or "non-" in case]))
def test_no_count_has_changed(recorded, case):
    same = all(recorded["versions"][p] == version(p) for p in PACKAGES)
    assert set(recorded["counts"]) == set(CASES), f"the cases are others than in {RECORD.name}{ADVICE}"
    faults = grown(CASES[case](), recorded["counts"][case], 0.0 if same else 0.03)
    assert not faults, f"{case}: {', '.join(faults)}{ADVICE}"


def test_a_cut_that_is_lost_would_be_seen(recorded):
    bar = recorded["counts"]["llama, TRL's order"]
    model = test_backward.plain(test_backward.llama())
    test_backward.as_trl_does(model)
    found = record(model, lambda: model(input_ids=test_backward.X, labels=test_backward.X).loss)
    assert found["gradients"] == bar["gradients"]
    told = " ".join(grown(found, bar, 0.03))
    assert all(word in told for word in ("flops", "kept", "backward calls: 111111, was 000011", "recomputed"))


def main() -> None:
    """Writes the record."""
    torch.set_num_threads(1)
    made = {"versions": {p: version(p) for p in PACKAGES}, "counts": {name: case() for name, case in CASES.items()}}
    RECORD.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

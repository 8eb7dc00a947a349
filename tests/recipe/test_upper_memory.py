"""The top of a checkpoint of 2 GB is trained in a process of its own, at the memory that `plan` says; what it is, the whole model
would have trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layerpeft.cli import main
from layerpeft.recipe.plan import forecast
from tests.helpers.anonymous import LAYER, TIGHT, checkpoint, held_by
from tests.helpers.bounds import PLANNED
from tests.helpers.processes import without_the_package

ROWS = (2, 256)  # of a batch, and tokens of each

LOGITS = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, out, *adapters = sys.argv[1:]
ids, found = torch.arange(5, 45)[None], []
with torch.no_grad():
    for adapter in (None, *adapters):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        found.append(model.eval()(input_ids=ids).logits)
torch.save(found, out)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_top_of_a_large_checkpoint_is_trained_at_the_memory_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with checkpoint(tmp_path / "base", torch.float32) as base:
        assert (base / "model.safetensors").stat().st_size > 2e9
        trained(base, tmp_path, capsys)


def trained(base: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # in another type than it is stored in, so that no weight is a page of its file
    words = [f"model_name_or_path={base}", "dtype=bfloat16", "bf16=false", "use_cpu=true", "layerpeft.select=last:4"]
    words += [f"per_device_train_batch_size={ROWS[0]}", f"per_device_eval_batch_size={ROWS[0]}", "max_train_samples=6"]
    words += ["max_eval_samples=2", f"max_length={ROWS[1]}", f"pad_to_multiple_of={ROWS[1]}", "max_steps=-1"]
    words += ["num_train_epochs=2", "warmup_steps=0", "sample_tokens=0", 'columns={text: "{answer}"}']
    kept = [*words, f"layerpeft.prefix_cache={place}/states"]

    def out(name: str) -> str:
        return f"output_dir={place}/{name}"

    plan = forecast("quickstart", [*kept, out("none")]).plan
    assert plan.prefix is not None and plan.prefix.apart is not None
    planned = plan.prefix.apart.training
    assert main(["prefill", "quickstart", *kept, out("none")]) == 0
    upper = held_by("train", [*kept, out("upper")], place / "a", "bfloat16", ROWS, TIGHT)
    usual = held_by("train", [*kept, out("usual")], place / "b", "bfloat16", ROWS)
    with capsys.disabled():
        print("planned", planned, "upper", upper, "usual", usual)
    assert 4 * 2 * LAYER < (1 - PLANNED) * planned < upper.peak < (1 + PLANNED) * planned
    # glibc's usual way leaves a hole for what goes beside what stays, at most as large as what a step makes
    assert usual.peak < (1 + PLANNED) * planned + plan.applies.peak
    assert main(["train", "quickstart", *words, out("whole")]) == 0
    ours, theirs = (load_file(place / name / "adapter_model.safetensors") for name in ("upper", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    done = without_the_package(LOGITS, base, place / "logits.pt", place / "upper", place / "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    bare, one, other = torch.load(place / "logits.pt")
    assert torch.equal(one, other) and not torch.equal(one, bare)

"""A checkpoint of 2 GB is filled ahead in a process of its own: it never holds more than one layer, and little besides."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from layerpeft.recipe.plan import forecast
from tests.helpers.anonymous import LAYER, TIGHT, checkpoint, held_by
from tests.helpers.bounds import FILLING, PLANNED

APART = 16e6  # bytes: Python's own objects, and products that oneDNN compiles for another length of rows (0.6 MB each)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("stored", "run"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_large_checkpoint_is_filled_with_one_layer_in_memory(stored: str, run: str, tmp_path: Path):
    with checkpoint(tmp_path / "base", getattr(torch, stored)) as base:
        assert (base / "model.safetensors").stat().st_size > (2e9 if stored == "float32" else 1e9)
        filled(base, stored, run, tmp_path)


def filled(base: Path, stored: str, run: str, place: Path) -> None:
    words = [f"model_name_or_path={base}", f"output_dir={place}/out", f"dtype={run}", "bf16=false", "use_cpu=true"]
    words += ["layerpeft.select=last:4", "per_device_train_batch_size=2", "per_device_eval_batch_size=2"]
    words += ["max_train_samples=6", "max_eval_samples=2", "max_length=64", "pad_to_multiple_of=64"]
    words += ['columns={text: "{answer}"}']
    kept = "layerpeft.prefix_cache={}/{}"
    found = held_by("prefill", [*words, kept.format(place, "one")], place / "a", run, (2, 64))
    assert found.peak < LAYER * getattr(torch, run).itemsize + FILLING
    prefix = forecast("quickstart", [*words, kept.format(place, "two")]).plan.prefix
    assert prefix is not None and prefix.apart is not None
    planned = prefix.apart.filling
    tight = held_by("prefill", [*words, kept.format(place, "two")], place / "b", run, (2, 64), TIGHT)
    print("planned", planned)
    assert tight.peak < (1 + PLANNED) * planned + APART
    if stored != run:  # else weights stay pages of their file
        assert tight.peak > (1 - PLANNED) * planned

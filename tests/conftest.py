"""What all tests share: the small pre-trained Llama, real rows, one thread, no hub, and a quiet package."""

from __future__ import annotations

import copy
import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest

import layerpeft
from tests.helpers.ordering import for_workers
from tests.helpers.repeating import mark_repetitions

# torch and what needs it are imported where they are used: the process that hands out tests to others needs none of it

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads cost more than such small files
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("LAYERPEFT_QUIET", "1")

DATA = Path(layerpeft.__file__).parent / "recipe" / "data"
LLAMA = DATA / "llama-6m"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Any:
    """Marks repetitions before tests are chosen by their markers, and orders them when they are; skips what needs an
    accelerator where there is none."""
    import torch

    torch.set_num_threads(1)
    mark_repetitions(items)
    if not torch.accelerator.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
    yield
    if hasattr(config, "workerinput"):
        items[:] = for_workers(items, config.workerinput["workercount"])


def pytest_collection_finish() -> None:
    """What was imported stays; the collector need not look at it again and again, nor often at the rest."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers keep to their files, whose fixtures cost, until one has nothing left to do."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    from tests.helpers.pictures import Pictures

    Pictures.looked_at = item.get_closest_marker("pictures") is not None


@pytest.fixture(autouse=True)
def _same_start() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _kept_traces():
    from tests.helpers.tracing import keep_traces

    with pytest.MonkeyPatch.context() as patch:
        keep_traces(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _brisk_libraries():
    from tests.helpers.brisk import make_brisk

    with pytest.MonkeyPatch.context() as patch:
        make_brisk(patch)
        yield


@pytest.fixture(scope="session")
def llama_path() -> Path:
    return LLAMA


@pytest.fixture(scope="session")
def _llama():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)


@pytest.fixture
def llama(_llama):
    return copy.deepcopy(_llama)


@pytest.fixture(scope="session")
def _short():
    import torch
    from transformers import AutoModelForCausalLM

    from tests.helpers.short import short_llama

    return AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)


@pytest.fixture
def short(_short):
    """Its first five layers of twelve."""
    return copy.deepcopy(_short)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe names by `layerpeft://` is short: the Llama's first five layers, the first rows of each file."""
    from layerpeft.recipe import shipped
    from tests.helpers.short import short_home

    monkeypatch.setattr(shipped, "_HERE", short_home())


@pytest.fixture(scope="session")
def gsm8k_batches() -> list[dict[str, Any]]:
    """Eight batches of two GSM8K rows, 64 tokens each, padding ignored by the labels."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    lines = (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [json.loads(line) for line in lines]
    texts = [" ".join(str(v) for v in row.values()) for row in rows]
    found = []
    for start in range(0, 16, 2):
        coded = tokenizer(
            texts[start : start + 2], return_tensors="pt", padding="max_length", truncation=True, max_length=64
        )
        labels = coded["input_ids"].masked_fill(coded["attention_mask"] == 0, -100)
        found.append({"input_ids": coded["input_ids"], "attention_mask": coded["attention_mask"], "labels": labels})
    return found

"""The names that the pages' Python speaks of: a tiny model, its batches, rows, a trainer."""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import layerpeft
from tests.conftest import LLAMA
from tests.helpers import loops
from tests.helpers.blocks import Block

# Where a block needs another model than the others.
LAYERS = {"docs/schedules.md": 4, "docs/unlock.md": 16, "docs/adding-a-scorer.md": 4}
ELSEWHERE = {
    "PeftModel": "peft",
    "torch": "torch", "peft": "peft", "layerpeft": "layerpeft",
}  # fmt: skip
PLACES = {"torch", "peft", "layerpeft"}


class Names(dict[str, Any]):
    """A namespace in which what the text around a block speaks of is made when it is first named."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.shown: list[Any] = []
        self |= {"_shown": self.shown.append, "__name__": __name__}

    def __missing__(self, name: str) -> Any:
        if name in layerpeft.__all__:
            return getattr(layerpeft, name)
        if name in ELSEWHERE:
            module = importlib.import_module(ELSEWHERE[name])
            return module if name in PLACES else getattr(module, name)
        make: Callable[[], Any] | None = getattr(self, f"_make_{name}", None)
        if make is None:
            return getattr(builtins, name) if hasattr(builtins, name) else _unknown(name)
        self[name] = make()
        return self[name]

    def check(self) -> None:
        """Every config that was shown can be used: it wraps a model, and something of that trains."""
        if "trainer" in self:
            self["trainer"].train()
            assert any(row.chosen and row.steps for row in layerpeft.layer_report(self["trainer"].model).rows)
        held = [self["config"]] if "config" in self and "model" not in self else []  # else it was just used
        for config in [*held, *self.shown]:
            if isinstance(config, layerpeft.LayerLoraConfig):
                model = layerpeft.get_peft_model(self._make_model(), config, **self._batches(config))
                assert any(parameter.requires_grad for parameter in model.parameters()), config

    def _batches(self, config: Any) -> dict[str, Any]:
        return {} if config.batches is not None or config.is_scheduled else {"batches": self["loader"]}

    def _make_model(self) -> Any:
        if self.block.page == "docs/shorter.md":  # read again from where it lies
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
        sizes |= {"vocab_size": len(self["tokenizer"]), "num_hidden_layers": LAYERS.get(self.block.page, 12)}
        model = loops.llama(**sizes)
        if "whole-model" in self.block.text:
            model.save_pretrained("whole-model")
        return model

    def _make_loader(self) -> Any:
        return loops.make_batches()

    def _make_batch(self) -> Any:
        return self["loader"][0]

    def _make_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(LLAMA)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def _make_config(self) -> Any:
        return layerpeft.LayerLoraConfig(select="all", r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    def _make_prompt(self) -> Any:
        return self["tokenizer"]("Question:", return_tensors="pt")

    def _make_data(self) -> Any:
        from datasets import Dataset

        return Dataset.from_list([{"text": "one two three four"}] * 8)

    def _make_SFTTrainer(self) -> Any:
        from trl import SFTConfig, SFTTrainer

        options = SFTConfig("made", bf16=False, max_steps=2, report_to="none", save_strategy="no")
        return partial(SFTTrainer, args=options, processing_class=self["tokenizer"])

    def _make_run(self) -> Any:
        return lambda: [
            self["model"](input_ids=batch["input_ids"][:1]) for batch in self["loader"]
        ]  # CorDA reads a row at a time

    def _make_pairs(self) -> Any:
        return [("Der Hund liegt dort.", "The dog lies there."), ("Es regnet heute.", "It rains today.")] * 4

    def _make_rows(self) -> Any:
        return self["tokenizer"](
            [f"{n} dogs" if n % 2 else f"{n} red cats" for n in range(16)], padding=True, return_tensors="pt"
        )

    def _make_topics(self) -> Any:
        return [n % 2 for n in range(16)]

    def _make_name(self) -> str:
        return str(LLAMA)


def _unknown(name: str) -> Any:
    raise NameError(f"{name!r}: the page does not say what it is, and tests/helpers/shown.py does not make it")

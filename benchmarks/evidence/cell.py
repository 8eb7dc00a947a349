"""A cell of the experiment: a model on a task, with its rows as tokens; read once, used by many runs."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import layerpeft
from benchmarks.evidence import made
from benchmarks.evidence.design import Design, Source, Task
from benchmarks.evidence.losses import measured, of_language
from layerpeft.errors import ConfigError
from layerpeft.model.costs import Costs
from layerpeft.recipe import shipped
from layerpeft.recipe.templates import fill

Batch = dict[str, torch.Tensor]
EVAL_ROWS = 16  # in one batch
KINDS: Mapping[str, Any] = {
    "lora": layerpeft.LayerLoraConfig, "full": layerpeft.LayerFullConfig, "galore": layerpeft.LayerGaloreConfig,
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A row as tokens, and its class where it has one."""

    ids: tuple[int, ...]
    label: int | None = None


@dataclass(frozen=True)
class Cell:
    """`data`: the folder of rows that do not ship; `models`: the folder of those that are made here."""

    design: Design
    name: str
    data: Path | None = None
    models: Path = field(default_factory=made.folder)

    @property
    def source(self) -> Source:
        return self.design.of(self.name)[0]

    @property
    def task(self) -> Task:
        return self.design.of(self.name)[1]

    @property
    def place(self) -> Path:
        """The folder of the model. Raises: ConfigError where it is not made yet."""
        if self.source.shipped is not None:
            return Path(shipped.resolve(f"{shipped.SCHEME}{self.source.shipped}"))
        return made.find(self.name.partition("/")[0], self.models)

    @cached_property
    def weights(self) -> str:
        """A digest of the weights that runs begin with."""
        return xxhash.xxh64((self.place / "model.safetensors").read_bytes()).hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        found = AutoTokenizer.from_pretrained(self.place)
        if found.pad_token is None:
            found.pad_token = found.eos_token
        return found

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Of rows with labels, in order."""
        if self.task.label is None:
            return ()
        return tuple(sorted({str(row[self.task.label]) for row in self._read(self.task.train)}))

    @cached_property
    def train(self) -> list[Example]:
        return self._examples(self.task.train)

    @cached_property
    def held_out(self) -> list[Batch]:
        """Batches of rows that nothing trains on: drawn once, the same for every run."""
        found = self._examples(self.task.eval)
        random.Random(0).shuffle(found)
        return _batches(found[: self.task.held_out], self)

    @cached_property
    def retained(self) -> list[Batch] | None:
        """Batches of the text of pre-training, without classes; None without the folder of data."""
        asked = self.design.retention
        if self.data is None:
            return None
        return _batches(
            [Example(ids) for ids in made.pieces(self.tokenizer, self._file(asked.text), asked.length, asked.rows)],
            self,
        )

    def fresh(self, seed: int) -> Any:
        """The model as it was; a new head is drawn from the seed."""
        model = copy.deepcopy(self._base)
        if self.classes:
            torch.manual_seed(seed)
            for module in (model.get_submodule(name) for name in HEADS if hasattr(model, name)):
                for part in module.modules():
                    if isinstance(part, nn.Linear):
                        nn.init.normal_(part.weight, std=0.02)
        return model

    @cached_property
    def _base(self) -> Any:
        place = self.place
        if not self.classes:
            model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        else:
            config = AutoConfig.from_pretrained(
                place, num_labels=len(self.classes), pad_token_id=self.tokenizer.pad_token_id
            )
            model = AutoModelForSequenceClassification.from_pretrained(place, config=config, dtype=torch.float32)
        model.config.use_cache = False
        return model

    @cached_property
    def language(self) -> Any:
        """The model as it was pre-trained, with its own head."""
        if self.source.made == "modernbert":
            from transformers import AutoModelForMaskedLM

            return AutoModelForMaskedLM.from_pretrained(self.place, dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(self.place, dtype=torch.float32)

    def config(self, method: str, select: Any, **options: Any) -> Any:
        """The PEFT config of a run."""
        targets = {} if method == "full" else {"target_modules": "all-linear"}
        task = "SEQ_CLS" if self.classes else "CAUSAL_LM"
        return KINDS[method](select=select, task_type=task, **targets, **options)

    def before(self, seed: int) -> dict[str, float | None]:
        """What a run begins with: losses of the untouched model."""
        if self.classes:
            return measured(self.fresh(seed), self.held_out) | {"retained": self._untouched["retained"]}
        return self._untouched

    @cached_property
    def _untouched(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {} if self.classes else {**measured(self._base, self.held_out)}
        texts = self.retained
        kept = None if texts is None else of_language(self.source, self.language, self.tokenizer, texts)
        return found | {"retained": kept}

    @cached_property
    def costs(self) -> Costs:
        """Operations of a step, by layers that train with the rank of the design."""
        r = self.design.training.r
        keep = {"time": 0.5, "length": self.task.length}
        config = self.config("lora", {"by": "depth", "keep": keep}, r=r, lora_alpha=2 * r)
        found = config.examine(self.fresh(0)).costs
        assert isinstance(found, Costs)
        return found

    def batches(self, seed: int, count: int, epoch: int = 0) -> list[Batch]:
        """Batches of training rows, drawn from a seed; with `epoch`, the rows of so many batches again and again, each time in
        another order."""
        draw = torch.Generator().manual_seed(seed)
        size = (self.task.rows,)
        if epoch:
            rows = torch.randperm(len(self.train), generator=draw)[: epoch * self.task.rows]
            orders = [rows[torch.randperm(len(rows), generator=draw)] for _ in range(-(-count // epoch))]
            drawn = [part.tolist() for order in orders for part in order.split(self.task.rows)][:count]
        else:
            drawn = [torch.randint(0, len(self.train), size, generator=draw).tolist() for _ in range(count)]
        return [collated([self.train[i] for i in rows], self) for rows in drawn]

    def _examples(self, name: str) -> list[Example]:
        rows = list(self._read(name))
        texts = [fill(self.task.text, {k: "" if v is None else v for k, v in row.items()}) for row in rows]
        ends = [] if self.classes else [self.tokenizer.eos_token_id]
        found = self.tokenizer(
            texts, truncation=bool(self.classes), max_length=self.task.length if self.classes else None
        )
        numbers = [None if self.task.label is None else self.classes.index(str(row[self.task.label])) for row in rows]
        pairs = zip(found["input_ids"], numbers, strict=True)
        return [Example(tuple([*ids, *ends][: self.task.length]), number) for ids, number in pairs if ids]

    def _read(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._file(name).read_text(encoding="utf-8").splitlines()]

    def _file(self, name: str) -> Path:
        if name.startswith(shipped.SCHEME):
            return Path(shipped.resolve(name))
        if self.data is None or not (self.data / name).is_file():
            raise ConfigError(f"{self.name}: no file {name} in the folder of --data ({self.data or 'not given'})")
        return self.data / name


HEADS = ("score", "classifier")


def collated(examples: Sequence[Example], cell: Cell) -> Batch:
    """One batch, padded to its longest row."""
    longest = max(len(e.ids) for e in examples)
    pad = cell.tokenizer.pad_token_id
    ids = torch.tensor([[*e.ids, *[pad] * (longest - len(e.ids))] for e in examples])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in examples])
    known = [e.label for e in examples if e.label is not None]
    labels = torch.tensor(known) if known else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _batches(examples: Sequence[Example], cell: Cell) -> list[Batch]:
    return [collated(examples[i : i + EVAL_ROWS], cell) for i in range(0, len(examples), EVAL_ROWS)]

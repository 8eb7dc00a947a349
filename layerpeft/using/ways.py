"""How a model is asked, by what it is for: which cells it reads, how they become numbers, and what its answer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from layerpeft.errors import UsageError
from layerpeft.model.layers import base_of
from layerpeft.recipe.rows import TURNS, Unfit
from layerpeft.recipe.tasks import cell, files
from layerpeft.recipe.tasks.answers import answer as best_answer
from layerpeft.recipe.tasks.answers import best, windows
from layerpeft.recipe.tasks.classification import MANY, NUMBER
from layerpeft.recipe.tasks.metrics import entities, has_entities
from layerpeft.recipe.tasks.tagging import words_as_tokens
from layerpeft.recipe.tasks.turns import asked, prompt_of, question
from layerpeft.recipe.tasks.written import texts
from layerpeft.using.folder import Trained
from layerpeft.using.generate import longest
from layerpeft.using.options import Options, drawing_none, of_training

Cells = Mapping[str, Any]
Answer = dict[str, Any]


@dataclass
class Way:
    """A model with what belongs to it. `item`: what it reads of a row's cells, whose `size` says how long it is (raises: Unfit);
    `run`: its answers to items of about one size, in their order; `columns`: what an answer holds, and of which kind."""

    found: Trained
    model: Any
    processing: Any
    options: Options = field(default_factory=lambda: Options({}))
    threshold: float = 0.5
    homes: tuple[str, ...] = ()
    cut: int = 0  # items that lost their end

    forms = (("text",),)
    more: tuple[str, ...] = ("text_pair",)
    needs = "AutoTokenizer"
    ahead = 32  # batches that are read ahead, and put in order of length

    def __post_init__(self) -> None:
        """What a kind sets up; without this line here the constructor would not call that of a kind."""

    @property
    def base(self) -> Any:
        """The model of transformers, under an adapter or not."""
        return base_of(self.model)

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def names(self) -> list[str]:
        """Of classes, by number."""
        return [name for _, name in sorted((int(i), n) for i, n in self.config.id2label.items())]

    @property
    def limit(self) -> int | None:
        """Tokens that the model reads."""
        own = getattr(self.processing, "model_max_length", None)
        known = [self.found.recipe.values.get("max_length"), own, longest(self.base)]
        return min((n for n in known if isinstance(n, int) and n < 10**9), default=None)

    def columns(self) -> dict[str, str]:
        raise NotImplementedError

    def item(self, cells: Cells) -> Any:
        raise NotImplementedError

    def run(self, items: Sequence[Any]) -> list[Answer]:
        raise NotImplementedError

    def size(self, item: Any) -> int:
        return len(item["input_ids"])

    def shortened(self, *given: Any) -> dict[str, Any]:
        """Token ids, as many as the model reads. Raises: Unfit where there are none."""
        made = self.processing(*given, verbose=False)
        if self.limit is not None and len(made["input_ids"]) > self.limit:
            made = self.processing(*given, truncation=True, max_length=self.limit)
            self.cut += 1
        if not made["input_ids"]:
            raise Unfit("holds no token")
        return {k: v for k, v in made.items() if k in self.processing.model_input_names}

    @torch.no_grad()
    def output(self, items: Sequence[Any]) -> Any:
        """What the model gives for items padded to one length."""
        return self.model(**self.placed(self.processing.pad([dict(item) for item in items], return_tensors="pt")))

    def placed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors where the model is, those of fractions in its precision."""
        kind = self.base.dtype
        return {k: v.to(self.device, kind if v.is_floating_point() else None) for k, v in batch.items()}

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device


class Classes(Way):
    """A class of several with its score (softmax), any number of them (sigmoid, from `threshold` on), or a number."""

    def __post_init__(self) -> None:
        if getattr(self.config, "pad_token_id", None) is None:  # of pictures there is none
            self.config.pad_token_id = getattr(self.processing, "pad_token_id", None)

    @property
    def kind(self) -> str | None:
        return NUMBER if self.config.num_labels == 1 else self.config.problem_type

    def columns(self) -> dict[str, str]:
        if self.kind == NUMBER:
            return {f"score_{n}" if self.config.num_labels > 1 else "score": "number" for n in self.names}
        first = {"labels": "object"} if self.kind == MANY else {"label": "text", "score": "number"}
        return {**first, "scores": "object"}

    def item(self, cells: Cells) -> Any:
        pair = [cell.text("text_pair", cells["text_pair"])] if cells.get("text_pair") is not None else []
        return self.shortened(cell.text("text", cells["text"], empty=False), *pair)

    def run(self, items: Sequence[Any]) -> list[Answer]:
        return [self.answer(line) for line in self.output(items).logits.float().cpu()]

    def answer(self, logits: torch.Tensor) -> Answer:
        """Of logits of shape (classes,)."""
        if self.kind == NUMBER:
            return dict(zip(self.columns(), logits.tolist(), strict=True))
        scores = (logits.sigmoid() if self.kind == MANY else logits.softmax(-1)).tolist()
        named = dict(zip(self.names, scores, strict=True))
        if self.kind == MANY:
            return {"labels": [n for n, s in named.items() if s >= self.threshold], "scores": named}
        top = int(logits.argmax())
        return {"label": self.names[top], "score": scores[top], "scores": named}


class Rewards(Classes):
    """How good an answer is: one number."""

    forms = (("prompt", "completion"), ("user", "completion"), ("messages",), ("conversations",), ("text",))
    more = ("system",)

    def item(self, cells: Cells) -> Any:
        if "text" in cells:
            return self.shortened(cell.text("text", cells["text"], empty=False))
        prompt = prompt_of(cells)
        if prompt is None:
            raise Unfit("has no prompt")
        if "completion" in cells:
            said: Any = cell.text("completion", cells["completion"], empty=False)
            said = said if isinstance(prompt, str) else [{"role": "assistant", "content": said}]
        else:
            prompt, said = asked("messages", question(prompt))
        return self.shortened(texts({"prompt": prompt, "said": said}, ["said"], self.processing)[1])


class Pictures(Classes):
    """The class of a picture."""

    forms, more, needs = (("image",),), (), "AutoImageProcessor"
    ahead = 1  # pictures are large

    def item(self, cells: Cells) -> Any:
        return files.picture(files.held("image", cells["image"], self.homes))

    def size(self, item: Any) -> int:
        return 1

    @torch.no_grad()
    def output(self, items: Sequence[Any]) -> Any:
        return self.model(**self.placed(self.processing(list(items), return_tensors="pt")))


class Tags(Way):
    """A tag for every word, by its first token; where tags are of a scheme (B-, I-), the names that they make up."""

    forms, more = (("tokens",), ("text",)), ()

    def columns(self) -> dict[str, str]:
        return {"words": "object", "tags": "object", "spans": "object"}

    def item(self, cells: Cells) -> Any:
        words = cell.listed("tokens", cells["tokens"] if "tokens" in cells else cells["text"])
        if not words:
            raise Unfit("has no tokens")
        words = [cell.text("tokens", word, empty=False) for word in words]
        made = words_as_tokens(words, self.processing, self.limit)
        of = made.word_ids()
        firsts = {w: i for i, w in reversed(list(enumerate(of))) if w is not None}
        if len(firsts) < len(words) and self.limit is not None and len(of) >= self.limit:
            self.cut += 1
        inputs = {k: v for k, v in made.items() if k in self.processing.model_input_names}
        return {**inputs, "words": words, "firsts": firsts}

    def run(self, items: Sequence[Any]) -> list[Answer]:
        inputs = [{k: v for k, v in item.items() if k not in ("words", "firsts")} for item in items]
        self.processing.padding_side = "right"
        lines = self.output(inputs).logits.float().softmax(-1).cpu()
        return [self._tagged(item, line) for item, line in zip(items, lines, strict=True)]

    def _tagged(self, item: Any, scores: torch.Tensor) -> Answer:
        words, names = item["words"], self.names
        tops = {w: int(scores[i].argmax()) for w, i in item["firsts"].items()}
        tags = [names[tops[w]] if w in tops else None for w in range(len(words))]  # None: behind the cut
        spans = []
        if has_entities(names):
            for kind, first, last in sorted(entities([t or "O" for t in tags]), key=lambda s: s[1]):
                sure = [float(scores[item["firsts"][w], tops[w]]) for w in range(first, last + 1)]
                text = " ".join(words[first : last + 1])
                spans.append(
                    {"label": kind, "first": first, "last": last, "text": text, "score": sum(sure) / len(sure)}
                )
        return {"words": words, "tags": tags, "spans": spans}


class Answers(Way):
    """A piece of the context, over all windows of it; "" where having none is likelier and was learned."""

    forms, more = (("question", "context"),), ()

    def columns(self) -> dict[str, str]:
        return {"answer": "text", "score": "number"}

    def item(self, cells: Cells) -> Any:
        self.processing.padding_side = "right"  # places of answers are counted from the first token
        q, c = (cell.text(name, cells[name], empty=False) for name in ("question", "context"))
        try:
            stride = self.found.recipe.values.get("stride", 128)
            limit = self.limit
            parts = windows(q, c, self.processing, limit, stride if limit is None or stride < limit else limit // 4)
        except ValueError as error:
            raise Unfit(f"has a question that leaves no room for its context ({error})") from None
        return {"context": c, "windows": parts}

    def size(self, item: Any) -> int:
        return sum(len(window["input_ids"]) for window in item["windows"])

    def run(self, items: Sequence[Any]) -> list[Answer]:
        flat = [(n, window) for n, item in enumerate(items) for window in item["windows"]]
        found: list[list[Any]] = [[] for _ in items]
        for begin in range(0, len(flat), max(1, len(items))):
            part = flat[begin : begin + len(items)]
            out = self.output([{k: v for k, v in window.items() if k != "offsets"} for _, window in part])
            starts, ends = (side.float().cpu().numpy() for side in (out.start_logits, out.end_logits))
            for (n, window), start, end in zip(part, starts, ends, strict=True):
                real = len(window["offsets"])
                found[n].append(best(start[:real], end[:real], window["offsets"]))
        without = bool(self.found.task.get("without_answer"))
        return [self._said(item["context"], f, without) for item, f in zip(items, found, strict=True)]

    @staticmethod
    def _said(context: str, found: Sequence[Any], without: bool) -> Answer:
        score = max(found)[0]
        return {"answer": best_answer(context, found, without), "score": score if np.isfinite(score) else None}


class Writes(Way):
    """Text that goes on from a prompt, the likeliest token each unless an option says otherwise."""

    forms = (("prompt",), *((name,) for name in TURNS), ("user",), ("text",))
    more = ("system",)

    def __post_init__(self) -> None:
        self.processing.padding_side = "left"
        self.options = drawing_none(self.options)

    def columns(self) -> dict[str, str]:
        return {"text": "text"}

    def item(self, cells: Cells) -> Any:
        prompt: Any = cell.text("text", cells["text"], empty=False) if "text" in cells else prompt_of(cells)
        if not prompt:
            raise Unfit("has no prompt")
        if isinstance(prompt, list):
            prompt = prompt[:-1] if len(prompt) > 1 and prompt[-1]["role"] == "assistant" else prompt
            if self.processing.chat_template is None:
                raise Unfit("is a conversation, and the tokenizer has no chat template")
            try:
                ids = self.processing.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            except Exception as error:  # templates raise what they like
                raise Unfit(f"cannot be written with the chat template ({error})") from None
        else:
            ids = self.processing(prompt, verbose=False)
        most = longest(self.base)
        if not ids["input_ids"] or most is not None and len(ids["input_ids"]) >= most:
            raise Unfit(f"has a prompt of {len(ids['input_ids'])} tokens, and the model reads up to {most}")
        return {k: ids[k] for k in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def run(self, items: Sequence[Any]) -> list[Answer]:
        batch = self.placed(self.processing.pad([dict(item) for item in items], return_tensors="pt"))
        given = self.options.for_model(self.base)
        try:
            made = self.model.generate(**batch, **given, pad_token_id=self.processing.pad_token_id)
        except ValueError as error:
            raise UsageError(f"the options do not go together ({error})") from error
        start = 0 if self.config.is_encoder_decoder else batch["input_ids"].shape[1]
        said = self.processing.batch_decode(made[:, start:], skip_special_tokens=True)
        return [{"text": text.strip()} for text in said]


class Rewrites(Writes):
    """A text made of another one, by an encoder and a decoder."""

    forms, more = (("source",), ("text",), ("prompt",)), ()

    def __post_init__(self) -> None:
        self.options = of_training(self.options, self.found.recipe.values)
        super().__post_init__()

    def item(self, cells: Cells) -> Any:
        return self.shortened(cell.text("source", next(iter(cells.values())), empty=False))

"""What is said in a sound: by a model that spells (CTC), or by one that writes (an encoder and a decoder)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerpeft.errors import UsageError, told
from layerpeft.recipe.rows import Unfit
from layerpeft.recipe.tasks import audio
from layerpeft.recipe.tasks.speech import file_of, numbers, spelled, writes
from layerpeft.using.options import drawing_none, of_training
from layerpeft.using.ways import Answer, Cells, Way


class Hears(Way):
    """The words of a sound. One that is longer than those of training, or than the model hears, has no answer."""

    forms, more, needs = (("audio",),), (), "AutoProcessor"
    ahead = 4  # sounds are large

    def __post_init__(self) -> None:
        self.options = drawing_none(of_training(self.options, self.found.recipe.values))

    def columns(self) -> dict[str, str]:
        return {"text": "text"}

    @property
    def hears(self) -> Any:
        return self.processing.feature_extractor

    @property
    def seconds(self) -> float | None:
        """The longest sound that is heard whole."""
        own = getattr(self.hears, "chunk_length", None) if writes(self.config) else None
        return min((float(n) for n in (self.found.recipe.get("max_seconds"), own) if n is not None), default=None)

    def item(self, cells: Cells) -> Any:
        """Samples between -1 and 1, of shape (samples,)."""
        heard = audio.sound(file_of(cells["audio"], self.homes), self.hears.sampling_rate)
        if self.seconds is not None and len(heard) > self.seconds * self.hears.sampling_rate:
            raise Unfit(f"is longer than max_seconds: {self.seconds:g}")
        return heard

    def size(self, item: Any) -> int:
        return len(item)

    def run(self, items: Sequence[Any]) -> list[Answer]:
        if writes(self.config):
            return self._written(items)
        if getattr(self.hears, "return_attention_mask", False):
            return self._spelled(items)
        return [answer for item in items for answer in self._spelled([item])]  # silence behind it would be heard, too

    @torch.no_grad()
    def _spelled(self, items: Sequence[Any]) -> list[Answer]:
        logits = self.model(**self.placed(numbers(items, self.hears))).logits
        longest = max(map(len, items))
        own = [self._frames(len(item), longest, logits.shape[1]) for item in items]  # the rest is padding
        ids = [line[:count] for line, count in zip(logits.argmax(-1).tolist(), own, strict=True)]
        return [{"text": text.strip()} for text in spelled(self.processing.tokenizer, ids)]

    def _frames(self, samples: int, longest: int, frames: int) -> int:
        """How many of the frames are of a sound's own samples, in a batch whose longest has all of them."""
        kernels, strides = (getattr(self.config, f"conv_{name}", ()) for name in ("kernel", "stride"))
        if samples == longest or not kernels or getattr(self.config, "add_adapter", False):
            return frames * samples // longest
        for kernel, stride in zip(kernels, strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return max(1, samples)

    @torch.no_grad()
    def _written(self, items: Sequence[Any]) -> list[Answer]:
        given = self.options.for_model(self.base)
        most = getattr(self.config, "max_target_positions", None)
        if most is not None and not {"max_new_tokens", "max_length"} & set(self.options.given):
            given = {k: v for k, v in given.items() if k != "max_new_tokens"} | {"max_length": most}
        try:
            made = self.model.generate(**self.placed(numbers(items, self.hears)), **given)
        except ValueError as error:
            raise UsageError(f"the options do not go together ({told(error, 300)})") from error
        said = self.processing.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [{"text": text.strip()} for text in said]

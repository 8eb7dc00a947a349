"""Words that are hidden in a text: the likeliest tokens in their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerpeft.recipe.rows import Unfit
from layerpeft.recipe.tasks import cell
from layerpeft.using.ways import Answer, Cells, Way

SHOWN = 5  # tokens of a mask, where `top_k` does not say how many


class Fills(Way):
    """The text with the likeliest token in the place of each mask, and for each the first of all tokens with their scores."""

    more = ()

    def columns(self) -> dict[str, str]:
        return {"text": "text", "masks": "object"}

    def item(self, cells: Cells) -> Any:
        self.processing.padding_side = "right"  # places of masks are counted from the first token
        text = cell.text("text", cells["text"], empty=False)
        before, made = self.cut, self.shortened(text)
        places = [i for i, token in enumerate(made["input_ids"]) if token == self.processing.mask_token_id]
        if not places:
            where = f" among its first {self.limit} tokens" if self.cut > before else ""
            raise Unfit(f"has no {self.processing.mask_token}{where}, in whose place a token is looked for")
        return {**made, "text": text, "places": places}

    def run(self, items: Sequence[Any]) -> list[Answer]:
        inputs = [{k: v for k, v in item.items() if k not in ("text", "places")} for item in items]
        lines = self.output(inputs).logits.float().softmax(-1).cpu()
        return [self._filled(item, line[item["places"]]) for item, line in zip(items, lines, strict=True)]

    def _filled(self, item: Any, scores: torch.Tensor) -> Answer:
        """Of scores of shape (masks, tokens)."""
        most = min(self.options.given.get("top_k") or SHOWN, scores.shape[-1])
        masks = [
            [{"token": self.processing.decode([i]).strip(), "score": s} for s, i in zip(*line, strict=True)]
            for line in zip(*(part.tolist() for part in scores.topk(most)), strict=True)
        ]
        parts = item["text"].split(self.processing.mask_token)
        said = [found[0]["token"] for found in masks]
        said += [self.processing.mask_token] * (len(parts) - 1 - len(said))  # behind the cut
        return {"text": "".join(a + b for a, b in zip(parts, [*said, ""], strict=True)), "masks": masks}

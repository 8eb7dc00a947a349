"""Masks that are filled: the tokens and scores of transformers' own pipeline."""

from __future__ import annotations

import json

import pytest
from transformers import pipeline

from layerpeft.cli import main
from layerpeft.recipe.shipped import resolve

TEXTS = ["Ana moved from [MASK] to Lima .", "the [MASK] of [MASK] fell", "ünï [MASK]"]


def test_masks_are_filled_as_the_pipeline_does(tmp_path, capsys):
    toy = resolve("layerpeft://toy-bert")
    long = "[MASK] " + "the " * 300 + "[MASK]"
    rows = [*({"text": text} for text in TEXTS), {"text": "no mask"}, {"text": None}, {"text": long}]
    rows.append({"text": "the " * 300 + "[MASK]"})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    words = ["predict", toy, str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl"), "top_k=3"]
    assert main(words) == 0
    assert "7 rows read, 4 predicted" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = pipeline("fill-mask", toy, top_k=3)
    for text, row in zip(TEXTS, found, strict=False):
        wanted = asked(text)
        wanted = wanted if isinstance(wanted[0], list) else [wanted]
        assert [[one["token"] for one in mask] for mask in row["masks"]] == [
            [one["token_str"] for one in mask] for mask in wanted
        ]
        for mask, other in zip(row["masks"], wanted, strict=True):
            assert [one["score"] for one in mask] == pytest.approx([one["score"] for one in other], rel=1e-4)
    assert found[0]["text"] == f"Ana moved from {found[0]['masks'][0][0]['token']} to Lima ."
    assert "has no [MASK]" in found[3]["reason"] and found[4]["reason"] == "has no text"
    assert len(found[5]["masks"]) == 1 and found[5]["text"].endswith("the [MASK]")  # behind the cut it stays
    assert found[6]["reason"].startswith("has no [MASK] among its first 256 tokens")

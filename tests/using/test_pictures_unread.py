"""Rows with pictures are refused where only the words of a model that sees would be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlavaConfig

from layerpeft.cli import main
from layerpeft.errors import UsageError
from layerpeft.recipe.recipe import Recipe
from layerpeft.using.folder import Trained
from layerpeft.using.kinds import check_seen


def trained(config):
    recipe = Recipe("run", Path("run/recipe.yaml"), "sft", {}, "", None, {})
    return Trained(Path("run"), "base", "AutoModelForImageTextToText", recipe, config)


def test_only_pictures_that_the_model_sees_are_missed():
    with pytest.raises(UsageError, match=r"the rows have pictures \(image\), which run sees"):
        check_seen(trained(LlavaConfig()), ["prompt", "image"])
    check_seen(trained(LlavaConfig()), ["prompt"])
    check_seen(trained(LlamaConfig()), ["prompt", "image"])  # a column that no training read either


@pytest.mark.slow
def test_predict_and_eval_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "vision_sft", "output_dir=run", "max_steps=2", "warmup_steps=0"]) == 0
    for words in (["predict", "--out", "said.csv"], ["eval"]):
        capsys.readouterr()
        assert main([words[0], "run", "layerpeft://scenes_eval.jsonl", *words[1:]]) == 2
        assert "reads words alone" in capsys.readouterr().err
    assert not Path("said.csv").exists()

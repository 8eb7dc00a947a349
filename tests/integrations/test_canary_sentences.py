"""What is used of sentence-transformers beyond its promises: where it builds, saves and reads its transformer."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from layerpeft.integrations import sentences
from layerpeft.recipe.beside import losses
from layerpeft.recipe.shipped import resolve

pytest.importorskip("sentence_transformers", reason="the extra `embeddings` is not installed")


def parts() -> tuple[type, type]:
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.base.modules.transformer import Transformer

    return Transformer, SentenceTransformerTrainer


def test_a_transformer_is_built_in_one_place_and_saves_its_config_apart() -> None:
    transformer, _ = parts()
    assert list(inspect.signature(transformer._load_model).parameters)[:2] == ["self", "model_name_or_path"]
    assert "self.model = self._load_model(" in inspect.getsource(transformer.__init__)
    assert list(inspect.signature(transformer.save).parameters)[:2] == ["self", "output_path"]
    assert list(inspect.signature(transformer.save_config).parameters)[1:2] == ["output_path"]


def test_a_model_is_held_as_it_is_and_its_parts_are_written_without_it(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    model = AutoModel.from_pretrained(resolve("layerpeft://toy-bert"))
    held = sentences.around(model, resolve("layerpeft://toy-bert"))
    assert held.transformers_model is model and sentences.modules_of(resolve("layerpeft://toy-bert")) == []
    sentences.write_parts(held, tmp_path)
    found = [(kind.rpartition(".")[2], place) for kind, place in sentences.modules_of(str(tmp_path))]
    assert found == [("Transformer", ""), ("Pooling", "1_Pooling")] and not sentences.foreign_modules(str(tmp_path))
    assert sorted(sentences.parts_in(tmp_path)) == sorted([*sentences.FILES, "1_Pooling/config.json"])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        sentences.parts_in(tmp_path)
    )
    model.save_pretrained(tmp_path)
    held.tokenizer.save_pretrained(tmp_path)
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(
        again.encode("late again", convert_to_tensor=True), held.encode("late again", convert_to_tensor=True)
    )
    (tmp_path / sentences.FILES[2]).write_text(json.dumps({"max_seq_length": 64}))
    assert sentences.longest_in(str(tmp_path)) == 64 and sentences.longest_in(str(tmp_path / "nowhere")) is None


def test_its_trainer_has_the_methods_that_are_replaced_as_trainer_has_them() -> None:
    _, kind = parts()
    for name in ("_save", "_load_from_checkpoint", "_load_best_model", "add_model_card_callback", "evaluation_loop"):
        assert name in {n for part in kind.__mro__ if part is not Trainer for n in vars(part)}, name
    names = list(inspect.signature(kind.get_batch_sampler).parameters)
    assert names == ["self", "dataset", "batch_size", "drop_last", "valid_label_columns", "generator", "seed"]
    assert list(inspect.signature(Trainer._load_from_checkpoint).parameters)[1:] == ["resume_from_checkpoint", "model"]


def test_it_has_the_losses_and_the_functions_that_recipes_may_name() -> None:
    assert {*losses.LOSSES, losses.NESTS} <= set(sentences.loss_names())
    assert set(sentences.loss_options("TripletLoss")["distance_metric"][1]) == {"COSINE", "EUCLIDEAN", "MANHATTAN"}
    assert {"cos_sim", "dot_score"} <= set(sentences.loss_options("MultipleNegativesRankingLoss")["similarity_fct"][1])
    assert set(losses.USUAL.values()) <= set(losses.LOSSES)
    assert all(form in losses.LOSSES[name] for form, name in losses.USUAL.items())

"""The record of a complete filling: read as it was written, never out of a broken file, and never for other weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from layerpeft.training.prefix.ahead import (
    AHEAD,
    Ahead,
    Filled,
    all_ahead,
    config_digest,
    marks_of,
    read_ahead,
    write_ahead,
)
from layerpeft.training.prefix.disk import Disk

BELONGS = {"weights": "a", "cut": "model.layers.2"}


def checkpoint(folder: Path, *numbers: float) -> Path:
    folder.mkdir()
    save_file({"w": torch.tensor(numbers)}, folder / "model.safetensors")
    return folder


def made(folder: Path) -> Ahead:
    return Ahead(
        BELONGS,
        2,
        None,
        marks_of(folder),
        "c",
        "float32",
        {"a": "nf4"},
        None,
        "float32",
        (-1, 1),
        Filled(3, 9),
        Filled(0, 0),
    )


def a_store(root: Path, belongs: dict[str, str], size: int, limit: int = 2**20) -> Disk:
    store = Disk(root, belongs, limit)
    store.put(bytes(16), torch.ones(size, 4))
    store.flush()
    return store


def test_a_filling_is_read_as_it_was_written_and_never_out_of_a_broken_file(tmp_path):
    found = made(checkpoint(tmp_path / "base", 1.0, 2.0))
    store = a_store(tmp_path / "states", BELONGS, 1)
    assert not list(all_ahead(tmp_path / "states")) and not list(all_ahead(tmp_path / "nowhere"))
    write_ahead(store.folder, found)
    assert list(all_ahead(tmp_path / "states")) == [(store.folder, found)] and found.block == "model.layers.2"
    assert found.differs(cut=2, weights="a", forms=(-1, 1)) == []
    assert found.differs(cut=3, dtype="float32", weights="b") and len(found.differs(cut=3, weights="b")) == 2
    whole = (store.folder / AHEAD).read_bytes()
    for broken in (
        whole[:-40],
        b"[]",
        b"{}",
        whole.replace(b'"format": 1', b'"format": 2'),
        whole.replace(b"cast", b"cost"),
    ):
        (store.folder / AHEAD).write_bytes(broken)
        assert read_ahead(store.folder) is None


def test_other_weights_are_not_taken_for_those_that_were_filled(tmp_path):
    base = checkpoint(tmp_path / "base", 1.0, 2.0)
    found, file = made(base), base / "model.safetensors"
    assert found.holds_of(base)
    assert found.holds_of(checkpoint(tmp_path / "copied later", 1.0, 2.0))
    before = file.stat()
    save_file({"w": torch.tensor([1.0, 3.0])}, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert not found.holds_of(base)
    assert not found.holds_of(checkpoint(tmp_path / "longer", 1.0, 2.0, 3.0))
    with pytest.raises(Exception, match="holds no weights"):
        found.holds_of(tmp_path)


def test_the_config_counts_as_far_as_it_says_how_to_compute():
    config = LlamaConfig(num_hidden_layers=3)
    same = LlamaConfig(num_hidden_layers=3, use_cache=False, num_labels=7, pad_token_id=3, dtype="bfloat16")
    assert config_digest(config) == config_digest(same)
    for other in (
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    ):
        assert config_digest(LlamaConfig(num_hidden_layers=3, **other)) != config_digest(config), other


def test_a_folder_that_was_filled_ahead_makes_room_as_others_do(tmp_path):
    store = a_store(tmp_path / "states", BELONGS, 100)
    write_ahead(store.folder, replace(made(checkpoint(tmp_path / "base", 1.0)), bits=8))
    (store.folder / f".{AHEAD}.0a1b2c3d.tmp").write_bytes(b"of a killed process")
    store.close()
    other = a_store(tmp_path / "states", {"weights": "b"}, 100, 3500)
    assert other.rows == 1 and not store.folder.exists()

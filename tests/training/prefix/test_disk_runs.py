"""Runs whose states are kept in a folder: killed, damaged, full or shared, they end as one that keeps nothing, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.recipe import compare
from layerpeft.training.prefix.disk import Disk
from layerpeft.training.prefix.folders import DATA, Handle
from tests.helpers.killing import child, differing
from tests.helpers.loops import adamw, llama, make_batches, record
from tests.helpers.short import short_llama
from tests.helpers.training import gsm8k_rows, sft

BATCHES, EPOCHS, EVERY = make_batches()[:4], 3, 2
ROWS = sum(len(batch["input_ids"]) for batch in BATCHES)
STATE = 12 * 32 * 4  # bytes of a row's


def wrapped(kept: Any) -> Any:
    torch.manual_seed(3)
    config = LayerLoraConfig(select="last:1", r=4, task_type="CAUSAL_LM", init_lora_weights=False, prefix_cache=kept)
    return get_peft_model(llama(), config)


def trained(kept: Any, checkpoint: Path | None = None, each: Callable[[int], object] = lambda _: None) -> Any:
    """Three epochs of four steps, from a checkpoint where there is one, with one after every second; the model, and its losses."""
    model, losses = wrapped(kept), {}
    optimizer = adamw(model.train())
    if checkpoint is not None and checkpoint.exists():
        found = torch.load(checkpoint)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        losses = found["losses"]
    for step in range(len(losses), EPOCHS * len(BATCHES)):
        each(step)
        loss = model(**BATCHES[step % len(BATCHES)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
        if checkpoint is not None and step % EVERY == 1:
            found = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            torch.save(found, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    cache = record(model).prefix
    if cache is not None and cache.store is not None:
        cache.store.close()
    return model, losses


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    model, losses = trained(None)
    return model.state_dict(), losses


def equals(plain: Any, model: Any, losses: dict[int, float]) -> bool:
    return losses == plain[1] and not differing(model.state_dict(), plain[0])


def of(model: Any) -> tuple[str | None, int, int]:
    cache = record(model).prefix
    return cache.why, cache.hits, cache.misses


def dying(folder: Path, step: int, write: int, share: float) -> None:
    """Trains, and is killed: before a step, or in a write of states, of which a share of the bytes gets there."""
    whole, calls, first = Handle.write, [0], []

    def cut(self: Handle, data: memoryview, offset: int) -> None:
        calls[0] += 1
        if calls[0] == write:
            whole(self, data[: int(len(data) * share)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, data, offset)

    def each(now: int) -> None:
        first.append(now)
        if now - first[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Handle.write = cut  # type: ignore[method-assign]
    trained(str(folder / "kept"), folder / "checkpoint", each)


def damaged(folder: Path, draw: random.Random) -> None:
    for file in folder.rglob(f"*{DATA}"):
        data = bytearray(file.read_bytes())
        if data:
            data[draw.randrange(len(data))] ^= 8
            file.write_bytes(data)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_runs_that_are_killed_and_whose_entries_are_damaged_resume_to_the_bit(tmp_path, plain, kills):
    draw, done, round_ = random.Random(kills), 0, 0
    while done < kills:
        folder = tmp_path / str(round_)
        folder.mkdir(exist_ok=True)
        step, write = draw.randint(1, 4), draw.choice([1, 2, 3, 99])
        pid = child(lambda f=folder, s=step, w=write: dying(f, s, w, draw.random()))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        done += status != 0
        if not status or done == kills:
            model, losses = trained(str(folder / "kept"), folder / "checkpoint")
            assert equals(plain, model, losses) and of(model)[0] is None
            again, losses = trained(str(folder / "kept"))  # with what is kept there
            assert equals(plain, again, losses) and of(again)[1] > (EPOCHS - 1) * ROWS, of(again)
            round_ += 1
        damaged(folder, draw)


def test_a_second_run_finds_what_the_first_has_kept_and_another_base_does_not(tmp_path, plain):
    first, losses = trained(str(tmp_path))
    assert equals(plain, first, losses) and of(first) == (None, (EPOCHS - 1) * ROWS, ROWS)
    second, losses = trained({"where": str(tmp_path), "limit": "1MB"})
    proved = len(BATCHES[0]["input_ids"])
    assert equals(plain, second, losses) and of(second) == (None, EPOCHS * ROWS - proved, proved)
    other = wrapped(str(tmp_path))
    with torch.no_grad():
        other.get_base_model().model.layers[0].mlp.down_proj.weight.add_(0.01)
    for batch in BATCHES:
        other(**batch)
    assert of(other) == (None, 0, ROWS)


def test_a_limit_and_a_folder_that_cannot_be_made_cost_speed_alone(tmp_path, plain):
    small = 3 * STATE + 1000
    model, losses = trained({"where": str(tmp_path / "small"), "limit": small})
    assert equals(plain, model, losses) and of(model) == (None, (EPOCHS - 1) * 2, EPOCHS * ROWS - (EPOCHS - 1) * 2)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) <= small
    (tmp_path / "file").touch()
    model, losses = trained(str(tmp_path / "file" / "in it"))
    assert equals(plain, model, losses) and of(model)[:2] == (None, 0)


def test_eight_bits_take_a_quarter_of_float32_and_hardly_move_the_loss(tmp_path, plain):
    model, losses = trained({"where": str(tmp_path), "bits": 8})
    kept = sum(file.stat().st_size for file in tmp_path.rglob(f"*{DATA}"))
    assert kept == ROWS * 12 * (32 + 4) and of(model) == (None, (EPOCHS - 1) * ROWS, ROWS)
    assert losses != plain[1]
    assert max(abs(losses[step] - plain[1][step]) for step in losses) < 5e-3


def test_a_trainer_has_the_rows_of_its_next_batch_read_before_they_are_asked_for(tmp_path, monkeypatch):
    told, asked, get = [], [], Disk.get
    monkeypatch.setattr(Disk, "ahead", lambda self, keys: told.extend(keys))
    monkeypatch.setattr(Disk, "get", lambda self, keys: (asked.append((list(keys), set(told))), get(self, keys))[1])
    config = LayerLoraConfig(select="last:2", r=4, prefix_cache=f"{tmp_path}/kept")
    trainer = sft(gsm8k_rows().select(range(6)), tmp_path, config, max_steps=-1, num_train_epochs=3, save_strategy="no")
    trainer.train()
    assert trainer.model is not None and record(trainer.model).prefix.hits == 12
    later = asked[-5:]  # of three batches an epoch; one is ready before the model has run
    assert all(known.issuperset(keys) for keys, known in later)


@pytest.mark.slow
def test_arms_at_one_cut_fill_a_folder_once(tmp_path, monkeypatch, capsys):
    """`compare`: whatever an arm trains of the last layer, what enters it is computed once; a batch proves in each."""
    monkeypatch.chdir(tmp_path)
    arms, load, forward = [], compare.load_model, LlamaDecoderLayer.forward

    def counted(block: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if block.self_attn.layer_idx == 0:
            arms[-1] += len(states)
        return forward(block, states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    monkeypatch.setattr(compare, "load_model", lambda *a: (arms.append(0), load(*a))[1])
    words = ["quickstart", f"model_name_or_path={short_llama(3)}", "output_dir=out", "max_length=48", "max_steps=-1"]
    words += ["max_train_samples=8", "max_eval_samples=4", "num_train_epochs=2", "pad_to_multiple_of=48"]
    words += [
        'columns={text: "{answer}"}',
        "per_device_train_batch_size=2",
        "per_device_eval_batch_size=2",
        "warmup_steps=0",
    ]
    chosen = 'layerpeft.select={by: weight_norm, unit: target, layers: "last:7", keep: 3}'
    words += [chosen, "layerpeft.target_modules=all-linear", "layerpeft.prefix_cache=./kept"]
    assert main(["compare", *words, "--arms", "random:4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 5
    first, *later = [n for n in arms if n]
    proof = 2 * (2 + 1)  # a batch of training and one of evaluation, and a row of each by itself
    assert first == 8 + 4 + 2 and later == [proof] * 4

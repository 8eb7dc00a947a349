"""Loops and trainers with `prefix_cache`: equal to runs without it, and whatever would make states wrong switches it off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.errors import ConfigError
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.recipe import layer_config
from layerpeft.recipe.shipped import beside
from layerpeft.training.exits import with_exits
from layerpeft.training.prefix.below import Below, why_off
from layerpeft.training.prefix.setting import Setting, placed
from tests.helpers.bounds import OTHER_PADDING
from tests.helpers.kept import cache_of, equal
from tests.helpers.loops import adamw, llama, make_batches
from tests.helpers.repeating import some
from tests.helpers.short import short_llama
from tests.helpers.training import gsm8k_rows, sft

BATCHES = make_batches()[:2]
METHODS: dict[str, Any] = {
    "lora": lambda **o: LayerLoraConfig(r=4, init_lora_weights=False, **o),
    "galore": lambda **o: LayerGaloreConfig(r=4, update_proj_gap=2, **o),
    "full": lambda **o: LayerFullConfig(**o),
}


def wrapped(method: str = "lora", base: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    config = METHODS[method](select="last:2", task_type="CAUSAL_LM", **options)
    return get_peft_model(llama() if base is None else base, config)


def epochs(model: Any, number: int = 3) -> list[float]:
    optimizer, losses = adamw(model), []
    for _ in range(number):
        for batch in BATCHES:
            loss = model.train()(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_every_method_begins_at_the_cut_and_a_block_below_runs_once_for_each_row(method: str):
    plain, model = wrapped(method), wrapped(method, prefix_cache="memory")
    ran = []
    below = model.get_base_model().model.layers[0].mlp.down_proj
    below.register_forward_hook(lambda *_: ran.append(1))
    below._forward_hooks.clear()
    own = type(below).forward
    below.forward = lambda x: (ran.append(1), own(below, x))[1]
    assert epochs(model) == epochs(plain)
    assert equal(model, plain)
    cache = cache_of(model)
    rows = sum(len(b["input_ids"]) for b in BATCHES)
    assert (cache.why, cache.hits, cache.misses) == (None, 2 * rows, rows)
    assert len(ran) == len(BATCHES) + 1  # and one row by itself, for the proof


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_again_from_what_is_kept(reentrant: bool):
    plain, model = wrapped(), wrapped(prefix_cache="memory")
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
    assert epochs(model) == epochs(plain)
    assert equal(model, plain)
    assert cache_of(model).hits


def two_then_backward(model: Any) -> list[float]:
    optimizer, losses = adamw(model), []
    for _ in range(3):
        found = [model.train()(**batch).loss for batch in BATCHES]  # both passes before the first goes back
        sum(found).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.item() for loss in found]
    return losses


def test_several_passes_in_flight_keep_to_their_own_states():
    plain, model = wrapped(), wrapped(prefix_cache="memory")
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": False})
    assert two_then_backward(model) == two_then_backward(plain)
    assert equal(model, plain)


def test_the_same_row_is_found_under_other_padding_and_in_other_company():
    model = wrapped(prefix_cache="memory")
    epochs(model, 1)
    ids = BATCHES[0]["input_ids"][:1]
    other = torch.cat([ids, torch.full((1, 3), 5)], 1), torch.tensor([[1] * ids.shape[1] + [0] * 3])
    cache, plain = cache_of(model), wrapped()
    plain.load_state_dict(model.state_dict())
    for found in (0, 1):  # the first batch with padding proves that this is no matter
        with torch.no_grad():
            ours, theirs = (
                m(input_ids=other[0], attention_mask=other[1], use_cache=False).logits for m in (model, plain)
            )
        assert cache.hits == found
    real = other[1].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


def test_padding_on_the_left_is_another_row():
    model = wrapped(prefix_cache="memory")
    epochs(model, 1)
    ids, cache = BATCHES[0]["input_ids"][:1], cache_of(model)
    left = torch.cat([torch.zeros(1, 2).long(), ids], 1), torch.tensor([[0] * 2 + [1] * ids.shape[1]])
    hits = cache.hits
    model(input_ids=left[0], attention_mask=left[1])
    assert cache.hits == hits


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "past_key_values"])
def test_passes_that_need_every_layer_are_computed_whole(asked: str):
    model = wrapped(prefix_cache="memory")
    epochs(model, 2)
    plain = wrapped()
    plain.load_state_dict(model.state_dict())
    hits = cache_of(model).hits
    if asked == "past_key_values":
        found = [m.eval().generate(BATCHES[0]["input_ids"], max_new_tokens=3, do_sample=False) for m in (model, plain)]
        assert torch.equal(*found)
    else:
        for m in (model, plain):
            m.config._attn_implementation = "eager"
        found = [m(**BATCHES[0], **{asked: True}) for m in (model, plain)]
        names = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}
        ours, theirs = (getattr(f, names[asked]) for f in found)
        assert all(map(torch.equal, ours, theirs))
    assert cache_of(model).hits == hits


def test_weights_that_change_below_the_cut_make_states_stale():
    plain, model = wrapped(), wrapped(prefix_cache="memory")
    losses = []
    for each in (plain, model):
        found = epochs(each, 2)
        with torch.no_grad():
            each.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(1.5)
        losses.append(found + epochs(each, 2))
    assert losses[0] == losses[1]
    assert cache_of(model).why is None


@pytest.mark.parametrize("what", ["hook", "adapter", "trains", "noise"])
def test_what_makes_the_lower_part_no_function_of_a_row_switches_it_off_at_any_time(what: str):
    def change(model: Any) -> None:
        base = model.get_base_model()
        if what == "hook":
            base.model.layers[0].register_forward_hook(lambda _m, _a, y: y * 1.01)
        elif what == "adapter":
            torch.manual_seed(9)
            model.add_adapter("other", LoraConfig(r=2, layers_to_transform=[0], init_lora_weights=False))
            model.base_model.set_adapter(["default", "other"])
        elif what == "trains":
            base.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
        else:
            base.model.embed_tokens.register_forward_hook(lambda _m, _a, y: y + torch.randn_like(y))

    if what == "adapter":  # which trains as well, so that the cut is gone
        model = wrapped(prefix_cache="memory")
        epochs(model, 1)
        change(model)
        epochs(model, 1)
        assert cache_of(model).why is not None
        return
    losses, model = [], None
    for options in ({}, {"prefix_cache": "memory"}):
        model = wrapped(**options)
        if what == "noise":
            change(model)
        torch.manual_seed(21)
        first = epochs(model, 1)
        if what != "noise":
            change(model)
        losses.append(first + epochs(model, 2))
    assert losses[0] == losses[1]
    assert cache_of(model).why is not None


@pytest.mark.parametrize("place", ["", "model", "model.layers.0.mlp", "model.layers.3.self_attn", "model.norm"])
def test_whatever_is_compiled_runs_as_a_whole(place: str):
    base: Any = llama()
    lower = Below(tuple(f"model.layers.{i}" for i in range(len(base.model.layers))), 2)
    assert why_off(base.requires_grad_(False), lower) is None
    base.get_submodule(place).compile()
    assert "compiled" in str(why_off(base, lower))


def test_weights_that_zero_3_divides_are_gathered_as_in_whole_passes():
    base: Any = llama().requires_grad_(False)
    weight = base.model.layers[0].mlp.down_proj.weight
    weight.ds_tensor = weight.detach()  # a process's part of it, as DeepSpeed marks it
    assert "ZeRO-3" in str(why_off(base, Below(tuple(f"model.layers.{i}" for i in range(4)), 2)))


@pytest.mark.parametrize("what", ["distill", "exits"])
def test_what_looks_at_layers_below_switches_it_off(what: str):
    losses, model = [], None
    for options in ({}, {"prefix_cache": "memory"}):
        model = wrapped(**options, **({"distill": {"layers": [0, 3], "weight": 0.5}} if what == "distill" else {}))
        if what == "exits":
            with_exits(model, [1, 4])
        losses.append(epochs(model, 2))
    assert losses[0] == losses[1]
    assert "a hook waits" in cache_of(model).why


def test_a_copy_of_the_model_keeps_states_of_its_own():
    model = wrapped(prefix_cache="memory")
    epochs(model, 1)
    twin = copy.deepcopy(model)
    assert cache_of(twin) is not cache_of(model)
    assert epochs(twin, 2) == epochs(model, 2)
    assert cache_of(twin).misses < cache_of(model).misses + 1


def test_a_choice_that_waits_is_made_before_anything_is_kept():
    losses = []
    for options in ({}, {"prefix_cache": "memory"}):
        torch.manual_seed(3)
        config = LayerLoraConfig(
            select={"by": "gradient_norm", "keep": 1, "layers": [2, 3], "num_batches": 1}, r=4, **options
        )
        model: Any = get_peft_model(llama(), config)
        losses.append(epochs(model))
    assert losses[0] == losses[1]
    assert cache_of(model).hits


def test_schedules_and_plain_choices_say_that_it_is_off():
    model: Any = get_peft_model(
        llama(), LayerLoraConfig(select={"by": "random", "keep": 1, "reselect_steps": 2}, r=4, prefix_cache="memory")
    )
    assert "change while training" in cache_of(model).why
    model = get_peft_model(llama(), LayerLoraConfig(r=4, prefix_cache="memory"))
    epochs(model, 1)
    assert "nothing lies below" in cache_of(model).why


def test_runs_share_a_folder_which_is_filled_once(tmp_path: Path):
    caches, rows = [], sum(len(b["input_ids"]) for b in BATCHES)
    losses = [epochs(wrapped(), 2)]
    for _ in range(3):
        model = wrapped(prefix_cache=f"{tmp_path}/kept")
        losses.append(epochs(model, 2))
        caches.append(cache_of(model))
        caches[-1].store.flush()
    assert all(found == losses[0] for found in losses)
    first = len(BATCHES[0]["input_ids"])  # which proves, in each of them
    assert [(c.hits, c.misses) for c in caches] == [(rows, rows), (2 * rows - first, first), (2 * rows - first, first)]
    changed: Any = llama()
    with torch.no_grad():
        changed.model.embed_tokens.weight[7] += 1
    other = wrapped(base=changed, prefix_cache=f"{tmp_path}/kept")
    epochs(other, 1)
    assert cache_of(other).misses == rows
    assert cache_of(other).store.folder != caches[0].store.folder


@pytest.mark.parametrize("bits", [None, 8])
def test_in_8_bits_states_take_a_quarter_of_float32_and_losses_stay_near(bits: int | None):
    kept: Any = {"where": "memory", "bits": bits} if bits else "memory"
    plain, model = wrapped(), wrapped(prefix_cache=kept)
    theirs, ours = epochs(plain), epochs(model)
    cache, numbers = cache_of(model), sum(b["input_ids"].numel() for b in BATCHES)
    width = model.config.hidden_size
    assert cache.store.size == numbers * (width + 4 if bits else 4 * width)
    assert cache.hits
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= (1e-3 if bits else 0)


SETTINGS = [
    ("memory", Setting()),
    ("disk", Setting("disk")),
    ("20GB", Setting("disk", 20 * 10**9)),
    ("./kept", Setting("./kept")),
    ({"where": "memory", "limit": "1MiB", "bits": 8}, Setting("memory", 2**20, 8)),
]


@pytest.mark.parametrize(("value", "setting"), SETTINGS)
def test_settings_are_read_and_written(value: Any, setting: Setting):
    assert Setting.parse(value) == setting == Setting.parse(setting.plain())


def test_wrong_settings_are_named_together():
    with pytest.raises(ConfigError) as error:
        LayerLoraConfig(select="last:1", prefix_cache={"where": 3, "limit": "much", "bit": 8}, lower_dropout="of")
    assert all(word in str(error.value) for word in ("'bit'", "limit: 'much'", "lower_dropout='of'", "memory, disk"))
    with pytest.raises(ConfigError, match=r"Did you mean 'memory'\? A folder is written as './memroy'"):
        LayerLoraConfig(select="last:1", prefix_cache="memroy")


def test_a_folder_in_a_recipe_is_found_as_all_its_paths_and_made_where_one_works(tmp_path: Path, monkeypatch: Any):
    """And never among the recipes of the package."""
    (tmp_path / "work").mkdir()
    (tmp_path / "recipes" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")

    def found(value: Any) -> Any:
        return placed(value, lambda name: beside(name, tmp_path / "recipes"))

    assert found("./kept") == str(tmp_path / "work" / "kept")
    assert found({"where": "./there", "limit": "1GB"}) == {"where": str(tmp_path / "recipes/there"), "limit": "1GB"}
    assert [found(v) for v in ("memory", "20GB", "/kept", None)] == ["memory", "20GB", "/kept", None]
    ours = load_recipe("quickstart", ["layerpeft.prefix_cache=./kept", "layerpeft.select=last:2"])
    assert layer_config(ours).prefix_cache == str(tmp_path / "work" / "kept")


# ---- trainers

TRAINED = {
    "sft": {"pad_to_multiple_of": 32},
    "accumulated": {"pad_to_multiple_of": 32, "gradient_accumulation_steps": 2},
    "packed": {"packing": True, "max_length": 64, "per_device_train_batch_size": 1},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 1},
    "bf16": {"pad_to_multiple_of": 32, "bf16": True},
}


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64}
CLASSES: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)),
}
RATE = {"learning_rate": 1e-2, "save_strategy": "no"}
PLAIN = {**RATE, "bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1}


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_twice(build: Callable[[LayerLoraConfig], Any]) -> Any:
    """The cache of a trainer's run that keeps states, which ends as the same run without does, to the bit."""
    found = []
    for kept in (None, "memory"):
        torch.manual_seed(11)
        trainer = build(LayerLoraConfig(select="last:2", r=4, prefix_cache=kept))
        trainer.train()
        found.append(trainer)
    assert losses_of(found[1]) == losses_of(found[0])
    assert equal(found[1].model, found[0].model)
    cache = cache_of(found[1].model)
    assert cache.why is None
    return cache


@pytest.mark.parametrize("name", some(TRAINED, ["accumulated", "packed"]))
def test_sft_is_equal_to_the_bit_where_batches_have_one_shape(name: str, tmp_path: Any):
    rows, options = gsm8k_rows().select(range(6)), {"max_steps": -1, "num_train_epochs": 3, **RATE, **TRAINED[name]}
    cache = trained_twice(lambda config: sft(rows, tmp_path, config, **options))
    assert cache.hits == 2 * cache.misses


@pytest.mark.parametrize("kind", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_reference_shares_the_lower_part_of_the_same_step(kind: str, tmp_path: Any):
    rows = [(r["prompt"], r["completion"]) for r in gsm8k_rows().select(range(6))]
    if kind == "dpo":
        made = [{"prompt": p, "chosen": c, "rejected": " no" + c[:9]} for p, c in rows]
        config, trainer = DPOConfig, DPOTrainer
    else:
        made = [{"prompt": p, "completion": c, "label": i % 2 == 0} for i, (p, c) in enumerate(rows)]
        config, trainer = KTOConfig, KTOTrainer
    given = {**PLAIN, "max_steps": 6, "max_length": 64}
    given |= (
        {"per_device_train_batch_size": 2, "pad_to_multiple_of": 64}
        if kind == "dpo"
        else {"per_device_train_batch_size": 6}
    )
    cache = trained_twice(
        lambda chosen: trainer(
            str(short_llama()),
            args=config(str(tmp_path), **given),
            train_dataset=Dataset.from_list(made),
            peft_config=chosen,
        )
    )
    assert cache.hits >= 3 * cache.misses  # in the first epoch half of all passes, later all


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_classes_are_learnt_and_evaluated_from_the_cut(kind: str, tmp_path: Any):
    """A trainer of transformers, with dropout above the cut, rows of one length, an evaluation after each epoch."""
    draw = torch.Generator().manual_seed(2)
    ids = [torch.randint(5, 60, (9,), generator=draw).tolist() for _ in range(8)]
    rows = Dataset.from_list([{"input_ids": i, "attention_mask": [1] * 9, "labels": sum(i) % 3} for i in ids])
    given = {"num_train_epochs": 3, "eval_strategy": "epoch", "per_device_train_batch_size": 2, "seed": 5, **RATE}

    def build(config: LayerLoraConfig) -> Trainer:
        base = CLASSES[kind]()
        if kind == "bert" and config.prefix_cache is None:  # what `lower_dropout: off` is, by hand
            for module in (*base.bert.embeddings.modules(), *base.bert.encoder.layer[0].modules()):
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        off = "off" if config.prefix_cache else None
        model = get_peft_model(base, replace(config, task_type="SEQ_CLS", lower_dropout=off))
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **given)
        return Trainer(model, args, train_dataset=rows, eval_dataset=rows.select(range(4)))

    cache = trained_twice(build)
    assert (cache.misses, cache.hits) == (8 + 4, 2 * (8 + 4))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_padding_that_differs_changes_no_more_than_another_shape_of_batches(bf16: bool, tmp_path: Any):
    """Rows come in other company in every epoch, so that batches that are kept and batches that are not differ in their padding."""
    rows = gsm8k_rows().select(range(12))

    def losses(kept: str | None = None, **shape: int) -> torch.Tensor:
        torch.manual_seed(11)
        options = {"max_steps": -1, "num_train_epochs": 3, "bf16": bf16, **RATE, **shape}
        trainer = sft(rows, tmp_path, LayerLoraConfig(select="last:2", r=4, prefix_cache=kept), **options)
        trainer.train()
        assert kept is None or cache_of(trainer.model).hits == 24
        return torch.tensor(losses_of(trainer), dtype=torch.float64)

    plain = losses()
    found = (losses("memory") - plain).abs()
    assert not found[:6].any()  # computed whole
    assert bf16 or found.max() < OTHER_PADDING
    shapes = ({"pad_to_multiple_of": 32}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
    assert found[6:].mean() <= max((losses(**shape) - plain)[6:].abs().mean() for shape in shapes)


def test_one_epoch_and_streams_leave_it_off(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setenv("LAYERPEFT_QUIET", "0")
    rows = gsm8k_rows().select(range(4))
    for given, why in ((rows, "one epoch"), (rows.to_iterable_dataset(), "streamed")):
        config = LayerLoraConfig(select="last:2", r=4, prefix_cache="memory")
        trainer = sft(given, tmp_path, config, max_steps=2, save_strategy="no")
        trainer.train()
        cache = cache_of(trainer.model)
        assert (cache.hits, cache.misses) == (0, 0)
        assert f"prefix_cache is off: {'one epoch without' if why == 'one epoch' else 'rows that are streamed'}" in (
            capsys.readouterr().err
        )


@pytest.mark.slow
def test_rows_that_a_trainer_makes_itself_serve_a_step_and_go(tmp_path: Any):
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in gsm8k_rows().select(range(6))])
    given = {**PLAIN, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8, "beta": 0.1}
    cache = trained_twice(
        lambda config: GRPOTrainer(
            str(short_llama()),
            reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
            args=GRPOConfig(str(tmp_path), **given, num_iterations=2, max_steps=4),
            train_dataset=rows,
            peft_config=config,
        )
    )
    assert cache.hits
    assert cache.store.rows <= cache.newest

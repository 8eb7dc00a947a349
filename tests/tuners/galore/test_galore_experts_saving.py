"""Experts that were trained by projection, on disk: stock LoRA for plain PEFT, and a state to go on from."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import layerpeft
from layerpeft.errors import SaveError
from layerpeft.tuners.galore.projection import as_stored, state_of, tensors, trained_of
from layerpeft.tuners.merge import merge
from tests.helpers.expert_models import EXPERTS, RANK, batches, build, modules, run, wrap
from tests.helpers.loops import adamw
from tests.helpers.processes import without_the_package
from tests.tuners.galore.test_galore_saving import PLAIN

IDS = batches(1)[0]["input_ids"]
SCENES = {
    "mixtral": ("mixtral", {}, 9),
    "left": ("mixtral", {"proj_type": "left"}, 9),
    "with modules": ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}, 9),
    "another name": ("qwen2_moe", {"subspace": "random", "fold": "base"}, 9),
    "stored the other way": ("gpt_oss", {"proj_type": "std"}, 9),
    "beyond all rank": ("mixtral", {"r": 8}, 25),
    "more than the weight has": ("qwen3_moe", {"r": 40}, 9),
    "one weight": ("gpt_oss", {"target_parameters": ["experts.down_proj"]}, 9),
}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Scene -> (live model, its folder, that of its base)."""
    root, found = tmp_path_factory.mktemp("experts"), {}
    for number, (scene, (name, options, steps)) in enumerate(SCENES.items()):
        base = build(name)
        base.save_pretrained(root / name)
        model = run(wrap(base, update_proj_gap=2, **options), steps)
        assert all(state_of(layer).folds.count >= 2 for layer in modules(model).values())
        model.save_pretrained(root / str(number))
        found[scene] = model, root / str(number), root / name
    return found


def test_plain_peft_gives_the_logits_of_the_live_model_without_the_package(saved):
    pairs = [(str(base), str(folder)) for _, folder, base in saved.values()]
    done = without_the_package(PLAIN, json.dumps(IDS.tolist()), json.dumps(pairs))
    assert done.returncode == 0, done.stderr[-2000:]
    for got, (scene, (model, *_)) in zip(json.loads(done.stdout.splitlines()[-1]), saved.items(), strict=True):
        got, untouched = torch.tensor(got), logits(build(SCENES[scene][0]))
        assert float((got - logits(model)).abs().max()) <= 1e-4, scene
        assert float((got - untouched).abs().max()) > 2e-3, f"{scene} trained nothing"


def test_ranks_are_those_of_the_folds_and_no_larger_than_the_weights(saved):
    for scene, (model, folder, _) in saved.items():
        weights = load_file(folder / "adapter_model.safetensors")
        ranks, needed = set(), []
        for layer in modules(model).values():
            state = state_of(layer)
            ranks.add(weights[f"base_model.model.{state.path}.lora_A.weight"].shape[0] // (state.experts or 1))
            out, into = state.folds.out, state.folds.into
            needed.append(min(out, into, state.folds.rank + min(SCENES[scene][1].get("r", RANK), out, into)))
        assert ranks == {max(needed)}, scene
    assert all(state_of(layer).folds.dense is not None for layer in modules(saved["beyond all rank"][0]).values())


def test_the_folder_is_merged_and_loaded_by_the_package(saved, tmp_path):
    model, folder, _ = saved["stored the other way"]
    loaded = layerpeft.load(folder, build("gpt_oss"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)
    merge(folder, tmp_path / "merged", build("gpt_oss"))
    merged = type(build("gpt_oss")).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)


def snapshot(model):
    found = {f"{n}|{k}": t.clone() for n, layer in modules(model).items() for k, t in tensors(layer).items()}
    return found | {n: p.detach().clone() for n, p in model.named_parameters()}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.spread(3)
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "side"), [("sketch", "right"), ("sketch", "left"), ("svd", "right"), ("random", "left")]
)
@pytest.mark.parametrize("at", [3, 4])
def test_a_loop_goes_on_bit_for_bit(tmp_path, kind, side, at):
    options = {"subspace": kind, "proj_type": side, "moments": "project", "gap_overlap": 0.2, "update_proj_gap": 3}
    whole = wrap(target_modules=["q_proj"], **options)
    optimizer = adamw(whole)
    run(whole, at, optimizer)
    whole.save_pretrained(tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    run(whole, 6, optimizer, start=at)
    twin = wrap(target_modules=["q_proj"], **options)
    twin.load_adapter(tmp_path, "default", is_trainable=True)
    again = adamw(twin)
    again.load_state_dict(kept)
    run(twin, 6, again, start=at)
    assert same(snapshot(twin), snapshot(whole))
    assert {state_of(layer).folds.count for layer in modules(twin).values()} != {0}


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_short_weights_hold_what_is_saved_and_go_on_bit_for_bit(tmp_path, name):
    model = run(wrap(build(name, dtype=torch.bfloat16), update_proj_gap=2), 9, rate=3e-2)
    assert {trained_of(layer).dtype for layer in modules(model).values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    for layer in modules(model).values():
        state, weight = state_of(layer), layer.get_param()
        change = as_stored(layer, state.folds.sum())
        rounded = (state.original.float() + change).bfloat16()
        assert weight.dtype == torch.bfloat16 and not torch.equal(weight, state.original)
        # rounded at random, by one step at most
        assert float((weight.float() - rounded.float()).abs().max()) <= 2**-7 * float(weight.float().abs().max())
    wide = peft.PeftModel.from_pretrained(build(name, dtype=torch.bfloat16).float(), tmp_path)
    live = copy.deepcopy(model)
    for layer in modules(live).values():
        layer.get_param().data = layer.get_param().data.float()
    torch.testing.assert_close(logits(wide), logits(live.float()), atol=1e-4, rtol=0)
    twin = wrap(build(name, dtype=torch.bfloat16), update_proj_gap=2)
    twin.load_adapter(tmp_path, "default")
    assert same(snapshot(twin), snapshot(model)) and torch.equal(logits(twin), logits(model))


def test_a_named_rank_is_kept_and_its_error_is_told(tmp_path):
    model = run(wrap(update_proj_gap=2, max_rank=6), 9)
    model.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "layerpeft.json").read_text())
    told, weights = manifest["checks"]["max_rank"], load_file(tmp_path / "adapter_model.safetensors")
    assert told["rank"] == 6 and 0 < told["largest_error"] < 1
    plain = peft.PeftModel.from_pretrained(build(), tmp_path)
    errors = []
    for layer in modules(model).values():
        state = state_of(layer)
        assert weights[f"base_model.model.{state.path}.lora_A.weight"].shape[0] == 4 * 6
        (wrapper,) = [m for m in plain.modules() if getattr(m, "parameter_name", "") and paths(plain, m) == state.path]
        whole = torch.cat([state.folds.sum() + layer.get_delta_weight("default")])
        got = wrapper.get_delta_weight("default")
        errors.append(float((whole - got).norm() / whole.norm()))
    assert max(errors) == pytest.approx(told["largest_error"], rel=1e-3)


def paths(model, module):
    return next(n for n, m in model.base_model.model.named_modules() if m is module)


def test_a_state_of_other_experts_is_not_taken(tmp_path):
    run(wrap(update_proj_gap=2), 4).save_pretrained(tmp_path)
    other = wrap(update_proj_gap=2, proj_type="left")
    before = snapshot(other)
    with pytest.raises(SaveError, match="proj_type: 'right' then, 'left' now"):
        other.load_adapter(tmp_path, "default")
    assert same(snapshot(other), before)


def test_trained_further_it_is_ordinary_lora_on_experts(tmp_path):
    model = run(wrap(update_proj_gap=2), 5)
    model.save_pretrained(tmp_path)
    further = peft.PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    assert further.peft_config["default"].peft_type == "LORA"
    assert sorted(further.peft_config["default"].target_parameters) == sorted(modules(model))
    start = logits(further)
    torch.testing.assert_close(start, logits(model), atol=1e-4, rtol=0)
    run(further.train(), 2)
    assert not torch.allclose(logits(further), start, atol=1e-3)
    assert EXPERTS[0].rpartition(".")[2] in "".join(modules(model))


def test_trainer_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for b in batches(8) for row in b["input_ids"]]

    def train(folder, checkpoint=None):
        model = wrap(update_proj_gap=3, target_modules=["q_proj"])
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "weight_decay": 0.0}
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=9, save_steps=4, learning_rate=1e-2, **quiet
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, data_collator=transformers.default_data_collator
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return model

    whole = train("whole")
    assert same(snapshot(train("again", str(tmp_path / "whole" / "checkpoint-4"))), snapshot(whole))
    assert all(state_of(layer).folds.count >= 2 for layer in modules(whole).values())

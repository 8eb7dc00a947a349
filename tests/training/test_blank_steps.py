"""Steps that show nothing: no label in their batches, equal rewards. They prove nothing either way; the next one is asked."""

import json

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.errors import TrainingError
from tests.conftest import LLAMA
from tests.helpers.loops import BY_GRADIENT, adamw, llama, make_batches, record
from tests.helpers.quanting import wide
from tests.helpers.training import sft

LABELLED = make_batches()
BLANK = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in LABELLED]
UNIFORM = {"pick": "uniform", "keep": 1, "reselect_steps": 1, "seed": 1}
BY_ADAPTERS = {"by": "adapter_gradient", "keep": 1, "reselect_steps": 2}


def wrap(select, kind=LayerLoraConfig):
    rank = {} if kind is LayerFullConfig else {"r": 2}
    torch.manual_seed(3)
    return get_peft_model(llama(), kind(select=select, target_modules=["q_proj", "v_proj"], **rank)).train()


def steps(model, batches, rewards=1.0):
    """One on each of `batches`, or on each list of them."""
    optimizer = adamw(model, weight_decay=0.0)
    for step in batches:
        for batch in step if isinstance(step, list) else [step]:
            (model(**batch).loss * rewards).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n or p.requires_grad}


@pytest.mark.spread(3)
@pytest.mark.parametrize("kind", [LayerLoraConfig, LayerGaloreConfig, LayerFullConfig])
@pytest.mark.parametrize(
    "select", ["last:2", BY_GRADIENT, UNIFORM, BY_ADAPTERS], ids=["last", "waits", "turns", "measured"]
)
def test_a_first_step_without_labels_is_passed_over(select, kind, caplog):
    if select is BY_ADAPTERS and kind is not LayerLoraConfig:
        select = {**BY_GRADIENT, "reselect_steps": 2}
    caplog.set_level("INFO")
    model = wrap(select, kind)
    steps(model, [BLANK[0], *LABELLED[:4], BLANK[1], LABELLED[0]])
    layerpeft.check_trained(model)
    assert record(model).checks["first_step"] == "every chosen target moved"
    assert (
        "shows nothing" in caplog.text or "only measures (0 of 1 batches (all gradients are exactly zero" in caplog.text
    )


def test_what_trains_then_is_what_plain_peft_trains():
    batches = [BLANK[0], LABELLED[0], [BLANK[1], LABELLED[1]], BLANK[2], LABELLED[2]]
    mine = wrap("last:2")
    chosen = [t.rpartition(".")[0] + "." + t.rpartition(".")[2] for t in record(mine).selection.targets]
    torch.manual_seed(3)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=chosen)).train()
    for model in (mine, theirs):
        steps(model, batches)
    found, want = trained(mine), trained(theirs)
    assert found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)


def test_a_choice_that_waits_is_made_by_the_first_step_that_has_labels():
    late, early = wrap(BY_GRADIENT), wrap(BY_GRADIENT)
    steps(late, [BLANK[0], BLANK[1], LABELLED[0]])
    steps(early, [LABELLED[0]])
    assert record(late).selection == record(early).selection
    found, want = trained(late), trained(early)
    assert found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)


@pytest.mark.spread(2)
@pytest.mark.parametrize("select", ["last:2", UNIFORM, BY_GRADIENT], ids=["last", "turns", "waits"])
def test_a_run_without_any_other_step_ends(select):
    for batches, rewards in ((BLANK[:2], 1.0), (LABELLED[:2], 0.0)):
        model = wrap(select)
        steps(model, batches, rewards)
        said = "before the layers were chosen: 0 of 1 batches (all gradients are exactly zero"
        said = said if select is BY_GRADIENT else "nothing was trained: all 2 optimizer steps had no gradient but zero"
        with pytest.raises(TrainingError) as error:
            layerpeft.check_trained(model)
        assert said in str(error.value)


def test_a_layer_that_alone_never_gets_a_gradient_is_caught_at_the_first_step_that_shows_something():
    model = wrap("last:2")
    still = next(p for n, p in model.named_parameters() if "layers.2.self_attn.q_proj.lora_B" in n)
    other = next(p for n, p in model.named_parameters() if "layers.2.self_attn.q_proj.lora_A" in n)
    for parameter in (still, other):
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=r"layers\.2\.self_attn\.q_proj did not move: its gradient is exactly zero"):
        steps(model, [BLANK[0], LABELLED[0]])


@pytest.mark.pictures
def test_a_trainer_whose_first_packed_rows_hold_prompts_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "word " * 60, "completion": " yes"}] * 10
    rows += [{"prompt": f"Say {i}", "completion": f" it is {i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wide(vocab_size=4096).save_pretrained("base"), AutoTokenizer.from_pretrained(LLAMA).save_pretrained("base")
    options = {"packing": True, "max_length": 32, "max_steps": 6, "per_device_train_batch_size": 1}
    caplog.set_level("INFO")
    config = LayerLoraConfig(select="last:2", r=4, target_modules="all-linear")
    trainer = sft(Dataset.from_list(rows), tmp_path / "trained", config, "base", learning_rate=1e-3, **options)
    trainer.train()
    assert "optimizer step 1 shows nothing" in caplog.text
    assert record(trainer.model).checks["first_step"] == "every chosen target moved"
    recipe = {"trainer": "sft", "model_name_or_path": "base", "dataset_name": "rows.jsonl", "use_cpu": True, **options}
    recipe |= {"learning_rate": 1e-3, "sample_tokens": 0, "output_dir": "out"}
    block = {"method": "lora", "select": "last:2", "r": 4, "target_modules": "all-linear"}
    (tmp_path / "r.yaml").write_text(json.dumps({**recipe, "layerpeft": block}))
    assert main(["train", "r.yaml"]) == 0

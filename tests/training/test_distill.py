"""A teacher beside training: the gradients of the formulas written out, whatever takes the loss, and what cannot be is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional
from trl.trainer.utils import add_fused_lm_head

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model, layer_map, plan
from layerpeft.errors import ConfigError, SelectionError, TrainingError
from layerpeft.integrations.engines.known import ENGINES
from layerpeft.planning.plan import layers_that_train
from layerpeft.planning.trace import Step
from layerpeft.training.distill import Distill, divergence
from tests.helpers.loops import adamw, hooks, llama, loras, make_batches, record, wrap
from tests.helpers.repeating import repeated

BATCH = make_batches()[0]
PADDED = BATCH | {"attention_mask": torch.ones(2, 12).long()}
PADDED["attention_mask"][0, 9:] = 0
PADDED["labels"] = PADDED["labels"].where(PADDED["attention_mask"] == 1, -100).clone()
PADDED["labels"][1, :4] = -100
ASKED = {"layers": [1, 2], "weight": 0.5, "kl": 2.0, "temperature": 3.0, "task": 0.25}


def wrapped(distill=None, config=LayerLoraConfig, base=None, **options):
    base = llama() if base is None else base
    torch.manual_seed(3)
    given = {"select": "last:3", "r": 4, "task_type": "CAUSAL_LM", **options}
    if config is LayerLoraConfig:
        given = {"init_lora_weights": False, "target_modules": "all-linear"} | given
    return get_peft_model(base, config(**given, distill=distill))


def states(model, batch):
    found = {}
    blocks = model.get_base_model().model.layers
    handles = [b.register_forward_hook(lambda _m, _a, y, i=i: found.update({i: y})) for i, b in enumerate(blocks)]
    output = model(**batch)
    for handle in handles:
        handle.remove()
    return found, output


def by_hand(model, batch, asked, teacher=None, pairs=((1, 1), (2, 2))):
    """The loss as the documentation writes it."""
    with torch.no_grad():
        if teacher is None:
            with model.disable_adapter():
                wanted, said = states(model.eval(), batch)
        else:
            wanted, said = states(teacher, batch)
    have, output = states(model.train(), batch)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    terms = []
    for s, t in pairs:
        a, b = have[s][mask], wanted[t][mask]
        if asked.get("loss") == "cosine":
            terms.append((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())
        else:
            terms.append(((a - b) ** 2).mean())
    counted, heat = batch["labels"][:, 1:] != -100, asked.get("temperature", 1.0)
    p, q = (functional.log_softmax(o.logits[:, :-1][counted] / heat, -1) for o in (said, output))
    kl = (p.exp() * (p - q)).sum(-1).mean() * heat**2
    return (
        asked.get("task", 1.0) * output.loss
        + asked.get("weight", 1.0) * sum(terms) / len(terms)
        + asked.get("kl", 0.0) * kl
    )


def gradients(model):
    return {n: p.grad.clone() for n, p in loras(model).items() if p.grad is not None}


def same(found, wanted, rtol=1e-4):
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(
    "asked", [ASKED, repeated({"layers": [1, 2], "loss": "cosine", "weight": 3.0})], ids=["mse and kl", "cosine"]
)
def test_gradients_are_those_of_the_formula_and_the_loss_that_is_told_is_the_task_s(asked):
    plain, model = wrapped(), wrapped(asked)
    by_hand(plain, PADDED, asked).backward()
    drawn = torch.get_rng_state()
    found = model.train()(**PADDED)
    assert torch.equal(found.loss, plain(**PADDED).loss) and torch.equal(drawn, torch.get_rng_state())
    found.loss.backward()
    same(gradients(model), gradients(plain))
    assert all(m.training for m in model.modules()) and not any(
        p.grad is not None for n, p in model.named_parameters() if ".lora_" not in n
    )
    told = record(model).distilling.news()
    assert set(told) == ({"distill/hidden", "distill/kl"} if asked is ASKED else {"distill/hidden"})
    assert all(v > 0 for v in told.values()) and record(model).distilling.news() == {}


def test_a_loss_of_parts_of_a_step_weighs_its_teacher_as_much():
    """Accumulation by labels, as Trainer hands it in, and TRL's own loss of log-probabilities, scaled as by a loss scaler."""
    batches = [PADDED, make_batches()[1]]
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    plain, model, fused = wrapped(), wrapped(ASKED), wrapped(ASKED)
    for batch, count in zip(batches, counts, strict=True):
        (8 * by_hand(plain, batch, ASKED) * count / sum(counts)).backward()
        (8 * model.train()(**batch, num_items_in_batch=torch.tensor(sum(counts))).loss).backward()
    same(gradients(model), gradients(plain))
    add_fused_lm_head(fused.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    for batch in batches:
        output = fused.train()(**batch, fused_lm_head=True)
        (-8 * output.log_probs.sum() / sum(counts)).backward()
    same(gradients(fused), gradients(plain), rtol=1e-3)
    output = fused(**PADDED, fused_lm_head=True)
    with pytest.raises(TrainingError, match="labels up and others down"):
        (output.log_probs[0].sum() - output.log_probs[1].sum()).backward()


@pytest.mark.parametrize(
    "kwargs", [repeated({"use_reentrant": False}), {"use_reentrant": True}], ids=["checkpointed", "reentrant"]
)
def test_under_checkpointing_gradients_are_the_same(kwargs):
    plain, model = wrapped(ASKED), wrapped(ASKED)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.enable_input_require_grads()
    for each in (plain, model):
        each.train()(**PADDED).loss.backward()
    same(gradients(model), gradients(plain))


def test_another_model_teaches_by_a_map_and_its_weights_stay(tmp_path):
    torch.manual_seed(5)
    teacher = llama(num_hidden_layers=6).eval()
    teacher.save_pretrained(tmp_path)
    asked = {"teacher": str(tmp_path), "map": {1: 2, 3: 5}, "kl": 1.0, "weight": 2.0}
    with pytest.raises(
        ConfigError, match=r"has 4 layers and its teacher 6: say which learns from which, such as map: \{0: 0"
    ):
        wrapped({"teacher": str(tmp_path)})
    with pytest.raises(ConfigError, match="the teacher has no layer 6"):
        wrapped(asked | {"map": {1: 6}})
    with pytest.raises(ConfigError, match="nowhere/at-all.*cannot be had as LlamaForCausalLM"):
        wrapped({"teacher": "nowhere/at-all"})
    wide = tmp_path / "wide"
    llama(hidden_size=64).save_pretrained(wide)
    with pytest.raises(ConfigError, match="the model's states are 32 wide and its teacher's 64"):
        wrapped({"teacher": str(wide)})
    plain, model = wrapped(), wrapped(asked)
    same_teacher = type("T", (), {"get_base_model": lambda self: teacher, "__call__": lambda self, **b: teacher(**b)})()
    by_hand(plain, PADDED, asked, same_teacher, ((1, 2), (3, 5))).backward()
    model.train()(**PADDED).loss.backward()
    same(gradients(model), gradients(plain))
    assert "teacher" not in " ".join(model.state_dict()) and not any(
        "distill" in n for n, _ in model.named_parameters()
    )
    assert record(model).asked.to_dict()["distill"] == asked | {"map": {1: 2, 3: 5}}


@pytest.mark.parametrize("config", [LayerGaloreConfig, repeated(LayerFullConfig)], ids=["galore", "full"])
def test_other_methods_learn_from_a_teacher_and_train_what_they_name(tmp_path, config):
    llama().save_pretrained(tmp_path)
    options = {} if config is LayerFullConfig else {"r": 4, "update_proj_gap": 1}
    given = {"select": "last:2", "task_type": "CAUSAL_LM", **options}
    if config is LayerFullConfig:
        with pytest.raises(
            ConfigError, match="method: full trains the model's own weights; name the folder of the teacher"
        ):
            config(**given, distill={})
    teacher = str(tmp_path) if config is LayerFullConfig else "base"
    torch.manual_seed(3)
    model = get_peft_model(llama(), config(**given, distill={"teacher": teacher, "kl": 1.0}))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".layers.0." in n or ".layers.1." in n}
    optimizer, seen = adamw(model), []
    for batch in make_batches()[:3]:
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(record(model).distilling.news())
    assert seen[0]["distill/hidden"] == pytest.approx(0, abs=1e-9) and seen[2]["distill/kl"] > 1e-6
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_evaluation_copies_and_pickles():
    model = wrapped({"layers": "last:2"})
    count = hooks(model)
    with torch.no_grad():
        model.eval()(**BATCH)
    model.train()(**BATCH).loss.backward()
    assert hooks(model) == count and len(record(model).distilling.news()) == 1
    twin = copy.deepcopy(model)
    twin(**BATCH).loss.backward()
    assert record(twin).distilling is not record(model).distilling and record(twin).distilling.news()
    assert not record(model).distilling.news()
    pickle.loads(pickle.dumps(model))(**BATCH).loss.backward()
    unloaded = model.unload()
    unloaded.train()(**BATCH)


def test_what_cannot_be_learned_is_said():
    with pytest.raises(ConfigError) as caught:
        wrapped({"layers": "last:x", "weight": 0, "loss": "mae", "temperature": 2.0, "map": {"a": 1}})
    for part in (
        "last:x",
        "leave nothing to learn",
        "'mse'",
        "temperature: 2 is of kl",
        "layers of the student and the teacher's",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="Did you mean 'weight'"):
        wrapped({"weigth": 1})
    with pytest.raises(SelectionError, match="9 is out of range"):
        wrapped({"layers": [9]})
    with pytest.raises(ConfigError, match="bias='lora_only' trains the model's own biases"):
        wrapped({}, bias="lora_only")
    with pytest.raises(
        ConfigError, match="method: full trains the model's own weights; name the folder of the teacher"
    ):
        LayerFullConfig(select="last:2", distill={})
    with pytest.raises(ConfigError, match="by: outliers watches forward passes of training"):
        wrapped({}, select={"by": "outliers", "keep": 2, "M": 2.0}, init_lora_weights=True)
    with pytest.raises(TrainingError, match="below the lowest layer that trains"):
        wrapped({"layers": 0}).train()(**BATCH)
    turns = {"pick": "uniform", "keep": 1, "layers": "last:2", "reselect_steps": 1}  # where others train at other steps
    wrapped({"layers": 0}, select=turns, init_lora_weights=True).train()(**BATCH).loss.backward()
    model = wrapped({"layers": "last:1"}).train()
    with pytest.raises(TrainingError, match="this trainer takes another"):
        model(input_ids=BATCH["input_ids"])
    model(**BATCH).loss.backward()  # the pass that failed has left nothing behind
    for engine in ENGINES[:-1]:
        assert "a teacher (distill) runs through the model" in " ".join(engine.refusals(record(model).needs))
    assert ENGINES[-1].refusals(record(model).needs) == [] and record(wrap()).needs.isdisjoint({"distill"})


def test_a_plan_counts_the_teacher(tmp_path):
    torch.manual_seed(5)
    llama(num_hidden_layers=6).save_pretrained(tmp_path)
    given = {"batch_size": 2, "length": 12}
    model = llama()
    config = {"select": "last:3", "r": 4, "task_type": "CAUSAL_LM"}
    asked = {"teacher": str(tmp_path), "map": {1: 2, 3: 5}, "kl": 1.0}
    bare, own = (plan(model, LayerLoraConfig(**config, distill=d), **given) for d in (None, {"layers": [1, 2]}))
    assert own.weights == bare.weights and own.kept.peak - bare.kept.peak == 2 * 12 * 32 * 2 * (4 + 4)
    assert own.kept.flops - bare.kept.flops == 2 * 24 * sum(t.params for t in layer_map(model).targets)
    assert "a teacher is the model itself" in str(own)
    weights = sum(p.numel() * p.element_size() for p in llama(num_hidden_layers=6).parameters())
    other = layers_that_train(model, LayerLoraConfig(**config, distill=asked), Step())[2]
    assert weights <= other - bare.weights < 1.01 * weights
    with pytest.raises(ConfigError, match="the teacher has no layer 6"):
        plan(model, LayerLoraConfig(**config, distill=asked | {"map": {1: 6}}), **given)


def test_a_head_whose_answers_are_changed_besides_is_refused():
    model = wrapped({"kl": 1.0})
    base = model.get_base_model()
    forward = base.forward
    base.forward = lambda **inputs: _halved(forward(**inputs))
    with pytest.raises(TrainingError, match="kl compares what the head makes of the last states"):
        model.train()(**BATCH)


def _halved(output):
    output.logits = output.logits / 2
    return output


def test_answers_are_compared_some_at_a_time():
    torch.manual_seed(1)
    head = torch.nn.Linear(8, 30)
    rows, wanted = torch.randn(600, 8, requires_grad=True), torch.randn(600, 30)
    found = divergence(rows, head, wanted, 2.0)
    p, q = (torch.log_softmax(z / 2, -1) for z in (wanted, head(rows)))
    assert float(found) == pytest.approx(
        float(4 * functional.kl_div(q, p, log_target=True, reduction="batchmean")), rel=1e-5
    )
    assert float(divergence(rows[:0], head, wanted[:0], 1.0)) == 0.0
    assert Distill.parse({"layers": [1], "kl": 1.0}).plain() == {"layers": [1], "kl": 1.0}
    assert Distill.parse({"map": {"1": 2, 3: 4}}).map == {1: 2, 3: 4}, "YAML and JSON have texts for keys"

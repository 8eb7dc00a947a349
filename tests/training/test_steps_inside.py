"""Optimizers that step inside the backward pass, and loops whose backward pass is inside the optimizer's step."""

from functools import partial

import pytest
import torch
from transformers import Trainer, TrainingArguments

import layerpeft
from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.errors import TrainingError
from layerpeft.integrations.torch import running_backward
from tests.helpers.loops import BY_GRADIENT, llama, make_batches, record

BATCHES = make_batches()
METHODS = {"lora": LayerLoraConfig, "full": LayerFullConfig}
METHODS |= {kind: partial(LayerGaloreConfig, subspace=kind, update_proj_gap=2) for kind in ("sketch", "random", "svd")}
TURNS = {"pick": "cycle", "keep": 1, "reselect_steps": 2}
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)


def wrap(method, select="last:2", dtype=torch.float32, **options):
    torch.manual_seed(3)
    rank = {} if method == "full" else {"r": 4}
    config = METHODS[method](select=select, target_modules=["q_proj", "v_proj"], **rank, **options)
    return get_peft_model(llama().to(dtype), config).train()


def train(model, loop, steps=6):
    """The tensors that a loop of this kind has trained, folds included, and how often each layer was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if loop == "inside":
        each = {p: ADAMW([p]) for p in trained}

        def update(parameter):
            each[parameter].step()
            each[parameter].zero_grad()

        handles = [p.register_post_accumulate_grad_hook(update) for p in trained]
    else:
        optimizer, handles = ADAMW(trained), []
    for i in range(steps):

        def closure(i=i):  # as Lightning's: the gradients of the step before go in the middle of it
            loss = model(**BATCHES[i]).loss
            if loop == "closure":
                optimizer.zero_grad()
            loss.backward()
            return loss

        if loop == "closure":
            optimizer.step(closure=closure)
            continue
        closure()
        if loop == "after":
            optimizer.step()
            optimizer.zero_grad()
    for handle in handles:
        handle.remove()
    layerpeft.check_trained(model)
    found = {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n or ".layers." in n}
    return found, record(model).steps_trained


def same(found, want):
    assert found[1] == want[1] and found[0].keys() == want[0].keys()
    for name, tensor in want[0].items():
        assert torch.equal(found[0][name], tensor), name


@pytest.mark.spread(2)
@pytest.mark.parametrize("checkpointing", [None, True], ids=["", "reentrant"])
@pytest.mark.parametrize("method", ["lora", "sketch", "random", "full"])
def test_steps_inside_the_backward_pass_are_those_after_it(method, checkpointing):
    models = [wrap(method), wrap(method)]
    for model in models if checkpointing else ():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    same(train(models[0], "inside"), train(models[1], "after"))


@pytest.mark.spread(2)
@pytest.mark.parametrize("method", ["lora", "sketch", "full"])
def test_layers_take_turns_between_such_passes(method):
    same(train(wrap(method, TURNS), "inside"), train(wrap(method, TURNS), "after"))


def test_float32_masters_are_lent_to_every_kind_of_step():
    made = partial(wrap, "full", dtype=torch.bfloat16, master_weights=True)
    want = train(made(), "after")
    same(train(made(), "inside"), want)
    same(train(made(), "closure"), want)


def test_what_needs_the_whole_pass_first_is_refused_before_anything_changes():
    for model, said in (
        (wrap("svd"), "subspace='svd'.*AdamW steps inside the backward"),
        (wrap("lora", BY_GRADIENT), "waits for the end"),
    ):
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(TrainingError, match=said):
            train(model, "inside")
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert running_backward() is None


class Fused(torch.optim.SGD):
    """Stands for LOMO, which runs the backward pass itself and changes weights on the way."""

    fused_backward = torch.optim.SGD.step


def test_an_optimizer_that_runs_the_backward_pass_itself_is_refused_before_training(tmp_path):
    model = wrap("sketch")
    trained = [p for p in model.parameters() if p.requires_grad]
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1, disable_tqdm=True)
    trainer = Trainer(
        model, args, train_dataset=[{k: v[0] for k, v in BATCHES[0].items()}], optimizers=(Fused(trained, 0.1), None)
    )
    for run in (trainer.train, Fused(trained, 0.1).step):
        with pytest.raises(TrainingError, match=r"Fused.*fused_backward.*use AdamW"):
            run()


@pytest.mark.spread(2)
@pytest.mark.parametrize("method", METHODS)
def test_a_backward_pass_inside_the_step_is_one_before_it(method):
    same(train(wrap(method), "closure"), train(wrap(method), "after"))


@pytest.mark.parametrize("num_batches", [1, 3])
def test_a_choice_waits_for_the_closure_of_the_first_step(num_batches):
    made = partial(wrap, "lora", {**BY_GRADIENT, "num_batches": num_batches})
    mine, theirs = made(), made()
    same(train(mine, "closure"), train(theirs, "after"))
    assert record(mine).selection == record(theirs).selection and len(record(mine).selection.layers) == 2


def test_an_optimizer_that_asks_again_and_again():
    model = wrap("lora", BY_GRADIENT)
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.1, max_iter=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = model(**BATCHES[0]).loss
        loss.backward()
        losses.append(float(loss))
        return loss

    for _ in range(2):
        optimizer.step(closure)
    layerpeft.check_trained(model)
    assert len(losses) > 2 and losses[-1] < losses[0]
    chosen = record(model).selection.targets
    moved = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved and all(any(t in n for t in chosen) for n in moved)

"""The backward pass stops at the lowest layer that trains, under every switch that is known to defeat it."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import warnings
import weakref

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.training import backward
from tests.helpers.repeating import some
from tests.helpers.traffic import blocks_of, watched

LAYERS = 6
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
X = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))


def llama(dropout: float = 0.0, layers: int = LAYERS, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width // 2, "num_hidden_layers": layers, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_dropout=dropout, use_cache=False))


def wrap(model, select="last:2", **options):
    torch.manual_seed(5)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(model, LayerLoraConfig(select=select, **options)).train()


def plain(model, layers=(4, 5), **options):
    """Plain PEFT on the same layers: nothing of ours is in it."""
    torch.manual_seed(5)
    names = [f"model.layers.{i}.{n}" for i in layers for n in LINEARS]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, **options)
    ).train()


def step(model) -> None:
    torch.manual_seed(7)
    model(input_ids=X, labels=X).loss.backward()


def traffic(model, run=step) -> tuple[str, str, str]:
    """By layer: forward calls, gradients that arrived, and recomputations of one step."""
    with watched(model) as seen:
        run(model)
    return seen.text("forward"), seen.text("reached"), seen.text("recomputed")


def grads_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    step(model)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def checkpoint(**keywords):
    return lambda m: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)


def as_trl_does(m) -> None:
    checkpoint(use_reentrant=False)(m)
    m.enable_input_require_grads()


def twice(m) -> None:
    as_trl_does(m)
    m.enable_input_require_grads()
    m.gradient_checkpointing_enable()


def reentrant_twice(m) -> None:
    m.enable_input_require_grads()
    checkpoint(use_reentrant=True)(m)
    m.enable_input_require_grads()


def every_second(m) -> None:
    m.base_model.model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)


NONE, TOP, ALL = "000000", "000011", "111111"
SWITCHES = {
    "none": (lambda m: None, NONE),
    "input grads": (lambda m: m.enable_input_require_grads(), NONE),
    "non-reentrant": (checkpoint(use_reentrant=False), TOP),
    "reentrant": (checkpoint(use_reentrant=True), TOP),
    "neither named": (checkpoint(), TOP),  # prepare_model_for_kbit_training's default, which torch takes for reentrant
    "every second layer": (every_second, "000010"),
    "TRL's order": (as_trl_does, TOP),
    "asked for twice": (twice, TOP),
    "reentrant, asked for twice": (reentrant_twice, TOP),
}
ALL_SWITCHES = pytest.mark.parametrize("name", SWITCHES)


@pytest.mark.spread(2)
@ALL_SWITCHES
def test_nothing_below_the_cut_is_recomputed_or_reached(name):
    switch, recomputed = SWITCHES[name]
    model = wrap(llama())
    switch(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="None of the inputs have requires_grad")
        assert traffic(model) == (ALL, TOP, recomputed)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["input grads", "TRL's order", "reentrant", "neither named"])
def test_the_switches_do_defeat_plain_peft(name):
    switch, recomputed = SWITCHES[name]
    model = plain(llama())
    switch(model)
    assert traffic(model) == (ALL, ALL, ALL if recomputed == TOP else NONE)


@pytest.mark.spread(2)
@pytest.mark.matrix("dropout,autocast")
@ALL_SWITCHES
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_equal_to_the_bit(name, dropout, autocast):
    switch, _ = SWITCHES[name]
    ours, theirs = wrap(llama(dropout), lora_dropout=dropout), plain(llama(dropout), lora_dropout=dropout)
    for model in (ours, theirs):
        switch(model)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        mine, reference = grads_of(ours), grads_of(theirs)
    assert mine.keys() == reference.keys() and len(mine) == 28
    assert all(torch.equal(mine[n], reference[n]) for n in mine)


def leaves_of(loss: torch.Tensor) -> set[int]:
    """Identities of the leaves into which the graph of a loss puts gradients."""
    seen, waiting, found = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {id(node.variable)} if hasattr(node, "variable") else set()
            waiting += [n for n, _ in node.next_functions]
    return found


@pytest.mark.parametrize("both", some([False, True], 1))  # the random numbers of dropout are other ones in eager code
def test_compiled_code_is_cut_without_an_eager_call_before_and_has_equal_gradients(both):
    few = {"target_modules": ["v_proj"], "lora_dropout": 0.1 * both, "init_lora_weights": False}
    found, besides = [], []
    stock = peft.LoraConfig(layers_to_transform=[1], layers_pattern="layers", **few)
    for make, config in ((get_peft_model, LayerLoraConfig(select="last:1", **few)), (peft.get_peft_model, stock)):
        torch.manual_seed(5)
        model = make(llama(layers=2), config).train()
        as_trl_does(model)
        # the libraries' hooks break plain PEFT's graph
        run = torch.compile(model, backend="aot_eager", fullgraph=not found) if both or not found else model
        torch.manual_seed(7)
        loss = run(input_ids=X, labels=X).loss
        besides.append(len(leaves_of(loss) - {id(p) for p in model.parameters() if p.requires_grad}))
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        torch.compiler.reset()
    assert besides == [0, 1]  # plain PEFT's backward runs down to the embeddings' output
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]) if both else torch.allclose(gradient, found[1][name], atol=1e-6)


# it follows what trains, and what the user does


def test_it_follows_what_trains():
    model = wrap(llama())
    as_trl_does(model)
    blocks = blocks_of(model)
    assert traffic(model)[1] == "000011"
    for p in blocks[4].parameters():
        p.requires_grad_(False)
    assert traffic(model)[1:] == ("000001", "000001")
    checkpoint(use_reentrant=True)(model)
    for n, p in blocks[3].named_parameters():
        p.requires_grad_("norm" in n)
    assert traffic(model)[1:] == ("000111", "000111")
    embedding = model.base_model.model.model.embed_tokens.weight.requires_grad_(True)
    assert traffic(model)[1:] == (ALL, ALL) and embedding.grad.any()
    embedding.requires_grad_(False)
    assert traffic(model)[1:] == ("000111", "000111")
    for p in blocks[0].parameters():
        p.requires_grad_(True)
    assert traffic(model)[1:] == (ALL, ALL)


def test_another_adapter_below_is_respected():
    model = wrap(llama())
    as_trl_does(model)
    model.add_adapter("low", peft.LoraConfig(r=2, target_modules=["model.layers.1.self_attn.q_proj"]))
    model.base_model.set_adapter(["default", "low"])
    assert traffic(model)[1] == "011111" and backward.where(model).layer == 1
    model.set_adapter("default")
    assert traffic(model)[1] == TOP and backward.where(model).layer == 4
    model.set_adapter("low")
    assert traffic(model)[1] == "011111"


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_the_user_turns_off_stays_off(reentrant):
    model = wrap(llama())
    base, blocks = model.base_model.model, blocks_of(model)
    checkpoint(use_reentrant=reentrant)(model)
    assert traffic(model)[2] == TOP and base.is_gradient_checkpointing
    assert all(b.gradient_checkpointing for b in blocks)  # the user's flags are not touched
    model.gradient_checkpointing_disable()
    for rows in (4, 3, 0):  # the cut moves, and is taken back
        for p in blocks[rows].parameters():
            p.requires_grad_(True)
        assert traffic(model)[2] == NONE
    assert not base.is_gradient_checkpointing and not any(b.gradient_checkpointing for b in blocks)
    checkpoint(use_reentrant=reentrant)(model)
    assert traffic(model)[2] == ALL


@pytest.mark.parametrize("switch", [as_trl_does, reentrant_twice])
def test_taken_back_everything_is_as_it_was(switch):
    model, untouched = wrap(llama()), plain(llama())
    for m in (model, untouched):
        switch(m)
    assert traffic(model)[1] == TOP
    for m in (model, untouched):
        blocks_of(m)[0].input_layernorm.weight.requires_grad_(True)
    assert traffic(model) == traffic(untouched) == (ALL, ALL, ALL)
    for mine, theirs in zip(blocks_of(model), blocks_of(untouched), strict=True):
        assert mine._gradient_checkpointing_func.func is theirs._gradient_checkpointing_func.func
        assert (
            len(mine._forward_pre_hooks) == len(mine._forward_pre_hooks_with_kwargs) == len(theirs._forward_pre_hooks)
        )
    mine, theirs = (list(m.get_input_embeddings()._forward_hooks.values()) for m in (model, untouched))
    assert [h.__qualname__ for h in mine] == [h.__qualname__ for h in theirs]


def test_hooks_that_their_owner_removes_do_not_come_back():
    model = wrap(llama())
    model.enable_input_require_grads()
    assert traffic(model)[1] == TOP
    model.disable_input_require_grads()
    hooks = model.get_input_embeddings()._forward_hooks
    assert not hooks
    blocks_of(model)[0].input_layernorm.weight.requires_grad_(True)
    assert traffic(model)[1] == ALL and not hooks


def test_hooks_of_the_users_own_get_their_gradients():
    model = wrap(llama())
    as_trl_does(model)
    embedding, seen = model.get_input_embeddings(), []
    handle = embedding.register_forward_hook(
        lambda _m, _a, out: out.requires_grad_(True).register_hook(seen.append) and None
    )
    step(model)
    assert len(seen) == 1
    handle.remove()
    step(model)
    assert len(seen) == 1 and traffic(model)[1] == TOP
    for module in (blocks_of(model)[1].mlp, embedding):
        handle = module.register_full_backward_hook(lambda *_: seen.append(None))
        before = len(seen)
        stop = backward.where(model)
        assert traffic(model)[1] == ALL and len(seen) == before + 1
        assert stop.layer is None and "hook of your own" in stop.why
        handle.remove()
        assert traffic(model)[1] == TOP and backward.where(model).layer == 4


# copies, pickles, evaluation, and the end of the model


@pytest.mark.matrix
@pytest.mark.parametrize("switch", [as_trl_does, reentrant_twice])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves(switch, copied):
    model = wrap(llama())
    switch(model)
    reference = grads_of(model)
    if copied is not copy.deepcopy:  # transformers' own handles cannot be pickled
        model.disable_input_require_grads()
        del model.base_model.model._require_grads_hooks
    twin = copied(model)
    found = grads_of(twin)
    assert found.keys() == reference.keys() and all(torch.equal(found[n], reference[n]) for n in found)
    assert traffic(twin) == traffic(model) == (ALL, TOP, TOP)
    twin.enable_input_require_grads()
    blocks_of(twin)[3].input_layernorm.weight.requires_grad_(True)
    assert traffic(twin)[1] == "000111" and traffic(model)[1] == TOP


def test_replicas_of_data_parallel_leave_the_hooks_they_share_alone():
    model = wrap(llama())
    as_trl_does(model)
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    replica = model.base_model.model._replicate_for_data_parallel()
    assert not replica._parameters and replica._forward_pre_hooks
    for layer in replica.model.layers:  # a replica's tensors are no parameters
        layer.requires_grad_(False)
    for hook in replica._forward_pre_hooks.values():
        hook(replica, ())
    assert model.get_input_embeddings()._forward_hooks == hooks and len(hooks) == 2


def test_evaluation_is_not_touched():
    model = wrap(llama())
    as_trl_does(model)
    step(model)
    with torch.no_grad():
        first = model.eval()(input_ids=X).logits
        assert torch.equal(first, plain(llama()).eval()(input_ids=X).logits)


def test_the_cut_does_not_keep_the_model_alive():
    model = wrap(llama())
    as_trl_does(model)
    step(model)
    gone = weakref.ref(blocks_of(model)[0].mlp.act_fn)
    running = gc.isenabled()
    gc.collect()  # what was made on the way; from here on the collector has no part in it
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        if running:
            gc.enable()


def test_blocks_that_are_taken_out_do_no_harm():
    model = wrap(llama())
    as_trl_does(model)
    layers = model.base_model.model.model.layers
    model.base_model.model.model.layers = torch.nn.ModuleList([layers[0], *layers[3:]])
    model.base_model.model.config.num_hidden_layers = 4
    assert traffic(model)[1:] == ("0011", "0011")

"""The backward pass stops at the lowest layer that trains, under every switch that is known to defeat it."""

from __future__ import annotations

import contextlib
import copy

import peft
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from layerpeft import LayerLoraConfig, backward, get_peft_model

LAYERS = 6


def llama(dropout: float = 0.0, layers: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


X = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1))


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


LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def traffic(model, blocks, step) -> tuple[str, str]:
    """Per layer: forward calls, and whether a gradient arrived at its output."""
    calls, grads = [0] * len(blocks), [0] * len(blocks)
    handles = []
    for i, block in enumerate(blocks):

        def count(_m, _a, out, i=i):
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda _g, i=i: grads.__setitem__(i, 1))

        def run(*_, i=i):
            calls[i] += 1

        handles += [block.register_forward_hook(count), block.input_layernorm.register_forward_pre_hook(run)]
    step(model)
    for handle in handles:
        handle.remove()
    return "".join(map(str, calls)), "".join(map(str, grads))


def step(model) -> None:
    torch.manual_seed(7)
    model(input_ids=X, labels=X).loss.backward()


def grads_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    step(model)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def checkpoint(reentrant):
    return lambda m: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def as_trl_does(m) -> None:
    checkpoint(False)(m)
    m.enable_input_require_grads()


def twice(m) -> None:
    as_trl_does(m)
    m.enable_input_require_grads()
    m.gradient_checkpointing_enable()


def reentrant_twice(m) -> None:
    m.enable_input_require_grads()
    checkpoint(True)(m)
    m.enable_input_require_grads()


SWITCHES = {
    "none": (lambda m: None, "111111"),
    "input grads": (lambda m: m.enable_input_require_grads(), "111111"),
    "non-reentrant": (checkpoint(False), "111122"),
    "reentrant": (checkpoint(True), "111122"),
    "TRL's order": (as_trl_does, "111122"),
    "asked for twice": (twice, "111122"),
    "reentrant, asked for twice": (reentrant_twice, "111122"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_nothing_below_the_cut_is_recomputed_or_reached(name):
    switch, calls = SWITCHES[name]
    model = wrap(llama())
    switch(model)
    assert traffic(model, model.base_model.model.model.layers, step) == (calls, "000011")
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_switches_do_defeat_plain_peft():
    model = plain(llama())
    as_trl_does(model)
    assert traffic(model, model.base_model.model.model.layers, step) == ("222222", "111111")


@pytest.mark.parametrize("before", [False, True])
def test_prepare_model_for_kbit_training(before):
    base = llama()
    if before:
        base = peft.prepare_model_for_kbit_training(base)
    model = wrap(base)
    if not before:
        peft.prepare_model_for_kbit_training(model)
        for n, p in model.named_parameters():
            p.requires_grad_("lora_" in n)
    calls, reached = traffic(model, model.base_model.model.model.layers, step)
    assert reached == "000011" and calls.startswith("1111")


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_equal_to_the_bit(name, dropout):
    switch, _ = SWITCHES[name]
    ours, theirs = wrap(llama(dropout), lora_dropout=dropout), plain(llama(dropout), lora_dropout=dropout)
    as_trl_does(theirs)
    switch(ours)
    if "entrant" in name and dropout:
        checkpoint("non" not in name)(theirs)
    mine, reference = grads_of(ours), grads_of(theirs)
    assert mine.keys() == reference.keys() and len(mine) == 28
    assert all(torch.equal(mine[n], reference[n]) for n in mine)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_and_compile(compiled):
    found = []
    for model in (wrap(llama(layers=2), "last:1"), plain(llama(layers=2), layers=(1,))):
        as_trl_does(model)
        model(input_ids=X)  # one eager call lets the cut take its place before anything is compiled
        run = torch.compile(model, backend="aot_eager") if compiled else model
        model.zero_grad()
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16) if not compiled else contextlib.nullcontext():
            loss = run(input_ids=X, labels=X).loss
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        torch.compiler.reset()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "embed_tokens"),
    ],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_it_steps_aside_where_something_below_trains(options, reason, reentrant):
    model = wrap(llama(), **options)
    checkpoint(reentrant)(model)
    model.enable_input_require_grads()
    assert traffic(model, model.base_model.model.model.layers, step)[1] == "111111"
    assert reason in backward.where(model).why and backward.where(model).layer is None
    below = [p for n, p in model.named_parameters() if "embed_tokens" in n and p.requires_grad]
    assert below and all(p.grad is not None and p.grad.any() for p in below)


def test_a_lower_adapter_and_a_users_hook_are_respected():
    model = wrap(llama())
    as_trl_does(model)
    model.add_adapter("low", peft.LoraConfig(r=2, target_modules=["model.layers.1.self_attn.q_proj"]))
    model.base_model.set_adapter(["default", "low"])
    assert traffic(model, model.base_model.model.model.layers, step)[1] == "011111"
    model.set_adapter("default")
    assert traffic(model, model.base_model.model.model.layers, step)[1] == "000011"
    seen = []

    def mine(_module, _args, out) -> None:
        out.requires_grad_(True).register_hook(seen.append)

    model.base_model.model.model.embed_tokens.register_forward_hook(mine)
    step(model)
    assert len(seen) == 1  # a hook of the user's own that asks for gradients gets them


def test_it_follows_what_trains():
    model = wrap(llama())
    as_trl_does(model)
    blocks = model.base_model.model.model.layers
    assert traffic(model, blocks, step)[1] == "000011"
    for p in blocks[4].parameters():
        p.requires_grad_(False)
    assert traffic(model, blocks, step)[1] == "000001"
    checkpoint(True)(model)
    for n, p in blocks[3].named_parameters():
        p.requires_grad_("norm" in n)
    assert traffic(model, blocks, step) == ("111222", "000111")
    model.base_model.model.model.embed_tokens.weight.requires_grad_(True)
    assert traffic(model, blocks, step) == ("222222", "111111")


def test_stock_configs_are_cut_too_and_full_ones_stay_untouched():
    stock = get_peft_model(
        llama(), peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[5], layers_pattern="layers")
    ).train()
    as_trl_does(stock)
    assert traffic(stock, stock.base_model.model.model.layers, step)[1] == "000001"
    for config in (LayerLoraConfig(target_modules=["q_proj"]), peft.LoraConfig(target_modules=["q_proj"])):
        model = get_peft_model(llama(), config)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert "_layerpeft_cut" not in model.base_model.model.__dict__


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_encoder_decoder_starves_no_stack(stack, reentrant):
    torch.manual_seed(0)
    sizes = {
        f"{s}_{k}": v
        for s in ("encoder", "decoder")
        for k, v in (("layers", 3), ("attention_heads", 2), ("ffn_dim", 32))
    }
    base = BartForConditionalGeneration(BartConfig(d_model=16, vocab_size=64, max_position_embeddings=32, **sizes))
    model = wrap(base, {"layers": "last:1", "stack": stack})
    checkpoint(reentrant)(model)
    model.enable_input_require_grads()
    model(input_ids=X, labels=X).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(f"{stack}.layers.2" in n for n in trained)
    reentrant_kwargs_lose_them = (
        stack == "encoder" and reentrant
    )  # transformers' own limit: keyword inputs get no gradient
    if not reentrant_kwargs_lose_them:
        assert all(p.grad is not None and p.grad.any() for p in trained.values())


def test_copies_and_evaluation_go_on_working():
    model = wrap(llama())
    as_trl_does(model)
    step(model)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    step(twin)
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        first = model(input_ids=X).logits
    assert torch.equal(first, twin.eval()(input_ids=X).logits.detach())

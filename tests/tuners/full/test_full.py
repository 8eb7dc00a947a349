"""Weights that train themselves: what trains, that it is what a loop by hand trains, and that the base comes back."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import peft
import pytest
import torch
from torch import nn

import layerpeft
from layerpeft import LayerFullConfig, LayerLoraConfig
from layerpeft.errors import ConfigError, SelectionError
from layerpeft.integrations.peft import DUMMY_TARGET_MODULES
from layerpeft.planning.trace import Live
from layerpeft.tuners.full.layer import (
    FullWrapper,
    full_layers,
    full_parameters,
    keep_originals,
    saved_modules,
    unwrap,
    wrappers,
)
from tests.helpers.fulling import (
    BATCHES,
    by_hand,
    clean,
    differ,
    logits,
    merged,
    originals_of,
    parameters,
    same,
    train,
    trains,
    unloaded,
    wrap,
)
from tests.helpers.loops import BY_GRADIENT, adamw, llama, step
from tests.helpers.models import MODELS, loss_of

# what trains


def test_the_weights_of_the_chosen_layers_train_and_nothing_else_does():
    model = wrap(select=[1, 3])
    plain = llama()
    assert trains(model) == {
        n for n, _ in plain.named_parameters() if n.startswith(("model.layers.1.", "model.layers.3."))
    }
    names = [n for n, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == len(list(plain.parameters()))
    assert {clean(n) for n in names} == {n for n, _ in plain.named_parameters()}
    assert all(".modules_to_save.default." in n for n, p in model.named_parameters() if p.requires_grad)
    config = model.peft_config["default"]
    assert config.target_modules == DUMMY_TARGET_MODULES and config.peft_type == "LORA"
    assert type(model.base_model) is peft.LoraModel


CHOICES = {
    "linears by name": (
        {"target_modules": ["q_proj", "down_proj"]},
        {"self_attn.q_proj.weight", "mlp.down_proj.weight"},
    ),
    "a norm": ({"target_modules": ["input_layernorm"]}, {"input_layernorm.weight"}),
    "a module around": (
        {"target_modules": ["mlp"]},
        {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"},
    ),
    "all but": (
        {"target_modules": ["mlp"], "exclude_modules": ["gate_proj"]},
        {"mlp.up_proj.weight", "mlp.down_proj.weight"},
    ),
    "a regex": ({"target_modules": r".*\.(q|k)_proj"}, {"self_attn.q_proj.weight", "self_attn.k_proj.weight"}),
    "no norms": (
        {"exclude_modules": ["input_layernorm", "post_attention_layernorm", "self_attn"]},
        {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"},
    ),
    "linears": (
        {"target_modules": "all-linear", "exclude_modules": ["mlp"]},
        {f"self_attn.{n}_proj.weight" for n in "qkvo"},
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_names_choose_within_the_layers(case):
    options, wanted = CHOICES[case]
    model = wrap(**options)
    assert trains(model) == {f"model.layers.3.{n}" for n in wanted}
    start = parameters(model)
    after = parameters(train(model))
    assert differ(start, after) == trains(model)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bert"])
def test_biases_stay_where_they_are_when_they_are_not_asked_for(name):
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    with_them, without = (
        trains(wrap(MODELS[name](), biases=b, task_type=task, train_new=False)) for b in (True, False)
    )
    assert without and not any(n.endswith("bias") for n in without)
    assert with_them - without == {n for n in with_them if n.endswith("bias")} != set()


def test_a_parameter_by_its_name_trains_alone_within_a_module_that_is_saved_whole():
    model = wrap(MODELS["gpt_oss"](), target_modules=["sinks", "experts.gate_up_proj"])
    assert trains(model) == {"model.layers.2.self_attn.sinks", "model.layers.2.mlp.experts.gate_up_proj"}
    assert set(full_layers(model, "default")) == {"model.layers.2.self_attn", "model.layers.2.mlp.experts"}


EVERY = [
    "llama",
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "mamba",
    "zamba2",
    "t5",
    "bert",
    "distilbert",
    "llama_bare",
]


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_trains_whole_layers_as_a_plain_loop_does(name):
    base, plain = MODELS[name](), MODELS[name]()
    task = {"bert": "SEQ_CLS", "distilbert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "llama_bare": None}.get(name, "CAUSAL_LM")
    model = wrap(base, task_type=task)
    start = parameters(model)
    chosen = trains(model)
    for parameter_name, parameter in plain.named_parameters():
        parameter.requires_grad_(parameter_name in chosen)
    keep_originals(model, "default")
    for one in (model, plain):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], 1e-2)
        for number in range(3):
            torch.manual_seed(number)
            loss_of(name, one).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert differ(start, parameters(model)) <= chosen
    assert same(parameters(model), parameters(plain))
    assert same(merged(model), parameters(plain)) and same(unloaded(model), start)


def test_a_loop_is_a_hand_written_one_bit_for_bit():
    ours, theirs = train(wrap(select=[1, 3])), by_hand((1, 3))
    assert same(parameters(ours), parameters(theirs))
    assert torch.equal(logits(ours), logits(theirs))
    assert differ(parameters(llama()), parameters(ours)) == trains(ours)


def test_a_choice_by_gradients_takes_the_layers_that_lora_takes():
    ours = wrap(select=BY_GRADIENT, batches=BATCHES[:2])
    lora = layerpeft.get_peft_model(
        llama(), LayerLoraConfig(select=BY_GRADIENT, target_modules="all-linear"), batches=BATCHES[:2]
    )
    chosen = [m.peft_config["default"]._layerpeft.selection for m in (ours, lora)]
    assert chosen[0].layers == chosen[1].layers and len(chosen[0].layers) == 2
    assert set(chosen[0].targets) == set(full_layers(ours, "default"))
    assert any("layernorm" in t for t in chosen[0].targets)


def test_norms_alone_are_chosen_by_the_gradients_of_their_layers():
    model = wrap(select=BY_GRADIENT, batches=BATCHES[:2], target_modules=["input_layernorm"])
    whole = wrap(select=BY_GRADIENT, batches=BATCHES[:2])
    layers = [m.peft_config["default"]._layerpeft.selection.layers for m in (model, whole)]
    assert layers[0] == layers[1] and len(trains(model)) == 2


# memory


def test_wrapping_a_pool_of_all_layers_makes_no_copy_of_a_weight():
    base = llama(hidden_size=64, intermediate_size=128)
    known = {t.untyped_storage()._cdata for t in [*base.parameters(), *base.buffers()]}
    gc.collect()
    with Live(known) as live:
        model = wrap(base, select="all")
    smallest = min(p.nbytes for n, p in base.named_parameters() if p.dim() == 2)
    assert live.peak < smallest
    assert len(full_layers(model, "default")) == 4 * 9


def test_originals_are_copied_once_and_only_where_asked():
    model = wrap(select="all")
    names = ["model.layers.1.mlp.up_proj", "model.layers.2.input_layernorm"]
    assert originals_of(model, "default") == {}
    keep_originals(model, "default", names[:1])
    keep_originals(model, "default", names)
    first = originals_of(model, "default")
    assert set(first) == {f"{n}.weight" for n in names}
    train(model, 2)
    keep_originals(model, "default", names)
    assert same(first, {n: t for n, t in originals_of(model, "default").items() if n in first})
    assert same(first, {n: t for n, t in parameters(llama()).items() if n in first})


# the base, when it is asked for


@pytest.fixture(params=["static", "mine"])
def trained(request):
    model = wrap(select=[1, 3], adapter_name="default" if request.param == "static" else "mine")
    keep_originals(model, "default" if request.param == "static" else "mine")
    return train(model)


def test_disabling_shows_the_base_and_enabling_what_was_trained(trained):
    now, ids = logits(trained), {id(p) for p in trained.parameters()}
    flags = {n: p.requires_grad for n, p in trained.named_parameters()}
    with trained.disable_adapter():
        assert torch.equal(logits(trained), logits(llama()))
        assert {id(p) for p in trained.parameters()} == ids
        assert not any(p.requires_grad for p in trained.parameters())
    assert torch.equal(logits(trained), now)
    assert {n: p.requires_grad for n, p in trained.named_parameters()} == flags


def test_layers_that_sleep_go_on_sleeping_after_the_base_was_asked_for():
    model = wrap(select="all")
    for parameter in full_parameters(full_layers(model, "default")["model.layers.0.mlp.up_proj"]).values():
        parameter.requires_grad_(False)
    awake = trains(model)
    with model.disable_adapter():
        pass
    assert trains(model) == awake and "model.layers.0.mlp.up_proj.weight" not in awake


def test_merging_gives_what_was_trained_and_unloading_what_was(trained):
    now, names = logits(trained), {n for n, _ in llama().named_parameters()}
    weights = parameters(by_hand((1, 3)))
    assert same(merged(trained), weights) and same(unloaded(trained), parameters(llama()))
    whole = trained.merge_and_unload()
    assert torch.equal(logits(whole), now) and {n for n, _ in whole.named_parameters()} == names
    assert not any(isinstance(m, FullWrapper) for m in whole.modules())


def test_the_base_while_disabled_is_what_is_unloaded_and_merging_takes_what_was_trained():
    model = wrap(select=[1, 3])
    keep_originals(model, "default")
    train(model)
    model.base_model.disable_adapter_layers()
    assert same(unloaded(model), parameters(llama()))
    assert same(merged(model), parameters(by_hand((1, 3))))


def test_reference_passes_in_between_leave_training_as_it_is():
    """As DPO does it: the policy's forward pass, then the base's, then the backward pass."""
    model, plain = wrap(select=[1, 3]), by_hand((1, 3), steps=0)
    keep_originals(model, "default")
    base = logits(llama())
    optimizers = [adamw(m) for m in (model, plain)]
    for number in range(4):
        model.train()
        loss = model(**BATCHES[number]).loss
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(input_ids=BATCHES[0]["input_ids"]).logits, base)
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        step(plain.train(), optimizers[1], BATCHES[number])
    assert same(parameters(model), parameters(plain))


def test_another_adapter_finds_the_base(tmp_path):
    model = wrap(select=[1, 3])
    keep_originals(model, "default")
    train(model)
    model.add_adapter("lora", peft.LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    now = logits(model)
    model.set_adapter("lora")
    assert torch.equal(logits(model), logits(llama()))
    model.set_adapter("default")
    assert torch.equal(logits(model), now)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(llama()))


def test_copies_and_pickles_go_their_own_way(trained):
    twin = copy.deepcopy(trained)
    adapter = next(iter(trained.peft_config))
    wrapper = next(wrappers(twin, adapter))
    assert wrapper.modules_to_save[adapter] is wrapper.original_module
    now = parameters(trained)
    train(twin, 2)
    assert same(parameters(trained), now) and not same(parameters(twin), now)
    assert same(unloaded(twin), parameters(llama()))
    file = io.BytesIO(pickle.dumps(full_layers(trained, adapter)))
    back = pickle.loads(file.getvalue())["model.layers.3.mlp.up_proj"]
    assert (
        torch.equal(back.weight, now[f"model.layers.3.mlp.up_proj.modules_to_save.{adapter}.weight"])
        if (adapter != "default")
        else torch.equal(back.weight, now["model.layers.3.mlp.up_proj.weight"])
    )


def test_a_state_dict_goes_into_another_model_and_leaves_its_originals():
    model = train(wrap(select=[1, 3]))
    other = wrap(select=[1, 3])
    other.load_state_dict(model.state_dict())
    assert same(parameters(other), parameters(model))
    assert same(unloaded(other), parameters(llama()))
    assert torch.equal(logits(other), logits(model))


def test_a_wrapper_can_be_taken_off():
    model = wrap(select="all")
    unwrap(model, "model.layers.0.mlp.up_proj", "default")
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")) is nn.Linear
    assert "model.layers.0.mlp.up_proj.weight" not in trains(model) and len(full_layers(model, "default")) == 35


def test_the_change_is_that_of_the_weights():
    model = wrap(select=[1, 3])
    keep_originals(model, "default")
    before = parameters(model)
    train(model)
    after, wrapper = parameters(model), full_layers(model, "default")["model.layers.3.mlp.up_proj"]
    name = "model.layers.3.mlp.up_proj.weight"
    wanted = (
        float((after[name].double() - before[name].double()).square().sum()),
        float(before[name].double().square().sum()),
    )
    assert wrapper.trained_change() == pytest.approx(wanted)
    with model.disable_adapter():
        assert wrapper.trained_change() == pytest.approx(wanted)
    rows = layerpeft.layer_report(model).rows
    names = [n for n in before if n.startswith("model.layers.3.")]
    change = sum(float((after[n] - before[n]).double().square().sum()) for n in names)
    whole = sum(float(before[n].double().square().sum()) for n in names)
    assert rows[3].change == pytest.approx((change / whole) ** 0.5, rel=1e-4)
    assert rows[0].change is None and [r.chosen for r in rows] == [False, True, False, True]


# always-on modules


def test_always_on_modules_train_and_their_cost_is_said(capsys, monkeypatch):
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    model = wrap(select="last:1", modules_to_save=["embed_tokens", "norm"])
    said = capsys.readouterr().err
    assert "model.embed_tokens, model.norm: 2,080 weights" in said
    assert "of gradients" in said and "on the CPU" in said and "runs to the bottom" in said
    assert {"model.embed_tokens.weight", "model.norm.weight"} < trains(model)
    assert "model.embed_tokens" not in full_layers(model, "default")
    keep_originals(model, "default", [])
    train(model)
    hand = llama()
    for name, parameter in hand.named_parameters():
        parameter.requires_grad_(name.startswith(("model.layers.3.", "model.embed_tokens", "model.norm")))
    assert same(parameters(model), parameters(train(hand)))
    wrap(select="last:1", modules_to_save=["norm"])
    said = capsys.readouterr().err
    assert "model.norm: 32 weights" in said and "bottom" not in said


# refusals


def fails(error, match, model=None, **options):
    base = llama() if model is None else model
    before = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(error, match=match) as caught:
        wrap(base, **options)
    assert {n: type(m) for n, m in base.named_modules()} == before
    return str(caught.value)


def test_options_of_lora_are_refused_all_at_once():
    with pytest.raises(ConfigError, match="4 problems") as caught:
        LayerFullConfig(r=4, use_dora=True, target_parameters=["experts"], biases="no")
    for fragment in ("r=4", "use_dora=True", "target_parameters", "biases='no' is not true or false"):
        assert fragment in str(caught.value)
    with pytest.raises(ConfigError, match="has no stock config"):
        LayerFullConfig().resolve(llama())


def test_names_that_match_nothing_are_refused_with_the_nearest():
    assert fails(SelectionError, "Did you mean 'up_proj'", target_modules=["up_porj"])
    assert fails(SelectionError, "Did you mean 'mlp'|Modules there", exclude_modules=["mpl"])
    assert fails(ConfigError, "Did you mean 'embed_tokens'", modules_to_save=["embed_token"])


def test_names_that_peft_would_mix_up_are_refused():
    assert fails(
        ConfigError,
        "PEFT would take layers.0.input_layernorm",
        MODELS["llama_bare"](),
        modules_to_save=["norm"],
        task_type=None,
    )


class Packed(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size, bias=False)
        del self.weight
        self.register_buffer("qweight", torch.zeros(size, size, dtype=torch.int8))


def test_weights_that_are_packed_are_refused_by_name():
    base = llama()
    for index in (0, 3):
        base.model.layers[index].self_attn.q_proj = Packed(32)
        base.model.layers[index].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), False)
    with pytest.raises(
        ConfigError, match="the weights of 2 modules are quantized"
    ):  # those of other layers stay frozen
        wrap(base)
    with pytest.raises(ConfigError, match="the weights of 4 modules are quantized") as caught:
        wrap(base, select=[0, 3])
    for index in (0, 3):
        assert f"model.layers.{index}.self_attn.q_proj" in str(caught.value)
        assert f"model.layers.{index}.mlp.up_proj" in str(caught.value)
    assert trains(wrap(base, target_modules=["input_layernorm"])) == {"model.layers.3.input_layernorm.weight"}


def test_a_model_with_another_adapter_is_refused_and_so_is_a_second_one():
    lora = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="without other adapters"):
        wrap(lora.base_model.model)
    with pytest.raises(ValueError, match="takes a model without other adapters"):
        lora.add_adapter("full", LayerFullConfig(select="last:1"))
    model = wrap()
    with pytest.raises(ConfigError, match="one adapter that trains the weights themselves"):
        model.add_adapter("other", peft.LoraConfig(target_modules=["embed_tokens"], modules_to_save=["3.mlp.up_proj"]))
    assert logits(model).isfinite().all() and list(model.peft_config) == ["default"]


def test_mixed_batches_are_refused():
    with pytest.raises(ConfigError, match="mixes adapters within a batch"):
        next(wrappers(wrap(), "default"))(torch.zeros(2, 32), adapter_names=["__base__", "default"])


def test_masters_are_for_one_process(monkeypatch):
    monkeypatch.setattr("layerpeft.integrations.distributed.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="one process only"):
        LayerFullConfig(select="last:1", master_weights=True)


def test_the_record_says_what_was_asked_for():
    model = wrap(select="last:2", biases=False)
    record = model.peft_config["default"]._layerpeft
    assert record.method == "full" and record.config["biases"] is False and "r" not in record.config
    assert record.config["peft_type"] == "LAYER_FULL" and record.selection.layers == (2, 3)
    assert saved_modules(model, "default") == list(full_layers(model, "default"))

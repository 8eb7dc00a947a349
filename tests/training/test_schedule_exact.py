"""Schedules against loops written by hand: the same draws, an optimizer of its own for every layer, equal to the bit."""

from __future__ import annotations

import copy
import gc
import inspect
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from layerpeft import check_trained
from layerpeft.selection.draws import window_seed
from layerpeft.selection.picks import uniform
from layerpeft.training.optimizer_states import optimizer_bytes
from tests.helpers import fulling
from tests.helpers.loops import llama
from tests.helpers.scheduling import rows, switcher_of, wrapped
from tests.helpers.switched import moments

LAYERS, KEEP, EVERY, STEPS, SEED, RATE, CLIP = 5, 2, 3, 11, 11, 1e-2, 0.5
SELECT = {"pick": "uniform", "keep": KEEP, "reselect_steps": EVERY, "seed": SEED}
STATES = ["keep", "clear", "offload"]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, RATE, momentum=0.9),
}


def drawn(window):
    """The layers of one window, read off the rule itself."""
    return sorted(uniform.pick([0.0] * LAYERS, KEEP, window_seed(SEED, window), uniform.Options()))


class ByHand:
    """What an optimizer of the pool should do: an optimizer for every layer, of which those of the window's layers step.

    `layers(window)` says which they are. Under `clear` a layer that stops training gives its optimizer up.
    """

    def __init__(self, blocks, make, clear, layers=drawn):
        self.blocks, self.make, self.clear, self.layers = blocks, make, clear, layers
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.steps = 0
        self.begin(0)

    def begin(self, window):
        self.active = self.layers(window)
        for number, block in enumerate(self.blocks):
            on = number in self.active
            for parameter in block.values():
                parameter.requires_grad_(on)
                parameter.grad = parameter.grad if on else None
            if on and number not in self.optimizers:
                self.optimizers[number] = self.make(list(block.values()))
            if not on and self.clear:
                self.optimizers.pop(number, None)

    def set_rate(self, rate):
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = rate

    def step(self):
        for number in self.active:
            self.optimizers[number].step()
        self.steps += 1
        if self.steps % EVERY == 0:
            self.begin(self.steps // EVERY)

    def zero_grad(self):
        for block in self.blocks:
            for parameter in block.values():
                parameter.grad = None

    def moments(self):
        return {
            f"{name}|{key}": torch.as_tensor(value)
            for number, optimizer in self.optimizers.items()
            for name, parameter in self.blocks[number].items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }


def blocks_of(model, inside="", only=""):
    """The parameters of every layer by their full name, all others frozen."""
    model.requires_grad_(False)
    named = {n: p for n, p in model.named_parameters() if only in n}
    return [{n: p for n, p in named.items() if n.startswith(f"{inside}model.layers.{i}.")} for i in range(LAYERS)]


def train(model, optimizer, accumulate=1, clip=None):
    """A bare loop; (loss, norm before clipping) of every step."""
    data, told = rows(), []
    torch.manual_seed(0)
    model.train()
    for step in range(STEPS):
        total = 0.0
        for part in range(accumulate):
            pair = [data[(2 * (step * accumulate + part) + i) % len(data)] for i in (0, 1)]
            ids = torch.stack([r["input_ids"] for r in pair])
            loss = model(input_ids=ids, labels=ids).loss / accumulate
            loss.backward()
            total += float(loss)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip)) if clip else 0.0
        optimizer.step()
        optimizer.zero_grad()
        told.append((total, norm))
    return told


def watch_bytes(model, optimizer, told):
    """Optimizer bytes after every step, before and after the switch, with those that the layers of that moment may have."""
    sizes = {p.numel() * p.element_size() for p in model.parameters() if p.requires_grad}
    assert len(sizes) > 1  # norms and matrices

    def measure(*_):
        active = [p for p in model.parameters() if p.requires_grad]
        whole = sum(p.numel() * p.element_size() for p in active)
        adam = "AdamW" in type(optimizer).__name__  # two moments, and a count of steps in 4 bytes
        told.append((optimizer_bytes([optimizer]), 2 * whole + 4 * len(active) if adam else whole))

    optimizer.register_step_post_hook(measure)  # runs before the hook that switches
    return measure


def differing(one, other):
    assert set(one) == set(other) and one
    return [n for n, t in one.items() if not torch.equal(t, other[n])]


def check_bytes(told, state):
    assert len(told) == 2 * STEPS and all(b for b, _ in told[::2])
    if state == "keep":
        assert told[-1][0] > told[-1][1]
    else:
        assert all(b <= most for b, most in told) and all(b == most for b, most in told[::2])
        assert any(b < most for b, most in told[1::2])  # after a switch


@pytest.mark.spread(3)
@pytest.mark.matrix("state,kind")
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("state", STATES)
def test_lisa_equals_a_loop_by_hand(state, kind, accumulate, clip):
    plain = llama(num_hidden_layers=LAYERS)
    hand = ByHand(blocks_of(plain), OPTIMIZERS[kind], state == "clear")
    want = train(plain, hand, accumulate, clip)

    model = wrapped("full", model=llama(num_hidden_layers=LAYERS), **SELECT, state=state)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    told = []
    measure = watch_bytes(model, optimizer, told)

    def step():
        optimizer.step()
        measure()  # once more, after the switch

    got = train(model, SimpleNamespace(step=step, zero_grad=optimizer.zero_grad), accumulate, clip)
    assert got == want
    check_bytes(told, state)
    windows = [h["layers"] for h in switcher_of(model).plain()["history"]]
    assert windows == [drawn(w) for w in range(STEPS // EVERY + 1)] and len({tuple(w) for w in windows}) > 2
    assert not differing(fulling.parameters(model), fulling.parameters(plain))
    assert not differing(moments(model, optimizer, fulling.clean), hand.moments())
    assert bool(switcher_of(model).store) == (state == "offload")
    check_trained(model)


def test_what_is_cleared_begins_as_a_new_optimizer_does():
    model = wrapped("full", model=llama(num_hidden_layers=LAYERS), **SELECT, state="clear")
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    counts = []
    optimizer.register_step_post_hook(lambda *_: counts.append({p: int(s["step"]) for p, s in optimizer.state.items()}))
    train(model, optimizer)
    layer = {p: int(n.split(".layers.")[1].split(".")[0]) for n, p in model.named_parameters() if ".layers." in n}
    since: dict[int, int] = {}
    again = set()
    for step, found in enumerate(counts):
        active = drawn(step // EVERY)
        again |= set(active) & {i for w in range(step // EVERY - 1) for i in drawn(w)} - set(since)
        since = {i: since.get(i, 0) + 1 for i in active}
        assert {(layer[p], n) for p, n in found.items()} == set(since.items())
    assert again  # some layer came back


def test_an_optimizer_that_the_garbage_collector_does_not_show_is_followed_too():
    """`gc.freeze()` before training, which some do to save time, hides every object that is there."""
    plain = llama(num_hidden_layers=LAYERS)
    hand = ByHand(blocks_of(plain), OPTIMIZERS["adamw"], clear=False)
    want = train(plain, hand)
    model = wrapped("full", model=llama(num_hidden_layers=LAYERS), **SELECT)
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    gc.freeze()
    try:
        assert train(model, optimizer) == want
    finally:
        gc.unfreeze()
        gc.freeze()  # what was imported stays out of the collector's sight
    assert not differing(fulling.parameters(model), fulling.parameters(plain))
    assert not differing(moments(model, optimizer, fulling.clean), hand.moments())


@pytest.mark.spread(2)
@pytest.mark.parametrize("state", STATES)
def test_two_optimizers_that_share_the_pool_count_as_one(state):
    """A step is over once both have stepped, and what rests is away from both."""
    plain = llama(num_hidden_layers=LAYERS)
    hand = ByHand(blocks_of(plain), OPTIMIZERS["adamw"], state == "clear")
    want = train(plain, hand)
    model = wrapped("full", model=llama(num_hidden_layers=LAYERS), **SELECT, state=state)
    pool = [p for p in model.parameters() if p.requires_grad]
    both = [OPTIMIZERS["adamw"]([p for p in pool if p.dim() == d]) for d in (1, 2)]

    def step():
        for optimizer in both:
            optimizer.step()
            active = {p for p in pool if p.requires_grad}
            assert state == "keep" or all(p in active for o in both for p in o.state)

    got = train(model, SimpleNamespace(step=step, zero_grad=lambda: [o.zero_grad() for o in both]))
    assert got == want and switcher_of(model).plain()["step"] == STEPS
    assert not differing(fulling.parameters(model), fulling.parameters(plain))
    states = SimpleNamespace(state={**both[0].state, **both[1].state})
    assert not differing(moments(model, states, fulling.clean), hand.moments())


def lora(state="offload", **select):
    return wrapped("lora", model=llama(num_hidden_layers=LAYERS), **SELECT | {"state": state} | select)


def plain_lora(start):
    """PEFT's own LoRA on all layers, with the same numbers to begin with."""
    model = peft.get_peft_model(llama(num_hidden_layers=LAYERS), peft.LoraConfig(**LORA))
    model.load_state_dict(start.state_dict())
    return model


@pytest.mark.spread(3)
@pytest.mark.matrix("state,kind")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("state", STATES)
def test_lora_equals_plain_peft_that_is_switched_by_hand(state, kind, accumulate):
    model = lora(state)
    plain = plain_lora(model)
    hand = ByHand(blocks_of(plain, "base_model.model.", ".lora_"), OPTIMIZERS[kind], state == "clear")
    want = train(plain, hand, accumulate, clip=0.1)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    assert train(model, optimizer, accumulate, clip=0.1) == want
    assert not differing(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert not differing(moments(model, optimizer), hand.moments())


@pytest.mark.spread(2)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_measuring_frozen_layers_changes_nothing_of_what_trains(accumulate):
    """The layers are those that the scores chose; everything else is as if nobody had measured."""
    model = lora("clear", pick="top", by="gradient_norm", seed=None)
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    got = train(model, optimizer, accumulate)
    windows = [h["layers"] for h in switcher_of(model).plain()["history"]]
    assert switcher_of(model).plain()["measured"] == len(windows) == STEPS // EVERY + 1
    assert len({tuple(w) for w in windows}) > 1
    start = lora("clear")
    plain = plain_lora(start)
    blocks = blocks_of(plain, "base_model.model.", ".lora_")
    hand = ByHand(blocks, OPTIMIZERS["adamw"], clear=True, layers=windows.__getitem__)
    assert train(plain, hand, accumulate) == got
    assert not differing(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert not differing(moments(model, optimizer), hand.moments())


class Seen(TrainerCallback):
    """Every micro-batch as the model got it; rates, norms and optimizer bytes of every step, and the last one's moments."""

    def __init__(self, model):
        self.model, self.batches, self.bytes, self.moments = model, [], [], {}
        model.base_model.model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, _module, args, kwargs):
        assert not args
        self.batches.append(copy.deepcopy(kwargs))

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        self.measure = watch_bytes(self.model, getattr(optimizer, "optimizer", optimizer), self.bytes)

    def on_step_end(self, args, state, control, optimizer=None, **_):
        self.measure()
        self.moments = moments(self.model, getattr(optimizer, "optimizer", optimizer), fulling.clean)


def replayed(batches, hand, model, accumulate):
    """The same micro-batches in a bare loop, with Trainer's rates and its clipping; (norm, rate) of every step."""
    told = []
    model.train()
    for step in range(STEPS):
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            model(**batch).loss.backward()
        active = [p for number, block in enumerate(hand.blocks) if number in hand.active for p in block.values()]
        norm = float(nn.utils.clip_grad_norm_(active, CLIP))
        rate = RATE * ((STEPS - step) / STEPS)
        hand.set_rate(rate)
        hand.step()
        hand.zero_grad()
        told.append((norm, rate))
    return told


@pytest.mark.spread(3)
@pytest.mark.matrix
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("state", STATES)
def test_lisa_under_a_trainer_equals_a_loop_by_hand(state, accumulate, tmp_path):
    model = wrapped("full", model=llama(num_hidden_layers=LAYERS), **SELECT, state=state)
    seen = Seen(model)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        learning_rate=RATE,
        max_grad_norm=CLIP,
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[seen])
    trainer.train()
    optimizer: torch.optim.Optimizer = trainer.optimizer.optimizer
    groups = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "initial_lr", "lr")}
    kind = type(optimizer)

    plain = llama(num_hidden_layers=LAYERS)
    hand = ByHand(
        blocks_of(plain), lambda p: kind(p, RATE, **{k: groups[k] for k in made(kind, groups)}), state == "clear"
    )
    want = replayed(seen.batches, hand, plain, accumulate)
    assert len(seen.batches) == STEPS * accumulate
    log = [(e["grad_norm"], e["learning_rate"]) for e in trainer.state.log_history if "grad_norm" in e]
    assert log == want and sum(norm > CLIP for norm, _ in log) > 1  # so that clipping has something to do
    assert not differing(fulling.parameters(model), fulling.parameters(plain))
    assert not differing(seen.moments, hand.moments())
    check_bytes(seen.bytes, state)


def made(kind, groups):
    """Those options of an optimizer's group that it is built with."""
    return [k for k in groups if k in inspect.signature(kind).parameters]

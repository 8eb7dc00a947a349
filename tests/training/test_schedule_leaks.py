"""A switch every five steps: what lives after forty switches, or two hundred, is what lived after ten."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, check_trained, get_peft_model
from layerpeft.tuners.galore.projection import projections, state_of
from tests.helpers.loops import hooks
from tests.helpers.repeating import repeated, some
from tests.helpers.scheduling import switcher_of

WIDTH, LAYERS, EVERY, EARLY = 8, 4, 5, 10
UNIFORM = {"pick": "uniform", "keep": 2, "reselect_steps": EVERY}
LATE = pytest.mark.parametrize("late", [40, repeated(200)])  # a thousand steps
BY_GRADIENT = {"by": "gradient_norm", "pick": "sample", "keep": 2, "reselect_steps": EVERY}
METHODS = {
    "lora": lambda select: LayerLoraConfig(select=select, r=2, target_modules=["up", "down"]),
    "galore": lambda select: LayerGaloreConfig(select=select, r=2, target_modules=["up", "down"], fold="beside"),
    "galore base": lambda select: LayerGaloreConfig(select=select, r=2, target_modules=["up", "down"]),
    "full": lambda select: LayerFullConfig(select=select),
    "masters": lambda select: LayerFullConfig(select=select, master_weights=True),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclass(frozen=True)
class Alive:
    """What lives at one moment: tensors, the bytes of their storages, hooks, parameters of which the optimizer has states.

    And of what shapes the tensors are, for who looks for a leak.
    """

    tensors: int
    nbytes: int
    hooks: int
    states: int
    shapes: Counter = field(compare=False)


def folded(model):
    """The sums of what projection has trained, which grow with every refresh until they are as large as the weights."""
    found = [state_of(layer).folds for _, layer in projections(model.base_model.model, "default")]
    return [t for folds in found for t in ([folds.dense] if folds.dense is not None else sum(folds.pieces, ()))]


def alive(model, optimizer=None):
    """All that lives but sums of projection: the garbage collector's tensors, and gradients of which Python has seen nothing."""
    gc.collect()
    found = {id(t): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    found |= {id(t.grad): t.grad for t in list(found.values()) if t.is_leaf and t.grad is not None}
    for tensor in folded(model):
        found.pop(id(tensor), None)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found.values()}
    shapes = Counter((tuple(t.shape), str(t.dtype), type(t).__name__) for t in found.values())
    return Alive(len(found), sum(storages.values()), hooks(model), len(optimizer.state) if optimizer else 0, shapes)


@dataclass
class Story:
    """What lived at switches, just before them and just after; and the layers of every window."""

    before: dict[int, Alive] = field(default_factory=dict)
    after: dict[int, Alive] = field(default_factory=dict)
    windows: list[set[int]] = field(default_factory=list)
    pool: int = 0  # parameters that may train

    def overlap(self, switch):
        """How many layers go on training through a switch."""
        return len(self.windows[switch - 1] & self.windows[switch])

    def complete(self):
        """The first switch before which every layer has trained."""
        return next(s for s in range(1, len(self.windows)) if len(set().union(*self.windows[:s])) == LAYERS)


@pytest.fixture
def nothing_else():
    """What other tests left behind is not looked at, which also saves nearly all of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.freeze()  # what was imported stays out of the collector's sight


def trained(method, state, late, select=UNIFORM):
    """What lived at some switches of so many."""
    looked = {*range(1, 13), late // 2, *range(late - 7, late + 1)}
    torch.manual_seed(0)
    model = Tiny().to(torch.bfloat16 if method == "masters" else torch.float32)
    model = get_peft_model(model, METHODS[method](select | {"state": state}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
    data = torch.randn(16, 4, WIDTH, dtype=next(model.parameters()).dtype)
    story, steps = Story(pool=sum(p.requires_grad for p in model.parameters())), 0

    def before_switch(*_):  # this hook runs before the one that switches
        switch, rest = divmod(steps + 1, EVERY)
        if not rest and switch in looked:
            story.before[switch] = alive(model, optimizer)

    optimizer.register_step_post_hook(before_switch)
    while steps < EVERY * late:
        model(data[steps % 16]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if not steps % EVERY and steps // EVERY in looked:
            story.after[steps // EVERY] = alive(model, optimizer)
    story.windows += [set(h["layers"]) for h in switcher_of(model).plain()["history"]]
    check_trained(model)
    assert len(story.windows) == late + 1 and len({frozenset(w) for w in story.windows}) > 3
    assert all(t.numel() <= WIDTH * WIDTH for t in folded(model)) and bool(folded(model)) == ("galore" in method)
    return story


CASES = [(m, s, UNIFORM) for m in METHODS for s in ("clear", "offload") if (m, s) != ("galore base", "clear")]
CASES += [("lora", "offload", BY_GRADIENT), ("full", "clear", BY_GRADIENT)]
QUICK = [("galore base", "offload", UNIFORM), ("full", "clear", BY_GRADIENT)]


@LATE
@pytest.mark.parametrize(
    ("method", "state", "select"),
    some(CASES, QUICK),
    ids=lambda v: v.get("by", "uniform") if isinstance(v, dict) else v,
)
def test_nothing_grows_under(method, state, select, late, nothing_else):
    story = trained(method, state, late, select)
    assert story.complete() <= EARLY
    assert story.before[EARLY].states == story.pool * 2 / LAYERS  # of the two layers that train
    for switch in sorted(s for s in story.before if s >= EARLY):
        assert story.before[switch] == story.before[EARLY], (switch, grown(story.before[EARLY], story.before[switch]))
    # just after a switch, cleared states are gone; how many depends on how many layers go on training
    firsts: dict[int, int] = {}
    for switch in sorted(s for s in story.after if s >= EARLY):
        first = firsts.setdefault(story.overlap(switch) if state == "clear" else 0, switch)
        assert story.after[switch] == story.after[first], (switch, grown(story.after[first], story.after[switch]))
    assert len(firsts) < len(story.after) / 2


@LATE
@pytest.mark.parametrize("method", some(["lora", "galore", "full"], ["full"]))
def test_kept_states_stop_growing_once_every_layer_was_active(method, late, nothing_else):
    story = trained(method, "keep", late)
    full = story.complete()
    assert story.before[full].states == story.pool
    assert 1 < full <= EARLY and story.before[1].nbytes < story.before[full].nbytes
    later = {s: a for s, a in story.before.items() if s >= full}
    assert late in later
    assert all(found == story.before[full] for found in later.values()), grown(story.before[full], later[late])


def grown(early, late):
    """What there is more of, for who looks for a leak."""
    return dict(late.shapes - early.shapes), dict(early.shapes - late.shapes), late.nbytes - early.nbytes


def test_a_leak_would_be_seen(nothing_else):
    torch.manual_seed(0)
    model = get_peft_model(Tiny(), METHODS["lora"](UNIFORM))
    one = alive(model)
    kept = [torch.zeros(3)]
    two = alive(model)
    assert (two.tensors, two.nbytes) == (one.tensors + 1, one.nbytes + 12) and len(kept) == 1
    model(torch.ones(1, WIDTH)).sum().backward()  # gradients that Python has not seen yet
    pool = [p for p in model.parameters() if p.requires_grad]
    three = alive(model)
    assert three.tensors >= two.tensors + len(pool) and three.nbytes >= two.nbytes + sum(p.nbytes for p in pool)

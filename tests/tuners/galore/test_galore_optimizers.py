"""Optimizers under projection: each takes the steps that it would take on the projected full gradient, or it is refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer
from transformers.optimization import Adafactor

import layerpeft
from layerpeft import LayerGaloreConfig
from layerpeft.errors import TrainingError
from layerpeft.tuners.galore.optimizers import COPIES, TABLE, check, verdict
from layerpeft.tuners.galore.projection import basis_of, projections, state_of
from tests.helpers.loops import llama, make_batches
from tests.helpers.repeating import some

bnb = pytest.importorskip("bitsandbytes").optim
TARGETS, RANK, GAP, STEPS, SCALE = ["q_proj", "v_proj", "up_proj", "down_proj"], 4, 3, 12, 0.25
BATCHES = make_batches()


class Lion(Optimizer):
    """arXiv 2302.06675, algorithm 2."""

    def __init__(self, params, lr, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(group["lr"] * (first * mean + (1 - first) * p.grad).sign())
                mean.mul_(second).add_(p.grad, alpha=1 - second)


class AdamWScheduleFree(Optimizer):
    """arXiv 2405.15682, as its authors' package has it: what trains is y, beside it lies z."""

    def __init__(self, params, lr, betas=(0.9, 0.999)):
        super().__init__(params, {"lr": lr, "betas": betas, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            (first, second), share = group["betas"], 1 / group["k"]
            for p in group["params"]:
                if "z" not in self.state[p]:
                    self.state[p] |= {"z": p.clone(), "exp_avg_sq": torch.zeros_like(p)}
                z, square = self.state[p]["z"], self.state[p]["exp_avg_sq"]
                square.mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                go = p.grad / ((square / (1 - second ** group["k"])).sqrt() + 1e-8)
                p.lerp_(z, share).add_(go, alpha=group["lr"] * (first * (1 - share) - 1))
                z.sub_(go, alpha=group["lr"])


class SGDScheduleFree(AdamWScheduleFree):
    """By name."""


class RAdamScheduleFreeClosure(AdamWScheduleFree):
    """By name: each comes in several forms."""


class Lookahead(torch.optim.SGD):
    """arXiv 1907.08610: every third step goes half the way back to a slow copy."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for g in self.param_groups for p in g["params"]):
            state = self.state[p]
            slow = state.setdefault("slow", p.clone())
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            state["step"] = state.get("step", 0) + 1
            if state["step"] % 3 == 0:
                p.copy_(slow.lerp_(p, 0.5))


class LAMB(torch.optim.Adam):
    """arXiv 1904.00962: the step of each tensor is as long as the tensor."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for g in self.param_groups for p in g["params"]]
        before = [p.clone() for p in params]
        super().step(closure)
        for p, old in zip(params, before, strict=True):
            size, move = old.norm(), p - old
            p.copy_(old + move * (size / move.norm() * self.param_groups[0]["lr"] if size else 1.0))


class LARS(LAMB):
    """By name."""


class MasterWeights(Optimizer):
    """What trains in a short dtype, with a copy in a long one that is copied back."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for g in self.param_groups for p in g["params"]):
            master = self.state[p].setdefault("master_param", p.double())
            p.copy_(master.sub_(p.grad.double(), alpha=self.param_groups[0]["lr"]))


ADAFACTOR = {"scale_parameter": False, "relative_step": False}
EIGHT = {"min_8bit_size": 16, "weight_decay": 0.0}
# by name of the table's row: how it is made, the numbers it computes in, its learning rate
EQUAL = {
    "AdamW": (lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0), torch.float64, 1e-2),
    "AdamW of bitsandbytes": (lambda p, lr: bnb.AdamW(p, lr, weight_decay=0.0), torch.float32, 1e-2),
    "Adam": (torch.optim.Adam, torch.float64, 1e-2),
    "NAdam": (torch.optim.NAdam, torch.float64, 1e-2),
    "RAdam": (torch.optim.RAdam, torch.float64, 1e-1),  # whose first steps are small
    "AdamW8bit": (lambda p, lr: bnb.AdamW8bit(p, lr, **EIGHT), torch.float32, 1e-2),
    "Adam8bit": (lambda p, lr: bnb.Adam8bit(p, lr, **EIGHT), torch.float32, 1e-2),
    "SGD": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), torch.float64, 1.0),
    "SGD, Nesterov": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True), torch.float64, 1.0),
    "Lion": (Lion, torch.float64, 1e-3),
    "Lion8bit": (lambda p, lr: bnb.Lion8bit(p, lr, min_8bit_size=16), torch.float32, 1e-3),
    "RMSprop": (lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.9, centered=True), torch.float64, 1e-3),
    "Adagrad": (torch.optim.Adagrad, torch.float64, 1e-2),
    "Adafactor": (lambda p, lr: Adafactor(p, lr, **ADAFACTOR), torch.float64, 1e-2),
    "Adafactor, momentum": (lambda p, lr: Adafactor(p, lr, beta1=0.9, **ADAFACTOR), torch.float64, 1e-2),
    "Muon": (lambda p, lr: torch.optim.Muon(p, lr, weight_decay=0.0), torch.float64, 1e-3),
}
REFUSED = {
    "Adafactor": (Adafactor, None),
    "Adafactor of torch": (torch.optim.Adafactor, 1e-2),
    "AdamWScheduleFree": (AdamWScheduleFree, 1e-2),
    "SGDScheduleFree": (SGDScheduleFree, 1e-2),
    "RAdamScheduleFree": (RAdamScheduleFreeClosure, 1e-2),
    "ASGD": (lambda p, lr: torch.optim.ASGD(p, lr, lambd=0.1, t0=0), 1e-2),
    "Lookahead": (Lookahead, 1e-2),
    "LAMB": (LAMB, 1e-2),
    "LARS": (LARS, 1e-2),
    "master weights": (MasterWeights, 1e-2),
}


def start(dtype):
    return llama(num_hidden_layers=2).to(dtype)


def wrap(dtype=torch.float32, **options):
    config = {"r": RANK, "update_proj_gap": GAP, "scale": SCALE, "target_modules": TARGETS, **options}
    return layerpeft.get_peft_model(start(dtype), LayerGaloreConfig(**config))


def modules(model):
    return dict(projections(model.base_model.model, "default"))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def weights(model):
    merged = copy.deepcopy(model).merge_and_unload()
    return {n: p.detach() for n, p in merged.named_parameters()}


def apart(one, other):
    """The largest difference of two runs from the same start."""
    assert set(one) == set(other)
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def ours(make, dtype, rate, **options):
    """(weights, the basis of each module at each step) of a run of `STEPS` steps."""
    model = wrap(dtype, **options)
    optimizer, bases = make(trained(model), lr=rate), []
    for number in range(STEPS):
        bases.append({n: basis_of(layer).clone() for n, layer in modules(model).items()})
        model(**BATCHES[number % 8]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(state_of(layer).refreshes >= 4 and not state_of(layer).failed for layer in modules(model).values())
    return {f"{n}.weight": weights(model)[f"{n}.weight"] for n in modules(model)}, bases


def by_hand(make, dtype, rate, bases, side="right", decay=0.0):
    """The same optimizer steps small shadows by the full gradient, projected; the weights follow, and decay."""
    model = start(dtype)
    full = {n: model.get_parameter(f"{n}.weight") for n in bases[0]}
    first = {n: w.detach().clone() for n, w in full.items()}
    sizes = {n: (w.shape[0], RANK) if side == "right" else (RANK, w.shape[1]) for n, w in full.items()}
    shadows = {n: torch.nn.Parameter(torch.zeros(*size, dtype=dtype)) for n, size in sizes.items()}
    optimizer = make(list(shadows.values()), lr=rate)
    for number, basis in enumerate(bases):
        model(**BATCHES[number % 8]).loss.backward()
        before = {n: p.detach().clone() for n, p in shadows.items()}
        for n, w in full.items():
            shadows[n].grad = w.grad @ basis[n].T if side == "right" else basis[n] @ w.grad
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            for n, w in full.items():
                step = shadows[n] - before[n]
                w.mul_(1 - rate * decay).add_(SCALE * (step @ basis[n] if side == "right" else basis[n].T @ step))
    movement = max(float((w.detach() - first[n]).abs().max()) for n, w in full.items())
    return {f"{n}.weight": w.detach() for n, w in full.items()}, movement


# the table


def test_every_row_is_tested():
    names = {n.partition(",")[0].partition(" of ")[0] for n in EQUAL}
    assert {row.name for row in TABLE if row.verdict == "equal"} == names
    refused = {n.partition(" of ")[0] for n in REFUSED}
    assert {row.name for row in TABLE if row.verdict == "refused"} == refused - {"master weights"}
    assert all(row.figure for row in TABLE if row.verdict == "equal")
    assert all(row.cure for row in TABLE if row.verdict == "refused")


def test_every_row_is_in_the_docs():
    lines = (Path(__file__).parents[3] / "docs" / "projection.md").read_text(encoding="utf-8").splitlines()
    for row in TABLE:
        assert any(f"`{row.name}`" in line and f"| {row.verdict}" in line for line in lines), row.name


# one of each kind of state; what a fold does to the others is asked below
KINDS = ["AdamW", "AdamW8bit", "SGD", "Lion", "RMSprop", "Adafactor", "Muon"]


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", some(EQUAL, KINDS))
def test_steps_are_those_on_the_projected_full_gradient(name):
    make, dtype, rate = EQUAL[name]
    found, bases = ours(make, dtype, rate)
    expected, movement = by_hand(make, dtype, rate, bases)
    row = verdict(make([torch.nn.Parameter(torch.zeros(2, 2))], lr=rate))
    assert row is not None and row.verdict == "equal" and movement > 1e-3
    share = apart(found, expected) / movement
    print(f"{name}: {share:.1e} of a movement of {movement:.3f}")
    assert share <= (row.figure if dtype == torch.float64 or row.figure > 1e-3 else 1e-3)


def test_steps_are_those_on_the_left_side_too():
    make, dtype, rate = EQUAL["AdamW"]
    found, bases = ours(make, dtype, rate, proj_type="left")
    expected, movement = by_hand(make, dtype, rate, bases, side="left")
    assert apart(found, expected) <= 1e-9 * movement and movement > 1e-3


def test_weight_decay_is_approximate_and_by_how_much():
    def make(params, lr):
        return torch.optim.AdamW(params, lr, weight_decay=0.01)

    row = verdict(make([torch.nn.Parameter(torch.zeros(2, 2))], lr=1e-2))
    assert row is not None and row.verdict == "approximate" and "weight_decay=0" in row.why
    found, bases = ours(make, torch.float64, 1e-2)
    plain, rate = EQUAL["AdamW"][0], 1e-2
    expected, movement = by_hand(plain, torch.float64, rate, bases, decay=0.01)
    share = apart(found, expected) / movement
    print(f"weight decay: {share:.1e} of the movement")
    assert row.figure is not None and 1e-4 < share <= row.figure


def moved(make, dtype, rate, folded):
    """All that an optimizer has moved, by the same gradients, where something is taken out of what it trains, or never."""
    draw = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(16, 8, dtype=dtype))
    optimizer, out = make([p], lr=rate), torch.zeros(16, 8, dtype=dtype)
    for number in range(16):
        p.grad = torch.randn(16, 8, generator=draw).to(dtype)
        optimizer.step()
        if folded and number in (3, 7, 11):
            piece = torch.randn(16, 8, generator=torch.Generator().manual_seed(number)).to(dtype) / 16
            out += piece
            p.data -= piece
    return out + p.detach()


FOLDED = [(n, "equal", m, d, r) for n, (m, d, r) in EQUAL.items()]
FOLDED += [(n, "refused", m, torch.float32, r) for n, (m, r) in REFUSED.items()]


@pytest.mark.parametrize(("name", "verdict", "make", "dtype", "rate"), FOLDED, ids=[" ".join(f[:2]) for f in FOLDED])
def test_a_fold_changes_the_steps_of_those_that_are_refused_and_of_no_other(name, verdict, make, dtype, rate):
    whole, folded = (moved(make, dtype, rate, f) for f in (False, True))
    share = float((whole - folded).abs().max() / whole.abs().max())
    print(f"{name}: {share:.1e}")
    assert share < 1e-4 if verdict == "equal" else share > 1e-2


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_with_a_cure(name):
    make, rate = REFUSED[name]
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = make([p], lr=rate)
    if name == "master weights":  # nothing is known of it until its state says what it is
        assert verdict(optimizer) is None
        p.grad = torch.ones_like(p)
        optimizer.step()
    row = verdict(optimizer)
    assert row is not None and row.verdict == "refused"
    with pytest.raises(TrainingError, match="does not work with gradient projection") as error:
        check(optimizer)
    assert type(optimizer).__name__ in str(error.value)
    assert "optim='adamw_torch'" in str(error.value) or "scale_parameter=False" in str(error.value)


@pytest.mark.parametrize("state", COPIES)
def test_states_that_are_copies_are_known_by_their_names(state):
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([p], 0.1)
    assert verdict(optimizer).verdict == "equal"
    optimizer.state[p][state] = p.detach().clone()
    with pytest.raises(TrainingError, match="it keeps an? .* from which a fold would not be taken away"):
        check(optimizer)


def test_the_optimizer_is_found_in_its_wrappers_and_under_its_other_names():
    from accelerate import Accelerator

    params = [torch.nn.Parameter(torch.zeros(2, 2))]
    wrapped = Accelerator(cpu=True).prepare_optimizer(AdamWScheduleFree(params, 0.1))
    assert type(wrapped).__name__ == "AcceleratedOptimizer" and verdict(wrapped).name == "AdamWScheduleFree"
    kinds = (bnb.PagedAdamW, bnb.PagedAdamW32bit, bnb.AdamW32bit, bnb.PagedAdamW8bit, bnb.PagedLion32bit)
    names = [verdict(kind(params, lr=1e-3)).name for kind in kinds]
    assert names == ["AdamW", "AdamW", "AdamW", "AdamW8bit", "Lion"]
    assert verdict(bnb.LAMB8bit(params, lr=1e-3)).verdict == "refused"
    row = verdict(bnb.RMSprop8bit(params, lr=1e-3))
    assert row.name == "RMSprop" and not row.means + row.squares  # 8-bit states cannot be turned

    class Mine(torch.optim.AdamW):
        pass

    assert verdict(Mine(params, weight_decay=0.0)).verdict == "equal"


def test_what_is_not_in_the_table_is_told_once(caplog):
    class Novel(Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

    optimizer = Novel([torch.nn.Parameter(torch.zeros(2, 2))])
    with caplog.at_level(logging.INFO, logger="layerpeft"):
        assert verdict(optimizer) is None and check(optimizer) is None and check(optimizer) is None
    assert caplog.text.count("Novel is not among the optimizers that were checked") == 1
    with pytest.raises(TrainingError, match="nothing is known of the states of Novel"):
        check(optimizer, "project")


@pytest.mark.parametrize("name", EQUAL)
def test_moments_that_can_be_rotated_are_all_that_the_optimizer_keeps_of_a_tensors_shape(name):
    make, _, rate = EQUAL[name]
    p = torch.nn.Parameter(torch.zeros(16, 8))
    optimizer = make([p], lr=rate)
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = {k for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and v.dim()}
    row = verdict(optimizer)
    if row.means + row.squares:
        assert kept and kept <= {*row.means, *row.squares}
        assert check(optimizer, "project") == row
    else:
        with pytest.raises(TrainingError, match="cannot be put into a new basis; use moments='keep'"):
            check(optimizer, "reset")


# in a run


@pytest.mark.parametrize("make", [AdamWScheduleFree, Lookahead, Adafactor], ids=lambda m: m.__name__)
def test_a_refused_optimizer_stops_before_its_first_step(make):
    model = wrap()
    optimizer = make(trained(model), lr=None if make is Adafactor else 1e-2)
    model(**BATCHES[0]).loss.backward()
    with pytest.raises(TrainingError, match="does not work with gradient projection"):
        optimizer.step()
    assert not any(bool(p.any()) for p in trained(model))


@pytest.mark.parametrize("name", ["AdamW of bitsandbytes", "Adagrad", "RMSprop", "AdamW8bit"])
def test_projected_moments_stay_sound_or_are_refused(name):
    make, _, rate = EQUAL[name]
    model = wrap(moments="project", update_proj_gap=3)
    make = bnb.RMSprop if name == "RMSprop" else make
    optimizer, losses, refused = make(trained(model), lr=rate), [], False
    for number in range(10):
        loss = model(**BATCHES[number % 8]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        try:
            optimizer.step()
        except TrainingError as error:
            refused = "moments='keep'" in str(error)
            break
        optimizer.zero_grad()
    squares = [s[k] for s in optimizer.state.values() for k in verdict(optimizer).squares if k in s]
    assert refused or (torch.tensor(losses).isfinite().all() and squares and all(bool((v >= 0).all()) for v in squares))

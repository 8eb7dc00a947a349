"""Optimizers under gradient projection: which of them take the steps they would take on the projected full gradient.

What trains is `B` of `W + s·B·Q`. It starts every period at zero, because the period before was folded into `W`. So an optimizer
whose steps follow from gradients and their moments alone takes the very steps that it would take on the projected gradient
`G Qᵀ` of the whole weight. One that looks at the value of what it trains, or keeps a copy of it, does not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakSet

from torch.optim.optimizer import Optimizer

from layerpeft.errors import TrainingError
from layerpeft.text import note

Verdict = Literal["equal", "approximate", "refused"]


@dataclass(frozen=True)
class Row:
    """One optimizer, by the name of its class (and the options of its groups that `when` names).

    `figure`: the largest difference of the weights from the same optimizer on the projected full gradient, over the largest
    movement, after 24 steps with refreshes. `means` and `squares`: its states that are averages of gradients and of their
    squares, all it keeps of a tensor's shape; empty where they cannot be turned into a new basis.
    """

    name: str
    verdict: Verdict
    why: str
    figure: float | None = None
    cure: str = ""
    when: Mapping[str, Any] = field(default_factory=dict)
    means: tuple[str, ...] = ()
    squares: tuple[str, ...] = ()


_ADAM: Any = {"means": ("exp_avg", "state1"), "squares": ("exp_avg_sq", "max_exp_avg_sq", "state2")}
_BY_MOMENTS = "steps follow from the gradient and its moments alone"
_IN_8_BIT = f"{_BY_MOMENTS}, kept in 8 bits"
_SCHEDULE_FREE = "keeps a second copy of what it trains (z), from which a fold would not be taken away"
_BY_SIZE = "scales its steps by the size of what it trains, which is zero after every fold, not by that of the weight"
_PLAIN = "train with AdamW and a learning-rate schedule (transformers: optim='adamw_torch')"

TABLE = (
    Row("AdamW", "equal", _BY_MOMENTS, 1e-9, **_ADAM),
    Row("Adam", "equal", _BY_MOMENTS, 1e-9, **_ADAM),
    Row("NAdam", "equal", _BY_MOMENTS, 1e-9, **_ADAM),
    Row("RAdam", "equal", _BY_MOMENTS, 1e-9, **_ADAM),
    Row("AdamW8bit", "equal", _IN_8_BIT, 1e-3),
    Row("Adam8bit", "equal", _IN_8_BIT, 1e-3),
    Row("Lion8bit", "equal", _IN_8_BIT, 1e-3),
    Row("SGD", "equal", f"{_BY_MOMENTS}, with momentum and without", 1e-9, means=("momentum_buffer", "state1")),
    Row("Lion", "equal", _BY_MOMENTS, 1e-9, means=("exp_avg", "state1")),
    Row("RMSprop", "equal", _BY_MOMENTS, 1e-9, means=("momentum_buffer", "grad_avg"), squares=("square_avg", "state1")),
    Row("Adagrad", "equal", _BY_MOMENTS, 1e-9, squares=("sum", "state1")),
    Row(
        "Adafactor",
        "equal",
        "without scale_parameter its steps follow from gradients alone; the rows and columns of its second moment are those "
        "of the projected gradient, as in GaLore's own",
        1e-9,
        when={"scale_parameter": False},
    ),
    Row(
        "Adafactor",
        "refused",
        _BY_SIZE,
        cure="use transformers' Adafactor(scale_parameter=False, relative_step=False, lr=…), which is optim='adafactor'; torch's "
        "own cannot be told not to",
    ),
    Row(
        "Muon",
        "equal",
        "it orthogonalises G Qᵀ (out, r), which times Q is the projected gradient orthogonalised; its factor of shape is that "
        "of (out, r)",
        1e-9,
        means=("momentum_buffer",),
    ),
    Row("AdamWScheduleFree", "refused", _SCHEDULE_FREE, cure=_PLAIN),
    Row("SGDScheduleFree", "refused", _SCHEDULE_FREE, cure=_PLAIN),
    Row("RAdamScheduleFree", "refused", _SCHEDULE_FREE, cure=_PLAIN),
    Row(
        "ASGD", "refused", "keeps an average of what it trains, from which a fold would not be taken away", cure=_PLAIN
    ),
    Row("Lookahead", "refused", "keeps a slow copy of what it trains, to which a fold would be undone", cure=_PLAIN),
    Row("LAMB", "refused", _BY_SIZE, cure=_PLAIN),
    Row("LARS", "refused", _BY_SIZE, cure=_PLAIN),
)
DECAY = "weight decay shrinks what a period has trained so far and not the weight, so it does almost nothing; give weight_decay=0"
DECAY_FIGURE = 1e-2  # AdamW's own 0.01 at a learning rate of 1e-2; in proportion to both and to the steps
# states that are copies of what is trained, by the names that optimizers outside the table give them
COPIES = {"z": "a second copy of what it trains"}
COPIES |= dict.fromkeys(("ax", "ema", "param_ema"), "an average of what it trains")
COPIES |= dict.fromkeys(("slow_param", "slow_buffer"), "a slow copy of what it trains")
COPIES |= dict.fromkeys(("master_param", "master_params", "fp32_param"), "a master copy of what it trains")
_told: WeakSet[Optimizer] = WeakSet()


def verdict(optimizer: Any) -> Row | None:
    """The row of an optimizer, by its class or the nearest known one that it is built on; None where nothing is known."""
    optimizer = _inner(optimizer)
    known = (row for name in _names(optimizer) for row in TABLE if row.name == name and _applies(row, optimizer))
    found = next(known, None)
    if found is not None and type(optimizer).__name__.endswith("8bit"):
        found = replace(found, means=(), squares=())
    copies = {COPIES[k] for state in optimizer.state.values() for k in state if k in COPIES}
    if copies and (found is None or found.verdict != "refused"):
        why = f"keeps {min(copies)}, from which a fold would not be taken away"
        return Row(type(optimizer).__name__, "refused", why, cure=_PLAIN)
    if found is not None and found.verdict == "equal" and any(g.get("weight_decay") for g in optimizer.param_groups):
        return replace(found, verdict="approximate", why=DECAY, figure=DECAY_FIGURE)
    return found


def check(optimizer: Any, moments: str = "keep") -> Row | None:
    """The row of an optimizer that is about to step; says once what is approximate, and what nothing is known of.

    `moments`: what a refresh is to do with them. Raises: TrainingError for what is refused, with the cure.
    """
    row, name = verdict(optimizer), type(_inner(optimizer)).__name__
    if row is not None and row.verdict == "refused":
        raise TrainingError(f"{name} does not work with gradient projection: it {row.why}; {row.cure}")
    if moments != "keep" and row is not None and not row.means + row.squares:
        raise TrainingError(
            f"moments={moments!r}: the states of {name} cannot be put into a new basis; use moments='keep'"
        )
    if moments != "keep" and row is None:
        raise TrainingError(
            f"moments={moments!r}: nothing is known of the states of {name}; use moments='keep' or AdamW"
        )
    if _inner(optimizer) not in _told and (row is None or row.verdict == "approximate"):
        _told.add(_inner(optimizer))
        note(
            f"{name} with gradient projection: {row.why}"
            if row is not None
            else f"{name} is not among the optimizers that were checked with gradient projection; it is right if its steps follow "
            "from gradients alone, and not from the value of what it trains or a copy of it"
        )
    return row


def _inner(optimizer: Any) -> Any:
    """The optimizer itself, out of Accelerate's wrapper or another that holds it by the same name."""
    while type(optimizer).__name__.endswith("Optimizer") and isinstance(
        getattr(optimizer, "optimizer", None), Optimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer


def _names(optimizer: Any) -> Iterator[str]:
    """Names of its class and of what that is built on; of bitsandbytes' kinds the paged ones are like the others."""
    for kind in type(optimizer).__mro__:
        name = kind.__name__.removeprefix("Paged").removesuffix("32bit")
        yield name
        yield name.removesuffix("8bit")
        if "ScheduleFree" in name:  # each comes in several forms: reference, closure, paper
            yield name.partition("ScheduleFree")[0] + "ScheduleFree"


def _applies(row: Row, optimizer: Any) -> bool:
    return all(g.get(k) == v for k, v in row.when.items() for g in optimizer.param_groups)

"""Losses of sentence-transformers by name, and the rows that each is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from layerpeft.errors import ConfigError, LayerpeftError, Problem, unknown
from layerpeft.integrations.sentences import loss_names, loss_options, made_loss
from layerpeft.selection.typecheck import Setting, complaint

KEY, NESTS = "loss", "MatryoshkaLoss"
PAIR, TRIPLE = ("anchor", "positive"), ("anchor", "positive", "negative")
SCORED, ALIKE, CLASS = ("sentence1", "sentence2", "score"), ("sentence1", "sentence2", "label"), ("sentence", "label")
NEGATIVES = ("negative", *(f"negative_{n}" for n in range(1, 10)))
_RANKED, _CLASSED = (PAIR, TRIPLE), (CLASS,)
# by name: the rows that it reads. Others of the library need another model, vectors of one, or weights of their own
LOSSES: dict[str, tuple[tuple[str, ...], ...]] = {
    "MultipleNegativesRankingLoss": _RANKED, "CachedMultipleNegativesRankingLoss": _RANKED,
    "MultipleNegativesSymmetricRankingLoss": (PAIR,), "CachedMultipleNegativesSymmetricRankingLoss": (PAIR,),
    "TripletLoss": (TRIPLE,), "CoSENTLoss": (SCORED,), "AnglELoss": (SCORED,), "CosineSimilarityLoss": (SCORED,),
    "ContrastiveLoss": (ALIKE,), "OnlineContrastiveLoss": (ALIKE,),
    "BatchAllTripletLoss": _CLASSED, "BatchHardTripletLoss": _CLASSED, "BatchHardSoftMarginTripletLoss": _CLASSED,
    "BatchSemiHardTripletLoss": _CLASSED,
}  # fmt: skip
USUAL = {
    PAIR: "MultipleNegativesRankingLoss", TRIPLE: "MultipleNegativesRankingLoss", SCORED: "CoSENTLoss", ALIKE: "ContrastiveLoss",
    CLASS: "BatchAllTripletLoss",
}  # fmt: skip


def form_of(columns: Iterable[str]) -> tuple[str, ...]:
    """Which rows have these columns."""
    have = set(columns)
    if "anchor" in have:
        return TRIPLE if have & set(NEGATIVES) else PAIR
    return CLASS if "sentence" in have else SCORED if "score" in have else ALIKE


def parsed(given: Any) -> tuple[str, dict[str, Any]]:
    """The name of a loss, and its options. Raises: ConfigError."""
    if isinstance(given, Mapping) and len(given) == 1:
        name, options = next(iter(given.items()))
        if not isinstance(options, Mapping):
            raise ConfigError(f"{name}: expected its options as a mapping, got {options!r}")
        return str(name), dict(options)
    if not isinstance(given, str):
        raise ConfigError(
            f"expected a name, or one with its options, got {given!r}; as in loss: {{CoSENTLoss: {{scale: 10}}}}"
        )
    return given, {}


def problems(given: Any) -> list[Problem]:
    """What is wrong with `loss` by itself."""
    try:
        if given is not None:
            _check(*parsed(given))
    except LayerpeftError as error:
        return [Problem((KEY,), f"{KEY}: {problem.text}") for problem in error.listed()]
    return []


def _check(name: str, options: Mapping[str, Any]) -> None:
    there = loss_names()
    known = [each for each in (*LOSSES, NESTS) if each in there]
    if name not in known:
        more = f" {name} needs more than rows: another model, or weights of its own." if name in there else ""
        raise ConfigError(f"{unknown('loss', name, known)}{more}")
    rest = dict(options)
    if name == NESTS:
        inner, dims = rest.pop(KEY, None), rest.pop("matryoshka_dims", None)
        whole = isinstance(dims, list) and dims and all(type(n) is int and n > 0 for n in dims)
        if inner is None or not whole:
            text = "{MatryoshkaLoss: {loss: MultipleNegativesRankingLoss, matryoshka_dims: [64, 32]}}"
            raise ConfigError(
                f"{name}: say the loss that it is of, and matryoshka_dims, whole numbers above 0, as in {text}"
            )
        _check(*parsed(inner))
    allowed, wrong = loss_options(name), []
    for option, value in rest.items():
        if option not in allowed:
            wrong.append(f"{name}: {unknown('option', option, allowed)}")
        elif (choices := allowed[option][1]) and value not in choices:
            wrong.append(f"{name}: {unknown(option, value, choices)}")
        elif not choices and (sentence := complaint(Setting(allowed[option][0]), value)):
            wrong.append(f"{name}: {option}: {sentence}")
    if wrong:
        raise ConfigError(*wrong)


def fitting(given: Any, columns: Iterable[str]) -> str | None:
    """What is wrong with a loss for rows of these columns; None where it reads them."""
    columns = list(columns)
    form = form_of(columns)
    if problems(given):
        return None  # said elsewhere
    name, options = parsed(USUAL[form] if given is None else given)
    if name == NESTS:
        return fitting(options[KEY], columns)
    negatives = [column for column in columns if column in NEGATIVES]
    if form in LOSSES[name] and not (LOSSES[name] == (TRIPLE,) and len(negatives) > 1):
        return None
    wanted = "; or ".join(" + ".join(each) for each in LOSSES[name])
    there = [other for other, forms in LOSSES.items() if form in forms and other in loss_names()]
    return f"{name} reads {wanted}, and the rows have {' + '.join(columns)}, which are for {', '.join(there)}"


def made(given: Any, sentences: Any, form: tuple[str, ...]) -> Any:
    """The loss, around a SentenceTransformer; the usual one of rows of this form where none is named."""
    name, options = parsed(USUAL[form] if given is None else given)
    if name == NESTS:
        options = {**options, KEY: made(options[KEY], sentences, form)}
    return made_loss(name, sentences, options)

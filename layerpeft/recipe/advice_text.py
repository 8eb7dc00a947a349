"""Advice as a person reads it: how layers rank, what choices take and gained, what is recommended, and the next commands."""

from __future__ import annotations

from collections.abc import Sequence

from layerpeft.recipe.advise import Advice, Choice
from layerpeft.recipe.evidence import Span
from layerpeft.text import grid, ranges, size_text

SAID = {
    "time": "three quarters of the time",
    "quarter": "a quarter",
    "half": "half",
    "last": "the last quarter",
    "last half": "the last half",
    "all": "all",
    "own": "the recipe's",
}
WHY = {
    "time": "the highest in rank of all sets whose step takes at most three quarters of the operations of training every layer",
    "quarter": "the quarter of the layers that ranks highest together",
    "half": "the half of the layers that ranks highest together",
    "last": "the last quarter of the layers",
    "last half": "the last half of the layers",
    "all": "all of them",
    "own": "what the recipe says",
}


def told(found: Advice) -> str:
    """All of it, as text."""
    best = next(choice for choice in found.choices if choice.layers == found.recommended)
    gained = (
        ""
        if best.kept is None
        else (
            f"; in the experiment such a choice had {_share(best.kept.steps)} of the gain of all layers after as many steps, and "
            f"{_share(best.kept.time)} in as much time"
        )
    )
    are = "is" if len(best.layers) == 1 else "are"
    agreed = f"{found.agreed} of {len(best.layers)} {are} in the upper half by every criterion"
    rule = best.rules[0] if best.kept is None else best.kept.rule
    lines = [
        f"scored by {len(found.names)} criteria: {found.passes} passes of one batch forward and back, {found.seconds:.0f} s",
        "",
        *_ranks(found),
        "",
        *_choices(found),
        "",
        f"recommended: layer{'s' * (len(best.layers) > 1)} {ranges(best.layers)}, {WHY[rule]}; {agreed}{gained}",
        *_methods(found),
        f"evidence: {found.evidence.source}",
        "",
        "next:",
        *(f"  {command}" for command in found.commands),
    ]
    return "\n".join(lines)


def _ranks(found: Advice) -> list[str]:
    """A line for every layer, the uppermost first: its ranks, and how many criteria have it in their upper half."""
    most = len(found.ranks)
    half = (len(found.ranks) + 1) // 2
    rows = [
        (
            str(layer),
            *map(str, ranks),
            str(sum(rank <= half for rank in ranks)),
            "yes" if layer in found.recommended else "",
        )
        for layer, ranks in sorted(found.ranks.items(), reverse=True)
    ]
    head = ("layer", *(f"rank by {name}" for name in found.names), "upper half by", "recommended")
    return [f"ranks of {most} layers: 1 is the layer to train first, {most} the last one", *grid([head, *rows], ">")]


def _choices(found: Advice) -> list[str]:
    """A line for every set, with what it takes beside training all layers, and what such sets gained."""
    whole = next((choice for choice in found.choices if "all" in choice.rules), found.choices[0])
    head = ("what trains", "layers", "trainable", "a step", "states kept", "memory", "gain, equal steps", "equal time")
    lines = grid([head, *(_row(one, whole) for one in found.choices)], "<<>")
    return [
        *lines,
        "operations beside those of all layers: of a step, and in the mean of all epochs with prefix_cache: memory; gain: what",
        f"such choices had of the gain of all layers on held-out rows, {_tried(found.choices)}",
    ]


def _tried(choices: Sequence[Choice]) -> str:
    """On how much the range rests."""
    cells = max((one.kept.cells for one in choices if one.kept is not None), default=0)
    return "with one model on one task" if cells == 1 else f"least to most over {cells} pairs of a model and a task"


def _row(one: Choice, whole: Choice) -> tuple[str, ...]:
    return (
        ", ".join(SAID[rule] for rule in one.rules), ranges(one.layers), f"{one.trainable:,}", f"{one.flops / whole.flops:.2f}",
        "" if one.kept_states is None else f"{one.kept_states * one.flops / whole.flops:.2f}", size_text(one.peak),
        "not known" if one.kept is None else _share(one.kept.steps),
        "not known" if one.kept is None else _share(one.kept.time),
    )  # fmt: skip


def _methods(found: Advice) -> list[str]:
    """What is known of methods, the best in equal time first."""
    known = sorted(found.evidence.methods, key=lambda one: -one.time[0])
    if not known:
        return []
    said = ", ".join(f"{one.name} {_share(one.time)}" for one in known)
    return [f"method: {found.method}, as the recipe says; gains in as much time, of LoRA's on all layers: {said}"]


def _share(span: Span) -> str:
    """Least to most, in hundredths."""
    low, high = f"{100 * span[1]:.0f}", f"{100 * span[2]:.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"

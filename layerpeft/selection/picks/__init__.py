"""Rules that turn scores into a choice; one file each, the file name is the value of `pick`. Another package adds one through an
entry point of the group `layerpeft.picks`.

A rule holds

- `Options`, a frozen dataclass of its own keys in `select`, as a scorer does (`selection/scorers/__init__.py`);
- one or both of
  - `pick(scores, keep, seed, options) -> list[int]`: positions in `scores`, `keep` of them (None: the rule decides);
  - `again(turn, options) -> Taken`: a choice of a schedule (`selection/schedule.py`), where more is known than scores. Without it,
    every window calls `pick` with a seed of its own; where more than `keep` come to train, `most(keep, count, options)` says
    how many;
- with the trait `overlaps` also `joint(scores, overlaps, keep, options) -> list[int]`, which is told how much each two layers do
  the same (1: all of it); the scorer then measures that besides;
- `TRAITS = Traits(...)`, where one of the traits below is not at its default.

What is missing is told when the rule is loaded.
"""

from dataclasses import dataclass

HOLDS = (("pick(scores, keep, seed, options)", "again(turn, options)"),)  # of each, one or more


@dataclass(frozen=True)
class Traits:
    """`scoreless`: looks at no scores; `again_only`: makes sense only where layers are chosen again during training; `decides`:
    says itself how many (`keep: auto`); `overlaps`: has `joint`, and wants a scorer that measures what layers do the same."""

    scoreless: bool = False
    again_only: bool = False
    decides: bool = False
    overlaps: bool = False


@dataclass(frozen=True)
class NoOptions:
    """Of a rule or a scorer that has no keys of its own."""

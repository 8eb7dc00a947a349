"""Rules that turn scores into a choice; one file each, the file name is the value of `pick`.

A rule holds a frozen `Options` dataclass and one or both of

- `pick(scores, keep, seed, options) -> list[int]`: positions in `scores`, `keep` of them (None: the rule decides);
- `again(turn, options) -> Taken`: a choice of a schedule (`selection/schedule.py`), where more is known than scores. Without it,
  every window calls `pick` with a seed of its own.

Module constants: `SCORELESS = True` (looks at no scores), `AGAIN_ONLY = True` (makes sense only where layers are chosen again
during training), `DECIDES = True` (says itself how many: `keep: auto`).
"""

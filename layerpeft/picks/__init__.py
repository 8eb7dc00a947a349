"""Rules that turn scores into a choice; one file each, the file name is the value of `pick`.

A rule holds a frozen `Options` dataclass and
`pick(scores, keep, seed, options) -> list[int]`: positions in `scores`, `keep` of them (None: the rule decides).
"""

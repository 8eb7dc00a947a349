"""Bounds that tests hold and pages name: neither says another than the other."""

from __future__ import annotations

# by how much losses move where states are kept in 8 bits: (in the mean, at most), by the type that is trained in
EIGHT_BITS = {"float32": (1e-3, 3e-3), "bfloat16": (2e-3, 1e-2)}
EIGHT_BITS_STEPS, FALLEN = 24, 0.15  # of that run, and by what share its held-out loss falls at least
OTHER_PADDING = 1e-5  # by how much losses move in float32 where rows of other lengths stand beside a row
FILLING = 200e6  # bytes that filling ahead takes at most above one layer and what imports hold
PLANNED = 0.1  # as a share: how near a plan comes to bytes that were measured

"""Offsets of attention heads: the weights stay as they are, and a vector is added to what chosen heads give out."""

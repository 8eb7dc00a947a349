"""Gradient projection on the chosen layers."""

"""Bits by layer."""

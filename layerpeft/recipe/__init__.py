"""YAML in, a run out."""

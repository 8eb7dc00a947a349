"""The trainers that a recipe may name: a row for each, which is all that tells one from another."""

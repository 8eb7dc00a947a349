"""Recipes out of other tools' files: a table for each tool, and what the tables share."""

"""Tasks other than chat and preference: what their rows hold, what a model reads of them, what its head is, how it is measured."""

"""What a choice will cost, before any weight is loaded."""

"""One page per run: what its folder says, as HTML that holds everything it shows."""

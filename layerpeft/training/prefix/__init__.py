"""Later passes over a row begin at the lowest layer that trains."""

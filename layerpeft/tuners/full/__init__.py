"""The weights themselves of the chosen layers."""

"""What lies on disk beside an adapter, and whether it is whole."""

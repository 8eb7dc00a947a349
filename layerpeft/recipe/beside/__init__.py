"""What a trainer is given besides a model and rows: rewards, and models that teach or judge."""

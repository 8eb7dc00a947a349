"""Ways to train one model on several processes: one file an engine, all of them listed in `known`."""

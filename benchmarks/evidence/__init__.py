"""Which criterion for choosing layers helps: an experiment that goes on where it was interrupted.

`python -m benchmarks.evidence` runs it and makes its tables.
"""

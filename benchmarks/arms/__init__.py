"""The arms: one file is one way of training, and its file name is its name in a case.

A file holds a docstring whose first line is shown in reports, a frozen dataclass `Options`, and
`build(model, options, traced) -> Ready`. Where a trainer can do the same from a PEFT config, `config(options, count)`
gives it for a model of `count` layers.
"""

"""The kinds of cases: one file is one kind, and its file name is the value of `kind` in a case.

A file holds a frozen dataclass `Options` (the keys of the case), `check(options, problems)`, `measure(case, say) -> dict` (what the
result's JSON holds besides case and provenance), `tables(result) -> str` (Markdown) and `draw(result, path)` (a chart, or None
where there is nothing to draw).
"""

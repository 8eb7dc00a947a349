"""`report.html`: everything that a run's folder tells, on one page that fetches nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from layerpeft import text
from layerpeft.errors import SaveError
from layerpeft.integrations.files import as_written, replace_file
from layerpeft.quantization.picture import COLOURS
from layerpeft.recipe.comparing.names import group_of, label_of
from layerpeft.recipe.page import charts
from layerpeft.recipe.page.charts import finite
from layerpeft.recipe.page.facts import Facts, facts
from layerpeft.recipe.page.style import STYLE
from layerpeft.recipe.page.svg import element
from layerpeft.recipe.samples import ANSWERS, SILENT
from layerpeft.recipe.tasks.metrics import NAMES
from layerpeft.saving.card import CARD, base_told, write_card
from layerpeft.saving.manifest import CONFIG
from layerpeft.saving.owned import completed, put_on_record, strangers
from layerpeft.saving.usage import grid_of

PAGE = "report.html"
ROWS = 512  # of the table of layers
LONG = 4000  # characters of an answer
CHOICE = (("first", "chosen"), ("rest", "not chosen"))
# nothing is fetched and nothing runs, whatever comes to stand in it
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Section(NamedTuple):
    """A part of the page: its anchor, its heading, and its markup, which is empty where there is nothing to say."""

    mark: str
    title: str
    inside: str
    wide: bool = False


def write_page(folder: Path) -> Path:
    """Writes the page of a folder, and says where. Raises: SaveError where there is nothing to report."""
    replace_file(folder / PAGE, page(facts(folder)).encode(errors="replace"))
    return folder / PAGE


def report(folder: Path) -> list[Path]:
    """Writes the page of a folder again, and the card of an adapter, and says where. Raises: SaveError where there is nothing to
    report, or a page of somebody else's lies in its place."""
    found = facts(folder)
    here = folder.absolute()  # of a checkpoint the run has the record, by which it may be removed
    home = here.parent if here.name in completed(here.parent) else here
    below = here.relative_to(home)
    if strangers(home, [str(below / PAGE)]):
        raise SaveError(f"{folder / PAGE} was not written by layerpeft, or was altered since; move it away")
    with as_written(f"what lies in {folder} is not what layerpeft writes"):
        written = [write_page(folder)]
        if (folder / CONFIG).is_file() and write_card(folder, found.run):
            written.append(folder / CARD)
    put_on_record(home, [str(below / path.name) for path in written])
    return written


def page(found: Facts) -> str:
    """The page as HTML."""
    sections = [part for part in _sections(found) if part.inside]
    links = "".join(f'<a href="#{part.mark}">{escape(part.title)}</a>' for part in sections)
    body = ""
    for wide, parts in groupby(sections, key=lambda part: part.wide):
        inside = "".join(f'<section id="{p.mark}"><h2>{escape(p.title)}</h2>{p.inside}</section>\n' for p in parts)
        body += inside if wide else f"<div class=beside>\n{inside}</div>\n"
    title = escape(found.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><header><h1>{title}</h1>{_about(found)}"
        f'<nav aria-label="On this page">{links}</nav></header>\n<main>\n{body}</main></body></html>\n'
    )


def _sections(found: Facts) -> Iterable[Section]:
    yield Section("numbers", "What it reached", _numbers(found), True)
    yield Section("loss", "Loss", _loss(found))
    yield Section("layers", f"{found.unit.capitalize()}s", _layers(found))
    yield Section("moved", "How far they moved", _moved(found))
    yield Section("schedule", "Which trained when", _schedule(found))
    yield Section("bits", "Precision by layer", _bits(found))
    yield Section("memory", "Memory", _memory(found))
    yield Section("arms", "Other choices beside it", _arms(found))
    yield Section("samples", "What it says, before and after", _samples(found), True)
    yield Section("table", f"All {found.unit}s", _table_of_layers(found), True)
    yield Section("recipe", "Recipe", _recipe(found), True)
    yield Section("versions", "Versions", _versions(found), True)


# ---- what was reached -----------------------------------------------------------------------------------------------


def _about(found: Facts) -> str:
    told = base_told(found.config, found.manifest, found.run)
    why = (found.manifest.get("selection") or {}).get("why")
    return "".join(f"<p>{escape(str(line))}</p>" for line in (told, why) if line)


def _numbers(found: Facts) -> str:
    run = found.run
    before, after, names = (run.get(key) or {} for key in ("before", "after", "names"))
    items = []
    for key, name in names.items():
        if (last := finite(after.get(key))) is not None:
            first = finite(before.get(key))
            items.append((str(name), " → ".join(text.measured(v) for v in (first, last) if v is not None)))
    if (seconds := finite(run.get("seconds"))) is not None:
        items.append(("time", _time(seconds)))
    if finite(run.get("steps")):
        items.append(("optimizer steps", f"{run['steps']:,}"))
    if finite(run.get("trainable")) and finite(run.get("total")):
        share = 100 * run["trainable"] / max(1, run["total"])
        items.append(("trainable", f"{run['trainable']:,} ({share:.2g}%)"))
    if run.get("device"):
        items.append(("device", str(run["device"])))
    listed = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in items)
    return f'<dl class="numbers">{listed}</dl>' if items else ""


def _time(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 3 else f"{minutes:.0f} min" if hours < 3 else f"{hours:.1f} h"


def _loss(found: Facts) -> str:
    training, held_out = found.curve("loss"), found.curve("eval_loss")
    drawn = charts.curves(training, held_out)
    keys = [("first", "training")] * bool(training) + [("second", "held out")] * bool(held_out)
    return drawn and _keys(keys) + _figure(drawn)


def _layers(found: Facts) -> str:
    rows, chosen = found.rows, _are_chosen(found)
    if not rows:
        return ""
    told = f"<p>{sum(chosen)} of {len(rows)} were chosen: {escape(_chosen(found))}.</p>"
    scores = [finite(row.get("score")) for row in rows]
    drawn = charts.bars(scores, chosen, found.unit, "Score")
    if not drawn:  # by place, or with a rule that looks at no scores
        drawn = charts.strip(chosen, found.unit)
        return told + (drawn and _keys(CHOICE) + _figure(drawn))
    by = ((found.manifest.get("selection") or {}).get("scores") or {}).get("by") or "the schedule's last"
    known = [(score, is_in) for score, is_in in zip(scores, chosen) if score is not None]
    kept, others = [s for s, is_in in known if is_in], [s for s, is_in in known if not is_in]
    highest = not kept or not others or min(kept) >= max(others)
    more = "higher trains first" if highest else "a rule weighed them, and the highest are not all in the choice"
    return told + _keys(CHOICE) + _figure(drawn, f"Score ({by}); {more}.")


def _moved(found: Facts) -> str:
    changes = [finite(row.get("change")) for row in found.rows]
    drawn = charts.bars(changes, _are_chosen(found), found.unit, "Change of weights", True)
    ends = (found.manifest.get("checks") or {}).get("end")
    more = f" Checked when training ended: {ends}." if ends else ""
    return drawn and _figure(drawn, f"‖ΔW‖ / ‖W‖ over the chosen targets, in percent.{more}")


def _are_chosen(found: Facts) -> list[bool]:
    return [bool(row.get("chosen")) for row in found.rows]


def _chosen(found: Facts) -> str:
    return text.some([str(row.get("layer")) for row in found.rows if row.get("chosen")], 24)


def _schedule(found: Facts) -> str:
    spans, steps = found.schedule
    drawn = charts.heatmap(spans, len(found.rows), steps, found.unit)
    windows = sum(end > begin for begin, end, *_ in spans)
    told = f"{windows} windows over {steps} optimizer steps; darker: a higher score, or more of that time."
    return drawn and _figure(drawn, told)


def _bits(found: Facts) -> str:
    packed = found.bits
    if packed is None:
        return ""
    kinds, table, mean = packed
    used = [name for name in COLOURS if name in set(table.values())]
    keys = "".join(f"<li>{_swatch(style=f'fill:{COLOURS[name]}')}{escape(name)}</li>" for name in used)
    drawn = charts.bits(kinds, table)
    return drawn and f'<ul class="keys">{keys}</ul>' + _figure(drawn, f"{mean:.2f} bits a weight, scales included.")


def _memory(found: Facts) -> str:
    known = found.run.get("memory") or {}
    planned, measured = ({k: v for k, v in (known.get(w) or {}).items() if finite(v)} for w in ("planned", "measured"))
    peaks = {name: measured.pop(name) for name in list(measured) if name.startswith("peak")}
    order = list(dict.fromkeys(["weights", "gradients", "optimizer", "activations", *planned, *measured]))
    lines = [
        (n, {k: found[k] for k in order if k in found}) for n, found in (("planned", planned), ("measured", measured))
    ]
    lines = [(name, parts) for name, parts in lines if parts]
    drawn = charts.memory(lines, order)
    if not drawn:
        return ""
    shown = [part for part in order if any(part in parts for _, parts in lines)]
    keys = [(charts.part_class(order, part), part) for part in shown]
    table = [("part", *(name for name, _ in lines))]
    table += [(part, *(text.size_text(p[part]) if part in p else "–" for _, p in lines)) for part in shown]
    told = [f"{name}: {text.size_text(size)}" for name, size in peaks.items()]
    if planned:
        told.append("the plan is of rows of full length")
    if measured and "activations" not in measured:
        told.append("activations are not measured by themselves")
    return _keys(keys) + _figure(drawn, "; ".join(told)) + _rows_of(table, "<>")


# ---- arms, samples, table, recipe -----------------------------------------------------------------------------------


def _arms(found: Facts) -> str:
    kept = found.comparison
    runs = [run for run in kept.get("runs") or [] if isinstance(run, Mapping) and finite(run.get("value")) is not None]
    if not runs:
        return ""
    groups: dict[str, list[float]] = {}
    for run in runs:
        groups.setdefault(group_of(str(run.get("arm"))), []).append(float(run["value"]))
    measure = NAMES.get(str(kept.get("measure")), str(kept.get("measure") or "value"))
    drawn = charts.arms(groups, finite(kept.get("before")), measure)
    head = ("arm", measure, "seconds", f"{found.unit}s")
    table: list[tuple[str, ...]] = [head]
    for run in runs:
        layers = text.ranges(run.get("layers") or [])
        seconds = finite(run.get("seconds"))
        table.append(
            (
                label_of(str(run.get("arm"))),
                text.measured(run["value"]),
                "" if seconds is None else f"{seconds:.0f}",
                layers,
            )
        )
    verdicts = filter(None, ((kept.get(key) or {}).get("sentence") for key in ("arms", "verdict")))
    return "".join(f"<p>{escape(str(verdict))}</p>" for verdict in verdicts) + _figure(drawn) + _rows_of(table, "<>><")


def _samples(found: Facts) -> str:
    parts = []
    for sample in found.run.get("samples") or []:
        shown = [(title, _said(sample, key)) for key, title in TITLES.items()]
        inside = "".join(f"<div><h3>{title}</h3>{said}</div>" for title, said in shown if said)
        parts.append(f'<div class="answers">{inside}</div>')
    return "".join(parts)


def _said(sample: Mapping[str, Any], key: str) -> str:
    """What a sample holds; of a model that answered nothing, that."""
    said = str(sample.get(key) or "")
    if said.strip():
        return f"<pre>{escape(said[:LONG])}</pre>"
    return f"<p class=soft>{SILENT}</p>" if key in ANSWERS and key in sample else ""


TITLES = {"prompt": "prompt", "wanted": "wanted", "before": "before training", "after": "after training"}


def _table_of_layers(found: Facts) -> str:
    rows = found.rows
    shown = rows if len(rows) <= ROWS else [row for row in rows if row.get("chosen")][:ROWS]
    if not shown:
        return ""
    head = (found.unit, "name", "score", "chosen", "steps", "change")
    cells = [head, *(_cells(row) for row in shown)]
    on = [bool(row.get("chosen")) for row in shown]
    left = f"<p class=soft>{len(shown)} of {len(rows)}; layers.csv has all.</p>" if len(shown) < len(rows) else ""
    return f"<details><summary>{len(shown)} rows</summary>{left}{_rows_of(cells, '><><>>', on)}</details>"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    score, change, steps = (finite(row.get(key)) for key in ("score", "change", "steps"))
    return (
        str(row.get("layer")),
        str(row.get("name")),
        "" if score is None else f"{score:.4g}",
        "yes" if row.get("chosen") else "no",
        "" if steps is None else f"{steps:.0f}",
        "" if change is None else f"{100 * change:.3g}%",
    )


def _recipe(found: Facts) -> str:
    said = str(found.run.get("recipe") or found.comparison.get("recipe") or "")
    return f'<pre tabindex="0" aria-label="recipe">{escape(said)}</pre>' if said else ""


def _versions(found: Facts) -> str:
    said = ", ".join(f"{name} {v}" for name, v in (found.manifest.get("versions") or {}).items())
    again = "\n".join(grid_of([("layerpeft report .", "writes this page again, in its folder")]))
    return (f"<p>{escape(said)}</p>" if said else "") + f"<pre>{escape(again)}</pre>"


# ---- markup ---------------------------------------------------------------------------------------------------------


def _figure(drawn: str, told: str = "") -> str:
    return f"<figure>{drawn}{f'<figcaption class=soft>{escape(told)}</figcaption>' if told else ''}</figure>"


def _swatch(**given: str) -> str:
    return f'<svg viewBox="0 0 10 10" aria-hidden="true">{element("rect", width=10, height=10, **given)}</svg>'


def _keys(keys: Sequence[tuple[str, str]]) -> str:
    listed = "".join(f"<li>{_swatch(class_=f'fill {kind}')}{escape(name)}</li>" for kind, name in keys)
    return f'<ul class="keys">{listed}</ul>'


def _rows_of(rows: Sequence[Sequence[str]], sides: str, on: Sequence[bool] = ()) -> str:
    """A table that scrolls by itself where it is too wide, the first row its head; `sides`: as those of `grid`."""
    sides = sides.ljust(len(rows[0]), sides[-1])

    def cells(row: Sequence[str], kind: str) -> str:
        return "".join(
            f"<{kind}{' class=n' * (side == '>')}>{escape(cell)}</{kind}>"
            for cell, side in zip(row, sides, strict=True)
        )

    body = "".join(
        f"<tr{' class=on' if on and on[place] else ''}>{cells(row, 'td')}</tr>" for place, row in enumerate(rows[1:])
    )
    head = f"<thead><tr>{cells(rows[0], 'th')}</tr></thead>"
    named = escape(", ".join(filter(None, rows[0])))
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{named}"><table>{head}<tbody>{body}</tbody></table></div>'

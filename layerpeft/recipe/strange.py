"""What is said of a key that a recipe does not have: whose it is, what was meant, and what to write."""

from collections.abc import Mapping
from typing import Any

from layerpeft.errors import hint
from layerpeft.recipe import cures, foreign, keys
from layerpeft.recipe.trainers.table import DEFAULT
from layerpeft.selection.typecheck import Setting, complaint
from layerpeft.tuners.methods import METHODS


def unknown_key(key: str, value: Any, known: Mapping[str, Setting], trainer: str) -> str:
    """What to say of a top-level key that does not exist."""
    if key in keys.FIXED:
        return f"{key}: {keys.FIXED[key]}"
    if value is None:
        return f"unknown key {key!r}: {cures.EMPTY}"
    if key == "select" or any(key in keys.block_settings(kind) for kind in METHODS.values()):
        return f"{key}: this belongs in the block, as in `layerpeft: {{{key}: {cures.written(value)}}}`"
    if trainer and (theirs := [name for name in keys.present() if name != trainer and key in keys.top_settings(name)]):
        return f"{key}: this is a setting of trainer: {' or '.join(theirs)}; take it out{_or_meant(key, value, known)}"
    kind = keys.arguments_class(trainer or DEFAULT.name).__name__
    allowed = "trainer, model_name_or_path, dataset_name, columns, output_dir, layerpeft, …"
    return f"unknown key {key!r}.{_near(key, value, known)} Allowed: {allowed} and every field of {kind}."


def _near(key: str, value: Any, known: Mapping[str, Setting]) -> str:
    return hint(key, [name for name, setting in known.items() if complaint(setting, value) is None])


def _or_meant(key: str, value: Any, known: Mapping[str, Setting]) -> str:
    meant = _near(key, value, known)
    return f".{meant}" if meant else ""


def unknown_field(key: str, value: Any, method: str, known: Mapping[str, Setting], block: Mapping[str, Any]) -> str:
    """What to say of a key that the method's config does not have."""
    if key in keys.FIXED:
        return f"{key}: {keys.FIXED[key]}"
    if key in foreign.BLOCK_HINTS and value is not None:
        meant = foreign.BLOCK_HINTS[key]
        value = cures.names(value) if meant == "target_modules" else value
        return f"unknown key {key!r} in the layerpeft block. Did you mean {meant!r}? Write `{meant}: {cures.written(value)}`."
    if key in foreign.OF_SELECT:
        return f"{key}: layers are chosen with `select`: write `select: {cures.written(foreign.select_of(block))}`"
    if key in keys.top_settings(DEFAULT.name):
        return f"{key}: this belongs at the top level, not in the layerpeft block"
    if road := cures.cure(key, value, block) or (cures.EMPTY if value is None else None):
        own = road.write.get("layerpeft")
        why = "layers are chosen with `select`; " if own and "select" in own else ""
        return f"{key}: {why}write `{cures.written(own)[1:-1]}`" if own else f"{key}: {road}"
    other = next((m for m, kind in METHODS.items() if m != method and key in keys.block_settings(kind)), None)
    if other:
        return f"{key}: this belongs to method: {other}, and the method here is {method}; take it out"
    allowed = f"method, select, r, target_modules, … and every other field of {METHODS[method].__name__}"
    fitting = [name for name, setting in known.items() if complaint(setting, value) is None]
    close = hint(key, ["method", "select", *fitting])
    return f"unknown key in the layerpeft block {key!r}.{close} Allowed: {allowed}."

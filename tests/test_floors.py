"""Imports run one way: a package knows only lower floors, siblings know each other in no circle; and sizes."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import layerpeft
from layerpeft.tuners.methods import METHODS

ROOT = Path(layerpeft.__file__).parent
# What stands at the root, from the ground up: each knows only what stands before it.
FLOORS = [
    "errors",
    "text",
    "integrations",
    "model",
    "selection",
    "saving",
    "training",
    "quantization",
    "tuners",
    "planning",
    "recipe",
    "using",
    "__init__",
    "cli",
    "__main__",
]
FILES = sorted(p for p in ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    """`training/steps.py` is `training.steps`, `training/__init__.py` is `training`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def unit(name: str) -> str:
    return name.split(".")[0]


def imports(tree: ast.AST) -> list[str]:
    """The modules of the package that are imported, without `layerpeft.`; what lies at its root is `__init__`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = [f"{node.module}.{a.name}" for a in node.names]
            found += [n if n.removeprefix("layerpeft.") in MODULES else node.module or "" for n in inside]
    ours = [n for n in found if n.split(".")[0] == "layerpeft"]
    return [n.removeprefix("layerpeft.") if "." in n else "__init__" for n in ours]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def others(name: str) -> frozenset[str]:
    """What a module imports of the package."""
    return frozenset(imports(tree(MODULES[name]))) - {name}


def test_a_file_imports_only_from_lower_floors():
    for name in MODULES:
        for other in others(name):
            lower = FLOORS.index(unit(other)) < FLOORS.index(unit(name)) or unit(other) == unit(name) != "__init__"
            assert lower, f"{name} may not import {other}"


def test_siblings_import_each_other_in_no_circle():
    left = {name: others(name) for name in MODULES}
    while free := [name for name, known in left.items() if not known & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other in a circle: {sorted(left)}"


def test_classes_and_functions_stay_small_and_import_the_package_at_the_top():
    for path, node in ((file, node) for file in FILES for node in ast.walk(tree(file))):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 200, (path, node.name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, (path, node.name)
            assert not imports(node), f"{path}: {node.name} imports the package inside"


def test_a_stranger_finds_his_room():
    names = {path.name for path in ROOT.iterdir()} - {"py.typed", "__pycache__"}
    assert len(names) <= 15
    assert {name.removesuffix(".py") for name in names} <= set(FLOORS)


# Where a method may be named besides its own folder: the public names, PEFT's types, and what other tools call things.
WORDS = {"head"}  # names of methods that mean something else besides: part of a model, what `unit` chooses
NAMING = (
    "__init__",
    "integrations.peft",
    "integrations.gguf",
    "recipe.cures",
    "recipe.importing.",
    "planning.optimizer_bytes",
)


def names_a_method(source: ast.AST, known: set[str]) -> list[str]:
    """What names one: a string, something that `method` is compared with, an import from its folder."""
    found = []
    for node in ast.walk(source):
        named = isinstance(node, ast.Constant) and node.value in known - WORDS
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = any(isinstance(s, ast.Attribute | ast.Name) and "method" in ast.unparse(s) for s in sides)
            texts = [c for s in sides for c in ast.walk(s) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            named = asked and bool(texts)
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = any(n.startswith("tuners.") and n.split(".")[1] in known for n in imports(node))
        if named:
            found.append(ast.unparse(node))
    return found


def test_a_method_is_named_in_its_folder_alone():
    known = {n for m, kind in METHODS.items() for n in (m, kind.kind.value)}
    assert known >= {path.name for path in (ROOT / "tuners").iterdir() if (path / "method.py").is_file()}
    for name, path in MODULES.items():
        if unit(name) != "tuners" and not name.startswith(NAMING):
            assert not names_a_method(tree(path), known), name
    for planted in (
        'if method == "galore": pass',
        'whole = config.method in ("full", "lora")',
        'match method:\n    case "full": pass',
        'slow = {"galore": 2}[recipe.method]',
        'recipe.method != "another"',
        "from layerpeft.tuners.galore import refresh",
        "import layerpeft.tuners.full.layer",
        "from layerpeft.tuners.full.layer import wrappers",
    ):
        assert names_a_method(ast.parse(planted), known), planted


def test_private_names_of_other_libraries_stay_in_integrations():
    private = ("peft.tuners", "peft.utils", "peft.mapping")
    found = [
        f"{path.name}: {node.module} belongs in integrations/peft.py"
        for path in FILES
        if unit(dotted(path)) not in {"integrations", "tuners"}
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(private)
    ]
    assert not found


def test_device_names_stay_in_integrations():
    found = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        if unit(dotted(path)) != "integrations"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and node.value in ("cuda", "xpu")
    ]
    assert not found

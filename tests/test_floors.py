"""Imports run one way: a file knows only lower floors, siblings never know each other; and the sizes of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import layerpeft

ROOT = Path(layerpeft.__file__).parent
FLOORS = [
    {
        "errors",
        "folders",
        "turns",
        "draws",
        "architectures",
        "notes",
        "typecheck",
        "recipe_yaml",
        "plan_text",
        "samples",
        "tether",
        "subspace",
        "folds",
    },
    {
        "grammar",
        "layers",
        "registry",
        "integrations",
        "recipe_keys",
        "shipped",
        "optimizers",
        "projection_optimizers",
        "expert_uses",
        "masters",
        "change",
    },
    {
        "scores",
        "probe",
        "backward",
        "targets",
        "weights",
        "newborn",
        "picks",
        "gradients",
        "rows",
        "counting",
        "projection",
        "full",
        "precisions",
    },
    {"allocate", "evaluating"},
    {"rounding"},
    {"scorers", "selection", "refresh", "projected", "full_targets", "quant_targets", "quantizing"},
    {
        "choose",
        "save",
        "report",
        "verify",
        "projected_experts",
        "states",
        "quant_config",
        "loading",
        "shards",
        "quant_save",
    },
    {"quant_units"},
    {"schedule", "pending", "projection_state", "sealing", "heatmap", "bits_map", "allotting", "merge_shards"},
    {"switching", "trained"},
    {"scheduled"},
    {"configs", "follower", "merge"},
    {"steps", "galore_config", "full_config", "quant_training"},
    {"assume"},
    {"plan_parts", "models"},
    {"tuners", "plan", "recipe_values"},
    {"fit", "recipe_around"},
    {"recipe_model"},
    {"recipe_check"},
    {"recipe"},
    {"training"},
    {"run", "compare", "forecast"},
    {"measure"},
    {"cli", "__init__"},
]
# Where a real need asks for another order, it stands here with its reason.
SIBLINGS_ALLOWED: dict[tuple[str, str], str] = {
    ("tuners", "tuners"): "projection is built on the LoRA tuner",
    ("scorers", "scorers"): "quantization_error weighs by outliers' input norms; output_kl reads precisions alike",
    ("picks", "picks"): "the published form of a split cuts where ours does, and then slips by one",
}
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py"))


def unit(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += (
                [f"{node.module}.{a.name}" for a in node.names] if node.module == "layerpeft" else [node.module or ""]
            )
    return [n for n in found if n.split(".")[0] == "layerpeft"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_floors(path):
    me = unit(path)
    assert me in FLOOR, f"{me} has no floor yet; say in tests/test_floors.py where it stands"
    if me == "__init__":
        return
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        other = name.split(".")[1] if "." in name else "__init__"
        if other == "__version__" or (other == "__init__" and FLOOR[me] == max(FLOOR.values())):
            continue
        inside_plugin_folder = other == me and path.stem == "__init__"
        lower = FLOOR.get(other, 99) < FLOOR[me]
        assert lower or inside_plugin_folder or (me, other) in SIBLINGS_ALLOWED, f"{me} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small_and_import_the_package_at_the_top(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
            assert not imports(node), f"{node.name} imports the package inside"


def test_private_names_of_other_libraries_stay_in_integrations():
    private = ("peft.tuners", "peft.utils", "peft.mapping")
    found = [
        f"{path.name}: {node.module} belongs in integrations/peft.py"
        for path in FILES
        if unit(path) not in {"integrations", "tuners"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(private)
    ]
    assert not found


def test_device_names_stay_in_integrations():
    found = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        if unit(path) != "integrations"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in ("cuda", "xpu")
    ]
    assert not found

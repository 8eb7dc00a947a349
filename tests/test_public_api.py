"""The public list, and what `import layerpeft` costs."""

from __future__ import annotations

import json
import subprocess
import sys

import layerpeft

NAMES = [
    "LayerFullConfig",
    "LayerGaloreConfig",
    "LayerLoraConfig",
    "LayerMap",
    "LayerQuantConfig",
    "LayerpeftError",
    "Measured",
    "Measurement",
    "Plan",
    "Quantized",
    "Request",
    "Scores",
    "Select",
    "Selection",
    "check_trained",
    "get_peft_model",
    "last_checkpoint",
    "layer_map",
    "layer_report",
    "load",
    "load_model",
    "plan",
    "quantize",
    "save_model",
    "save_record",
    "score_layers",
]


def test_the_public_list():
    assert layerpeft.__all__ == NAMES
    for name in NAMES:
        assert getattr(layerpeft, name).__doc__, name


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_brings_in_nothing_that_peft_does_not():
    extra = modules_after("import layerpeft") - modules_after("import peft")
    standard = set(sys.stdlib_module_names)
    assert extra - standard == {"layerpeft"}
    every = modules_after("from layerpeft import *") - modules_after("import peft")
    assert every - standard == {"layerpeft"}


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert layerpeft.__version__ == version("layerpeft")

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
    "layer_rates",
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


def modules_after(*statements: str) -> list[set[str]]:
    told = "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    code = "\n".join(["import sys, json", *(f"{statement}\n{told}" for statement in statements)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def test_import_brings_in_nothing_that_peft_does_not():
    standard = set(sys.stdlib_module_names)
    theirs, every = modules_after("import peft", "from layerpeft import *")
    (alone,) = modules_after("import layerpeft")
    assert alone - theirs - standard == every - theirs - standard == {"layerpeft"}


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert layerpeft.__version__ == version("layerpeft")

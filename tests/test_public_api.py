"""The public list."""

from __future__ import annotations

import layerpeft

NAMES = [
    "LayerFullConfig",
    "LayerGaloreConfig",
    "LayerHeadConfig",
    "LayerLoraConfig",
    "LayerMap",
    "LayerQuantConfig",
    "LayerUnlockConfig",
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


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert layerpeft.__version__ == version("layerpeft")

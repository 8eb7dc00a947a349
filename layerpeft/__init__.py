"""Layer-selective fine-tuning for PEFT: layers are picked by evidence, wrapped with LoRA, and the rest stays frozen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from layerpeft.errors import nearest

__version__ = "0.2.0"
# A name is fetched from its place when it is first used: `import layerpeft`, and with it the command, loads no library.
_PLACES = {
    "LayerFullConfig": "tuners.full.config",
    "LayerGaloreConfig": "tuners.galore.config",
    "LayerHeadConfig": "tuners.head.config",
    "LayerLoraConfig": "tuners.config",
    "LayerMap": "model.layers",
    "LayerQuantConfig": "quantization.config",
    "LayerUnlockConfig": "tuners.unlock.config",
    "LayerpeftError": "errors",
    "Measured": "selection.scoring",
    "Measurement": "selection.scoring",
    "Plan": "planning.plan",
    "Quantized": "quantization.apply",
    "Request": "selection.scoring",
    "Scores": "selection.scores",
    "Select": "selection.select",
    "Selection": "selection.select",
    "check_trained": "training.steps",
    "get_peft_model": "tuners.wrap",
    "last_checkpoint": "saving.checkpoints",
    "layer_map": "model.layers",
    "layer_rates": "training.steps",
    "layer_report": "training.report",
    "load": "tuners.load",
    "load_model": "tuners.load",
    "plan": "planning.plan",
    "quantize": "quantization.quantize",
    "save_model": "quantization.save",
    "save_record": "tuners.load",
    "score_layers": "selection.scoring",
}
__all__ = list(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll] - it sees the imports below

if TYPE_CHECKING:
    from layerpeft.errors import LayerpeftError as LayerpeftError
    from layerpeft.model.layers import LayerMap as LayerMap
    from layerpeft.model.layers import layer_map as layer_map
    from layerpeft.planning.plan import Plan as Plan
    from layerpeft.planning.plan import plan as plan
    from layerpeft.quantization.apply import Quantized as Quantized
    from layerpeft.quantization.config import LayerQuantConfig as LayerQuantConfig
    from layerpeft.quantization.quantize import quantize as quantize
    from layerpeft.quantization.save import save_model as save_model
    from layerpeft.saving.checkpoints import last_checkpoint as last_checkpoint
    from layerpeft.selection.scores import Scores as Scores
    from layerpeft.selection.scoring import Measured as Measured
    from layerpeft.selection.scoring import Measurement as Measurement
    from layerpeft.selection.scoring import Request as Request
    from layerpeft.selection.scoring import score_layers as score_layers
    from layerpeft.selection.select import Select as Select
    from layerpeft.selection.select import Selection as Selection
    from layerpeft.training.report import layer_report as layer_report
    from layerpeft.training.steps import check_trained as check_trained
    from layerpeft.training.steps import layer_rates as layer_rates
    from layerpeft.tuners.config import LayerLoraConfig as LayerLoraConfig
    from layerpeft.tuners.full.config import LayerFullConfig as LayerFullConfig
    from layerpeft.tuners.galore.config import LayerGaloreConfig as LayerGaloreConfig
    from layerpeft.tuners.head.config import LayerHeadConfig as LayerHeadConfig
    from layerpeft.tuners.load import load as load
    from layerpeft.tuners.load import load_model as load_model
    from layerpeft.tuners.load import save_record as save_record
    from layerpeft.tuners.unlock.config import LayerUnlockConfig as LayerUnlockConfig
    from layerpeft.tuners.wrap import get_peft_model as get_peft_model
else:  # hidden from type checkers, for whom it would mean that every name is here

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            close = nearest(name, __all__)
            hint = f". Did you mean {close!r}?" if close else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}", name=name)
        place = _PLACES[name]
        if place != "errors":
            importlib.import_module("layerpeft.tuners")  # PEFT knows our config types from the first use of a name
            importlib.import_module("layerpeft.planning.layers")  # and choices what layers cost
        found = globals()[name] = getattr(importlib.import_module(f"layerpeft.{place}"), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

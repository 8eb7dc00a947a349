"""Imports what tests import as soon as pip has unpacked it, and so compiles it, on the core that pip leaves idle.

`early.py DONE`: once the file DONE is there, pip has unpacked all.
"""

import contextlib
import importlib
import sys
import sysconfig
import time
from pathlib import Path

# in pip's order; each is imported when what it needs is there
PACKAGES = {
    "hypothesis": "hypothesis.strategies",
    "scikit_learn": "sklearn.metrics sklearn.cluster sklearn.linear_model",
    "torch": "torch._dynamo torch._inductor.utils torch.distributed.fsdp torch.utils.flop_counter",
    "pandas": "pandas",
    "matplotlib": "matplotlib.figure",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "transformers": "transformers.trainer transformers.models.auto.modeling_auto",
    "wandb": "wandb",
    "trl": "trl.trainer.sft_trainer",
    "peft": "peft",
}

done, site = Path(sys.argv[1]), Path(sysconfig.get_path("purelib"))
for package, modules in PACKAGES.items():
    while not done.exists() and not any(site.glob(f"{package}-*.dist-info/RECORD")):
        time.sleep(0.2)
    importlib.invalidate_caches()
    for module in modules.split():
        with contextlib.suppress(Exception):  # tests say what is wrong
            importlib.import_module(module)

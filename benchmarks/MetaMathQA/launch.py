"""Runs PEFT's MetaMathQA harness with layerpeft's config types known to PEFT; to be started in the harness's own folder.

    python …/benchmarks/MetaMathQA/launch.py -v experiments/layerpeft/llama-3.2-3B-rank64-last14-gc

The harness itself is not changed: all arguments go to its `run.py`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from layerpeft import LayerLoraConfig  # noqa: F401 - from the first use of a name on, PEFT knows our config types

if __name__ == "__main__":
    harness = Path("run.py")
    if not harness.is_file():
        raise SystemExit("error: no run.py here; start this in method_comparison/MetaMathQA of a checkout of PEFT")
    sys.path[0] = str(Path.cwd())  # run.py imports its neighbours
    sys.argv[0] = "run.py"
    runpy.run_path(str(harness), run_name="__main__")

"""The environment that `accelerate launch --config_file` gives two processes (`benchmarks.ranks` lets them be CPU processes)."""

from __future__ import annotations

from pathlib import Path


def environment(file: Path) -> dict[str, str]:
    """What Accelerate itself puts into the environment of processes for a config file; the recipe says the precision."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(file), "--num_processes", "2", "--mixed_precision", "no", "-m", "layerpeft"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(getattr(defaults, "deepspeed_config", None) or {})
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    divided = args.use_deepspeed or args.use_fsdp  # of which Accelerate takes neither for a CPU
    own = {
        "ACCELERATE_USE_CPU": "false" if divided else "true",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))} | own

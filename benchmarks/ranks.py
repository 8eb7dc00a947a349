"""Two CPU processes under an engine, and what passes between them in a step; each runs `python -m benchmarks.ranks`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from benchmarks.arm import ARMS
from benchmarks.model import Batch, Model, batches, build, num_layers
from layerpeft.errors import LayerpeftError
from layerpeft.model.layers import base_of, layer_map
from layerpeft.selection import plugins

Tally = dict[str, list[int]]  # what moved -> how often, and elements
# `_whole`: frozen blocks above the cut stay so after forward
ENGINES = ("ddp", "fsdp2", "fsdp2_whole", "zero2", "zero3")
# so that a small model is divided as a large one is, of which DeepSpeed keeps a part whole that is small by comparison
NOTHING_STAYS = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
STEPS = 3  # the first shows ZeRO-3 in which order modules run


def as_accelerators(deepspeed: bool = False) -> None:
    """Lets Accelerate take this CPU process for one with an accelerator; all that follows is the engines' own code."""
    from accelerate import state

    state.PartialState._prepare_backend = lambda self, *a, **k: ("gloo", state.DistributedType.MULTI_GPU)  # type: ignore[assignment]
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))  # type: ignore[assignment]
    if deepspeed:
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled now


def in_two(
    engine: str, arms: Mapping[str, tuple[str, Mapping[str, Any]]], model: Model, batch: Batch
) -> dict[str, Tally]:
    """What the last of three steps of each arm (by label: its file and options) moved, as the first of two processes counts it.
    Raises: LayerpeftError where they fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = json.dumps({"engine": engine, "arms": dict(arms), "model": asdict(model), "batch": asdict(batch)})
    same = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    same |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    command = [sys.executable, "-m", "benchmarks.ranks", asked]
    running = [
        subprocess.Popen(
            command, env={**os.environ, **same, "RANK": r, "LOCAL_RANK": r}, stdout=-1, stderr=-1, text=True
        )
        for r in ("0", "1")
    ]
    said = [process.communicate() for process in running]
    if any(process.returncode for process in running):
        raise LayerpeftError(f"{engine}: the processes fail: {said[0][1][-2000:]}")
    return json.loads(said[0][0].splitlines()[-1])


def _one(engine: str, arm: str, options: Mapping[str, Any], model: Model, batch: Batch) -> Tally:
    module: Any = plugins.get(ARMS, arm)
    base = build(model)
    config = module.config(module.Options(**options), num_layers(base))
    wrapped: Any = _wrapping(arm)(base, config)
    wrapped.base_model.model.activation_checkpointing_enable()
    wrapped.enable_input_require_grads()  # as TRL sets both
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    accelerator, wrapped, optimizer = _prepared(engine, wrapped.train(), optimizer, batch)
    rows = batches(model, batch, base.config.vocab_size, count=STEPS, seed=dist.get_rank())  # type: ignore[union-attr, arg-type]
    found: Tally = {}
    for number, given in enumerate(rows):
        with counting(engine, wrapped, found) if number == STEPS - 1 else contextlib.nullcontext():
            found["phase"] = [0, 0]
            loss = wrapped(**given).loss
            found["phase"] = [1, 0]
            accelerator.backward(loss)
            found["phase"] = [2, 0]
            optimizer.step()
            optimizer.zero_grad()
    return {name: found.get(name, [0, 0]) for name in ("forward", "backward", "reduced")}


def _wrapping(arm: str) -> Callable[..., Any]:
    import peft

    import layerpeft

    return layerpeft.get_peft_model if arm.startswith("layerpeft") else peft.get_peft_model


def _prepared(engine: str, model: Any, optimizer: Any, batch: Batch) -> tuple[Any, Any, Any]:
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin

    options: dict[str, Any] = {}
    if engine.startswith("fsdp2"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        options["fsdp_plugin"] = plugin
    elif engine.startswith("zero"):
        options["deepspeed_plugin"] = DeepSpeedPlugin(zero_stage=int(engine[-1]))
        settings = options["deepspeed_plugin"].deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = batch.rows
        settings["zero_optimization"] |= dict.fromkeys(NOTHING_STAYS, 0)
    accelerator = Accelerator(cpu=engine == "ddp", **options)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if engine == "fsdp2_whole":
        keep_frozen_whole(prepared)
    return accelerator, prepared, optimizer


def keep_frozen_whole(model: Any) -> None:
    """Of FSDP2: frozen blocks above the lowest one that trains are not gathered again in the backward pass."""
    blocks: list[Any] = [base_of(model).get_submodule(layer.name) for layer in layer_map(model).layers]
    trains = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    for block, trained in list(zip(blocks, trains, strict=True))[trains.index(True) :]:
        if not trained:
            block.set_reshard_after_forward(False)


@contextmanager
def counting(engine: str, model: Any, found: Tally) -> Iterator[None]:
    """Counts what the engine gathers in the forward and backward pass (`found["phase"]`: 0, 1), and the gradients it reduces."""
    with contextlib.ExitStack() as stack:

        def add(name: str, elements: int) -> None:
            times, so_far = found.get(name, [0, 0])
            found[name] = [times + 1, so_far + elements]

        def gathered(elements: int) -> None:
            if elements:
                add(("forward", "backward", "after")[found["phase"][0]], elements)

        def watch(owner: Any, name: str, count: Callable[..., None]) -> None:
            original = getattr(owner, name)

            def called(*args: Any, **kwargs: Any) -> Any:
                count(*args)
                return original(*args, **kwargs)

            setattr(owner, name, called)
            stack.callback(setattr, owner, name, original)

        if engine.startswith("fsdp2"):
            import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups

            watch(groups, "foreach_all_gather", lambda ps, *_: gathered(sum(p._orig_size.numel() for p in ps)))
            watch(groups, "foreach_reduce", lambda _, gs, *__: add("reduced", sum(g.numel() for g in gs)))
        elif engine == "zero3":
            from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
            from deepspeed.runtime.zero import stage3

            name = "_PartitionedParameterCoordinator__all_gather_params"
            away = lambda ps: sum(p.ds_numel for p in ps if p.ds_status.name == "NOT_AVAILABLE")  # noqa: E731
            watch(coordinator.PartitionedParameterCoordinator, name, lambda _, ps, *__: gathered(away(ps)))
            watch(stage3, "reduce_scatter_coalesced", lambda gs, *_: add("reduced", sum(g.numel() for g in gs)))
        elif engine == "zero2":
            from deepspeed import comm

            watch(comm, "all_reduce", lambda t, *_: add("reduced", t.numel()) if found["phase"][0] == 1 else None)
        else:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def reduced(group, bucket):  # type: ignore[no-untyped-def]  # DDP looks at annotations, and takes no texts
                add("reduced", bucket.buffer().numel())
                return allreduce_hook(group, bucket)

            model.register_comm_hook(dist.group.WORLD, reduced)
        yield


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given["engine"] != "ddp":
        as_accelerators(given["engine"].startswith("zero"))
    tallies = {}
    for label, (name, options) in given["arms"].items():
        tallies[label] = _one(given["engine"], name, options, Model(**given["model"]), Batch(**given["batch"]))
        AcceleratorState._reset_state(True)
    dist.barrier()
    print(json.dumps(tallies), flush=True)

"""Trainer runs under the engines that `accelerate launch` starts, on CPU processes that talk by gloo.

Accelerate takes FSDP and DeepSpeed for accelerators only, so `as_devices` lets it take a CPU process for one; everything after
that is the engines' own code. Run as a program by every rank: folder, engine, and the runs as JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# what `accelerate launch --config_file` sets
FSDP2 = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
ZERO2 = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,gradient_accumulation_steps,zero3_init_flag,zero3_save_16bit_model,mixed_precision",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
ZERO1, ZERO3 = (ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage} for stage in "13")
ENGINES = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": FSDP2,
    "fsdp2_noram": FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
    "fsdp2_sharded": FSDP2 | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "fsdp2_ac": FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "fsdp2_bf16": FSDP2 | {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "zero1": ZERO1,
    "zero2": ZERO2,
    "zero3": ZERO3,
    "zero3_apart": ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"},
    "zero2_bf16": ZERO2 | {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "zero3_bf16": ZERO3 | {"ACCELERATE_MIXED_PRECISION": "bf16"},
}
# DeepSpeed's own files, as users have them, with the optimizer in the CPU's memory
FILES = {
    f"zero{stage}_file": {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, where DeepSpeed's own would be compiled
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
    }
    for stage in (2, 3)
}  # fmt: skip
ENGINES |= {name: ZERO2 | {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file"} for name in FILES}
BY_GRADIENTS = {"keep": 2, "by": "gradient_norm", "layers": "2-5"}
TURNS = {"pick": "uniform", "keep": 2, "reselect_steps": 2}
ROWS = 48


def config(name: str, batches: Any) -> Any:
    """What is trained, by a name."""
    from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig

    common: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = {
        "depth": {"select": "last:2"},
        "grad": {"select": BY_GRADIENTS},
        "batches": {"select": BY_GRADIENTS, "batches": batches},
        "outliers": {"select": {"by": "outliers", "keep": 2, "M": 3}},
        "sched": {"select": TURNS},
        "sched-clear": {"select": TURNS | {"state": "clear"}},
        "nf4": {"select": "last:2", "quantize_frozen": "nf4"},
        "nf4-deferred": {"select": BY_GRADIENTS, "quantize_frozen": "nf4"},
    }
    full = {"full": "last:2", "full-grad": BY_GRADIENTS, "lisa": TURNS}
    if name.startswith("galore"):
        common = {"r": 4, "update_proj_gap": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        galore = {
            "": {"scale": 1.0},
            "-svd": {"subspace": "svd", "moments": "project", "proj_type": "left"},
            "-random": {"subspace": "random", "moments": "reset", "proj_type": "std"},
            "-project": {"moments": "project", "gap_overlap": 0.3},
            "-base": {"fold": "base", "stagger": False},
            "-grad": {"select": BY_GRADIENTS},
            "-batches": {"select": BY_GRADIENTS, "batches": batches},
            "-outliers": {"select": {"by": "outliers", "keep": 2, "M": 3}},
            "-sched": {"select": TURNS},
            "-sched-clear": {"select": TURNS | {"state": "clear"}},
            "-sched-offload": {"select": TURNS | {"state": "offload"}},
            "-nf4": {"quantize_frozen": "nf4"},
            "-experts": {"target_parameters": ["mlp.experts.gate_up_proj"]},
            "-packed": {"quantize_trained": "nf4"},
        }
        return LayerGaloreConfig(**{"select": "last:2", **common, **galore[name.removeprefix("galore")]})
    if name in full:
        return LayerFullConfig(select=full[name], task_type="CAUSAL_LM")
    return LayerLoraConfig(**common, **lora[name.removeprefix("lora-")])


def as_devices(engine: str) -> ExitStack:
    """Inside, and in this process alone, CPU processes count as devices."""
    from accelerate import state

    stack = ExitStack()
    stack.enter_context(mock.patch.dict(os.environ, ENGINES[engine]))
    if engine in FILES:
        file = Path(stack.enter_context(TemporaryDirectory()), "zero.json")
        file.write_text(json.dumps(FILES[engine]))
        stack.enter_context(mock.patch.dict(os.environ, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}))
    if engine == "ddp":
        return stack
    if engine.startswith("zero"):
        stack.enter_context(mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}))
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled here
    gloo = ("gloo", state.DistributedType.MULTI_GPU)
    stack.enter_context(mock.patch.object(state.PartialState, "_prepare_backend", lambda *_, **__: gloo))
    stack.enter_context(
        mock.patch.object(state.PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
    )
    stack.enter_context(mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True))
    return stack


def model() -> Any:
    """A Llama of six layers that differ, so that scores do; the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, max_position_embeddings=32, **sizes))
    with torch.no_grad():
        for size, layer in zip((1.0, 3.0, 1.5, 2.5, 1.2, 2.0), made.model.layers, strict=True):
            for p in layer.parameters():
                p.mul_(size if p.dim() > 1 else 1.0)
    return made


def rows(count: int = ROWS, ragged: bool = False) -> list[dict[str, torch.Tensor]]:
    """Sequences of twelve tokens, with themselves as labels, or with the last ones of them."""
    ids = torch.randint(0, 96, (count, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for i, row in enumerate(labels if ragged else ()):
        row[: i * 5 % 11] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


@contextmanager
def counting() -> Iterator[Counter[int]]:
    """Of FSDP2: how often the weights of each layer are fetched in backward passes, while they run."""
    from accelerate import Accelerator
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    found: Counter[int] = Counter()
    fetch, backward, running = groups.foreach_all_gather, Accelerator.backward, [False]

    def fetched(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        number = re.search(r"\.layers\.(\d+)\.", parameters[0]._param_fqn or "")
        if running[0] and number:
            found[int(number[1])] += 1
        return fetch(parameters, *args, **kwargs)

    def passed(self: Any, *args: Any, **kwargs: Any) -> Any:
        running[0] = True
        backward(self, *args, **kwargs)
        running[0] = False

    with mock.patch.object(groups, "foreach_all_gather", fetched), mock.patch.object(Accelerator, "backward", passed):
        yield found


def whole(p: torch.Tensor) -> torch.Tensor:
    """All of a parameter, in float32."""
    from layerpeft.integrations.engines import known

    return known.whole(p).detach().float().clone()


def train(
    name: str,
    out: Path,
    checkpoint: Path | None = None,
    at_once: int = 4,
    count: int = ROWS,
    ragged: bool = False,
    **options: Any,
) -> Any:
    """One run: weights by name, losses of the steps, and what was said of the layers. `at_once`: rows of all processes together."""
    from transformers import Trainer, TrainingArguments

    from layerpeft import get_peft_model
    from layerpeft.model.names import clean
    from layerpeft.training.report import layer_report

    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if size > 1:
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(options.get("gradient_accumulation_steps", 1))
    told = {
        "max_steps": 4,
        "save_steps": 2,
        "save_strategy": "steps",
        "logging_steps": 1,
        "adam_epsilon": 1e-6,
        "use_cpu": size == 1,
        # DeepSpeed's settings have to say the same
        "bf16": "ACCELERATE_USE_DEEPSPEED" in os.environ and os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16",
    } | options
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=at_once // size, learning_rate=2e-3, lr_scheduler_type="constant", seed=0,
        report_to="none", disable_tqdm=True, optim="adamw_torch", train_sampling_strategy="sequential",
        dataloader_pin_memory=False, per_device_eval_batch_size=4, **told,
    )  # fmt: skip
    data = rows(count, ragged)
    each = at_once // size
    parts = [data[at_once * i + each * rank : at_once * i + each * (rank + 1)] for i in range(2)]
    batches = [{k: torch.stack([row[k] for row in part]) for k in part[0]} for part in parts]
    trainer = Trainer(
        get_peft_model(model(), config(name, batches)), arguments, train_dataset=data, eval_dataset=data[:8]
    )
    with counting() as fetched:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    wrapped: Any = trainer.model
    weights = {clean(n): whole(p) for n, p in wrapped.named_parameters() if p.dtype.is_floating_point}
    if told["save_strategy"] != "no":
        trainer.save_model(str(out / "final"))
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    held_out = [h["eval_loss"] for h in trainer.state.log_history if "eval_loss" in h]
    steps = {row.layer: row.steps for row in layer_report(wrapped).rows}
    found = {"weights": weights, "losses": losses, "held_out": held_out, "steps": steps, "fetched": dict(fetched)}
    return found | (beside_a_reference(wrapped) if name.startswith("galore") else {})


def beside_a_reference(wrapped: Any) -> dict[str, Any]:
    """Logits of a trained model, and of its base: before gradients, and between a forward pass and its backward pass."""
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        live = wrapped.eval()(input_ids=ids).logits.clone()
        with wrapped.disable_adapter():
            base = wrapped(input_ids=ids).logits.clone()

    def gradients(within: bool) -> dict[str, torch.Tensor]:
        wrapped.zero_grad()
        loss = wrapped(input_ids=ids, labels=ids).loss
        if within:
            with torch.no_grad(), wrapped.disable_adapter():
                assert torch.equal(wrapped(input_ids=ids).logits, base)
        loss.backward()
        return {n: whole(p.grad) for n, p in wrapped.named_parameters() if p.grad is not None}

    plain, beside = gradients(False), gradients(True)
    assert plain and plain.keys() == beside.keys() and all(torch.equal(g, beside[n]) for n, g in plain.items())
    with torch.no_grad():
        assert torch.equal(wrapped(input_ids=ids).logits, live)
    return {"live": live, "base": base}


def in_ranks(folder: Path, engine: str, runs: list[dict[str, Any]], ranks: int = 2) -> list[list[Any]]:
    """What each process found in each of these runs (`name`, `out`, and options of `train`): a sentence where it was refused."""
    from tests.helpers.processes import in_a_process

    folder.mkdir(parents=True, exist_ok=True)
    done = in_a_process(__file__, folder, engine, json.dumps(runs), cwd=folder, ranks=ranks)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(ranks)]


def main(folder: Path, engine: str, runs: list[dict[str, Any]]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    from layerpeft.errors import LayerpeftError

    torch.set_num_threads(1)
    found = []
    with as_devices(engine):
        for run in runs:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            given = {k: v for k, v in run.items() if k not in ("out", "checkpoint")}
            checkpoint = folder / run["checkpoint"] if "checkpoint" in run else None
            try:
                found.append(train(out=folder / run["out"], checkpoint=checkpoint, **given))
            except LayerpeftError as error:
                found.append(str(error))
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))

"""Two processes under DeepSpeed's ZeRO, in a loop of one's own, train as one does; what cannot be is refused before a step."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from layerpeft import (
    LayerFullConfig,
    LayerGaloreConfig,
    LayerHeadConfig,
    LayerLoraConfig,
    LayerUnlockConfig,
    check_trained,
    get_peft_model,
)
from layerpeft.errors import ScoreError, TrainingError
from layerpeft.integrations.engines.deepspeed import stage
from layerpeft.integrations.engines.known import asked_for
from layerpeft.training import verify
from tests.helpers.loops import llama, record
from tests.helpers.processes import in_two_ranks
from tests.helpers.repeating import some, wanted

STEPS, SAVED, CLIP = 5, 2, 0.3
ROWS = torch.randint(0, 60, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))
SELECTS = {
    "last": "last:2",
    "waits": {"by": "gradient_norm", "exact": True, "keep": 2},
    "scored": {"by": "gradient_norm", "exact": True, "keep": 2, "normalize": "weight"},
    "weights": {"by": "snr", "keep": 2},
    "turns": {"pick": "cycle", "keep": 1, "reselect_steps": 2, "state": "offload"},
    "clears": {"pick": "cycle", "keep": 1, "reselect_steps": 2, "state": "clear"},
}
METHODS = {
    "lora": lambda **options: LayerLoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options),
    "galore": lambda **options: LayerGaloreConfig(r=4, target_modules=["q_proj", "v_proj"], scale=1.0, **options),
    "full": lambda **options: LayerFullConfig(biases=False, **options),
    "head": lambda **options: LayerHeadConfig(**options),
    "unlock": lambda **options: LayerUnlockConfig(**options),
}
# (stage, method, select); a stage of 3.5 divides the model before it is wrapped
CELLS = [
    (2, "galore", "waits"),
    (3.5, "lora", "scored"),
]
MORE = [
    (s, m, c)
    for s in (1, 2)
    for m in ("lora", "galore", "full")
    for c in ("last", "waits", "turns", "clears")
    if (s, m, c) not in CELLS
]
MORE += [
    (3, "full", "last"),
    (3, "lora", "last"),
    (3, "lora", "scored"),
    (3.5, "full", "weights"),
    (3.5, "full", "scored"),
    (3.5, "full", "last"),
]
MORE += [(3.5, "lora", "last"), (2, "head", "last"), (2, "head", "turns"), (1, "head", "waits")]
MORE += [(2, "unlock", "turns"), (1, "unlock", "waits")]


def config(method, select, rank=None):
    share = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    batches = [{"input_ids": four[share], "labels": four[share]} for four in ROWS[:8].split(4)]
    more = {"update_proj_gap": 2, "stagger": False} if method == "galore" else {}
    scored = select in ("scored", "weights")
    return METHODS[method](select=SELECTS[select], task_type="CAUSAL_LM", batches=batches if scored else None, **more)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, eps=1e-3)


def told(model, weights):
    found = record(model)
    chosen = (
        found.selection.layers if found.schedule is None else [h["layers"] for h in found.schedule.standing.history]
    )
    return {"weights": weights, "chosen": list(chosen), "steps": found.steps_trained, "checks": dict(found.checks)}


def alone(method, select):
    """One process, all rows."""
    torch.manual_seed(1)
    model = get_peft_model(llama(attention_bias=True), config(method, select)).train()
    optimizer = adamw(model)
    for four in ROWS.split(4):
        parts = four.split(2 if select == "waits" else 4)  # a choice in training is by the batches of all processes
        for rows in parts:
            (model(input_ids=rows, labels=rows).loss / len(parts)).backward()
        if select != "waits":  # who clips by hand clips the first step by the norm of the whole pool
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], CLIP)
        optimizer.step()
        optimizer.zero_grad()
    check_trained(model)
    return told(model, {n: p.detach() for n, p in model.named_parameters()}) | {"base": base_logits(model, model)}


@torch.no_grad()
def base_logits(model, outer):
    model.eval()
    with model.disable_adapter():
        found = outer(input_ids=ROWS[:2]).logits.clone()
    model.train()
    return found


# what each process runs


def settings(number, select="last"):
    sizes = {"stage": number, "reduce_bucket_size": 20000, "stage3_param_persistence_threshold": 100}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0 if select == "waits" else CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": sizes,
    }


def wrapped(number, method, select, rank):
    import deepspeed

    torch.manual_seed(1)
    base = llama(attention_bias=True)
    if number == 3.5:
        deepspeed.zero.Init(module=base, config_dict_or_path=settings(3))
    return get_peft_model(base, config(method, select, rank)).train()


def engine_of(model, number, select="last", optimizer=None):
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer or adamw(model), config=settings(int(number), select))[
        0
    ]


def trained(rank, folder, number, method, select, again=False):
    from deepspeed import zero

    model = wrapped(number, method, select, rank)
    engine = engine_of(model, number, select)
    if again:
        engine.load_checkpoint(folder, load_module_strict=False)
    for step, four in enumerate(ROWS.split(4)):
        if again and step < SAVED:
            continue
        ids = four[2 * rank : 2 * rank + 2]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        if step + 1 == SAVED and not again:
            if (
                rank == 0 and number < 3 and (select != "clears" or method == "galore")
            ):  # without, as accelerator.save_state
                model.save_pretrained(folder)
            dist.barrier()
            engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    check_trained(model)
    base = base_logits(model, engine) if method != "lora" else None
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True) if number >= 3 else None
    if rank == 0:  # as Trainer saves
        model.save_pretrained(f"{folder}/final", **({} if state is None else {"state_dict": state}))
    with zero.GatheredParameters(list(model.parameters())):
        found = told(model, {n: p.detach().clone() for n, p in model.named_parameters()}) | {"base": base}
    engine.destroy()
    return found


def refused(action):
    try:
        action()
    except (TrainingError, ScoreError) as error:
        return str(error)
    return None


def refusals(rank):
    model = wrapped(2, "lora", "turns", rank)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    found = {"rates": refused(lambda: engine_of(model, 2, optimizer=optimizer)), "kept": scheduler.last_epoch}
    for select in ("turns", "waits"):
        found[select] = refused(lambda: engine_of(wrapped(3, "lora", select, rank), 3))  # noqa: B023
    uneven = config("lora", "scored", rank).with_batches([{"input_ids": ROWS[:2], "labels": ROWS[:2]}] * (1 + rank))
    base = llama()
    from deepspeed import zero

    zero.Init(module=base, config_dict_or_path=settings(3))
    found["uneven"] = refused(lambda: get_peft_model(base, uneven))
    return found


def main(folder):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for every engine
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled here
    rank, found = dist.get_rank(), {}
    for cell in map(tuple, json.loads((folder / "cells.json").read_text())):
        place = str(folder / " ".join(map(str, cell)))
        found[cell] = trained(rank, place, *cell), trained(rank, place, *cell, again=True)
    found["refused"] = refusals(rank)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()


# what is asked


def run(folder, cells):
    (folder / "cells.json").write_text(json.dumps(cells))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return in_two_ranks(__file__, folder, imports=["deepspeed"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("zero")
    return run(folder, wanted(request, "number", "method", "select")), folder


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max()) for n in one)


def compare(ranks, folder, number, method, select):
    (ours, again), (theirs, _) = (r[number, method, select] for r in ranks)
    one = alone(method, select)
    assert apart(ours["weights"], theirs["weights"]) == 0 and apart(ours["weights"], one["weights"]) <= 2e-5
    assert (ours["chosen"], ours["steps"]) == (one["chosen"], one["steps"])
    assert ours["checks"]["end"] == one["checks"]["end"] and ours["checks"]["first_step"] == "every chosen target moved"
    assert len(ours["checks"]["not_made"]) == 1 and "not_made" not in one["checks"]
    assert apart(again["weights"], ours["weights"]) <= 1e-7
    saved = load_file(folder / f"{number} {method} {select}" / "final" / "adapter_model.safetensors")
    assert saved if method != "full" else {k.rpartition(".")[2] for k in saved} == {"weight", "bias"}
    ends = ours["weights"].items()  # a folder has no names of adapters
    held = {n.replace(".modules_to_save.default.", ".").replace(".default.", "."): p for n, p in ends}
    assert method in ("galore", "head", "unlock") or all(torch.equal(saved[k], held[k]) for k in saved)
    for found in (ours, again) if method != "lora" else ():
        torch.testing.assert_close(found["base"], one["base"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("number", "method", "select"), some(CELLS + MORE, CELLS), ids=str)
def test_two_processes_train_what_one_does_and_go_on_where_they_were_saved(number, method, select, ranks):
    compare(*ranks, number, method, select)


def test_what_cannot_be_right_is_refused_before_the_first_step_with_a_way_out(ranks):
    for found in (r["refused"] for r in ranks[0]):
        assert "under DeepSpeed ZeRO-3" in found["turns"] and "use DDP or ZeRO-2" in found["turns"]
        assert "pass batches=" in found["waits"] and "ZeRO-2, FSDP2 or DDP" in found["waits"]
        assert "LambdaLR was made for the groups there were" in found["rates"] and "make it after" in found["rates"]
        assert "each of them needs as many batches" in found["uneven"]


def test_processes_ask_of_the_same_tensors_in_one_order(monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "_cut", lambda _: True)
    monkeypatch.setattr(verify.distributed, "agreed", lambda facts: asked.append(facts) or facts)
    tensors = {name: {"weight": torch.nn.Parameter(torch.ones(2))} for name in "abcd"}
    before = {name: {"weight": verify.seal(group["weight"])} for name, group in tensors.items()}
    tensors["b"]["weight"].data += 1
    for order in ("abcd", "dcba", "bdac"):
        assert set(verify.unmoved(tensors, {name: before[name] for name in order})) == {"a", "c", "d"}
    assert asked == [[True, False, True, True]] * 3


def test_the_stage_is_read_where_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    for given in ({"zero_optimization": {"stage": 3}}, str(tmp_path / "zero.json")):
        args = type("Arguments", (), {"deepspeed": given})
        assert stage(args) == 3 and asked_for(args).name == "DeepSpeed ZeRO-3"
    assert stage() == 0 and stage(type("Arguments", (), {"deepspeed": {}})) == 0
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert stage() == 2
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    assert stage() == 1
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    assert stage() == 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))

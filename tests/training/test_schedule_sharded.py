"""Two processes under FSDP2 train a schedule as one does, each with its part of every tensor; what cannot be says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import layerpeft
from layerpeft import LayerFullConfig, check_trained, get_peft_model
from layerpeft.errors import SaveError, TrainingError
from layerpeft.integrations.distributed import Part
from layerpeft.saving.manifest import read_manifest
from layerpeft.training.optimizer_states import divided, optimizer_bytes
from tests.helpers.loops import llama
from tests.helpers.processes import in_two_ranks
from tests.helpers.repeating import some, wanted
from tests.helpers.scheduling import pool_tensors, switcher_of
from tests.training.test_schedule_processes import STEPS, apart, told, train, wrap

BARE = [f"{method} {select}" for method in ("lora", "full") for select in ("uniform", "gradient", "rescored")]
ROOT = [f"{method} uniform, the root alone" for method in ("galore", "lora")]
QUICK = ["full gradient", "full rescored"]
SAVED = ("lora", "full", "galore")
ROWS = torch.randint(0, 60, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))


def shard(model, blocks=True):
    """`fully_shard` as a loop of one's own uses it."""
    mesh = init_device_mesh("cpu", (2,))
    for block in model.base_model.model.model.layers if blocks else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def loop(model, rank, steps=STEPS, each=lambda optimizer: None, spoil=lambda step: None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step, four in enumerate(ROWS.split(4)[:steps]):
        ids = four[2 * rank : 2 * rank + 2]
        model(input_ids=ids, labels=ids).loss.backward()
        spoil(step)
        optimizer.step()
        each(optimizer)
        optimizer.zero_grad()
    return optimizer


def gathered(model):
    return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}


@torch.no_grad()
def logits(model):
    was, ids = model.training, ROWS[:2]
    found = model.eval()(input_ids=ids).logits
    model.train(was)
    return found


# what each process runs


def trained(rank, method, select, blocks=True):
    """A run, and how many bytes of states this process held; what was away from the optimizer at its end."""
    model, used = shard(wrap(method, select), blocks), []
    loop(model, rank, each=lambda optimizer: used.append(optimizer_bytes([optimizer])))
    check_trained(model)
    layer = [p for t, group in pool_tensors(model).items() if ".0." in t for p in group.values()]
    own = sum(2 * 4 * p.to_local().numel() + 4 for p in layer)
    store = switcher_of(model).store
    parts = [v for state in store.values() for v in state.values() if not isinstance(v, torch.Tensor)]
    return told(model) | {
        "weights": gathered(model),
        "used": used,
        "layer": own,
        "away": (divided(store), bool(parts) and all(isinstance(v, Part) for v in parts)),
    }


def with_head():
    """A head in the root's own group trains besides."""
    torch.manual_seed(1)
    select = {"pick": "uniform", "keep": 1, "reselect_steps": 2}
    config = LayerFullConfig(select=select, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return shard(get_peft_model(llama(), config))


def switched_off(rank, model):
    """Outputs with the adapter, without it, and with it again."""
    loop(model, rank, 5)
    found = {"on": logits(model)}  # the root's weights stay gathered after a pass without gradients
    with model.disable_adapter():
        found["off"] = logits(model)
    found["again"] = logits(model)
    model.reshard()  # or the optimizer would hold what is gathered
    loop(model, rank, 2)
    found["further"] = logits(model)
    return found


def saved(rank, folder, method):
    """A folder of the gathered weights, and what is said where they are not."""
    model = shard(wrap(method, "uniform"))
    loop(model, rank, 5)
    said = []
    for options in ({}, {"state_dict": model.state_dict()}):
        try:
            model.save_pretrained(folder / f"parts of {rank}", **options)
        except SaveError as error:
            said.append(str(error))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # elsewhere it is empty
        model.save_pretrained(folder / method, state_dict=state)
        if method == "full":
            with model.disable_adapter(), pytest.raises(SaveError, match="switched off"):
                model.save_pretrained(folder / "off", state_dict=state)
    return {"said": said, "logits": logits(model), "parts": (folder / f"parts of {rank}").exists()}


def divided_too_late(rank):
    """A model that was trained before it was divided."""
    model = wrap("galore", "uniform")
    loop(model, rank, 3)
    try:
        with shard(model).disable_adapter():
            return None
    except TrainingError as error:
        return str(error)


def refused(rank, method, spoil):
    model = shard(wrap(method, "uniform"))
    try:
        loop(model, rank, 3, spoil=lambda step: spoil(model) if rank == 1 else None)
    except TrainingError as error:
        return str(error)
    return None


@torch.no_grad()
def burn(model):
    """Puts a NaN into this process's part of one gradient."""
    next(p for p in model.parameters() if p.grad is not None).grad.to_local().view(-1)[0] = float("nan")


def main(folder, *scenes):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, found = dist.get_rank(), {}
    for scene in scenes:
        kind, _, name = scene.partition(": ")
        if kind == "trained":
            method, select, *root_alone = name.replace(",", "").split()
            found[scene] = trained(rank, method, select, blocks=not root_alone)
        elif kind == "off":
            model = with_head() if name == "full" else shard(wrap("galore", "uniform"), blocks=False)
            found[scene] = switched_off(rank, model)
        else:
            found[scene] = saved(rank, folder, name)
    found["too late"] = divided_too_late(rank)
    found["nan"] = refused(rank, "full", burn)
    torch.save((found, str(folder)), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# what is asked of them


@pytest.fixture(scope="module")
def told_by(tmp_path_factory, request):
    scenes = [f"{kind}: {name}" for kind in ("trained", "off", "saved") for name in wanted(request, kind)]
    return in_two_ranks(__file__, tmp_path_factory.mktemp("sharded"), *scenes)


@pytest.fixture(scope="module")
def ranks(told_by):
    return [found for found, _ in told_by]


@pytest.mark.parametrize("trained", some([*BARE, *ROOT], [*QUICK, ROOT[0]]))
def test_two_processes_equal_one_with_accumulation(ranks, trained):
    method, select = trained.replace(",", "").split()[:2]
    ours, theirs = (r[f"trained: {trained}"] for r in ranks)
    assert ours["history"] == theirs["history"] and apart(ours["weights"], theirs["weights"]) == 0
    model = wrap(method, select)
    start = told(model)["weights"]
    alone = train(model, model, slice(0, 4), 2)
    assert [h[:2] for h in ours["history"]] == [h[:2] for h in alone["history"]]
    assert len({tuple(h[1]) for h in ours["history"]}) > 1
    assert apart(alone["weights"], start) > 1e-3 and apart(ours["weights"], alone["weights"]) <= 1e-5


@pytest.mark.parametrize("trained", some(BARE, QUICK))
def test_a_process_holds_states_of_its_parts_of_the_active_layer_alone(ranks, trained):
    for found in (r[f"trained: {trained}"] for r in ranks):
        assert 0 < max(found["used"]) <= found["layer"]
        # `rescored` clears states, the others take them to the CPU part by part
        assert found["away"] == ((False, False) if "rescored" in trained else (True, True))


@pytest.mark.parametrize("off", some(["full", "galore"], ["full"]))
def test_originals_come_and_go_part_by_part(ranks, off):
    for found in (r[f"off: {off}"] for r in ranks):
        plain = logits(llama().to(found["off"].dtype))
        assert torch.allclose(found["off"], plain, atol=1e-6)
        assert not torch.allclose(found["on"], plain, atol=1e-3)
        assert torch.equal(found["again"], found["on"])
        assert not torch.equal(found["further"], found["on"])


@pytest.mark.parametrize("saved", some(SAVED, ["galore"]))
def test_gathered_weights_are_saved_and_parts_refused(told_by, saved):
    folder = Path(told_by[0][1]) / saved
    for found in (found[f"saved: {saved}"] for found, _ in told_by):
        assert not found["parts"] and len(found["said"]) == 2 and "full_state_dict=True" in found["said"][0]
        assert found["said"][0] == found["said"][1]
    live = told_by[0][0][f"saved: {saved}"]["logits"]
    assert torch.allclose(logits(layerpeft.load(folder, llama().to(live.dtype))), live, atol=1e-6)
    manifest = read_manifest(folder)
    assert manifest["schedule"]["divided"] is True and not (folder / "layerpeft_optimizer.safetensors").exists()
    held = {k.split(".layers.")[1][0] for k in load_file(folder / "adapter_model.safetensors") if ".layers." in k}
    ever = {str(i) for entry in manifest["schedule"]["history"] for i in entry["layers"]}
    assert held == (ever if saved == "full" else set("0123"))
    with pytest.raises(SaveError, match="held a part of the optimizer's states"):
        wrap(saved, "uniform").load_adapter(str(folder), "default")


def test_projection_says_that_folds_of_before_cannot_be_divided(ranks):
    assert all(
        "divide the model first" in r["too late"] and "load the folder afterwards" in r["too late"] for r in ranks
    )


def test_a_gradient_that_is_not_finite_in_one_part_stops_every_process(ranks):
    assert ranks[0]["nan"] == ranks[1]["nan"] and "gradient is not finite" in ranks[0]["nan"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

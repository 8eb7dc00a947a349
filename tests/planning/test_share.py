"""What a plan says of one card of several against what two processes hold and send under Accelerate's FSDP2."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.ranks import keep_frozen_whole
from layerpeft import LayerGaloreConfig, LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.integrations.engines import known
from layerpeft.integrations.torch import tensors_of
from layerpeft.planning.engines import ENGINES, cards
from layerpeft.planning.plan import for_cards, plan
from layerpeft.planning.trace import Step
from layerpeft.tuners.galore.projection import projections, state_of
from tests.helpers.processes import in_two_ranks
from tests.helpers.repeating import some, wanted

SHAPE = dict(vocab_size=101, hidden_size=36, intermediate_size=50, num_hidden_layers=4, num_attention_heads=2)
PROJECTED = [2, 3]
PARTS = ("weights", "gradients", "states")
CASES = {
    "all": ("all", None, False),
    "above the cut": ([1, 3], None, False),
    "in bfloat16": ("last:1", torch.bfloat16, True),
    "projected": (PROJECTED, None, False),
}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, use_cache=False))


def config(select) -> LayerLoraConfig:
    kind = LayerGaloreConfig if select == PROJECTED else LayerLoraConfig
    return kind(select=select, r=3, target_modules="all-linear", task_type="CAUSAL_LM")


def of_two(select, kind, checkpointing):
    step = Step(autocast=kind, cards=cards("fsdp2", 2))
    return plan(model(), config(select), batch_size=2, length=16, checkpointing=checkpointing, step=step).share


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    return in_two_ranks(__file__, tmp_path_factory.mktemp("share"), *wanted(request, "name"))


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", some(CASES, ["above the cut", "projected"]))
def test_a_share_is_what_each_of_two_processes_holds_and_sends(ranks, name):
    (found, there), said = (rank[name] for rank in ranks), of_two(*CASES[name])
    if said.kept is not None:  # frozen blocks above the cut stayed whole after the forward pass
        kept, backward = said.kept, said.traffic.backward
        again = [backward.times - kept.units, backward.bytes - kept.saved]
        assert found["kept"] == there["kept"] == again and kept.units
    held = {k: getattr(said, k) for k in PARTS}
    assert found["held"] == held and all(there["held"][k] <= held[k] for k in PARTS)  # the first has the larger halves
    moved = said.traffic
    counted = {
        "forward": [moved.forward.times, moved.forward.bytes],
        "backward": [moved.backward.times, moved.backward.bytes],
        "reduced": [moved.reduced.times, moved.reduced.bytes],
        "whole": said.gathered,
    }
    assert all(rank[k] == v for rank in (found, there) for k, v in counted.items())


def test_what_is_not_divided_is_whole_and_the_cut_is_seen():
    def one(engine, select="last:1", processes=4, **changes):
        step = Step(autocast=torch.bfloat16, cards=cards(engine, processes), **changes)
        given = {"batch_size": 2, "length": 16, "optimizer": "adamw_torch", "checkpointing": False, "step": step}
        return for_cards(model(), config(select), [processes], **given)[0]

    ddp, first, second, third = (one(name) for name in ("ddp", "zero1", "zero2", "zero3"))
    assert ddp.weights > 1.9 * first.weights == 1.9 * second.weights > 3 * third.weights
    assert ddp.states > 3.9 * first.states and first.gradients > second.gradients
    assert ddp.traffic.received == ddp.traffic.reduced.bytes * 2 * 3 // 4 and not ddp.traffic.forward.times
    assert one("ddp", processes=1).traffic.received == 0
    assert (
        one("zero3", "all").traffic.backward.bytes == third.traffic.backward.bytes == 0
    )  # so small that all stays whole
    high, whole = one("fsdp2"), one("fsdp2", "all")
    assert high.traffic.forward.times == whole.traffic.forward.times > high.traffic.backward.times
    assert high.kept is None and one("fsdp2", [1, 3]).kept.units == 1  # type: ignore[union-attr]
    twice = one("fsdp2", accumulation=2)
    assert (
        twice.traffic.forward.bytes == 2 * high.traffic.forward.bytes and twice.traffic.reduced == high.traffic.reduced
    )


def test_what_is_packed_is_counted_as_it_is_on_every_card():
    step = Step(autocast=torch.bfloat16, cards=cards("zero2", 2))
    given = {"batch_size": 2, "length": 16, "optimizer": "adamw_torch", "checkpointing": False, "step": step}
    few = LayerLoraConfig(select="last:1", r=3, target_modules="all-linear", quantize_frozen="nf4")
    packed, plain = (for_cards(model(), c, [2], **given)[0] for c in (few, config("last:1")))
    assert packed.weights < 0.8 * plain.weights and packed.states == plain.states


def test_an_engine_that_there_is_not_is_told_with_the_nearest(capsys):
    assert main(["plan", "quickstart", "--processes", "8", "--engine", "fdsp2"]) == 2
    said = capsys.readouterr().err
    assert "unknown engine 'fdsp2'. Did you mean 'fsdp2'? Allowed: ddp, fsdp2, zero1, zero2, zero3." in said
    assert (
        main(["plan", "quickstart", "--processes", "0"]) == 2 and "a whole number from 1 to" in capsys.readouterr().err
    )


def test_what_an_engine_divides_is_said_alike_where_it_runs_and_where_it_is_planned():
    running = {engine.key: engine for engine in known.ENGINES}
    for name, engine in ENGINES.items():
        assert engine.divides == running[name].divides


def test_a_plan_refuses_what_the_engine_does(capsys):
    words = ["plan", "lisa", "--processes", "2", "--engine"]
    assert main([*words, "zero3"]) == 2
    assert "layers cannot change while training under" in capsys.readouterr().err


def measured(select, kind, checkpointing) -> dict:
    """One process's bytes, and what collectives were given, in one step of a model as Accelerate wraps it."""
    import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FSDPModule

    found: dict = {"forward": [0, 0], "backward": [0, 0], "reduced": [0, 0], "whole": 0}
    phase = "forward"
    gather, reduce = groups.foreach_all_gather, groups.foreach_reduce

    def gathered(params, *args):
        result = gather(params, *args)
        found[phase][0] += 1
        found[phase][1] += result.all_gather_output.nbytes
        return result

    def reduced(params, gradients, *args):
        done = reduce(params, gradients, *args)
        found["reduced"][0] += 1
        found["reduced"][1] += done[0].nbytes
        return done

    wrapped = get_peft_model(model(), config(select))
    if checkpointing:
        wrapped.base_model.model.activation_checkpointing_enable()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(mixed_precision="no" if kind is None else "bf16", fsdp_plugin=plugin)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
    groups.foreach_all_gather, groups.foreach_reduce = gathered, reduced
    units = [m for m in wrapped.modules() if isinstance(m, FSDPModule)]

    def whole(*_):
        params = [p for m in units for g in m._get_fsdp_state()._fsdp_param_groups for p in g.fsdp_params]
        held = {id(p): p for p in params if p.sharded_state.name == "UNSHARDED"}
        size = sum(t.untyped_storage().nbytes() for p in held.values() for t in p.all_gather_outputs)
        found["whole"] = max(found["whole"], size)

    def later(_module, _args, output):
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(whole)

    for unit in units:
        unit.register_forward_pre_hook(whole)
        unit.register_forward_hook(later)
    ids = torch.arange(32).reshape(2, 16)

    def passes():
        nonlocal phase
        phase = "forward"
        loss = wrapped(input_ids=ids, labels=ids).loss
        phase = "backward"
        accelerator.backward(loss)

    passes()
    groups.foreach_all_gather, groups.foreach_reduce = gather, reduce
    optimizer.step()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    originals = [state_of(layer).original for _, layer in projections(wrapped, "default")]
    states = [t for p in trained for n, t in optimizer.state[p].items() if n != "step"]
    found["held"] = {
        "weights": nbytes([*wrapped.parameters(), *originals]) + nbytes(wrapped.buffers()),
        "gradients": nbytes(p.grad for p in trained),
        "states": nbytes(states),
    }
    if select == [1, 3]:
        counted = copy.deepcopy(found)
        found["backward"] = [0, 0]
        keep_frozen_whole(wrapped)
        groups.foreach_all_gather = gathered
        passes()
        groups.foreach_all_gather = gather
        found = counted | {"kept": found["backward"]}
    accelerator.free_memory()
    return found


def nbytes(tensors) -> int:
    """Of the storages behind them, each once: gradients of a block share one."""
    stores = [getattr(t, "_local_tensor", t).untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in stores}.values())


if __name__ == "__main__":
    from accelerate import state

    state.PartialState._prepare_backend = lambda self, *a, **k: ("gloo", state.DistributedType.MULTI_GPU)
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    os.environ["FSDP_VERSION"] = "2"
    results = {}
    for label in sys.argv[2:]:
        results[label] = measured(*CASES[label])
        state.AcceleratorState._reset_state(True)
    rank = torch.distributed.get_rank()
    torch.save(results, Path(sys.argv[1]) / f"rank{rank}.pt")
    torch.distributed.barrier()

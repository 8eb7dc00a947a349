"""States that come through one block at a time: those of the whole model to the bit, after any kill, and none is lost silently."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from layerpeft.errors import ConfigError
from layerpeft.model.layers import layer_map
from layerpeft.model.precisions import PLAIN
from layerpeft.quantization.load import load_quantized
from layerpeft.training.prefix import parts
from layerpeft.training.prefix.below import Below
from layerpeft.training.prefix.disk import Disk
from layerpeft.training.prefix.fingerprint import belongs_to
from layerpeft.training.prefix.folders import Handle
from layerpeft.training.prefix.passing import Keyed
from layerpeft.training.prefix.streaming import Call, Filling, Lower
from layerpeft.training.prefix.upwards import forms_below
from tests.helpers.kept import states_in
from tests.helpers.repeating import some

CUT = 3
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
MADE: dict[str, Any] = {
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, intermediate_size=24, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=4,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2)),
}  # fmt: skip


@dataclass
class Base:
    """A checkpoint, and the same model whole."""

    folder: Path
    whole: Any

    @property
    def below(self) -> Below:
        return Below(layer_map(self.whole).names, CUT)

    @cached_property
    def forms(self) -> Any:
        return forms_below(self.whole, self.below.names, CUT)

    def load(self, before: parts.Before) -> Any:
        return load_quantized(self.folder, {}, PLAIN, before=before, progress=False, dtype=torch.float32)

    def lower(self) -> Lower:
        names, forms = self.below.names, self.forms
        front = self.load(parts.front_alone(names, forms))
        block = lambda i: self.load(parts.block_alone(names[i])).get_submodule(names[i])  # noqa: E731
        return Lower(front, self.below, forms, block, torch.device("cpu"), quiet=True)

    def entering(self, call: Call) -> torch.Tensor:
        """What enters the cut of the whole model."""
        found: list[torch.Tensor] = []
        block = self.whole.get_submodule(self.below.block)
        hook = block.register_forward_pre_hook(lambda _, args, kwargs: found.append(args[0]), with_kwargs=True)
        with torch.no_grad():
            self.whole.eval()(**call.inputs)
        hook.remove()
        return found[0]


def calls(number: int) -> list[Call]:
    """Batches of two rows of many lengths, the third of which is the first again."""
    drawn = torch.Generator().manual_seed(1)
    found = []
    for i in range(number):
        ids = torch.randint(5, 50, (2, 9), generator=drawn)
        mask = torch.ones_like(ids)
        mask[0, 4 + i % 5 :] = 0
        found.append(Call({"input_ids": ids, "attention_mask": mask, "use_cache": False}, i > 1))
    return [*found[:2], found[0], *found[2:]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Base] = {}

    def base(name: str) -> Base:
        if name not in made:
            torch.manual_seed(0)
            folder, model = tmp_path_factory.mktemp(name), MADE[name]()
            model.save_pretrained(folder, max_shard_size="8KB")
            made[name] = Base(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        return made[name]

    return base


def filled(base: Base, root: Path, portion: int = 1, *, given: list[Call], **limits: Any) -> Filling:
    lower = base.lower()
    store = Disk(root, lower.belongs(lambda: None), **limits)
    found = Filling(lower, store, root, lambda count: None, portion)
    found.fill(given)
    store.close()
    return found


@pytest.mark.parametrize("name", some(MADE, ["gemma3"]))
def test_states_and_digest_are_those_of_the_whole_model(name: str, bases: Any, tmp_path: Path):
    base = bases(name)
    given = calls(4)
    found = filled(base, tmp_path, given=given)
    store = Disk(tmp_path, belongs_to(base.whole, base.below))
    keyed, lower, seen = found.lower.keyed(), found.lower, set()
    for call in given:
        rows, _ = keyed.rows(call.inputs, *lower.entering(0, call))
        states = base.entering(call)
        for row in rows:
            (kept,) = store.get([row.key]) or [None]
            assert kept is not None and torch.equal(kept, states[row.row, row.places])
            seen.add(row.key)
    assert len(states_in(tmp_path)) == len(seen) == found.computed == 8
    assert sum(map(len, found.rows.values())) == 8 and not found.lost
    assert not [file for file in tmp_path.iterdir() if "filling" in file.name]


def test_what_the_store_does_not_take_is_told(bases: Any, tmp_path: Path):
    found = filled(bases("gemma3"), tmp_path, 2**20, given=calls(2), limit=1600)
    kept = states_in(tmp_path)
    assert 0 < len(kept) < 4 and len(found.lost) == 4 - len(kept)


def test_a_text_has_one_key_alone_and_among_others_in_a_row():
    keyed, ids = Keyed(False, None, False, None), torch.arange(5, 12)[None]
    places, hidden = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), torch.zeros(1, 7, 4)
    apart = torch.block_diag(torch.ones(4, 4), torch.ones(3, 3)).bool()[None, None]

    def keys(part: slice, ends: list[int], **other: torch.Tensor) -> list[bytes]:
        given = {
            "input_ids": ids[:, part],
            "position_ids": places[:, part],
            "cu_seq_lens_q": torch.tensor(ends),
            **other,
        }
        return [row.key for row in keyed.rows(given, hidden[:, part], {"attention_mask": apart})[0]]

    both = keys(slice(7), [0, 4, 7])
    assert len(set(both)) == 2
    assert both == keys(slice(4), [0, 4]) + keys(slice(4, 7), [0, 3])
    assert keys(slice(4), [0, 2, 4])[0] not in both  # cut elsewhere than positions say
    assert keys(slice(4), [0, 4], seq_idx=torch.tensor([[0, 0, 1, 1]]))[0] not in both


def spoiled(base: Base, root: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A filling through a second block whose states are changed so."""
    lower = base.lower()

    def load(number: int) -> Any:
        block = lower.load(number)
        if number == 1:
            own = block.mlp.forward
            block.mlp.forward = lambda x: how(own(x))
        return block

    Filling(replace(lower, load=load), Disk(root, {}), root, lambda count: None).fill(calls(2))


def test_states_that_are_no_fixed_function_of_a_row_are_an_error(bases: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match="rows of a batch are not computed apart"):
        spoiled(bases("gemma3"), tmp_path, lambda x: x + x.mean(0, keepdim=True))
    with pytest.raises(ConfigError, match="what runs below layer 3 draws random numbers"):
        spoiled(bases("gemma3"), tmp_path, lambda x: x + torch.rand(()))
    assert not states_in(tmp_path)
    spoiled(bases("gemma3"), tmp_path, lambda x: 2 * x)
    few, more = calls(2)[:2]
    row = {k: v[:1] if torch.is_tensor(v) else v for k, v in few.inputs.items()}
    with pytest.raises(
        ConfigError, match="what is kept of a row is not what enters layer 3"
    ):  # weights that were lied about
        store = Disk(tmp_path, {})
        other = {k: torch.cat([v, 54 - more.inputs[k][:1]]) if torch.is_tensor(v) else v for k, v in row.items()}
        other["attention_mask"] = torch.cat([row["attention_mask"], torch.ones(1, 9).long()])
        Filling(bases("gemma3").lower(), store, tmp_path, lambda count: None).fill([Call(other, False)])


def killed(base: Base, root: Path, given: list[Call], last: int) -> bool:
    """Whether a process that fills was killed while it wrote for the last time of so many."""
    pid = os.fork()
    if pid:
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    try:
        write, count = Handle.write, iter(range(1, 10**6))

        def counted(self: Handle, data: memoryview, offset: int) -> None:
            if next(count) == last:
                write(self, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, data, offset)

        Handle.write = counted  # type: ignore[method-assign]
        filled(base, root, given=given)
    finally:
        os._exit(0)


@pytest.mark.parametrize(("times", "batches"), some([(2, 3), (20, 60)], [(2, 3)]))
def test_a_filling_that_is_killed_goes_on_to_the_same_bits(times: int, batches: int, bases: Any, tmp_path: Path):
    base, given = bases("gemma3"), calls(batches)
    filled(base, tmp_path / "unbroken", given=given)
    expected, drawn, held = states_in(tmp_path / "unbroken"), random.Random(times), [0]
    for number in range(times):
        last = drawn.randint(2, 20) if number else 14  # of about six for each batch
        assert killed(base, tmp_path / "broken", given, last)
        kept = states_in(tmp_path / "broken")
        assert kept.items() <= expected.items()
        held.append(len(kept))
    assert held == sorted(held) and 0 < held[-1] < len(expected)
    went_on = filled(base, tmp_path / "broken", given=given)
    assert states_in(tmp_path / "broken") == expected
    assert went_on.computed == len(expected) - held[-1]

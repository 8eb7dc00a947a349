"""A plain state dict, which is what `accelerator.load_state` restores, holds all that a run goes on from, or it is refused."""

import copy
import io

import pytest
import torch

from layerpeft import LayerFullConfig, LayerLoraConfig, get_peft_model
from layerpeft.errors import SaveError
from layerpeft.training.carried import KEY, packed, unpacked
from layerpeft.training.follower import followers_of
from tests.helpers.loops import BY_GRADIENT, adamw, llama, make_batches, step
from tests.helpers.scheduling import switcher_of, wrapped

BATCHES = make_batches()
LISA = {"pick": "uniform", "keep": 1, "reselect_steps": 2}
WAITING = {"by": "gradient_norm", "keep": 2}


def masters():
    return get_peft_model(llama().bfloat16(), LayerFullConfig(select=LISA | {"state": "keep"}, master_weights=True))


MAKERS = {
    "lora": lambda: wrapped("lora", **LISA),
    "lora, states away": lambda: wrapped("lora", **LISA, state="offload"),
    "full": lambda: wrapped("full", **LISA),
    "full, masters": masters,
    "first choice by gradients": lambda: wrapped("lora", **BY_GRADIENT | {"reselect_steps": 3}),
    "a choice that waits": lambda: get_peft_model(llama(), LayerLoraConfig(select=WAITING, r=4, task_type="CAUSAL_LM")),
}


def run(model, optimizer, steps):
    torch.manual_seed(0)
    model.eval()  # without dropout, with gradients
    for number in steps:
        step(model.train(), optimizer, BATCHES[number % 8])


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    return torch.load(io.BytesIO(file.getvalue()))  # tensors and plain values alone


@pytest.mark.spread(3)
@pytest.mark.parametrize("at", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_goes_on_from_a_state_dict_bit_for_bit(kind, at):
    whole = MAKERS[kind]()
    for module in whole.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    again = copy.deepcopy(whole)
    optimizer = adamw(whole)
    run(whole, optimizer, range(at))
    state, states = saved(whole, optimizer)
    run(whole, optimizer, range(at, 7))
    other = adamw(again)  # built before, as accelerate does it
    again.load_state_dict(state)
    other.load_state_dict(states)
    run(again, other, range(at, 7))
    left, right = dict(whole.named_parameters()), dict(again.named_parameters())
    assert left.keys() == right.keys() and all(torch.equal(p, right[n]) for n, p in left.items())
    if kind != "a choice that waits":
        assert switcher_of(again).plain() == switcher_of(whole).plain()
        assert followers_of(again)[0].record.steps_trained == followers_of(whole)[0].record.steps_trained


def test_of_another_schedule_the_weights_are_taken_which_is_said(capsys, monkeypatch):
    model = wrapped("lora", **LISA)
    run(model, adamw(model), range(3))
    state, other = model.state_dict(), wrapped("lora", **LISA | {"reselect_steps": 3})
    monkeypatch.delenv("LAYERPEFT_QUIET", raising=False)
    other.load_state_dict(state)
    said = capsys.readouterr()
    assert "set up in another way (reselect_steps: 2 then, 3 now)" in said.err + said.out
    assert switcher_of(other).plain()["step"] == 0
    left = dict(other.named_parameters())
    assert all(torch.equal(p, left[n]) for n, p in model.named_parameters())
    with pytest.raises(RuntimeError, match=KEY):
        llama().load_state_dict({k.removeprefix("base_model.model."): v for k, v in state.items()})


def test_before_a_schedule_begins_and_after_its_adapter_is_gone_there_is_nothing_to_carry():
    model = wrapped("lora", **LISA)
    assert not [k for k in model.state_dict() if k.endswith(KEY)]
    run(model, adamw(model), range(3))
    assert [k for k in model.state_dict() if k.endswith(KEY)]
    assert not [k for k in model.unload().state_dict() if k.endswith(KEY)]


def test_tensors_without_a_place_are_no_silence():
    model = get_peft_model(llama(), LayerLoraConfig(select="last:2", r=4, task_type="CAUSAL_LM"))
    state = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
    with pytest.raises(SaveError, match="load as nothing.*set_peft_model_state_dict"):
        model.load_state_dict(state, strict=False)
    half = {k: v for k, v in model.state_dict().items() if "lora_A" in k}
    with pytest.raises(SaveError, match="Missing: .*lora_B"):
        model.load_state_dict(half, strict=False)


def test_what_is_carried_comes_back():
    given = {"a": ({"x|y": torch.ones(2, 3).bfloat16()}, {"n": [1, None]}), "b": ({}, {})}
    found = unpacked(packed(given))
    assert found["a"][1] == {"n": [1, None]} and found["b"] == ({}, {})
    assert torch.equal(found["a"][0]["x|y"], given["a"][0]["x|y"]) and found["a"][0]["x|y"].dtype == torch.bfloat16


def test_a_folder_does_not_pack_what_it_keeps_in_files_of_its_own(tmp_path, monkeypatch):
    model = MAKERS["full, masters"]()
    run(model, adamw(model), range(3))
    with monkeypatch.context() as patch:
        patch.setattr("layerpeft.training.follower.packed", lambda _: pytest.fail("packed for nothing"))
        model.save_pretrained(tmp_path / "saved")
    assert any(name.endswith(KEY) for name in model.state_dict())

"""A recipe whose lower layers are never loaded: what comes of it is what comes of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, core_model_loading

import layerpeft
from layerpeft.cli import main
from layerpeft.recipe import train, upper
from layerpeft.training.prefix.ahead import all_ahead
from layerpeft.training.prefix.upper import StandIn
from tests.conftest import LLAMA
from tests.helpers.bounds import EIGHT_BITS, EIGHT_BITS_STEPS, FALLEN
from tests.helpers.filled import recorded
from tests.helpers.kept import states_in
from tests.helpers.repeating import repeated
from tests.helpers.short import short_llama, shorten
from tests.recipe.test_launched import in_two
from tests.recipe.test_prefill import CASES, settings

WORDS = [
    "max_train_samples=3", "max_eval_samples=1", "max_length=32", "max_steps=-1", "num_train_epochs=2", "logging_steps=1",
    "per_device_train_batch_size=2", "warmup_steps=0", "layerpeft.select=last:2", "layerpeft.lora_dropout=0",
    "eval_strategy=epoch", "save_strategy=epoch", "load_best_model_at_end=true", "gradient_checkpointing=true",
    "sample_tokens=3",
]  # fmt: skip
LAYERS, CUT = 4, 2


def rows(folder: Path) -> list[str]:
    """Four short rows and one held out, and the words that name them; `known.jsonl`: another row, of a class that training has."""
    lines = [json.dumps({"question": f"What is {n} and {n}?", "answer": str(n + n)}) for n in range(5)]
    (folder / "rows.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (folder / "held.jsonl").write_text(lines[0] + "\n")
    (folder / "known.jsonl").write_text(json.dumps({"question": "What is 0 and 2?", "answer": "2"}) + "\n")
    return [
        f"dataset_name={folder}/rows.jsonl",
        f"eval_dataset={folder}/held.jsonl",
        f"model_name_or_path={short_llama(LAYERS)}",
    ]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with the whole model, in `whole`, whose states are recorded as a filling; and its words."""
    home = tmp_path_factory.mktemp("filled")
    words = [*rows(home), *WORDS, f"layerpeft.prefix_cache={home}/states"]
    assert main(["train", "quickstart", *words, f"output_dir={home}/whole"]) == 0
    recorded(home / "states", "quickstart", [*words, f"output_dir={home}/none"])
    return home, words


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    ours, theirs = tensors(a), tensors(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def losses(folder: Path) -> list[Any]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]


def plain(path: Path, but: tuple[str, ...] = ()) -> dict[str, Any]:
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in but}


def test_what_was_filled_ahead_is_trained_on_without_the_layers_below(filled, monkeypatch, capsys):
    home, words = filled
    read, real, models = [], core_model_loading._materialize_copy, []
    monkeypatch.setattr(core_model_loading, "_materialize_copy", lambda t, *a, **k: read.append(1) or real(t, *a, **k))
    made = train.make_trainer
    monkeypatch.setattr(train, "make_trainer", lambda setup, model: models.append(model) or made(setup, model))
    monkeypatch.setenv("LAYERPEFT_QUIET", "")
    assert main(["train", "quickstart", *words, f"output_dir={home}/upper"]) == 0
    said = capsys.readouterr()
    base = models[0].get_base_model()
    assert [type(block) is StandIn for block in base.model.layers] == [True] * CUT + [False] * (LAYERS - CUT)
    assert len(read) == len({p.data_ptr() for n, p in base.named_parameters() if ".lora_" not in n})
    assert "nothing below layer 2 is loaded: what enters it was filled ahead" in said.err
    assert "samples are left out" in said.out and f"layerpeft merge {home}/upper {home}/upper-merged" in said.out
    assert same(home / "upper", home / "whole") and losses(home / "upper") == losses(home / "whole")
    assert plain(home / "upper/adapter_config.json") == plain(home / "whole/adapter_config.json")
    but = ("files", "sha256", "checks")
    assert plain(home / "upper/layerpeft.json", but) == plain(home / "whole/layerpeft.json", but)

    ids = AutoTokenizer.from_pretrained(short_llama(LAYERS))("What is 1 and 1?", return_tensors="pt").input_ids
    logits = []
    for name in ("upper", "whole"):
        whole = AutoModelForCausalLM.from_pretrained(short_llama(LAYERS)).eval()
        with torch.no_grad():
            before = whole(input_ids=ids).logits
            logits.append(PeftModel.from_pretrained(whole, home / name).eval()(input_ids=ids).logits)
    assert torch.equal(*logits) and not torch.allclose(logits[0], before)


WAYS: dict[str, list[str]] = {
    "full": ["layerpeft={method: full, select: last:2}"],
    "galore": ["layerpeft={method: galore, select: last:2, r: 4, update_proj_gap: 2}"],
    "parts of layers": ["layerpeft.select={unit: sublayer, layers: [5, 6]}"],
    "packed rows": ["packing=true", "max_length=24"],
    "padding-free": ["padding_free=true", "max_length=null"],
    "accumulation": ["per_device_train_batch_size=1", "gradient_accumulation_steps=2"],
    "preferences": ["trainer=dpo", "columns={prompt: '{question}', chosen: '{answer}', rejected: 'no {answer}'}"],
    "classes": [
        "trainer=classification",
        "columns={text: '{question}', label: '{answer}'}",
        "eval_dataset=PLACE/known.jsonl",
    ],
}


MOVING = ("packed rows", "padding-free")  # texts stand among others in every epoch, which changes the order of sums


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_comes_to_what_it_does_with_the_whole_model(way, tmp_path, monkeypatch):
    said = [word.replace("PLACE", str(tmp_path)) for word in WAYS[way]]
    words = [*rows(tmp_path), *WORDS, f"layerpeft.prefix_cache={tmp_path}/states", *said]
    if said[0].startswith("layerpeft={"):
        words = [word for word in words if not word.startswith("layerpeft.")] + [
            f"layerpeft.prefix_cache={tmp_path}/states"
        ]
    assert main(["train", "quickstart", *words, f"output_dir={tmp_path}/whole"]) == 0
    recorded(tmp_path / "states", "quickstart", [*words, f"output_dir={tmp_path}/none"])
    found, real = [], upper.upper_part
    monkeypatch.setattr(train, "upper_part", lambda *a: found.append(real(*a)) or found[-1])
    assert main(["train", "quickstart", *words, f"output_dir={tmp_path}/upper"]) == 0
    assert found[0] is not None
    if way in MOVING:
        ours, theirs = tensors(tmp_path / "upper"), tensors(tmp_path / "whole")
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
        return
    assert same(tmp_path / "upper", tmp_path / "whole") and losses(tmp_path / "upper") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "eight bits"])
def test_what_prefill_has_filled_is_what_the_upper_part_trains_on(case, tmp_path, monkeypatch):
    if case == "nf4":
        pytest.importorskip("bitsandbytes")
    name, words = settings(case, tmp_path / "ahead")
    kept = [word.replace(str(tmp_path / "ahead"), str(tmp_path / "run")) for word in words if "output_dir" not in word]
    assert main(["train", name, *kept, f"output_dir={tmp_path}/whole"]) == 0
    assert main(["prefill", name, *words]) == 0
    found, real = [], upper.upper_part
    monkeypatch.setattr(train, "upper_part", lambda *a: found.append(real(*a)) or found[-1])
    assert main(["train", name, *words, f"output_dir={tmp_path}/upper"]) == 0
    assert found[0] is not None and same(tmp_path / "upper", tmp_path / "whole")
    assert losses(tmp_path / "upper") == losses(tmp_path / "whole")
    ours, theirs = (plain(tmp_path / side / "layerpeft.json") for side in ("upper", "whole"))
    assert ours["selection"] == theirs["selection"] and ours["report"] == theirs["report"]
    if case == "nf4":
        assert ours["quant"]["modules"] == theirs["quant"]["modules"]
        assert layerpeft.load(tmp_path / "upper") is not None


@pytest.mark.slow
def test_two_processes_train_the_upper_part(filled, tmp_path, monkeypatch):
    home, words = filled
    place = tmp_path / "ranks"
    for name, kept in (("whole", f"layerpeft.prefix_cache={place}/states"), ("upper", "sample_tokens=0")):
        (place / name).mkdir(parents=True)
        more = [kept, f"output_dir={place}/{name}/out", "per_device_train_batch_size=1"]
        codes, said = in_two(place / name, monkeypatch, "ddp", "train", "quickstart", *words, *more)
        assert codes == [0, 0], said[-4000:]
    assert same(place / "upper/out", place / "whole/out") and losses(place / "upper/out") == losses(place / "whole/out")


@pytest.mark.slow
def test_a_run_is_gone_on_with_from_its_checkpoint(filled):
    home, words = filled
    again = [*words, f"output_dir={home}/again", f"resume_from_checkpoint={home}/whole/checkpoint-2"]
    assert main(["train", "quickstart", *again]) == 0
    assert same(home / "again", home / "whole")


def test_a_row_that_was_not_filled_is_named_with_the_command_that_fills_it(filled, capsys):
    home, words = filled
    more = [word.replace("max_train_samples=3", "max_train_samples=4") for word in words]
    assert main(["train", "quickstart", *more, f"output_dir={home}/more"]) == 2
    said = capsys.readouterr().err
    assert "What is 4 and 4?" in said and f"layerpeft prefill quickstart dataset_name={home}/rows.jsonl" in said
    assert not (home / "more").exists() or not list((home / "more").iterdir())


def others(place: Path) -> Path:
    """The same model with another number in a layer below."""
    folder = shorten(place / "others", LAYERS)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ("layerpeft.select=last:1", "what enters layer 2 was filled"),
        ("model_name_or_path={}", "it was filled of other weights"),
        *map(
            repeated,
            [
                ("layerpeft.select={by: snr, keep: 2}", "snr measures all layers"),
                ("exits=[3, 4]", "exits is for all layers"),
                ("dtype=bfloat16", "dtype: 'float32' then, 'bfloat16' now"),
                ("layerpeft.prefix_cache={where: FOLDER, bits: 8}", "bits: None then, 8 now"),
            ],
        ),
    ],
)
def test_what_does_not_fit_has_the_whole_model_loaded_and_is_said(filled, changed, why, tmp_path, capsys, monkeypatch):
    home, words = filled
    monkeypatch.setenv("LAYERPEFT_QUIET", "")
    changed = changed.replace("FOLDER", f"{home}/states")
    changed = changed.format(others(tmp_path)) if "{}" in changed else changed

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_model", stop)
    main(["train", "quickstart", *words, changed, f"output_dir={home}/other"])
    assert why in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_what_was_filled_in_8_bits_is_trained_on_and_hardly_moves_the_loss(dtype, tmp_path, capsys):
    """The shipped model, three of its twelve layers, 24 steps, in which losses fall by more than a seventh."""
    words = ["max_train_samples=32", "max_eval_samples=16", "max_steps=-1", "num_train_epochs=3", "logging_steps=1"]
    words += ["per_device_train_batch_size=4", "eval_strategy=epoch", "learning_rate=1e-3", "sample_tokens=0"]
    words += ["layerpeft.select=last:3", f"dtype={dtype}"]
    assert main(["train", "quickstart", *words, f"output_dir={tmp_path}/whole"]) == 0
    kept = [f"layerpeft.prefix_cache={{where: {tmp_path}/states, bits: 8}}", f"output_dir={tmp_path}/halved"]
    assert main(["prefill", "quickstart", *words, *kept]) == 0
    assert main(["train", "quickstart", *words, *kept]) == 0
    assert "nothing below layer 9 was loaded" in capsys.readouterr().out
    ((_, found),) = all_ahead(tmp_path / "states")
    tokens, width = found.train.tokens + found.held_out.tokens, AutoConfig.from_pretrained(LLAMA).hidden_size
    assert sum(map(len, states_in(tmp_path / "states").values())) == tokens * (width + 4)
    whole, halved = losses(tmp_path / "whole"), losses(tmp_path / "halved")
    assert [step for step, *_ in halved] == [step for step, *_ in whole]
    moved = [abs(a - b) for one, other in zip(halved, whole) for a, b in zip(one[1:], other[1:]) if a is not None]
    mean, most = EIGHT_BITS[dtype]
    assert 0 < max(moved) < most and sum(moved) / len(moved) < mean and len(moved) > EIGHT_BITS_STEPS
    assert whole[-1][2] < (1 - FALLEN) * whole[0][2]

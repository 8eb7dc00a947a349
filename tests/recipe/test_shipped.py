"""Every shipped recipe, a few steps of it: what it trains moves and nothing else does, it loads in plain PEFT, it resumes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerpeft.recipe import shipped, trainer
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.train import run
from tests.helpers.processes import ROOT, without_the_package
from tests.helpers.repeating import some
from tests.helpers.tiny import EMBEDDINGS, STEPS, TASKS, TINY, TRL
from tests.helpers.training import plain

PLAIN = """
import json, sys; sys.modules["layerpeft"] = None
import peft, safetensors.torch, torch, transformers
folder, base, labels, ids, more = sys.argv[1:]
options = json.loads(more) | ({"num_labels": int(labels)} if int(labels) else {})
kind = transformers.AutoModelForSequenceClassification if int(labels) else transformers.AutoModelForCausalLM
model = peft.PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32, **options), folder).eval()
held, wanted = peft.get_peft_model_state_dict(model), safetensors.torch.load_file(folder + "/adapter_model.safetensors")
assert set(held) == set(wanted) and all(torch.equal(held[n], wanted[n].to(held[n].dtype)) for n in wanted)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, ids)
"""
IDS = torch.arange(100, 124)[None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shallow: None) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def trained(name: str, *settings: str) -> tuple[Any, dict[str, torch.Tensor], Any, list[str]]:
    """A model, its tensors from before training, what came of it, and what was said."""
    held: list[Any] = []
    said: list[str] = []
    make = trainer.make_trainer

    def kept(setup: Any, model: Any, **changes: Any) -> Any:
        held[:] = model, {of_base(n): p.detach().clone() for n, p in tensors(model)}
        return make(setup, model, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerpeft.recipe.train.make_trainer", kept)
        result = run(load_recipe(name, [*TINY[name].settings, *settings]), said.append)
    return held[0], held[1], result, said


def of_base(name: str) -> str:
    return plain(name).replace(".original_module", "").replace(".modules_to_save.default", "")


def tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


def moved(folder: Path, base: dict[str, torch.Tensor]) -> set[str]:
    """The modules of a saved adapter that do something: an update that is not zero, or tensors all other than the base's."""
    same = set()
    saved = {n.removeprefix("base_model.model."): t for n, t in load_file(folder / "adapter_model.safetensors").items()}
    found = {n.rpartition(".lora_B.bias")[0] for n, t in saved.items() if n.endswith(".lora_B.bias") and t.any()}
    for name, tensor in saved.items():
        if name.endswith(".lora_B.weight"):
            update = tensor @ saved[name.replace("lora_B", "lora_A")]
            found |= {name.removesuffix(".lora_B.weight")} if update.any() else set()
        elif name.endswith(".lora_magnitude_vector"):
            module = name.removesuffix(".lora_magnitude_vector")
            (same if torch.equal(tensor, base[f"{module}.weight"].norm(dim=1)) else found).add(module)
        elif name.endswith(".base_layer.bias"):
            (found if tensor.any() else same).add(name.removesuffix(".base_layer.bias"))
        elif ".lora_" not in name:
            (same if torch.equal(tensor, base[name].to(tensor.dtype)) else found).add(name.rpartition(".")[0])
    return found - same


def wanted(record: dict[str, Any], before: dict[str, torch.Tensor]) -> set[str]:
    """The modules that a run's record says have trained."""
    steps = {row["name"]: row["steps"] for row in record["report"]}
    assert any(steps.values()) and all(row["chosen"] for row in record["report"] if row["steps"])
    targets = record["selection"]["targets"]
    if "schedule" in record:  # the others are of the pool
        targets = [t for t in targets if any(f"{t}.".startswith(f"{name}.") for name, n in steps.items() if n)]
    inside = {target.split(".head_")[0] for target in targets}
    return inside | modules_to_save(record, before) | set(record["new_tensors"])


def modules_to_save(record: dict[str, Any], before: dict[str, torch.Tensor]) -> set[str]:
    named = tuple(f".{name}" for name in record["config"].get("modules_to_save") or ())
    return {m for m in (name.rpartition(".")[0] for name in before) if f".{m}".endswith(named or "?")}


def test_each_shipped_recipe_has_a_tiny_variant_and_stands_in_the_tables() -> None:
    assert sorted([*TINY, *TASKS, *TRL, *EMBEDDINGS]) == sorted(shipped.recipes())
    methods, listed = ((ROOT / page).read_text(encoding="utf-8") for page in ("docs/methods.md", "recipes/README.md"))
    assert sorted(re.findall(r"\[`(\w+)`\]\(\.\./recipes/\1\.yaml\)", methods)) == sorted(TINY)
    assert sorted(re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:word|classes)", listed, re.M)) == sorted(TINY)
    assert set(re.findall(r"^\| `(\w+)` \| `trainer: \w+` \|", listed, re.M)) == {*TASKS, *TRL, *EMBEDDINGS}
    rows = [line.split(" | ") for line in methods.splitlines() if "/recipes/" in line and line.startswith("| ")]
    assert all(len(row) == 4 and all(cell.strip(" |") for cell in row) for row in rows)


def test_what_a_recipe_says_to_change_can_be_changed() -> None:
    tried = 0
    for name, path in shipped.recipes().items():
        said = "".join(line[2:].rstrip("\n\\") + " " for line in path.open(encoding="utf-8") if line.startswith("# "))
        commands = [shlex.split(c) for c in re.findall(rf"  layerpeft train {name} ((?: *[\w.]+=\S+)+)", said)]
        for settings in [*commands, *([s] for s in re.findall(r"`(layerpeft[\w.]*=[^`]+)`", said))]:
            load_recipe(name, settings)
            tried += 1
    assert tried >= 3


@pytest.mark.parametrize("name", some(TINY, [name for name, tiny in TINY.items() if tiny.quick]))
def test_a_shipped_recipe_trains_what_it_names_loads_in_plain_peft_and_resumes(name: str, place: Path) -> None:
    whole = place / "whole"
    model, before, result, said = trained(name, f"output_dir={whole}")
    with torch.no_grad():
        ours = model.eval()(input_ids=IDS).logits
    if name == "lora":  # of all layers: the adapter is plain PEFT's, of which no record is kept
        assert not (whole / "layerpeft.json").exists()
        linears = {
            n.removesuffix(".weight")
            for n, p in before.items()
            if ".layers." in n and ".lora_" not in n and p.dim() > 1
        }
        assert moved(whole, before) == linears
        assert {n for n, t in tensors(model.unload()) if not torch.equal(t, before[n])} == set()
        torch.save(IDS, place / "ids")
        home = json.loads((whole / "adapter_config.json").read_text())["base_model_name_or_path"]
        there = without_the_package(PLAIN, whole, home, 0, place / "ids", TINY[name].base)
        assert there.returncode == 0, there.stderr
        torch.testing.assert_close(torch.load(place / "ids"), ours.float(), atol=1e-5, rtol=1e-6)
        return resumes(name, whole, place / "again")
    record = json.loads((whole / "layerpeft.json").read_text())
    assert all(row.steps <= STEPS for row in result.report.rows) and record["checks"]["end"].startswith("every chosen")
    assert any(line.startswith(("held-out loss: ", "accuracy: ")) for line in said)

    # it trained what it names, and nothing else
    assert moved(whole, before) == wanted(record, before)
    originals = {
        of_base(n): t for n, t in tensors(model) if ".original_module." in n
    }  # which stock PEFT unloads as trained
    base = {n: t for n, t in tensors(model.unload()) if n.rpartition(".")[0] not in record["new_tensors"]} | originals
    assert base and {n for n, t in base.items() if not torch.equal(t, before[n])} == set()

    # plain PEFT holds the same adapter, and computes the same where it has the same base
    torch.save(IDS, place / "ids")
    home, labels = record["config"]["base_model_name_or_path"], len((record["head"] or {}).get("id2label", ()))
    there = without_the_package(PLAIN, whole, home, labels, place / "ids", TINY[name].base)
    assert there.returncode == 0, there.stderr
    if not record.get("quant"):
        torch.testing.assert_close(torch.load(place / "ids"), ours.float(), atol=1e-5, rtol=1e-6)

    resumes(name, whole, place / "again")


def resumes(name: str, whole: Path, again: Path, *settings: str) -> None:
    """Cut off after a step, it comes to the same end."""
    shutil.copytree(whole / "checkpoint-1", again / "checkpoint-1")
    trained(name, f"output_dir={again}", "resume_from_checkpoint=true", *settings)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, again)]
    assert weights[0].keys() == weights[1].keys()
    assert {n for n, t in weights[0].items() if not torch.equal(t, weights[1][n])} == set()
    if not (whole / "layerpeft.json").exists():
        return
    records = [json.loads((folder / "layerpeft.json").read_text()) for folder in (whole, again)]
    assert all(records[0].get(part) == records[1].get(part) for part in ("selection", "schedule", "config"))


@pytest.mark.slow
@pytest.mark.parametrize("soft", ["ranks=by_score", "layer_lr=by_score"])
def test_what_goes_by_score_resumes_by_the_scores_on_record(soft: str, place: Path) -> None:
    trained("quickstart", "output_dir=whole", f"layerpeft.{soft}")
    resumes("quickstart", Path("whole"), Path("again"), f"layerpeft.{soft}")

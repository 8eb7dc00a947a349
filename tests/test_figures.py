"""Every measured figure of a page is that of the result that it comes from, rounded: one that drifts fails."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kinds.rewards import earned
from benchmarks.model import SHAPES
from layerpeft import LayerLoraConfig, layer_map
from layerpeft.model.costs import Load, costs_of
from layerpeft.recipe.comparing.names import group_of
from layerpeft.recipe.comparing.runs import Run
from layerpeft.recipe.comparing.verdict import Basis, judge, judge_arms, standings
from layerpeft.recipe.tasks.metrics import NAMES
from layerpeft.recipe.yaml import parse
from layerpeft.text import ranges, size_text
from layerpeft.training.prefix import entries
from tests.helpers import bounds
from tests.helpers.figures import RESULTS, result, section, span, table, untied

METHODS = RESULTS.parent / "methods"
COMPARED = [("memory", METHODS), ("time", METHODS), ("parameters", METHODS)]
COMPARED += [("quickstart_compare", RESULTS), ("lofit_compare", RESULTS)]


def ratio(name: str, arm: str, to: str, count: str) -> float:
    arms = result(name)["arms"]
    return float(arms[arm]["counts"][count] / arms[to]["counts"][count])


def small(number: float) -> str:
    """As a page writes it: 1e-3."""
    return f"{number:.0e}".replace("e-0", "e-")


def test_what_has_drifted_is_found() -> None:
    text = "A step takes **0.53** of it\n([all](../x9.json)), of 12 layers.\n\n```bash\nrun --of 7\n```\n"
    assert untied(text, ["takes 0.53 of it"], ["of 12 layers"]) == []
    assert untied(text, ["takes 0.54 of it"], ["of 12 layers"])[0] == "not there: takes 0.54 of it"
    assert "0.53" in untied(text, [], ["of 12 layers"])[0] and "12" in untied(text, ["takes 0.53 of it"])[0]
    assert table(["a", "b"], [["1", ""]]) == "| a | b |\n|---|---|\n| 1 | |\n" and span([3, 1, None]) == "1 to 3"


# ---- comparisons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "folder"), COMPARED, ids=[name for name, _ in COMPARED])
def test_verdicts_are_those_that_the_runs_get_now(name: str, folder: Any) -> None:
    """So that a result says no more of its runs than a comparison would today."""
    found = result(name, folder)
    runs = [Run(**{**run, "layers": tuple(run["layers"])}) for run in found["runs"]]
    basis = Basis(len({run.seed for run in runs}), parse(found["recipe"]).data["max_eval_samples"])
    lower, stand = found["measure"] == "eval_loss", standings(runs, found["measure"] == "eval_loss", basis.scant)
    wanted = {"basis": basis, "verdict": judge(runs, lower, NAMES[found["measure"]], basis, "arms" not in found)}
    if "arms" in found:
        wanted["arms"] = judge_arms(stand, basis, lower)
        assert found["standings"] == [asdict(one) for one in stand]
    assert {key: found[key] for key in wanted} == {key: asdict(value) for key, value in wanted.items()}


def methods(found: dict[str, Any]) -> str:
    """The table of arms at an equal budget."""
    rows = []
    for one in found["standings"]:
        given = [g for arm, g in found["given"].items() if group_of(arm) == one["arm"]]
        steps = [run["steps"] for run in found["runs"] if group_of(run["arm"]) == one["arm"]]
        value, gain = one["value"], one["gain"]
        star = " *" if one["kind"] in ("better", "worse") else ""
        rows.append([
            one["arm"], span(g["count"] for g in given), span(g["rank"] for g in given), span(steps),
            span(g["parameters"] for g in given), span((g["peak_bytes"] / 2**20 for g in given), "{:.0f}"),
            span((100 * g["share"] for g in given), "{:.0f} %"), f"{value['mean']:.3f} ± {value['margin']:.3f}",
            f"{gain['mean']:+.3f} ± {gain['margin']:.3f}{star}" if gain else "",
        ])  # fmt: skip
    return table(["arm", "layers", "rank", "steps", "trainable", "MiB", "of budget", "held-out loss", "gain"], rows)


@pytest.mark.parametrize("kind", ["memory", "time", "parameters"])
def test_the_page_of_comparisons_shows_their_results(kind: str) -> None:
    found = result(kind, METHODS)
    room = {"memory": "{:.0f} MiB", "time": "{:.3g} operations", "parameters": "{:,.0f}"}[kind]
    room = room.format(found["room"] / (2**20 if kind == "memory" else 1))
    head = f"({room}; held-out loss {found['before']:.3f} before; [all runs]"
    made = [head, methods(found), found["arms"]["sentence"], found["verdict"]["sentence"]]
    assert untied(section("docs/compare.md", f"At equal {kind} ", until="![Held-out"), made) == []


def told(run: dict[str, Any], layers: Callable[[Sequence[int]], str]) -> list[str]:
    """A run in a line of the page."""
    return [layers(run["layers"]).replace("-", "–"), f"{run['value']:.3f}", f"{run['seconds']:.0f}"]


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def test_what_is_said_of_a_choice_beside_others_is_what_compare_found() -> None:
    found = result("quickstart_compare")
    runs = {run["arm"]: run for run in found["runs"]}
    draws = [run for arm, run in runs.items() if group_of(arm) == "random"]
    norm, last, every = runs["gradient_norm"], runs["last:3"], runs["all"]
    rows = [
        ["gradient norm, within three quarters of the time", *told(norm, ranges)],
        ["random, three draws", *map(" · ".join, zip(*(told(run, listed) for run in draws), strict=True))],
        ["last 3", *told(last, ranges)],
        ["all", *told(every, ranges)],
    ]
    head = ["arm", "layers", f"held-out loss ({found['before']:.3f} before)", "seconds"]
    command = "`layerpeft compare quickstart --arms random:3,last:3,all`"
    made = [command, table(head, rows)]
    assert untied(section("docs/measured.md", "## A choice beside others"), made) == []
    assert found["case"]["compare_with"] in command
    assert found["verdict"]["sentence"].startswith("Random was better here") and found["verdict"]["kind"] == "worse"
    said = section("docs/saving.md", "# What comes out", until="layer  name")
    assert f"held-out loss: {found['before']:.4f} before, {norm['value']:.4f} after" in said


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_the_cut_of_the_backward_pass_is_that_of_the_trainer_and_of_the_loop() -> None:
    time, cut = result("trl_sft")["arms"]["layerpeft"]["time"], ratio("trl_sft", "layerpeft", "peft_layers", "flops")
    assert ratio("backward_cut", "layerpeft", "torch_lora", "peak_bytes") <= 1.05
    both = f"{cut:.2f} times the operations and {time['median']:.2f} times the step time"
    made = [
        f"{cut:.2f} times the floating-point operations and {time['median']:.2f} times the step time "
        f"({time['lower']:.2f} to {time['upper']:.2f})",
        "peak bytes within 5 %",
    ]
    assert untied(section("docs/measured.md", "## The backward cut"), made, ["the last 3 of 12 layers"]) == []
    assert untied(section("docs/measured.md", "## What is promised"), [both], ["the last 3 of 12 layers"]) == []


def test_what_projection_costs_and_learns_is_what_was_measured() -> None:
    arms, refresh = result("projection")["arms"], result("refresh")["arms"]
    ours, theirs, over = arms["layerpeft_galore"], arms["galore_linears"], result("learning")["arms"]["sketch"]["over"]
    worst = ours["worst_kept_bytes"] / theirs["worst_kept_bytes"]
    kept = ratio("projection", "layerpeft_galore", "galore_linears", "kept_bytes")
    gradients = ratio("projection", "layerpeft_galore", "galore_linears", "gradient_bytes")
    made = [
        f"{kept:.2f} times the bytes kept for the backward pass ({worst:.2f} on the worst step of a period)",
        f"{gradients:.2f} times the gradients, {ours['time']['median']:.2f} times the step time",
        f"costs {refresh['sketch']['refresh']['median']:.1f} ordinary steps",
        f"theirs {refresh['galore_linears']['refresh']['median']:.1f}",
        f"by {over['svd']:.3f} of what exact SVDs reach, and {over['galore_torch']:.3f} of the reference",
    ]
    said = ["(12 layers, width 512, rank 64, after two folds)", "width 2,048", "300 steps and three seeds", "GSM8K"]
    assert untied(section("docs/measured.md", "## Gradient projection"), made, said) == []


def test_what_parts_projection_from_its_reference_is_what_was_measured() -> None:
    found = result("galore_reference")
    case, shares = found["case"], [f"{row['difference'] / row['movement']:.2g}" for row in found["breaks"].values()]
    apart = " to ".join(small(end([row["difference"] for row in found["equal"].values()])) for end in (min, max))
    moved = min(row["movement"] for row in found["equal"].values())
    why = [
        "weight decay 0.1: here it decays `B`, there `W`",
        "eps 1e-6: torch adds it after the bias correction, the reference before",
        "clipping at 1e-3, with that eps: here by the norm of the projected gradient, there by that of the full one",
        '`basis="aligned"`',
        "`stagger=True`",
        '`subspace="sketch"`, which serves from the step after the one it was taken in',
    ]
    assert list(case["breaks"].values()) == [
        {"weight_decay": 0.1},
        {"eps": 1e-6},
        {"clip": 1e-3, "eps": 1e-6},
        {"basis": "aligned"},
        {"stagger": True},
        {"subspace": "sketch"},
    ]
    made = [
        table(["what", "by"], zip(why, shares, strict=True)),
        f"over {case['steps']} steps with five refreshes",
        f"after {case['parting_steps']} steps and two refreshes",
        f"is {apart}, after movements of {moved:.2f} or more, for {', '.join(f'`{s}`' for s in case['proj_types'][:-1])} and",
    ]
    said = ["`galore-torch` 1.0", "AdamW with eps 1e-14 on both sides", "to 1e-2 of the movement", "weights in float64"]
    said.append("a float32 and a float64 SVD")  # and how near these come: tests/tuners/galore/test_galore_reference.py
    assert found["provenance"]["versions"]["galore-torch"] == "1.0" and case["steps"] == 5 * case["gap"]
    assert untied(section("docs/projection.md", "## What equals the reference, and what breaks it"), made, said) == []


def test_later_epochs_and_scoring_cost_what_was_measured() -> None:
    arms, scan = result("prefix")["arms"], result("scan")
    kept, whole, without = arms["layerpeft_cached"], arms["peft_all"], arms["layerpeft"]
    first = kept["first_epoch"]["median"] / without["first_epoch"]["median"]
    time = kept["time"]
    made = [
        f"takes {time['median']:.2f} ({time['lower']:.2f} to {time['upper']:.2f}) of that of plain PEFT on the same layers, "
        f"{time['median'] / whole['time']['median']:.2f} of that of plain PEFT on all layers, and "
        f"{ratio('prefix', 'layerpeft_cached', 'peft_layers', 'flops'):.2f} of the operations; a first epoch {first:.2f} of that",
    ]
    said = ["(12 layers, width 512, LoRA on the last 3)"]
    shown = section("docs/prefix.md", "Ten rounds of TRL's SFTTrainer", until="\n\n")
    assert result("prefix")["case"]["rounds"] == 10 and untied(shown, made, said) == []
    made = [
        f"{scan['scan']['probe']['time']['median']:.2f} times a rank-8 LoRA forward and backward pass",
        f"within {100 * scan['errors']['max']:.1f} % of the exact one",
    ]
    said = [f"{scan['errors']['seeds']} seeds, one thread"]
    assert untied(section("docs/layers.md", "Scoring works on", until="\n\n"), made, [*said, "4-bit and 8-bit"]) == []


def test_what_is_said_of_kept_states_is_what_tests_hold() -> None:
    """Slow tests measure these anew each time; a page names the bound that they are held to, and nothing nearer."""
    (mean, most), (half_mean, half_most) = (map(small, bounds.EIGHT_BITS[name]) for name in ("float32", "bfloat16"))
    near, fallen = f"{100 * bounds.PLANNED:.0f} %", f"{100 * bounds.FALLEN:.0f} %"
    shown = [
        (
            "In 8 bits losses move a little:",
            [
                f"trained for {bounds.EIGHT_BITS_STEPS} steps, in which the held-out loss falls by more than {fallen}, by less "
                f"than {mean} in the mean and {most} at most in float32, and by less than {half_mean} and {half_most} in",
            ],
            [],
        ),
        (
            "dropped. Weights that are read as they are",
            [f"filling takes less than {bounds.FILLING / 1e6:.0f} MB above one layer", "16 layers (2 GB in float32)"],
            ["rows of 64 tokens"],
        ),
        ("Where a text stands in other padding,", [f"by less than {small(bounds.OTHER_PADDING)} in float32"], []),
        (
            "To free the room at once,",
            [f"takes {entries.SIZE} bytes beside its state", "16 bytes of memory for a row"],
            [],
        ),
        (
            "Of the checkpoint of 2 GB, read as",
            [f"to within {near}", "two rows of 256 tokens", "top 4 of 16 layers"],
            ["MALLOC_MMAP_THRESHOLD_=65536"],
        ),
    ]
    for begins, made, said in shown:
        assert untied(section("docs/prefix.md", begins, until="\n\n"), made, said) == [], begins
    assert untied(section("docs/trainers.md", "Measured against `generate` of", until="\n\n"), [f"within {near}"]) == []


def test_what_rewards_teach_is_what_was_measured() -> None:
    found = result("rewards")
    runs, window = found["runs"], found["case"]["window"]
    head = ["recipe", "seed", f"first {window} steps", f"last {window} steps", "z"]
    rows = [
        [f"`{run['recipe']}`", str(run["seed"]), f"{run['first']:.2f}", f"{run['last']:.2f}", f"{run['z']:.1f}"]
        for run in runs
    ]
    right = [100 * run["right"] for run in runs if run["right"] is not None]
    made = [
        table(head, rows),
        f"over the first and the last {window} of the {len(runs[0]['rewards'])} steps",
        f"in the last {window} steps of `grpo` and `rloo`, {min(right):.0f} to {max(right):.1f} of 100 are right",
    ]
    said = [
        "a model of 6 M parameters",
        "up to 0.5 for a number, halved by every 12 letters",
        "adds 1 for that",
        "have 8 tokens",
    ]
    assert {len(run["rewards"]) for run in runs} == {30}
    shown = section("docs/trainers.md", "The rewards that ship, `gsm8k_rewards.py`,", until="\n## ")
    assert untied(shown, made, said) == []
    for run in runs:  # as they are made of the rewards of the steps
        again = earned([{"reward": reward} for reward in run["rewards"]], window)
        assert all(run[name] == pytest.approx(again[name], rel=1e-2, abs=1e-4) for name in ("first", "last", "z"))
    assert earned([{"objective/scores": x} for x in (0.0, 2.0, 4.0, 6.0)], 2)["z"] == pytest.approx(
        4 / 2**0.5, abs=1e-3
    )


def test_what_embeddings_learn_is_what_was_measured() -> None:
    (run,) = result("embeddings")["results"]["as it ships"]["runs"]
    made = f"recall at 1 goes from {run['before']:.2f} to {run['after']:.2f}"
    assert made in section("docs/tasks.md", "## Embeddings", until="`trainer: embeddings` trains")


def test_sets_of_layers_cost_what_the_page_says() -> None:
    """As a benchmark counted them, and of a large shape as they are counted now."""
    runs = {tuple(run["layers"]): run["step_operations"] for one in result("sets")["runs"].values() for run in one}
    made = [f"takes {runs[0, 10, 11] / runs[9, 10, 11]:.1f} times the operations of as many layers at the top"]
    shown = section("docs/costs.md", "A layer near the input is dear:", until="\n\n")
    assert untied(shown, made, ["that holds layer 0"]) == []
    shape = SHAPES["llama-2-7b"]
    heads = {"num_attention_heads": shape["heads"][0], "num_hidden_layers": shape["num_hidden_layers"]}
    sizes = {key: shape[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    config, layers = LayerLoraConfig(r=16, target_modules="all-linear"), layer_map(model)
    costs = costs_of(model, layers, config.targets_in(model, layers), Load(1, 512, False), config.works_by.work(config))
    whole = costs.of(range(32))
    once, later, three = (replace(costs, whole=w).of(range(24, 32)) / whole for w in (1.0, 0.0, 1 / 3))
    made = [
        f"the last 8 of 32 layers take {once:.2f} of the operations of all in a whole pass, {later:.2f} in one that begins there, "
        f"{three:.2f} in the mean of three epochs"
    ]
    shown = section("docs/costs.md", "Sets near the output become cheaper still:", until="Where nothing")
    assert untied(shown, made, ["Llama 2 7B", "rows of 512 tokens"]) == []


# ---- bits -----------------------------------------------------------------------------------------------------------


def test_loading_takes_what_was_measured() -> None:
    found, rows = result("loading"), []
    for kind in ("nf4", "int8"):
        ways = {r["way"]: r for r in found["rows"] if (r["precision"], r["type"]) == (kind, "bfloat16")}
        peaks = [f"{ways[way]['peak'] / 1e6:,.0f} MB" for way in ("load_quantized", "in_place", "transformers")]
        rows.append([kind, f"{ways['load_quantized']['packed'] / 1e6:,.0f} MB", *peaks])
    head = ["into", "weights then", "peak of `load_model`", "loaded, then packed in place"]
    case = found["case"]
    made = [
        table([*head, "transformers with a `BitsAndBytesConfig`"], rows),
        f"of {case['layers']} layers, width {case['hidden_size']:,} ({found['checkpoint_bytes'] / 1e9:.2f} GB in bfloat16, "
        f"a layer is {found['layer_bytes'] / 1e6:.0f} MB)",
    ]
    assert untied(section("docs/quantization.md", "**Loading**", until="**Bits where"), made) == []


def perplexities(of: dict[str, Any], name: str) -> list[float]:
    """Of both texts together, one for each row that is called so, or so and by its seed."""
    rows = [row for key, row in of["rows"].items() if key == name or key.startswith(f"{name}, seed ")]
    return [math.exp(statistics.fmean(row["loss"].values())) for row in rows]


def test_bits_where_they_matter_are_those_that_were_measured() -> None:
    """Also that a choice `is uniform` where it is marked so, and which are the best of their column."""
    found, case = result("bits"), result("bits")["case"]
    columns = [("layer", "hqq3"), ("module", "hqq3"), ("module", "3.0"), ("module", "nf4")]
    shares = [found["found"][unit][bits] for unit, bits in columns]
    wanted = {
        "uniform": "uniform", "random": "random scores", "`objective: kl`, greedy": "kl", "`objective: kl`, paired": "kl, paired",
        "`quantization_error`, `activations: true`": "quantization_error, inputs", "`quantization_error`": "quantization_error",
        "`outliers`": "outliers",
    }  # fmt: skip

    def cell(share: dict[str, Any], name: str) -> str:
        values = perplexities(share, name)
        if name == "random scores":
            return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
        (value,) = values or [0.0]
        same = name != "uniform" and value and perplexities(share, "uniform") == [value]
        return (f"{value:.2f}" + (" (is uniform)" if same else "")) if value else "–"

    rows = [[label, *(cell(share, name) for share in shares)] for label, name in wanted.items()]
    rows.append(
        ["`entropy`; `depth`", "; ".join(cell(shares[0], name) for name in ("entropy", "depth")), "–", "–", "–"]
    )
    head = [
        "at the same bytes",
        "per layer, 3.7 bits",
        "per module, 3.7 bits",
        "per module, 3.0 bits",
        "per module, 4.5 bits",
    ]
    tokens = 2 * case["rows"]["calibration"] * case["rows"]["length"]
    whole = math.exp(statistics.fmean(found["as_it_is"]["loss"].values()))
    held = sum(found["held_out_tokens"].values())
    made = [table(head, rows), f"{held:,} held-out tokens ({whole:.2f} unrounded)", f"sample of {tokens:,} tokens"]
    shown = section("docs/quantization.md", "**Bits where they matter.**", until="**Training over it")
    assert untied(shown, made, ["try `objective: kl` first"]) == []
    for name in ("kl", "quantization_error, inputs"):
        for share in (*shares[:2], shares[3]) if name == "kl" else shares[:2]:
            assert max(perplexities(share, name)) <= min(
                [*perplexities(share, "uniform"), *perplexities(share, "random scores")]
            )


def test_training_over_packed_layers_gave_what_was_measured() -> None:
    found = result("frozen_nf4")["results"]
    names = {"all layers": "all twelve layers", "own weights in": "own weights instead, in"}
    rows = []
    for arm, one in found.items():
        for old, new in names.items():
            arm = arm.replace(old, new)
        (run,) = one["runs"]
        rows.append([arm, f"{run['weight_bytes'] / 2**20:.1f} MiB", f"{run['after']:.3f}"])
    before = [run["before"] for one in found.values() for run in one["runs"]]
    made = [table(["LoRA of rank 16 on", "all weights", "held-out loss"], rows), f"({span(before, '{:.2f}')} before)"]
    said = ["300 steps", "on 200 rows", "GSM8K"]
    assert "max_eval_samples=200" in result("frozen_nf4")["case"]["common"]
    assert untied(section("docs/quantization.md", "**Training over it.**", until="**Llama-2-7B"), made, said) == []


def large() -> str:
    """The table of what packing and the cut came to on an accelerator."""
    arms = result("llama2_7b_nf4")["arms"]
    names = {
        "qlora": "LoRA of rank 16 on all layers, all nf4 (QLoRA)", "layerpeft": "LoRA of rank 16 on the last 8, all bf16",
        "layerpeft_nf4": "LoRA of rank 16 on the last 8 in bf16, the rest nf4",
        "layerpeft_galore_nf4": "projection of rank 128 on the last 8 in bf16, the rest nf4",
    }  # fmt: skip
    flops, rows = arms["qlora"]["counts"]["flops"], []
    for arm, name in names.items():
        one, counts = arms[arm], arms[arm]["counts"]
        sizes = [counts["weight_bytes"], counts["together_bytes"], one["accelerator_peak_bytes"]]
        ratios = [counts["flops"] / flops, one["time"]["median"]]
        rows.append([name, *map(size_text, sizes), *("1" if arm == "qlora" else f"{r:.2f}" for r in ratios)])
    return table(["what trains", "weights", "counted in all", "allocator's peak", "operations", "step time"], rows)


def test_what_a_large_model_takes_is_what_was_measured() -> None:
    case = result("llama2_7b_nf4")["case"]
    assert case["batch"] == {"rows": 16, "length": 512} and case["setting"] == "checkpointed"
    shown = section("docs/quantization.md", "**Llama-2-7B's shape on an accelerator**")
    assert untied(shown, [large()], ["NVIDIA H200", "bf16; 16 rows of 512 tokens"]) == []

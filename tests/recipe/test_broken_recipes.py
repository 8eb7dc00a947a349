"""Recipes that cannot run: each is answered with one readable message and exit code 2, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from layerpeft.cli import main
from layerpeft.integrations import hub
from tests.helpers.processes import in_a_process

pytestmark = pytest.mark.usefixtures("shallow")

HEAD = """\
trainer: sft
model_name_or_path: layerpeft://llama-6m
dataset_name: layerpeft://gsm8k_train.jsonl
eval_dataset: layerpeft://gsm8k_eval.jsonl
columns: {prompt: "{question}", completion: "{answer}"}
output_dir: out
"""
BLOCK = "layerpeft: {method: lora, select: last:2, r: 4}\n"
GOOD = HEAD + BLOCK
LONG = """\
columns:
  prompt: "{question}"
  completion: "{answer}"
"""
CLASSES = """\
trainer: classification
model_name_or_path: layerpeft://llama-6m
dataset_name: layerpeft://revision_train.jsonl
columns: {text: "{before}", label: "{label}"}
output_dir: out
"""


def block(text: str) -> str:
    return HEAD + f"layerpeft: {{{text}}}\n"


def without(key: str) -> str:
    return "".join(line for line in GOOD.splitlines(keepends=True) if not line.startswith(key + ":"))


# id: (text of the recipe, fragments that the message must hold)
BROKEN: dict[str, tuple[str, list[str]]] = {
    # the text
    "empty": ("", ["empty"]),
    "only_comments": ("# nothing\n", ["empty"]),
    "a_list": ("- trainer: sft\n", ["key: value", "a list"]),
    "a_word": ("quickstart\n", ["key: value", "single value"]),
    "a_tab": ("trainer: sft\nlayerpeft:\n\tselect: last:2\n", ["line 3", "tab"]),
    "two_documents": (GOOD + "---\n" + GOOD, ["line 8", "second document"]),
    "open_bracket": (GOOD + "report_to: [none\n", ["not readable as YAML"]),
    "second_colon": ("trainer: sft: classification\n", ["line 1", "second `:`"]),
    "unknown_alias": (GOOD + "run_name: *nobody\n", ["line 8", "undefined alias", "nobody"]),
    "self_alias": (GOOD + "model_init_kwargs: &a {b: *a}\n", ["line 8", "alias", "holds itself"]),
    "python_tag": (GOOD + "run_name: !!python/object/apply:os.getcwd []\n", ["line 8", "tag", "not understood"]),
    "twice": (GOOD + "seed: 1\nlearning_rate: 1e-4\nseed: 2\n", ["line 10", "'seed' is written twice", "line 8"]),
    "twice_inside": (
        HEAD + "layerpeft:\n  select: last:2\n  r: 4\n  r: 8\n",
        ["line 10", "'r' is written twice", "line 9"],
    ),
    # keys
    "typo": (GOOD + "learning_rte: 1e-4\n", ["line 8", "'learning_rte'", "Did you mean 'learning_rate'?", "Allowed:"]),
    "nonsense": (GOOD + "zzzz: 1\n", ["line 8", "unknown key 'zzzz'", "every field of SFTConfig"]),
    "no_trainer": (without("trainer"), ["trainer: missing", "sft, classification"]),
    "other_trainer": (GOOD.replace("sft", "ppo", 1), ["line 1", "trainer", "sft, classification", "'ppo'"]),
    "no_model": (without("model_name_or_path"), ["model_name_or_path: missing"]),
    "no_data": (without("dataset_name"), ["dataset_name: missing"]),
    "no_output": (without("output_dir"), ["output_dir: missing"]),
    "no_block": (HEAD, ["layerpeft: missing", "select"]),
    "block_is_text": (HEAD + "layerpeft: lora\n", ["line 7", "layerpeft", "a mapping", "'lora'"]),
    "block_key_above": (GOOD + "r: 8\n", ["line 8", "belongs in the block", "layerpeft: {r: 8}"]),
    "select_above": (GOOD + "select: last:2\n", ["line 8", "layerpeft: {select: last:2}"]),
    "top_key_in_block": (block("select: last:2, learning_rate: 1e-4"), ["line 7", "learning_rate", "top level"]),
    "block_typo": (block("select: last:2, lora_alhpa: 8"), ["line 7", "Did you mean 'lora_alpha'?"]),
    "block_rank": (block("select: last:2, rank: 8"), ["line 7", "'rank'", "Did you mean 'r'?"]),
    "sft_key_for_classes": (CLASSES + BLOCK + "packing: true\n", ["line 7", "packing", "trainer: sft"]),
    "do_train": (GOOD + "do_train: true\n", ["line 8", "do_train", "take the key out"]),
    "task_type": (block("select: last:2, task_type: SEQ_CLS"), ["line 7", "task_type", "`trainer`"]),
    # types and values
    "off_for_false": (GOOD + "bf16: off\n", ["line 8", "bf16", "true or false", "'off'", "write `false`"]),
    "unset_wrongly": (
        GOOD + "max_steps: -3\n",
        ["line 8", "max_steps: expected at least 1 (or -1, which leaves it open), got -3"],
    ),
    "negative": (GOOD + "warmup_steps: -1\nlogging_steps: 0\n", ["2 problems", "line 8: warmup", "line 9: logging"]),
    "leading_zero": (GOOD + "max_steps: 010\n", ["line 8", "max_steps", "whole number", "write 10"]),
    "quoted_number": (GOOD + 'learning_rate: "1e-4"\n', ["line 8", "learning_rate", "a number", "quotes"]),
    "decimal_comma": (GOOD + "learning_rate: 0,1\n", ["line 8", "learning_rate", "0.1"]),
    "fraction_of_steps": (GOOD + "max_steps: 10.0\n", ["line 8", "max_steps", "write 10"]),
    "number_for_text": (GOOD + "run_name: 7\n", ["line 8", "run_name", "expected text", "quotes: '7'"]),
    "bool_for_number": (GOOD + "seed: true\n", ["line 8", "seed", "whole number", "true"]),
    "infinite": (GOOD + "learning_rate: .inf\n", ["line 8", "learning_rate", "a number", "inf"]),
    "zero_rate": (GOOD + "learning_rate: 0\n", ["line 8", "learning_rate", "above 0"]),
    "no_batch": (GOOD + "per_device_train_batch_size: 0\n", ["line 8", "at least 1", "got 0"]),
    "strategy": (GOOD + "eval_strategy: sometimes\n", ["line 8", "eval_strategy", "no, steps, epoch", "'sometimes'"]),
    "scheduler": (GOOD + "lr_scheduler_type: cosin\n", ["line 8", "lr_scheduler_type", "cosine", "'cosin'"]),
    "dtype": (GOOD + "dtype: bf16\n", ["line 8", "dtype", "bfloat16", "'bf16'"]),
    "loss_type": (GOOD + "loss_type: ce\n", ["line 8", "loss_type", "nll", "'ce'"]),
    "rank_text": (block("select: last:2, r: eight"), ["line 7", "r: expected a whole number", "'eight'"]),
    "bias": (block("select: last:2, bias: some"), ["line 7", "bias", "none, all, lora_only"]),
    "init": (block("select: last:2, init_lora_weights: pisa"), ["line 7", "init_lora_weights", "pissa"]),
    # the same by another road, other versions, other tools
    "use_peft": (GOOD + "use_peft: true\n", ["line 8", "use_peft", "layerpeft: {method: lora}"]),
    "lora_r": (GOOD + "lora_r: 16\n", ["line 8", "lora_r", "layerpeft: {r: 16}"]),
    "lora_targets": (GOOD + "lora_target_modules: [q_proj]\n", ["line 8", "layerpeft: {target_modules: [q_proj]}"]),
    "four_bit": (
        GOOD + "load_in_4bit: true\n",
        ["line 8", "model_init_kwargs: {quantization_config: {load_in_4bit: true}}"],
    ),
    "lisa": (
        GOOD + "lisa_n_layers: 3\n",
        ["line 8", "{method: full, select: {pick: uniform, keep: 3, reselect_steps: 20}}"],
    ),
    "lisa_clock": (GOOD + "lisa_step_interval: 5\n", ["line 8", "{pick: uniform, keep: 2, reselect_steps: 5}"]),
    "badam_clock": (
        GOOD + "badam_switch_interval: 9\n",
        ["line 8", "{pick: cycle, keep: 1, reselect_steps: 9, state: clear}"],
    ),
    "badam_order": (GOOD + "badam_switch_mode: descending\n", ["line 8", "reselect_steps: 50, order: descending"]),
    "galore_rank": (GOOD + "galore_rank: 64\n", ["line 8", "galore_rank", "layerpeft: {method: galore,"]),
    "galore_optim": (GOOD + "optim: galore_adamw\n", ["line 8", "galore_adamw", "frozen"]),
    "both_spellings": (
        GOOD + "max_seq_length: 128\nmax_length: 256\n",
        ["line 8", "max_seq_length", "this is max_length"],
    ),
    "warmup_ratio": (GOOD + "warmup_ratio: 3\n", ["line 8", "warmup_ratio", "warmup_steps", "below 1"]),
    "logging_dir": (GOOD + "logging_dir: logs\n", ["line 8", "TENSORBOARD_LOGGING_DIR"]),
    "axolotl_layers": (GOOD + "peft_layers_to_transform: [8, 9]\n", ["line 8", "layerpeft: {select: [8, 9]}"]),
    "mlx_layers": (GOOD + "num_layers: 4\n", ["line 8", "layerpeft: {select: last:4}"]),
    # the choice of layers
    "no_select": (block("method: lora"), ["line 7", "select: missing", "gradient_norm"]),
    "method": (block("method: lor, select: last:2"), ["line 7", "method 'lor'", "Did you mean 'lora'?"]),
    "later_method": (
        block("method: quant, select: last:2"),
        ["line 7", "method 'quant' is written as", "quantize_frozen: nf4"],
    ),
    "method_of_a_paper": (
        block("method: lisa, select: last:2"),
        ["line 7", "'lisa' is written as `method: full, select: {pick: uniform"],
    ),
    "lora_for_full": (block("method: full, select: last:2, r: 4"), ["line 7", "r=4: LoRA's own"]),
    "modules_for_full": (
        block("method: full, select: last:2, target_modules: [input_layernrom]"),
        ["line 7", "'input_layernrom'", "Did you mean 'input_layernorm'?"],
    ),
    "other_method": (
        block("select: last:2, update_proj_gap: 9"),
        ["line 7: update_proj_gap", "belongs to method: galore"],
    ),
    "importance_for_galore": (
        block("method: galore, select: {by: importance, pick: sigmoid, keep: 2, reselect_steps: 5}"),
        ["line 7", "by: importance damps", "method: lora"],
    ),
    "lora_for_galore": (
        block("method: galore, select: last:2, use_dora: true"),
        ["line 7", "use_dora=True: LoRA's own"],
    ),
    "scorer": (block("select: {by: gradient_nrom, keep: 2}"), ["line 7", "Did you mean 'gradient_norm'?", "outliers"]),
    "keep_missing": (block("select: {by: gradient_norm}"), ["line 7", "keep: missing"]),
    "keep_one_point_zero": (
        block("select: {by: outliers, keep: 1.0}"),
        ["line 7", "keep: 1.0 has two meanings", "all"],
    ),
    "keep_negative": (block("select: {by: random, keep: -1}"), ["line 7", "keep: -1"]),
    "grammar": (block("select: lst:2"), ["line 7", "cannot read 'lst:2'", "last:25%"]),
    "option": (
        block("select: {by: gradient_norm, keep: 2, exakt: true}"),
        ["line 7", "'exakt'", "Did you mean 'exact'?"],
    ),
    "too_deep": (block("select: last:40"), ["line 7", "asks for 40 layers of"]),
    "out_of_range": (block("select: [3, 17]"), ["line 7", "17", "0 to 4"]),
    "keep_too_many": (block("select: {by: gradient_norm, keep: 13}"), ["line 7", "keep: 13", "there are 5"]),
    "targets": (block("select: last:2, target_modules: [q_porj]"), ["line 7", "'q_porj'", "Did you mean 'q_proj'?"]),
    "scores_file": (block("select: {by: nowhere.json, keep: 2}"), ["line 7", "nowhere.json"]),
    "layers_to_transform": (
        block("select: last:2, layers_to_transform: [1]"),
        ["line 7", "layers_to_transform", "`select`"],
    ),
    # data, model, output
    "no_such_file": (GOOD.replace("layerpeft://gsm8k_train", "gsm_train"), ["line 3", "no file 'gsm_train.jsonl'"]),
    "no_such_shipped": (GOOD.replace("gsm8k_train", "gsm8k_trian"), ["line 3", "Did you mean 'gsm8k_train.jsonl'?"]),
    "wrong_kind": (GOOD.replace("layerpeft://gsm8k_train.jsonl", "./rows.xlsx"), ["line 3", ".jsonl", "rows.xlsx"]),
    "broken_rows": (
        GOOD.replace("layerpeft://gsm8k_train", "broken"),
        ["line 3: dataset_name", "broken.jsonl, line 1: not readable as JSON"],
    ),
    "no_rows": (GOOD.replace("layerpeft://gsm8k_train", "none"), ["line 3", "none.jsonl", "empty"]),
    "column": (GOOD.replace("{question}", "{qestion}"), ["line 5", "no column 'qestion'", "question, answer"]),
    "no_columns": (without("columns"), ["line 3", "question, answer", "columns: {prompt:"]),
    "incomplete_columns": (GOOD.replace(', completion: "{answer}"', ""), ["line 5", "prompt + completion"]),
    "bare_template": (GOOD.replace('"{answer}"', "answer"), ["line 5", "names no column", "{answer}"]),
    "open_brace": (GOOD.replace('"{answer}"', '"{answer"'), ["line 5", "{answer"]),
    "no_eval_rows": (without("eval_dataset") + "eval_strategy: epoch\n", ["line 7", "eval_strategy", "eval_dataset"]),
    "no_such_model": (GOOD.replace("layerpeft://llama-6m", "./models/none"), ["line 2", "no folder './models/none'"]),
    "empty_model": (GOOD.replace("layerpeft://llama-6m", "./hollow"), ["line 2", "config.json"]),
    "adapter_as_model": (GOOD.replace("layerpeft://llama-6m", "./adapter"), ["line 2", "adapter, not a model"]),
    "full_folder": (
        GOOD.replace("output_dir: out", "output_dir: full"),
        ["line 6", "not empty", "overwrite_output_dir=true"],
    ),
    "output_is_file": (GOOD.replace("output_dir: out", "output_dir: broken.jsonl"), ["line 6", "is a file"]),
    "nothing_to_resume": (GOOD + "resume_from_checkpoint: true\n", ["line 8", "no complete checkpoint"]),
    "resume_and_overwrite": (
        GOOD + "resume_from_checkpoint: hollow\noverwrite_output_dir: true\n",
        ["line 9", "exclude each other"],
    ),
    "tracker": (GOOD + "report_to: wandbb\n", ["line 8", "'wandbb'", "none"]),
    "best_without_eval": (GOOD + "load_best_model_at_end: true\n", ["line 8: load_best_model_at_end", "strategy"]),
    "foreign_constructor": (
        GOOD + "accelerator_config: nowhere.json\n",
        ["line 8: accelerator_config", "nowhere.json", "No such file"],
    ),
    "method_is_a_list": (block("method: [lora], select: last:2"), ["line 7", "unknown method ['lora']"]),
    "nested_field": (block("select: last:2, eva_config: {rha: 2}"), ["line 7", "eva_config", "rho"]),
    "class_column": (CLASSES.replace("{label}", "{nolabel}") + BLOCK, ["line 4", "no column 'nolabel'", "coarse"]),
    "quantization_bit": (GOOD + "quantization_bit: 4\n", ["line 8", "quantization_config: {load_in_4bit: true}"]),
    # the architecture: each at the line of its own key
    "targets_of_all": (block("select: all, target_modules: [q_porj, v_proj]"), ["line 7", "'q_porj'", "'q_proj'?"]),
    "exclusions": (block("select: last:2, exclude_modules: [qproj]"), ["line 7: exclude_modules: 'qproj'", "'q_proj'"]),
    "ranks": (block("select: last:2, rank_pattern: {q_porj: 4}"), ["line 7: rank_pattern: 'q_porj'", "matches no"]),
    "ranks_of_others": (
        block(r"select: last:2, rank_pattern: {'layers\.1\..*': 4}"),
        ["line 7: rank_pattern", "matches no"],
    ),
    "alphas_doubled": (
        block(r"select: all, alpha_pattern: {'layers\\.3\\..*': 4}"),
        ["line 7: alpha_pattern", "matches no"],
    ),
    "saved": (block("select: last:2, modules_to_save: [embed]"), ["line 7: modules_to_save: 'embed'", "matches no"]),
    "saved_full": (
        block("method: full, select: last:2, modules_to_save: [embed]"),
        ["line 7: modules_to_save: 'embed'", "matches no"],
    ),
    "no_parameters": (
        block("select: last:2, target_parameters: [w]"),
        ["line 7: target_parameters: 'w'", "none of that"],
    ),
    "stack": (block("select: {layers: last:2, stack: encoder}"), ["line 7: stack: unknown stack 'encoder'"]),
    "exclude_range": (block("select: {layers: all, exclude: [12]}"), ["line 7: exclude:", "12 is out of range"]),
    "output_embeddings": (
        block("select: all, target_modules: [lm_head]"),
        ["line 7: target_modules", "lm_head", "TRL"],
    ),
    "own_lines": (
        HEAD + "layerpeft:\n  r: 4\n  target_modules: [v_porj]\n  select:\n    by: random\n    keep: 13\n",
        ["2 problems", "line 9: target_modules: 'v_porj'", "line 12: keep: 13"],
    ),
    # rows
    "late_line": (
        GOOD.replace("layerpeft://gsm8k_train", "late"),
        ["line 3", "late.jsonl, line 3: not readable as JSON"],
    ),
    "list_for_row": (GOOD.replace("layerpeft://gsm8k_train", "list"), ["line 3", "list.jsonl, line 2: a row must be"]),
    "own_column": (
        GOOD.replace('columns: {prompt: "{question}", completion: "{answer}"}', LONG.replace("{answer}", "{anwser}")),
        ["line 7: columns.completion: no column 'anwser'", "Did you mean 'answer'?"],
    ),
    "unquoted_template": (
        GOOD.replace('columns: {prompt: "{question}", completion: "{answer}"}', LONG.replace('"', "")),
        ["line 6: columns.prompt: put the template in quotes"],
    ),
    # devices
    "flash_attention": (GOOD + "attn_implementation: flash_attention_3\n", ["line 8", "flash_attn_interface", "sdpa"]),
    "lomo": (GOOD + "optim: lomo\n", ["line 8: optim", "full weights", "'sgd'"]),
    # several at once
    "devices_at_once": (
        GOOD + "bf16: true\nload_best_model_at_end: true\nlearning_rte: 1\n",
        ["3 problems", "line 8: bf16: ", "line 9: load_best_model_at_end: ", "line 10: unknown key"],
    ),
    "everything_at_once": (
        GOOD.replace("{question}", "{qestion}").replace("layerpeft://gsm8k_train", "late").replace("r: 4", "r: four")
        + "learning_rte: 1\nbf16: true\n",
        [
            "6 problems",
            "line 3: dataset_name: late.jsonl, line 3",
            "line 5: columns.prompt",
            "(dataset_name)",
            "(eval_dataset)",
            "line 7: r: expected",
            "line 8: unknown key",
            "line 9: bf16: ",
        ],
    ),
    "all_at_once": (
        GOOD + "learning_rte: 1e-4\nbf16: off\nlora_r: 4\n",
        ["3 problems", "line 8", "line 9", "line 10", "learning_rate", "write `false`", "layerpeft: {r: 4}"],
    ),
    "select_all_at_once": (
        block("select: {by: outlier, keep: 0, pick: best}"),
        ["3 problems", "Did you mean 'outliers'?", "keep: 0", "'best'"],
    ),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that some recipes name, in which loading any model is a failure."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"question": \n')
    (tmp_path / "none.jsonl").write_text("")
    row = '{"question": "Why?", "answer": "So."}\n'
    (tmp_path / "late.jsonl").write_text(row + row + '{"question": "Why?",\n' + row)
    (tmp_path / "list.jsonl").write_text(row + "[1]\n")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "adapter_model.safetensors").write_text("x")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(refuse))
    return tmp_path


def test_there_are_fifty() -> None:
    assert len(BROKEN) >= 50


@pytest.mark.parametrize("name", BROKEN)
def test_broken_recipe(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, fragments = BROKEN[name]
    (place / "recipe.yaml").write_text(text)
    code = main(["train", "recipe.yaml"])
    said = capsys.readouterr()
    assert code == 2, said.err
    message = said.err[said.err.index("layerpeft: ") :]
    for fragment in fragments:
        assert fragment in message
    assert "Traceback" not in said.err and said.out == ""
    assert not (place / "out").exists()


def test_the_good_one_reaches_the_model(place: Path) -> None:
    (place / "recipe.yaml").write_text(GOOD)
    with pytest.raises(AssertionError, match="a model was loaded"):
        main(["train", "recipe.yaml"])


@pytest.mark.parametrize("name", ["typo", "a_tab", "too_deep"])
def test_broken_recipe_in_a_process_of_its_own(name: str, place: Path) -> None:
    text, fragments = BROKEN[name]
    (place / "recipe.yaml").write_text(text)
    found = in_a_process("from layerpeft.cli import main; raise SystemExit(main())", "train", "recipe.yaml")
    assert found.returncode == 2
    for fragment in fragments:
        assert fragment in found.stderr
    assert "Traceback" not in found.stderr and found.stdout == ""


def test_a_plan_gathers_what_rows_and_optimizer_add(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = GOOD.replace("last:2", "last:40").replace("gsm8k_eval.jsonl\n", "gsm8k_eval.jsonl\nmax_train_samples: 0\n")
    (place / "recipe.yaml").write_text(text + "optim: grokadamw\n")
    assert main(["plan", "recipe.yaml"]) == 2
    message = capsys.readouterr().err
    fragments = ["3 problems", "line 5: max_train_samples", "line 8: layers: ", "line 9: optim: optimizer 'grokadamw'"]
    places = [message.index(fragment) for fragment in fragments]
    assert places == sorted(places)
    (place / "one.jsonl").write_text('{"before": "a", "label": "x"}\n' * 4)
    classes = CLASSES.replace("layerpeft://revision_train", "one") + BLOCK.replace("last:2", "last:40")
    (place / "recipe.yaml").write_text(classes)
    assert main(["plan", "recipe.yaml"]) == 2
    message = capsys.readouterr().err
    assert "2 problems" in message and "line 6: layers: " in message
    assert "line 3: dataset_name: label: the training rows hold one class only" in message


def test_unknown_keys_are_answered_shortly(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "recipe.yaml").write_text(block("select: last:2, lora_alhpa: 8") + "learning_rte: 1e-4\n")
    assert main(["train", "recipe.yaml"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "unknown key" in line]
    assert len(lines) == 2 and all(len(line) < 240 and "Did you mean" in line for line in lines)


def test_without_a_network_the_hub_is_asked_once(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked: list[object] = []

    def refuse(address: object, *_: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    monkeypatch.setattr(hub, "getproxies", dict)
    hub.reachable.cache_clear()
    text = GOOD.replace("layerpeft://llama-6m", "nobody/nothing").replace(
        "layerpeft://gsm8k_train.jsonl", "nobody/rows"
    )
    (place / "recipe.yaml").write_text(text.replace("eval_dataset: layerpeft://gsm8k_eval.jsonl\n", "") + "seed: x\n")
    try:
        assert main(["plan", "recipe.yaml"]) == 2
    finally:
        hub.reachable.cache_clear()
    message = capsys.readouterr().err
    for fragment in (
        "3 problems",
        "line 2: model_name_or_path: no folder 'nobody/nothing'",
        "line 3: dataset_name: no file or folder 'nobody/rows'",
        "line 7",
    ):
        assert fragment in message
    assert "Retrying" not in message and len(asked) == 1
    assert constants.HF_HUB_OFFLINE is False

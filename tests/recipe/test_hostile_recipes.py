"""Recipes that bring code, that never end, or that name what cannot be: one message, exit code 2, and nothing was run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from layerpeft.cli import main
from layerpeft.errors import ConfigError, SelectionError
from layerpeft.integrations import code
from layerpeft.model import patterns
from layerpeft.recipe import yaml
from layerpeft.recipe.yaml import DEPTH, PLACES, parse
from tests.conftest import LLAMA
from tests.recipe.test_broken_recipes import GOOD, HEAD, block

pytestmark = pytest.mark.usefixtures("shallow")

# ---- code -----------------------------------------------------------------------------------------------------------

EVIL = """\
from pathlib import Path
from layerpeft.integrations import code
from transformers import LlamaForCausalLM
Path({ran!r}).write_text("named first" if any("odd.py" in text for text in code._named) else "unnamed")
class Odd(LlamaForCausalLM): pass
"""
SCORED = [
    "quickstart",
    "model_name_or_path=odd",
    "layerpeft.select={by: random, keep: 1}",
    "max_train_samples=8",
    "output_dir=out",
]


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose folder asks for code of its own; the file that tells whether it ran."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(LLAMA, "odd")
    ran = tmp_path / "ran"
    Path("odd/odd.py").write_text(EVIL.format(ran=str(ran)))
    change("odd", auto_map={"AutoModelForCausalLM": "odd.Odd"})
    return ran


def change(folder: str, **more: object) -> None:
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_code_of_a_model_runs_when_scoring_and_is_named_before(odd, capsys):
    assert main(["plan", *SCORED, "trust_remote_code=true"]) == 2
    said = capsys.readouterr().err
    assert "odd/odd.py (SHA-256 " in said and "--run-code" in said and not odd.exists()
    assert main(["score", *SCORED, "trust_remote_code=true"]) == 0
    assert odd.read_text() == "named first"
    assert capsys.readouterr().err.count("trust_remote_code: true: runs code that is not layerpeft's: odd/odd.py") == 1
    odd.unlink()
    assert main(["plan", *SCORED, "trust_remote_code=true", "--run-code", "seed=x"]) == 2
    assert "runs code that is not layerpeft's: odd/odd.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key", ["trust_remote_code", "code_revision", "weights_only", "use_kernels", "allow_all_kernels"]
)
def test_what_says_which_code_runs_stands_at_the_top(odd, key, capsys):
    assert main(["score", *SCORED, f"model_init_kwargs={{{key}: true}}"]) == 2
    assert f"model_init_kwargs: {key}: " in capsys.readouterr().err and not odd.exists()


def test_kernels_of_the_hub_are_named_before_they_are_fetched(odd, capsys):
    assert main(["score", *SCORED, "attn_implementation=owner/kernel"]) == 2  # nothing here fetches them
    said = capsys.readouterr().err
    assert said.index("attn_implementation: runs code that is not layerpeft's: owner/kernel on the hub") < said.index(
        "cannot load"
    )
    change("odd", attn_implementation="owner/kernel", auto_map={})
    assert main(["plan", *SCORED]) == 2
    said = capsys.readouterr().err
    assert (
        "attn_implementation in odd/config.json" in said and "owner/kernel on the hub" in said and "--run-code" in said
    )


def test_a_file_of_code_lies_beside_the_recipe(tmp_path, capsys):
    home = tmp_path / "recipes"
    home.mkdir()
    (home / "scorer.py").write_text("x = 1")
    (tmp_path / "other.py").write_text("x = 1")
    (home / "link.py").symlink_to(tmp_path / "other.py")
    path, data = code.code_beside("./scorer.py", home, "by: ./scorer.py")
    assert (path, data) == (home.resolve() / "scorer.py", b"x = 1")
    assert "by: ./scorer.py: runs code" in capsys.readouterr().err
    for name in ("../other.py", str(tmp_path / "other.py"), "link.py", "none.py", "."):
        with pytest.raises(ConfigError, match="beside the recipe alone|no file of code"):
            code.code_beside(name, home, "by")
    with code.kept_out("not here"), pytest.raises(ConfigError, match=r"scorer\.py \(SHA-256 .*not here"):
        code.code_beside("scorer.py", home, "by")


# ---- what never ends ------------------------------------------------------------------------------------------------

LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))])
CHAIN = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 2 * DEPTH))])
MERGED = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10))]
)
ENDLESS = {
    "laughs": (LAUGHS, "aliases count"),
    "chain": (CHAIN, "deep in each other"),
    "merged": (MERGED, "aliases count"),
    "flow": ("a: " + "[" * 100_000, "deep in each other"),
    "block": ("\n".join(" " * i + "a:" for i in range(2 * DEPTH)), "deep in each other"),
    "list": ("a:\n" + "- 1\n" * PLACES, "20,000 keys and values"),
    "keys": ("\n".join(f"k{i}: 1" for i in range(3_000)), "2,000 keys"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_recipe_is_walked_so_far_and_no_further(name, monkeypatch):
    text, why = ENDLESS[name]
    walked: list[int] = []
    plain = yaml._Walk.value
    monkeypatch.setattr(yaml._Walk, "value", lambda self, *given: (walked.append(1), plain(self, *given))[1])
    (fault,) = parse(text).faults
    assert why in fault.text and fault.line and len(walked) <= PLACES + 1


def test_long_texts_are_read_and_longer_ones_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert parse("# a comment\n" * 100_000 + "a: 1\n").data == {"a": 1}
    Path("r.yaml").write_text("# a comment\n" * 400_000)
    assert main(["plan", "r.yaml"]) == 2 and "more than 4,194,304 bytes" in capsys.readouterr().err


SLOW = r"(\w+\.?)+Z"
REFUSED = {
    **{
        f"{key} {method}": (block(f"method: {method}, select: {select}, {key}: {value}"), [key, "ways to match"])
        for method, select in (("lora", "last:2"), ("lora", "all"), ("galore", "last:2"), ("full", "last:2"))
        for key, value in (("target_modules", f"'{SLOW}'"), ("exclude_modules", f"'{SLOW}'"))
    },
    "ranks": (block(f"select: last:2, rank_pattern: {{'{SLOW}': 4}}"), ["rank_pattern", "ways to match"]),
    "alphas": (block(f"select: all, alpha_pattern: {{'{SLOW}': 4}}"), ["alpha_pattern", "ways to match"]),
    "saved": (block(f"select: last:2, modules_to_save: ['{SLOW}']"), ["modules_to_save", "ways to match"]),
    "no_regex": (block("select: last:2, target_modules: '('"), ["target_modules", "no regular expression"]),
    "no_regex_rank": (block("select: last:2, rank_pattern: {'(': 4}"), ["rank_pattern", "no regular expression"]),
    "names": (block(f"select: last:2, target_modules: [{', '.join(f'x{i}' for i in range(9_000))}]"), ["matches no target"]),
    "rate": (GOOD + f"learning_rate: 1{'0' * 400}\n", ["line 8", "learning_rate", "whole numbers end at"]),
    "seed": (GOOD + f"seed: 1{'0' * 30}\n", ["line 8", "seed", "whole numbers end at"]),
    "digits": (GOOD + f"seed: {'9' * 5_000}\n", ["line 8", "!!int"]),
    "batch": (GOOD + "per_device_train_batch_size: 9999999999999\n", ["line 8", "at most 1,000,000,000"]),
    "layers": (block(f"select: '{'9' * 5_000}'"), ["cannot read '999"]),
    "ends": (block(f"select: 'last:{'9' * 400}'"), ["cannot read 'last:999"]),
    "long_name": (GOOD.replace("output_dir: out", f"output_dir: {'a' * 300}"), ["line 6", "output_dir", "File name too long"]),
    "null_name": (GOOD.replace("output_dir: out", r'output_dir: "a\0b"'), ["line 6", "output_dir", "null byte"]),
    "no_home": (GOOD.replace("layerpeft://llama-6m", "~nobody-here/x"), ["line 2", "no folder '~nobody-here/x'"]),
    "no_rows": (GOOD.replace("layerpeft://gsm8k_train", "~nobody-here/x"), ["line 3", "dataset_name", "no file"]),
    "no_scores": (block(r'select: {by: "a\0b.json", keep: 2}'), ["line 7", "no scores file"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_never_end_or_cannot_be_is_one_message(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, fragments = REFUSED[name]
    Path("r.yaml").write_text(text)
    assert main(["plan", "r.yaml"]) == 2
    message = capsys.readouterr().err
    assert all(fragment in message for fragment in fragments) and len(message) < 200_000, message[:2_000]


def test_a_pattern_is_counted_as_re_goes_about_it():
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qkvo"] + ["model.embed_tokens"]
    for good in (
        r".*\.(q|v)_proj",
        r"(?:\w+\.)*q_proj",
        r"(.*\.)*q_proj",
        r"^(?!.*vision).*\.(?:q_proj|k_proj)$",
        "a?" * 20,
    ):
        patterns.check_pattern("target_modules", good, names)
    for bad in (
        SLOW,
        "(.+)+x",
        ".*" * 6 + "x",
        "(?=(.+)+x)y",
        "(.|.)" * 20,
        "(?:.*?){9}!",
        "(" * 3_000 + ")" * 3_000,
        "x{99999999999}",
    ):
        with pytest.raises(SelectionError, match="target_modules: "):
            patterns.check_pattern("target_modules", bad, names)
    search = patterns._Search(patterns._parser.parse("(a|b)*c"), "ababab")
    assert list(search.walk(patterns._parser.parse("(a|b)*c").data, 0, 0)) == [] and search.taken < 60
    assert HEAD in GOOD

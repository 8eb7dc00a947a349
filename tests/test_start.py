"""A command that starts at once, and a package whose names load nothing until they are used."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import layerpeft
from layerpeft import cli
from tests.helpers.processes import without_the_package

LIBRARIES = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "matplotlib", "tqdm"}
AT_ONCE = [
    (["--help"], 0, "compare"),
    (["train", "--help"], 0, "RECIPE"),
    (["--version"], 0, layerpeft.__version__),
    ([], 0, "recipes"),
    (["recipes"], 0, "quickstart"),
    (["recipes", "list", "--json"], 0, '"command"'),
    (["recipes", "show", "telly"], 0, "layerpeft train telly"),
    (["recipes", "copy", "telly"], 0, "layerpeft train telly.yaml"),
    (["recipes", "copy", "telly"], 2, "exists already"),
    (["recipes", "shwo"], 2, "Did you mean 'show'?"),
    (["recipes", "show", "tely"], 2, "Did you mean 'telly'?"),
    (["trian", "quickstart"], 2, "Did you mean `layerpeft train`?"),
    (["quickstart"], 2, "layerpeft train quickstart"),
    (["env", "more"], 2, "unknown argument 'more'"),
    (["plan", "quickstart", "--fits", "24GB"], 2, "unknown option '--fits'"),
    (["compare", "quickstart", "--seeds", "many"], 2, "'many'"),
    (["merge", "only-one"], 2, "OUT"),
    (["export", "folder", "--to", "vlm"], 2, "'vllm', 'gguf', 'ollama', 'merged'"),
    *(([name], 2, "name a recipe") for name in ("train", "plan", "score", "compare")),
    *(([name, "quickstrat"], 2, "Did you mean 'quickstart'?") for name in ("train", "plan", "score", "compare")),
    (["train", "."], 2, "is a folder"),
    (["generate", "--help"], 0, "FOLDER"),
    (["predict", "folder", "rows.csv"], 2, "--out"),
    (["eval", "folder"], 2, "ROWS"),
    (["import"], 2, "FILE"),
    (["import", "a.yaml", "--mdel", "a"], 2, "Did you mean '--model'?"),
]
GONE = [(["recipes"], ""), (["recipes", "show", "telly"], "1"), (["--help"], ""), (["trian"], ""), (["trian"], "1")]
COMMANDS = """
import contextlib, io, json, sys
from layerpeft.cli import main
found = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
    found.append([code, said.getvalue(), sorted(sys.modules)])
print(json.dumps(found))
"""
NAMES = """
import json, sys

def loaded():
    return {name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names

libraries, before = set(json.loads(sys.argv[1])), loaded()
import layerpeft
from layerpeft import LayerpeftError
assert {*layerpeft.__all__, "__version__", "__doc__"} <= set(dir(layerpeft))
try:
    layerpeft.LayerLoraConfg
except AttributeError as error:
    assert "Did you mean 'LayerLoraConfig'?" in str(error) and error.name == "LayerLoraConfg"
else:
    raise AssertionError("a misspelt name")
try:
    from layerpeft import score_layer
except ImportError:
    pass
assert not hasattr(layerpeft, "nothing_like_it")
assert not libraries & loaded()
assert loaded() - before == {"layerpeft"}
print("all is well")
"""
USED = """
import pickle, sys, peft

def loaded():
    return {name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names

theirs = loaded()
assert "layerpeft" not in theirs
config = pickle.loads(bytes.fromhex(sys.argv[1]))
assert all(kind in table for kind in (config.peft_type, "LAYER_GALORE", "LAYER_FULL", "LAYER_QUANT") for table in (
    peft.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING))
names = {}
import layerpeft
exec("from layerpeft import *", names)
assert set(layerpeft.__all__) <= set(names), set(layerpeft.__all__) - set(names)
assert all(names[name] is getattr(layerpeft, name) for name in layerpeft.__all__)
assert type(config) is names["LayerLoraConfig"]
assert loaded() - theirs == {"layerpeft"}, loaded() - theirs  # nothing that PEFT does not bring in
print("all is well")
"""


def launched(code: str, *words: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_needs_no_library_loads_none(tmp_path):
    given = json.dumps([words for words, _, _ in AT_ONCE])
    found = json.loads(launched(COMMANDS, given, folder=tmp_path))
    for (words, code, fragment), (ended, said, modules) in zip(AT_ONCE, found, strict=True):
        assert ended == code, (words, said)
        assert fragment in said and "Traceback" not in said, (words, said)
        assert not LIBRARIES & {name.split(".")[0] for name in modules}, words


def test_names_load_their_part_when_they_are_used(tmp_path):
    assert "all is well" in launched(NAMES, json.dumps(sorted(LIBRARIES)), folder=tmp_path)
    config = pickle.dumps(layerpeft.LayerLoraConfig(select="last:1"))
    done = without_the_package(USED, config.hex())
    assert "all is well" in done.stdout, done.stderr


def test_type_checkers_and_the_table_of_names_say_the_same():
    tree = ast.parse(Path(layerpeft.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        (str(node.module), alias.name, alias.asname)
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {(f"layerpeft.{place}", name, name) for name, place in layerpeft._PLACES.items()}
    assert layerpeft.__all__ == sorted(layerpeft._PLACES)


def test_every_command_that_is_loaded_is_there():
    for name, place in cli.RUNS.items():
        module, _, function = place.partition(":")
        assert getattr(importlib.import_module(module), function).__name__.rstrip("_") == name
        assert module.startswith(("layerpeft.recipe.", "layerpeft.using."))  # lower than the command


@pytest.mark.parametrize(
    ("terminal", "loaded", "rank"), [(True, False, "0"), (True, True, "0"), (True, False, "1"), (False, False, "0")]
)
def test_loading_is_told_where_somebody_waits(terminal, loaded, rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)  # a log is read as well
    modules = dict(sys.modules) if loaded else {k: v for k, v in sys.modules.items() if k != "torch"}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "modules", modules)
        patch.setattr(importlib, "import_module", lambda name: cli)
        assert cli._loaded("anything:main") is cli.main
    said = capsys.readouterr()
    assert said.out == ""
    assert ("loading libraries" in said.err) == (not loaded and rank == "0")


def test_peft_knows_our_types():
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["LAYER_LORA"] is layerpeft.LayerLoraConfig


@pytest.mark.parametrize(("words", "at_once"), GONE, ids=str)
def test_whoever_reads_may_leave(words: list[str], at_once: str) -> None:
    """`| head`, of what is printed and of errors alike: no traceback, and the exit code of a broken pipe. `at_once`: nothing is
    kept back before it is written."""
    script = f"import sys; from layerpeft.cli import main; sys.exit(main({words!r}))"
    reader, writer = os.pipe()
    os.close(reader)
    errors = words == ["trian"]
    out, err = (subprocess.PIPE, writer) if errors else (writer, subprocess.PIPE)
    environment = {**os.environ, "PYTHONUNBUFFERED": at_once}
    try:
        found = subprocess.run([sys.executable, "-c", script], text=True, stdout=out, stderr=err, env=environment)
    finally:
        os.close(writer)
    assert found.returncode == 141 and not found.stdout and not found.stderr


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError("of a tracker")

    monkeypatch.setattr(cli, "_recipes", broken)
    with pytest.raises(BrokenPipeError, match="of a tracker"):
        cli.main(["recipes"])

"""Text from a trained folder: the tokens of plain transformers and PEFT, on a terminal and without one."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerpeft import LayerLoraConfig, get_peft_model
from layerpeft.cli import main
from layerpeft.text import cells
from layerpeft.using import generate
from layerpeft.using.terminal import Screen, escaped, harmless
from tests.helpers.short import short_llama

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPT = "Natalia sold clips to 48 of her friends"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the model says, with its tokenizer and a chat template."""
    made = tmp_path_factory.mktemp("used") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    model = get_peft_model(
        base, LayerLoraConfig(select="last:2", r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(1)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=1.0)
    model.save_pretrained(str(made))
    tokenizer = AutoTokenizer.from_pretrained(short_llama())
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(made)
    return made


def plain(folder: Path | None, prompt: str, tokens: int = 8) -> str:
    """What plain transformers and PEFT say, with the likeliest token each."""
    base = AutoModelForCausalLM.from_pretrained(short_llama(), dtype=torch.float32)
    model = base if folder is None else peft.PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(short_llama())
    inputs = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_tokens_are_those_of_plain_peft(folder, capsys, monkeypatch, tmp_path):
    wanted = plain(folder, PROMPT)
    assert main(["generate", str(folder), "--prompt", PROMPT, "max_new_tokens=8", "temperature=0"]) == 0
    said = capsys.readouterr().out
    assert said == wanted + "\n"
    assert wanted != plain(None, PROMPT)
    bare = tmp_path / "bare"  # no record: any adapter of plain PEFT
    shutil.copytree(folder, bare)
    (bare / "layerpeft.json").unlink()
    lines = [{"prompt": PROMPT}, {"messages": [{"role": "user", "content": "hi"}]}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, lines))))
    assert main(["generate", str(bare), "--json", "max_new_tokens=8", "do_sample=false"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"prompt": PROMPT, "answer": wanted}
    assert second["answer"] == plain(folder, "user: hi\nassistant:")


def test_predicted_text_is_the_likeliest_whatever_the_batch(folder, tmp_path):
    """Of a model whose own settings draw."""
    prompts = [PROMPT, "Weng", "How many clips did Natalia sell ?"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    words = ["predict", str(folder), str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main([*words, "max_new_tokens=6"]) == 0
    found = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [plain(folder, prompt, 6).strip() for prompt in prompts]


def test_a_conversation(folder, capsys, monkeypatch):
    asked = []
    real = generate.encoded

    def seen(tokenizer, prompt):
        asked.append([turn["content"] for turn in prompt])
        return real(tokenizer, prompt)

    def stopped(self, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "encoded", seen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/rest\n\ntwo\n/reset\nthree\n/quit\nfour\n"))
    assert main(["generate", str(folder), "--chat", "--system", "be brief", "max_new_tokens=3", "do_sample=false"]) == 0
    out, err = capsys.readouterr()
    answer = asked[1][2]
    assert asked == [["be brief", "one"], ["be brief", "one", answer, "two"], ["be brief", "three"]]
    assert out.splitlines()[0].strip() == answer == plain(folder, "system: be brief\nuser: one\nassistant:", 3).strip()
    assert "no command /rest. Did you mean '/reset'?" in err and "a new conversation" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    monkeypatch.setattr(generate.Streamed, "put", stopped)  # Ctrl-C in an answer ends that alone
    assert main(["generate", str(folder), "--chat", "max_new_tokens=3"]) == 0
    assert capsys.readouterr().out == " …\n"


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["max_new_tokens=-4"], ["layerpeft: generation: max_new_tokens: expected a whole number from 1"]),
        (["max_new_token=3", "top_k=x", "seed=-1"], ["3 problems", "Did you mean 'max_new_tokens'?", "top_k", "seed"]),
        (["--max_new_tokens", "3"], ["max_new_tokens=3"]),
        (["temperature=-1"], ["temperature"]),
        (["--model", "./nowhere"], ["'./nowhere' of", "is not there"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt: No such file"]),
    ],
)
def test_what_cannot_be_is_said_before_weights_load(words, fragments, folder, capsys, monkeypatch):
    monkeypatch.setattr("layerpeft.using.commands.load_found", lambda found: pytest.fail("weights were loaded"))
    assert main(["generate", str(folder), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and all(fragment in err for fragment in fragments), err


def test_a_base_that_is_not_there_can_be_given(folder, tmp_path, capsys):
    lost = tmp_path / "lost"
    shutil.copytree(folder, lost)
    (lost / "layerpeft.json").unlink()
    said = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": "/gone/model"}))
    words = ["generate", str(lost), "--prompt", PROMPT, "max_new_tokens=3", "do_sample=false"]
    assert main(words) == 2
    assert "'/gone/model'" in (err := capsys.readouterr().err) and "--base MODEL" in err
    assert main([*words, "--base", str(short_llama())]) == 0
    assert capsys.readouterr().out == plain(folder, PROMPT, 3) + "\n"
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert str(lost) in capsys.readouterr().err


def test_text_is_harmless_and_wrapped():
    assert harmless("a\x1b[31mb\r\nc\x9bd\u202ee\x7f") == "a␛[31mb\nc\ufffdd\ufffde␡"
    assert json.loads(escaped(json.dumps({"a": "\x1b\u202e\x9b"}, ensure_ascii=False))) == {"a": "\x1b\u202e\x9b"}
    file = io.StringIO()
    screen = Screen(file, width=10)
    for piece in ("one two ", "three ", "数数数数数数 ", "abcdefghijklmnop\n", "  x"):
        screen.write(piece)
    screen.end()
    lines = file.getvalue().splitlines()
    assert lines == ["one two", "three", "数数数数数", "数", "abcdefghij", "klmnop", "  x"]
    assert max(map(cells, lines)) <= 10
    file = io.StringIO()
    Screen(file).write("a  " * 60)
    assert file.getvalue() == "a  " * 60  # no terminal: as it is

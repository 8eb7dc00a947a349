"""Who speaks in turns: a misspelt name is found before weights load, whatever the chat template would have made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from layerpeft.errors import RecipeError
from layerpeft.recipe import roles
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.rows import load
from layerpeft.recipe.trainer import prepare, tokenized
from tests.conftest import LLAMA

pytestmark = pytest.mark.usefixtures("shallow")

ANY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
CASES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}{% elif m['role'] == \"assistant\" %}"
    "A: {{ m['content'] }}{% elif m['role'] == 'narrator' %}({{ m['content'] }}){% endif %}</s>{% endfor %}"
)
STRICT = "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no') }}{% endif %}{% endfor %}"


def turns(*names: str) -> list[dict[str, str]]:
    return [{"role": name, "content": f"said {number}"} for number, name in enumerate(names)]


def told(template: str | None, *names: str) -> list[str]:
    """What is wrong with rows of one conversation each, of which the last turn is named."""
    Path("rows.jsonl").write_text("".join(json.dumps({"messages": turns("user", name)}) + "\n" for name in names))
    source = load("rows.jsonl", config=None, split="train")
    assert source is not None
    import datasets

    features = datasets.Features({"messages": datasets.Json()})
    part = datasets.Dataset.from_list([{"messages": turns("user", name)} for name in names], features=features)
    tokenizer: Any = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.chat_template = template
    try:
        roles.check(part, source, tokenizer, "dataset_name")
    except RecipeError as error:
        return [problem.text.removeprefix("dataset_name: rows.jsonl, ") for problem in error.problems]
    return []


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_names_that_templates_use_go_and_misspelt_ones_do_not() -> None:
    assert told(ANY, "assistant", "tool", "developer", "ipython", "system", "narrator") == []
    assert told(None, "assistant", "tool", "developer", "ipython") == []
    assert told(CASES, "assistant", "narrator") == []
    assert told(STRICT, "tool") == []  # the row itself is refused, with its number
    assert told(ANY, "assistant", "asistant", "usr", "asistant", "Assistant") == [
        "line 2: row 2 has a turn (messages, number 2) of 'asistant'. Did you mean 'assistant'? (2 turns in all)",
        "line 3: row 3 has a turn (messages, number 2) of 'usr'. Did you mean 'user'?",
        "line 5: row 5 has a turn (messages, number 2) of 'Assistant'. Did you mean 'assistant'?",
    ]
    assert told(ANY, "human", "gpt") == [
        "line 1: row 1 has a turn (messages, number 2) of 'human'. Did you mean 'user'?",
        "line 2: row 2 has a turn (messages, number 2) of 'gpt'. Did you mean 'assistant'?",
    ]
    assert told(CASES, "tool", "chorus") == [
        "line 1: row 1 has a turn (messages, number 2) of 'tool', of whom the chat template writes nothing; "
        "there are user, assistant",
        "line 2: row 2 has a turn (messages, number 2) of 'chorus', of whom the chat template writes nothing; "
        "there are user, assistant",
    ]


@pytest.mark.parametrize(
    ("trainer", "good", "bad"),
    [
        ("sft", {"messages": turns("user", "assistant")}, {"messages": turns("usr", "assistant")}),
        ("sft", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         {"conversations": [{"from": "humn", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ("dpo", {"prompt": turns("user"), "chosen": turns("assistant"), "rejected": [{"role": "assistant", "content": "x"}]},
         {"prompt": turns("usr"), "chosen": turns("assistant"), "rejected": [{"role": "assistant", "content": "x"}]}),
    ],
    ids=["messages", "sharegpt", "dpo"],
)  # fmt: skip
def test_it_is_found_before_weights_load(trainer: str, good: Any, bad: Any) -> None:
    Path("t.jinja").write_text(ANY)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, good, bad)))
    Path("recipe.yaml").write_text(
        f"trainer: {trainer}\nmodel_name_or_path: layerpeft://llama-6m\ndataset_name: rows.jsonl\noutput_dir: out\n"
        "layerpeft: {select: last:2, r: 4}\nmax_length: 32\nchat_template_path: t.jinja\n"
    )
    recipe = load_recipe("recipe.yaml", [] if trainer == "sft" else ["chat_template_path=null"])
    with pytest.raises(RecipeError, match=r"rows.jsonl, line 3: row 3 has a turn \(\w+, number 1\) of '(usr|humn)'"):
        tokenized(prepare(recipe))

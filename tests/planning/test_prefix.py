"""What is planned of kept states beside passes that begin at the cut, and what a real cache keeps."""

from __future__ import annotations

import json

import pytest
import torch

from layerpeft import LayerLoraConfig, get_peft_model, layer_map
from layerpeft.cli import main
from layerpeft.planning.plan import plan
from layerpeft.planning.prefix import Prefix, Rows
from layerpeft.planning.trace import Step, trace
from layerpeft.recipe.plan import forecast
from layerpeft.recipe.read import load_recipe
from layerpeft.recipe.trainer import prepare, tokenized
from layerpeft.training.prefix.setting import Setting
from tests.helpers.models import MODELS, batch
from tests.helpers.passes import beginning_at
from tests.helpers.repeating import repeated, some
from tests.helpers.short import short_llama

NAMES = ["llama", "gpt2", "bert", "gemma2", "mixtral", "deberta_v2", "vit", "nanogpt"]


def config(**options):
    return LayerLoraConfig(select="last:1", target_modules="all-linear", r=4, **options)


@pytest.mark.parametrize("name", some(NAMES, 1))
def test_later_steps_and_bytes_are_those_of_passes_that_begin_at_the_cut(name):
    model, given = MODELS[name](), batch(name, MODELS[name]())
    for again in (False,) if name in ("llama", "nanogpt") else (False, True):
        kept = config(prefix_cache="memory", lower_dropout="off")
        found = plan(model, kept, batch_size=2, length=8, checkpointing=again, inputs=given).prefix
        real = get_peft_model(MODELS[name](), config()).train()
        if again:
            real.get_base_model().gradient_checkpointing_enable()
        assert found.why is None and found.whole == pytest.approx(trace(real, 2, 8, inputs=given).flops, rel=0.02)
        with beginning_at(found.layer, real, layer_map(model), given):
            assert found.later == pytest.approx(trace(real, 2, 8, inputs=given).flops, rel=0.02)
        if name != "nanogpt":  # operations that follow from shapes, without another trace
            unasked = plan(model, config(), batch_size=2, length=8, checkpointing=again).prefix
            if unasked is not None:
                assert unasked.later == pytest.approx(found.later, rel=0.02) and unasked.token == found.token


@pytest.mark.parametrize(
    ("kind", "cast", "bits", "token"),
    [
        (None, torch.bfloat16, None, 128),
        (None, None, 8, 36),
        *map(repeated, [(None, None, None, 128), (torch.bfloat16, None, None, 64)]),
    ],
)
def test_a_token_takes_what_is_kept_of_it(kind, cast, bits, token):
    def built():
        return MODELS["llama"]().to(kind or torch.float32)

    kept = {"where": "memory", "bits": bits} if bits else "memory"
    found = plan(built(), config(prefix_cache=kept), batch_size=2, length=8, step=Step(autocast=cast)).prefix
    assert found.token == token
    real, given = get_peft_model(built(), config(prefix_cache=kept)).train(), batch("llama", built())
    mask = torch.ones_like(given["input_ids"])
    mask[0, 5:] = 0  # padding is not kept
    given["labels"] = given["labels"].masked_fill(mask == 0, -100)
    for _ in range(2):
        with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
            real(**given, attention_mask=mask, use_cache=False)
    cache = real.peft_config["default"]._layerpeft.prefix
    assert cache.hits == 2 and cache.store.size == found.token * 13


def test_a_training_is_the_sum_of_its_epochs():
    found = Prefix(9, None, token=10, whole=100, later=40, setting=Setting("disk"))
    assert Rows(3, 1000).ratio(found) == pytest.approx((100 + 40 + 40) / 300)
    assert Rows(1.5, 1000).ratio(found) == pytest.approx((100 + 20) / 150)
    assert Rows(1, 1000).ratio(found) == Rows(0.5, 1000).ratio(found) == 1
    half = Prefix(9, None, token=10, whole=100, later=40, setting=Setting("disk", limit=6000))
    assert half.setting is not None and Rows(3, 1000, 200).takes(half) == 12000
    assert Rows(3, 1000, 200, batch=2).ratio(half) == pytest.approx((100 + 2 * (0.25 * 40 + 0.75 * 100)) / 300)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("llama", {"select": "all"}, "the first layer trains"),
        ("bert", {"select": "last:1"}, "dropout or noise"),
        ("llama", {"select": {"by": "gradient_norm", "keep": 1}}, "the layers that will be chosen"),
        repeated(("t5", {"select": "last:1", "lower_dropout": "off"}, "position bias")),
        repeated(("llama", {"select": {"keep": 1, "pick": "cycle", "reselect_steps": 2}}, "change while training")),
        repeated(("llama", {"select": "last:1", "modules_to_save": ["embed_tokens"]}, "trains")),
    ],
)
def test_why_nothing_is_kept_is_said_beforehand(name, options, why):
    made = LayerLoraConfig(r=4, target_modules="all-linear", prefix_cache="memory", **options)
    found = plan(MODELS[name](), made, batch_size=2, length=8)
    lines = [line for line in str(found).splitlines() if "prefix_cache" in line]
    assert len(lines) == 1 and lines[0].startswith(f"prefix_cache: {'not known yet' if 'chosen' in why else 'off'}, ")
    assert found.prefix.later == found.prefix.whole == found.flops
    assert why in lines[0]


FEW = ["layerpeft.select=last:1", "max_train_samples=8", "max_eval_samples=2", "max_length=96", "max_steps=-1"]


def test_a_recipe_says_what_its_rows_take(capsys, tmp_path):
    words = [f"model_name_or_path={short_llama(3)}", f"output_dir={tmp_path}", *FEW]
    assert main(["plan", "quickstart", *words, "layerpeft.prefix_cache=memory"]) == 0
    text = capsys.readouterr().out
    setup = tokenized(prepare(load_recipe("quickstart", words, "plan")))
    tokens = sum(min(96, len(ids)) for part in (setup.train, setup.held_out) for ids in part["input_ids"])
    assert f"the states of {tokens:,} tokens take" in text and "3 epochs take 0." in text
    assert "prefix_cache: later epochs begin at layer 2, and 768 B are kept of a token" in text


@pytest.mark.slow
def test_a_recipe_says_what_was_not_asked_where_it_is_much_and_when_rows_do_not_come_again(capsys, tmp_path):
    words = [f"model_name_or_path={short_llama(6)}", f"output_dir={tmp_path}", *FEW]
    unasked = forecast("quickstart", words)
    ratio = unasked.to_dict()["prefix"]["ratio"]
    assert (ratio < 0.9) == ("prefix_cache: memory would take" in str(unasked))
    assert "prefix_cache" in str(forecast("quickstart", [*words, "num_train_epochs=30"]))
    assert "prefix_cache" not in str(forecast("quickstart", [*words, "num_train_epochs=1"]))
    assert main(["plan", "quickstart", *words, "layerpeft.prefix_cache=memory", "max_steps=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["prefix"]
    assert 0 < found["epochs"] < 1 and found["ratio"] == 1 and found["setting"] == "memory"
    within = str(forecast("quickstart", [*words, "layerpeft.prefix_cache={where: disk, limit: 100KB}"]))
    assert "within the limit of 97.7 KiB" in within and "of later batches of 4 rows begin there" in within


@pytest.mark.slow
def test_rows_of_a_classifier_are_counted_too(tmp_path):
    words = [
        f"output_dir={tmp_path}",
        "max_train_samples=12",
        "layerpeft.prefix_cache=memory",
        "layerpeft.lower_dropout=off",
    ]
    lines = [f'{{"text": "{"word " * (n % 5 + 1)}", "label": "{n % 2}"}}' for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "r.yaml").write_text(
        f"trainer: classification\nmodel_name_or_path: {short_llama(3)}\ndataset_name: rows.jsonl\n"
        f"layerpeft: {{select: 'last:1', r: 4}}\nmax_length: 4\nnum_train_epochs: 2\n"
    )
    found = forecast(str(tmp_path / "r.yaml"), words)
    setup = prepare(load_recipe(str(tmp_path / "r.yaml"), words, "plan"))
    assert found.rows is not None and not found.rows.about and found.rows.epochs == 2
    assert found.rows.tokens == sum(map(len, setup.train["input_ids"])) <= 48

"""What fields declare: bounds, choices and words, and every fault in one message."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerpeft import LayerFullConfig, LayerGaloreConfig, LayerLoraConfig, LayerQuantConfig, Select
from layerpeft.errors import ConfigError, Problem, Problems, SelectionError
from layerpeft.selection.typecheck import check, checked


@dataclass
class Declared:
    count: int = checked(8, "How many.", least=1)
    rank: int | None = checked(None, above=0)
    seed: int = checked(0)
    share: float = checked(0.5, least=0, below=1)
    part: float | None = checked(None, above=0, most=1)
    bits: float = checked(4.5, least=1, most=32)
    beat: int | Literal["never"] | None = checked(None, least=1)
    side: str = checked("right", choices=("right", "left"))
    order: Literal["up", "down"] = checked("up")
    names: list[str] | None = checked(None, words="a list of names")
    flag: bool = checked(True)
    free: Any = None


def faults(kind: type = Declared, every: bool = False, sign: str = "=", **values: Any) -> list[str]:
    problems = Problems("")
    check(kind, values, problems, sign, every)
    assert all(item.path[0] in item.text for item in problems.items if isinstance(item, Problem))
    return [str(item.text) for item in problems.items if isinstance(item, Problem)]


@pytest.mark.parametrize(
    ("name", "good", "bad", "sentence"),
    [
        ("count", [1, 8], [0, 1.0, True, "8", None], "is not a whole number from 1"),
        ("rank", [None, 1], [0, -1, False, 2.0], "is not a whole number above 0"),
        ("seed", [-3, 0], [0.5, True, None], "is not a whole number"),
        ("share", [0, 0.99], [1, -0.1, math.nan, "0.5", False], "is not a number from 0 to below 1"),
        ("part", [None, 1, 1e-9], [0, 1.1, math.inf], "is not a number above 0 and at most 1"),
        ("bits", [1, 32, 4.5], [0.99, 33, None], "is not a number from 1 to 32"),
        ("beat", [None, 1, "never"], [0, "often", 2.5, True], "is not a whole number from 1"),
        ("names", [None, ["a"], ("a", "b"), {"a"}, []], [5, "a", [1]], "is not a list of names"),
        ("flag", [True, False], [1, "yes", None], "is not true or false"),
        ("free", [object(), None, "x"], [], ""),
    ],
)
def test_a_value_is_of_its_type_and_within_its_bounds(name, good, bad, sentence):
    assert [v for v in good if faults(**{name: v})] == []
    for value in bad:
        assert faults(**{name: value}) == [f"{name}={value!r} {sentence}"]
        assert faults(sign=": ", **{name: value}) == [f"{name}: {value!r} {sentence}"]


def test_a_choice_is_told_with_the_nearest_and_the_allowed():
    assert faults(side="left", order="down") == []
    assert faults(side="rihgt", order="dwon") == [
        "unknown side 'rihgt'. Did you mean 'right'? Allowed: left, right.",
        "unknown order 'dwon'. Did you mean 'down'? Allowed: down, up.",
    ]
    assert faults(side=None, order=["up"]) == [
        "unknown side None. Allowed: left, right.",
        "unknown order ['up']. Allowed: down, up.",
    ]


def test_what_is_not_given_is_not_looked_at_and_a_bound_that_is_none_is_an_error():
    assert faults() == [] and faults(unheard_of=3) == []
    with pytest.raises(TypeError, match="lest"):
        checked(1, lest=1)


@given(value=st.one_of(st.integers(-3, 40), st.floats(-3, 40), st.booleans(), st.none(), st.text(max_size=2)))
def test_bounds_are_what_they_say(value):
    whole, number = type(value) is int, type(value) in (int, float)
    assert bool(faults(count=value)) is not (whole and value >= 1)
    assert bool(faults(rank=value)) is not (value is None or whole and value > 0)
    assert bool(faults(share=value)) is not (number and 0 <= value < 1)
    assert bool(faults(part=value)) is not (value is None or number and 0 < value <= 1)
    assert bool(faults(bits=value)) is not (number and 1 <= value <= 32)


@dataclass(frozen=True)
class Options:
    k: int = 8
    lr: float = 1.0
    exact: bool = False
    form: Literal["sum", "mean"] = "sum"
    power: Literal[1, 2] = 1
    window: tuple[float, float] = (0.35, 0.65)
    limit: int | None = None
    precision: str | int = "nf4"
    text: str = ""
    least: float = checked(0.0, least=0)


def test_options_of_a_plug_in_are_declared_by_their_hints():
    assert faults(Options, True, k=1, lr=0.5, window=[0.1, 0.2], limit=None, precision=4.5, text=3, least=0) == []
    assert faults(
        Options, True, ": ", k=0, lr=0, exact="yes", form="men", power=3, window=[0.1], limit=1.5, least=-1, window_=1
    ) == [
        "k: 0 is not a whole number from 1",
        "lr: 0 is not a number above 0",
        "exact: 'yes' is not true or false",
        "unknown form 'men'. Did you mean 'mean'? Allowed: mean, sum.",
        "unknown power 3. Allowed: 1, 2.",
        "window: [0.1] is not a list of 2 numbers",
        "limit: 1.5 is not a whole number from 1",
        "least: -1 is not a number from 0",
    ]
    assert faults(Options, False, k=0, lr=0, form="men") == []  # nothing of them is declared by hand


def test_a_subclass_whose_hints_cannot_be_read_is_checked_all_the_same():
    class Local:
        pass

    @dataclass
    class Mine(LayerFullConfig):
        other: Local | None = None

    assert Mine(select="last:1").other is None
    with pytest.raises(ConfigError, match="biases='no' is not true or false"):
        Mine(biases="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "sentences"),
    [
        (
            lambda: Select.parse(
                {
                    "by": "outliers",
                    "M": 0,
                    "keep": 2,
                    "pick": "cycle",
                    "order": "acsending",
                    "reselect_steps": 0,
                    "rescore_steps": "nevr",
                    "memory": "lst",
                    "state": 3,
                    "decay": 1.0,
                    "seed": "a",
                    "stack": 5,
                    "log_gradients": 1,
                }
            ),
            [
                "reselect_steps: 0 is not a whole number from 1",
                "rescore_steps: 'nevr' is not a whole number from 1",
                "unknown memory 'lst'. Did you mean 'last'? Allowed: counts, ema, last.",
                "unknown state 3. Allowed: clear, keep, offload.",
                "decay: 1.0 is not a number from 0 to below 1",
                "decay: is of memory: ema",
                "seed: 'a' is not a whole number",
                "stack: 5 is not a name",
                "log_gradients: 1 is not true or false",
                "M: 0 is not a number above 0",
                "unknown order 'acsending'. Did you mean 'ascending'? Allowed: ascending, descending, permutation.",
            ],
        ),
        (
            lambda: Select.parse({"by": "gradient_norm", "memory": "lst", "reselect_steps": 5}),
            ["unknown memory 'lst'", "keep: missing; say how many layers to keep"],
        ),
        (
            lambda: LayerQuantConfig(mean_bits=64, per="modul", group_size=4, split_fused=1, skip_modules=5, choices=5),  # type: ignore[arg-type]
            [
                "mean_bits=64 is not a number from 1 to 32",
                "unknown per 'modul'. Did you mean 'module'? Allowed: layer, module.",
                "group_size=4 is not a whole number from 8",
                "split_fused=1 is not true or false",
                "skip_modules=5 is not a list of names",
                "choices=5 is not a list of precisions",
            ],
        ),
        (
            lambda: LayerGaloreConfig(
                r=0, max_rank=0, scale=-1, proj_type="rihgt", gap_overlap="x", stagger="no", seed="a"
            ),  # type: ignore[arg-type]
            [
                "r=0 is not a whole number above 0",
                "max_rank=0 is not a whole number above 0",
                "scale=-1 is not a number above 0",
                "unknown proj_type 'rihgt'. Did you mean 'right'? Allowed: left, reverse_std, right, std.",
                "gap_overlap='x' is not a number above 0 and at most 1",
                "stagger='no' is not true or false",
                "seed='a' is not a whole number",
            ],
        ),
        (
            lambda: LayerFullConfig(biases=0, master_weights=2, train_new="yes"),  # type: ignore[arg-type]
            ["biases=0 is not true or false", "master_weights=2 is not true or false", "train_new='yes' is not"],
        ),
        (lambda: LayerLoraConfig(train_new=None), ["train_new=None is not true or false"]),  # type: ignore[arg-type]
    ],
)
def test_all_faults_of_a_config_are_told_at_once(make, sentences):
    with pytest.raises((ConfigError, SelectionError)) as caught:
        make()
    text = str(caught.value)
    assert [s for s in sentences if s not in text] == []
    assert len(sentences) == 1 or f"{len(sentences)} problems" in text

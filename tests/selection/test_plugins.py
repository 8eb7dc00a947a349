"""What a plug-in holds and says of itself, checked once when it is loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from layerpeft import Select
from layerpeft.errors import ConfigError
from layerpeft.selection import picks, plugins, scorers

GROUPS = {"layerpeft.scorers": scorers, "layerpeft.picks": picks}


@dataclass(frozen=True)
class Options:
    temper: float = 1.0


@dataclass(frozen=True)
class Bare:
    temper: float


SCORER = {"Options": Options, "needs": lambda options: "nothing", "score": lambda request, options: None}
PICK = {"Options": Options, "pick": lambda scores, keep, seed, options: [0]}


@pytest.fixture
def load(monkeypatch):
    """Loads a plug-in of another package that holds what is given."""

    def run(group: str, **held: Any) -> ModuleType:
        module = ModuleType("theirs.mine")
        vars(module).update(held)
        entry = SimpleNamespace(name="mine", value="theirs.mine", load=lambda: module)
        monkeypatch.setattr(plugins, "entry_points", lambda group=group, here=group: [entry] if group == here else [])
        plugins._installed.cache_clear()
        plugins._get.cache_clear()
        return plugins.get(group, "mine")

    yield run
    plugins._installed.cache_clear()
    plugins._get.cache_clear()


def refused(load, group: str, **held: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(group, **held)
    return str(caught.value)


@pytest.mark.parametrize("group", GROUPS)
def test_all_of_ours_hold_what_they_must(group):
    for name in plugins.names(group):
        assert isinstance(plugins.traits(group, name), GROUPS[group].Traits)  # type: ignore[attr-defined]


def test_without_traits_the_defaults_hold(load):
    assert load("layerpeft.scorers", **SCORER).needs is SCORER["needs"]
    assert plugins.traits("layerpeft.scorers", "mine") == scorers.Traits(live_only=False, of_whole=False, unseen=0.0)
    load("layerpeft.picks", **PICK, TRAITS=picks.Traits(decides=True))
    assert plugins.traits("layerpeft.picks", "mine").decides and not plugins.traits("layerpeft.picks", "top").decides


def test_a_plug_in_of_another_package_is_asked_for_its_options(load):
    load("layerpeft.picks", **PICK)
    select = Select.parse({"by": "random", "keep": 2, "pick": "mine", "temper": 0.5})
    assert select.options == {"temper": 0.5}
    with pytest.raises(Exception, match="temper: 0 is not a number above 0"):
        Select.parse({"by": "random", "keep": 2, "pick": "mine", "temper": 0})


def test_everything_that_is_missing_is_told_at_once(load):
    text = refused(load, "layerpeft.scorers", score=3)
    assert text.startswith("layerpeft.scorers: mine (theirs.mine): 3 problems")
    for part in (
        "Options: missing",
        "needs(options): missing",
        "score(request, options) or start(request, options): m",
    ):
        assert part in text
    assert "pick(scores, keep, seed, options) or again(turn, options): missing" in refused(load, "layerpeft.picks")
    assert "Options.temper: has no default" in refused(load, "layerpeft.picks", **PICK | {"Options": Bare})
    assert "Options: missing" in refused(load, "layerpeft.picks", **PICK | {"Options": dict})


def test_a_misspelt_trait_is_an_error_by_construction():
    with pytest.raises(TypeError, match="decide"):
        picks.Traits(decide=True)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        picks.Traits().decides = True  # type: ignore[misc]


@pytest.mark.parametrize("group", GROUPS)
def test_bare_constants_are_refused_with_what_to_write(load, group):
    whole, kind = (SCORER, scorers.Traits) if group == "layerpeft.scorers" else (PICK, picks.Traits)
    for trait in (f.name for f in fields(kind)):
        for name in (trait.upper(), trait.upper()[1:], trait.upper() + "S", trait.upper().replace("_", "")):
            text = refused(load, group, **whole, **{name: True})
            assert (
                f"{name} = True is not read; write TRAITS = Traits({trait}=True), with Traits from {kind.__module__}"
                in text
            )
    two = refused(load, group, **whole, **{f.name.upper(): 1 for f in fields(kind)})
    assert f"{len(fields(kind))} problems" in two


def test_what_only_looks_a_little_like_a_trait_is_let_through(load):
    held = {"SCORES": 3, "TRIES": 1000, "UNSEEN": "a text", "_DECIDES": True, "decides": True, "LIVE": True, "MISC": {}}
    assert load("layerpeft.picks", **PICK, **held) and load("layerpeft.scorers", **SCORER, **held)


def test_traits_that_nobody_would_read_are_refused(load):
    assert "TRAIT = Traits(" in refused(load, "layerpeft.picks", **PICK, TRAIT=picks.Traits(decides=True))
    assert "has to be TRAITS" in refused(load, "layerpeft.picks", **PICK, traits=picks.Traits())
    other = refused(load, "layerpeft.picks", **PICK, TRAITS=scorers.Traits(live_only=True))
    assert "is not read; write TRAITS = Traits(…), with Traits from layerpeft.selection.picks" in other
    assert "is not read" in refused(load, "layerpeft.picks", **PICK, TRAITS={"decides": True})
    wrong = refused(load, "layerpeft.picks", **PICK, TRAITS=picks.Traits(decides="yes"))  # type: ignore[arg-type]
    assert "decides='yes' is not true or false" in wrong
    wrong = refused(load, "layerpeft.scorers", **SCORER, TRAITS=scorers.Traits(unseen="much"))  # type: ignore[arg-type]
    assert "unseen='much' is not a number" in wrong


def test_groups_without_traits_hold_what_they_like(tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "__init__.py").write_text("")
    (tmp_path / "toys" / "ball.py").write_text("DECIDES = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.names("toys") == ("ball",) and plugins.get("toys", "ball").DECIDES
    sys.modules.pop("toys", None)

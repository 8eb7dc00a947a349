"""`LayerQuantConfig`: which layers are stored in how many bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, ClassVar, Literal

from peft import PeftConfig

from layerpeft.errors import ConfigError, LayerpeftError, Problems, hint
from layerpeft.integrations.peft import LayerPeftType
from layerpeft.model import precisions
from layerpeft.model.precisions import KEPT, PRECISIONS, Storage
from layerpeft.selection.chooses import Chooses
from layerpeft.selection.grammar import check_grammar
from layerpeft.selection.scores import Scores
from layerpeft.selection.select import Select
from layerpeft.selection.typecheck import check, checked
from layerpeft.text import no_size, size_of

CHOICES = (2, 3, 4, 8, 16)


@dataclass
class LayerQuantConfig(Chooses, PeftConfig):
    """Bits by layer: picked layers in `bits`, the others in `rest`; or a budget spent over layers where scores say it matters.

    As the field `quant` of a training config, or alone through `layerpeft.quantize(model, config)`. A precision is a number of
    bits (1, 2, 3: HQQ; 4: nf4; 8: int8; 16: as loaded) or a name ("nf4", "fp4", "int8", "hqq4", …).
    Raises: ConfigError naming every problem at once.
    """

    select: Any = checked("all", "Which layers get `bits`; with a budget: the scorer that spends it.")
    bits: Any = checked(
        None, "Precision of the picked layers (default: 4); or layers and theirs: {'first:2': 8, '2-9': nf4}."
    )
    rest: Any = checked(None, "Precision of the other layers, of other stacks too. Default: as they are.")
    mean_bits: float | None = checked(
        None, "Budget: stored bits per weight over the layers, scales included (uniform nf4 is 4.5).", least=1, most=32
    )
    budget: int | str | None = field(
        default=None, metadata={"help": "Budget: bytes of all weights of the model, such as '6GB' or '800MiB'."}
    )
    choices: list[Any] | None = checked(
        None, "Precisions that a budget may use. Default: 2, 3, 4, 8, 16.", words="a list of precisions"
    )
    allocation: Literal["greedy", "paired", "lowest_first"] = checked(
        "greedy", "How a budget is spent: greedy, paired (as many raised as lowered), or lowest_first (LUQ's)."
    )
    objective: Literal["scores", "kl"] = checked(
        "scores", "What a budget is spent by: scores, or kl (measured on batches)."
    )
    per: Literal["layer", "module"] = checked(
        "layer", "What gets bits of its own: layer, or module (q/k/v and gate/up together)."
    )
    split_fused: bool = checked(False, "Lets q, k, v (gate, up) of one layer have different bits.")
    apply_to: Literal["all", "frozen", "trained"] = checked(
        "all", "As field quant: all layers, or only those that are frozen, or that train."
    )
    skip_modules: list[str] | None = checked(
        None, "Linears to leave alone besides the defaults.", words="a list of names"
    )
    extra_modules: list[str] | None = checked(
        None, "Linears to quantize although they are left alone by default, such as lm_head.", words="a list of names"
    )
    group_size: int = checked(64, "Weights per scale, for 1 to 3 bits and hqq4.", least=8)
    double_quant: bool = checked(False, "Quantize the scales of 4-bit weights, too.")
    batches: InitVar[Iterable[Any] | None] = None
    kind: ClassVar[LayerPeftType] = LayerPeftType.LAYER_QUANT

    def __post_init__(self, batches: Iterable[Any] | None = None) -> None:
        self._batches = batches
        problems = Problems("LayerQuantConfig")
        self._select = _parsed(self, problems)
        _check_values(self, problems)
        _check_budget(self, problems)
        problems.raise_if_any(ConfigError)
        self.peft_type = self.kind  # type: ignore[assignment]

    @classmethod
    def parse(cls, value: Any) -> LayerQuantConfig:
        """A config from a config or a dict (as YAML gives it). Raises: ConfigError."""
        if isinstance(value, LayerQuantConfig):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"quant: expected a LayerQuantConfig or a dict such as {{'select': 'first:4', 'bits': 4}}, got {value!r}"
            )
        own = _own_fields()
        problems = Problems("quant")
        for name in (n for n in value if n not in own):
            close = hint(name, own, "; did you mean {!r}?")
            problems.add(f"unknown key {name!r}{close}; allowed: {', '.join(sorted(own))}", str(name))
        problems.raise_if_any(ConfigError)
        return cls(**value)

    @property
    def choosing(self) -> Select:
        """`select`, parsed."""
        return self._select

    @property
    def has_budget(self) -> bool:
        """Whether bits are spent from a budget."""
        return self.mean_bits is not None or self.budget is not None

    @property
    def budget_bytes(self) -> int | None:
        """`budget` in bytes."""
        return parse_bytes(self.budget) if self.budget is not None else None

    @property
    def storage(self) -> Storage:
        """How the weights are packed."""
        return Storage(self.group_size, self.double_quant)

    @property
    def picked(self) -> str:
        """The precision of the picked layers; where layers are listed with theirs, the first of them."""
        given = next(iter(self.bits.values())) if isinstance(self.bits, Mapping) else self.bits
        return precisions.named(4 if given is None else given)

    @property
    def listed(self) -> dict[Any, str] | None:
        """Layers by the grammar and their precisions, where `bits` lists them."""
        if not isinstance(self.bits, Mapping):
            return None
        return {layers: precisions.named(value) for layers, value in self.bits.items()}

    @property
    def others(self) -> str | None:
        """The precision of the other layers; None: the one they have."""
        return None if self.rest is None else precisions.named(self.rest)

    @property
    def may_use(self) -> tuple[str, ...]:
        """The precisions that a budget is spent on, fewest bits first."""
        given = [precisions.named(c) for c in (CHOICES if self.choices is None else self.choices)]
        return tuple(sorted(dict.fromkeys(given), key=lambda n: PRECISIONS[n].bits))

    def plain(self) -> dict[str, Any]:
        """What was asked for, as a recipe would write it, defaults left out."""
        given = self.select
        select = given if isinstance(given, str | int | list) else _written(self.choosing, given)
        own = [f for f in fields(self) if f.name in _own_fields() and f.name != "select"]
        changed = {f.name: value for f in own if (value := getattr(self, f.name)) != f.default}
        return {"select": select, **changed}

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return self.plain() | {"peft_type": self.kind.value}


LayerQuantConfig.batches = property(lambda self: self._batches)  # type: ignore[assignment,misc]


def _own_fields() -> set[str]:
    return {f.name for f in fields(LayerQuantConfig)} - {f.name for f in fields(PeftConfig)}


def used(config: LayerQuantConfig) -> tuple[str, ...]:
    """The precisions that a config may come to."""
    picked = tuple(config.listed.values()) if config.listed is not None else (config.picked,)
    return (*(config.may_use if config.has_budget else picked), config.others or KEPT)


def parse_bytes(value: Any) -> int:
    """Bytes from a number, or a text such as "6GB" (powers of 1000) or "6GiB" (of 1024). Raises: ValueError."""
    found = size_of(value)
    if not found:
        raise ValueError(no_size(value))
    return found


def _written(select: Select, given: Any) -> Any:
    plain = select.to_dict()
    if isinstance(given, Mapping):
        plain["by"] = given.get("by", "depth")
        if "keep" not in given:
            plain.pop("keep", None)
        if isinstance(plain["by"], Scores):
            plain["by"] = plain["by"].to_dict()
    return plain


def _parsed(config: LayerQuantConfig, problems: Problems) -> Select:
    given = config.select
    if config.has_budget and isinstance(given, Mapping):
        for name in ("keep", "pick"):
            if given.get(name) is not None:
                problems.add(f"select.{name}: a budget gives every layer its bits; leave {name} out", "select", name)
        given = {**{k: v for k, v in given.items() if k not in ("keep", "pick")}, "keep": 1}
    try:
        select = Select.parse(given)
    except LayerpeftError as error:
        problems.absorb(error, "select")
        return Select()
    if select.per is not None or select.budget is not None:
        name = "keep" if select.per is None else "per"
        problems.add(f"select.{name}: costs of a step are of layers that train; leave them out", "select", name)
    if select.is_scheduled:
        problems.add("select.reselect_steps: precisions are chosen once; leave it out", "select", "reselect_steps")
    return select


def _check_values(config: LayerQuantConfig, problems: Problems) -> None:
    listed = config.bits if isinstance(config.bits, Mapping) else {}
    if isinstance(config.bits, Mapping):
        if not listed:
            problems.add("bits: an empty list of layers; write {'first:2': 8, '2-9': 'nf4'}", "bits")
        if config._select != Select(stack=config._select.stack):
            problems.add(
                f"bits lists layers and their precisions, and select={config.select!r} picks some, too; leave select out "
                "but for its stack",
                "bits",
            )
    for layers, value in listed.items():
        check_grammar("bits", layers, problems)
        _named(f"bits: {layers}", value, problems, "bits")
    for name in ("bits", "rest"):
        value = getattr(config, name)
        if value is not None and not (name == "bits" and isinstance(value, Mapping)):
            _named(name, value, problems)
    check(type(config), vars(config), problems)


def _check_budget(config: LayerQuantConfig, problems: Problems) -> None:
    if config.budget is not None:
        try:
            parse_bytes(config.budget)
        except ValueError as error:
            problems.add(f"budget={error}", "budget")
    if config.mean_bits is not None and config.budget is not None:
        problems.add("mean_bits and budget: two budgets; give one", "budget")
    if config.has_budget and config.bits is not None:
        problems.add(
            f"bits={config.bits!r}: a budget gives every layer its bits; leave bits out, or write choices", "bits"
        )
    if config.has_budget and config.choosing.unit != "layer":
        problems.add(f"select: unit: {config.choosing.unit} is of layers that are picked; a budget has `per`", "select")
    if isinstance(config.choices, list | tuple):
        good = [n for n in (_named("choices", c, problems) for c in config.choices) if n]
        if len(set(good)) < 2 and len(good) == len(config.choices):
            problems.add(f"choices={config.choices!r}: a budget needs two precisions or more to choose from", "choices")
    if config.has_budget and config.allocation == "lowest_first":
        if len(config.choices or ()) != 2 and isinstance(config.choices, list | tuple | None):
            problems.add(
                f"choices={config.choices!r}: allocation: lowest_first lowers layers from one precision to another, one after "
                "another; write the two, such as [1, 4]",
                "choices",
            )
        if config.objective == "kl":
            problems.add(
                "objective: kl: allocation: lowest_first goes by the order of scores alone; leave it out", "objective"
            )
    if not config.has_budget:
        for name in ("choices", "allocation", "objective", "per"):
            if getattr(config, name) != getattr(type(config), name):
                problems.add(f"{name}={getattr(config, name)!r}: is of a budget; write mean_bits or budget", name)


def _named(name: str, value: Any, problems: Problems, key: str = "") -> str | None:
    try:
        return precisions.named(value)
    except ValueError as error:
        problems.add(f"{name}: {error}", key or name)
        return None


def frozen_precision(name: str, value: Any, problems: Problems) -> None:
    """Adds what is wrong with `quantize_frozen` or `quantize_trained`."""
    if value is None:
        return
    found = _named(name, value, problems)
    if found == KEPT:
        problems.add(f"{name}={value!r}: 16 bit is what happens without it; leave it out", name)

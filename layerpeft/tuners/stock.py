"""A choice as a stock LoRA config, whose folder plain PEFT loads, and whose save leaves the record beside it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from peft import LoraConfig, PeftConfig
from torch import nn

from layerpeft.errors import ConfigError, Problem, Problems
from layerpeft.integrations.peft import HEADS, renamed_leaves
from layerpeft.model.experts import SINGLE, check_experts
from layerpeft.model.layers import Target, base_of
from layerpeft.model.names import adapted
from layerpeft.model.new_modules import new_modules
from layerpeft.model.stacked import EXPERT, place_of
from layerpeft.model.targets import PARAMETERS, like
from layerpeft.saving import manifest
from layerpeft.selection.select import Selection
from layerpeft.text import note
from layerpeft.training.method import Method
from layerpeft.training.record import Record, record_of, write_record
from layerpeft.tuners import ranks

NAMES = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")  # fields that name modules


class Recorded(PeftConfig):
    """Beside a config class of PEFT's own: its folder also keeps the record of what was chosen, and why."""

    _layerpeft: ClassVar[Any]  # of each, where it has one

    def bind(self, model: nn.Module, adapter: str) -> Method:
        """Its method, bound to this model and adapter; from now on its folder tells of those."""
        record, kind = self._layerpeft, self._layerpeft.asked.works_by
        record.bound = kind(model, adapter, self)
        return record.bound

    def recorded(self, record: Record) -> Self:
        """Itself, with this record."""
        vars(self)["_layerpeft"] = record
        return self

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's file, as the method's weights are read, then the files of the record, and last `layerpeft.json`.

        Raises: SaveError.
        """
        record = record_of(self)
        bound = record.bound if record is not None and record.bound is not None and record.bound.alive else None
        chosen = record is not None and record.selection is not None
        whole = bound is not None and chosen and manifest.has_weights(save_directory)
        os.makedirs(save_directory, exist_ok=True)
        twin = object.__new__(type(self))
        fields = bound.as_stock(os.fspath(save_directory)) if bound is not None and chosen else {}
        listed = getattr(self, "modules_to_save", None) if record is None else None
        if listed and manifest.has_weights(save_directory):  # a pickled copy does not know what was ever active
            keys = manifest.keys_in(save_directory)
            fields = {"modules_to_save": [n for n in listed if any(f".{n}." in k for k in keys)]}
        fields = vars(self) | fields
        for name in NAMES:  # as in the user's own model, whatever was put around its modules
            if isinstance(fields.get(name), list | set | tuple):
                fields[name] = type(fields[name])(map(adapted, fields[name]))
        twin.__dict__ |= fields
        super(Recorded, twin).save_pretrained(save_directory, **kwargs)
        if record is not None and not chosen:
            note(
                f"{save_directory}: saved before the choice was made; it holds an adapter on every candidate, and no record"
            )
        elif record is not None and bound is not None and whole:
            write_record(save_directory, bound.model, record, bound.adapter)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value if name == "_layerpeft" else copy.deepcopy(value, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_layerpeft"}


@dataclass
class RecordedLoraConfig(Recorded, LoraConfig):
    """A stock LoRA config with a record."""


def stock_config(config: Any, model: nn.Module, selection: Selection, targets: Sequence[Target]) -> Recorded:
    """The config that PEFT sees of a `LayerLoraConfig`: full names of the chosen targets, new heads to save, and a record."""
    kinds = {t.name: t.kind for t in targets}
    given = lora_fields(config)
    born = new_modules(model) if config.train_new else ()
    if born:
        listed = [] if config.modules_to_save is None else list(config.modules_to_save)
        given["modules_to_save"] = listed + [n for n in born if not any(n == k or n.endswith(f".{k}") for k in listed)]
    # of single experts the tensor that they lie in
    places = {n: place_of(n)[0] if kind == EXPERT else n for n, kind in kinds.items()}
    parameters = list(dict.fromkeys(places[n] for n in selection.targets if kinds[n] in (*PARAMETERS, EXPERT)))
    modules = {n for n in selection.targets if kinds[n] not in (*PARAMETERS, EXPERT)}
    check_experts(base_of(model), dict.fromkeys(places[n] for n in selection.targets if kinds[n] == EXPERT), SINGLE)
    wrong = unmatched(config, model, places.values())
    if wrong:
        raise ConfigError(*(ConfigError(problem, title=problem.path[-1]) for problem in wrong))
    _refuse_saved_targets(given["modules_to_save"], selection.targets)
    _refuse_renamed_targets(model, modules)
    given |= {
        "target_modules": modules or [],
        "target_parameters": parameters or None,
        "exclude_modules": _namesakes(model, modules) or None,
    }
    there = {adapted(n): n for n, _ in base_of(model).named_modules()}
    for name in NAMES[:2]:  # PEFT looks for them under the names that compiled or divided blocks have
        given[name] = given[name] and type(given[name])(there.get(n, n) for n in given[name])
    chosen = [t for t in targets if t.name in set(selection.targets)]
    if config.ranks and selection.scores is not None:  # a plan knows of none yet, and counts as many parameters
        found = ranks.by_score(dict(enumerate(selection.scores.values)), chosen, config.r, config.min_rank or 1)
        given |= ranks.patterns(config, found)
    stock = config.stock(given, chosen)
    return stock.recorded(Record(plain_config(config), config.method, selection, new_tensors=born, asked=config.bare()))


def unmatched(config: LoraConfig, model: nn.Module, targets: Iterable[str]) -> list[Problem]:
    """What of a config's names and patterns matches nothing, which PEFT passes over: ranks and alphas of no target among
    `targets`, and modules that are not in the model."""
    modules, targets = [n for n, _ in base_of(model).named_modules() if n], list(targets)
    found: list[Problem] = []
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, None) or ():
            try:
                if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):  # as PEFT does
                    sentence = f"'{pattern}' matches no target that trains. {like(pattern, targets)}"
                    found.append(Problem((key,), sentence))
            except re.error as error:
                found.append(Problem((key,), f"'{pattern}' is no regular expression: {error}"))
    saved, tokens = getattr(config, "modules_to_save", None) or (), getattr(config, "trainable_token_indices", None)
    named = [("modules_to_save", name, name) for name in saved if name not in HEADS]
    named += [("trainable_token_indices", name, f".{name}") for name in tokens] if isinstance(tokens, dict) else []
    for key, name, end in named:
        if name not in modules and not any(n.endswith(end) for n in modules):
            found.append(Problem((key,), f"'{name}' matches no module of the model. {like(name, modules)}"))
    return found


def _refuse_saved_targets(modules_to_save: Any, targets: tuple[str, ...]) -> None:
    """Raises: ConfigError for chosen targets inside `modules_to_save`: PEFT would copy them whole and wrap nothing."""
    problems = Problems("modules_to_save")
    for name in modules_to_save or ():
        held = [t for t in targets if re.match(rf"(^|.*\.){name}($|\..*)", t)]
        if held:
            problems.add(
                f"{name!r} holds {len(held)} of the chosen targets ({held[0]}{', …' if len(held) > 1 else ''}); PEFT trains "
                "such modules as whole copies, in every layer, and puts no LoRA in them. Leave them out of target_modules "
                "(exclude_modules), or out of modules_to_save (train_new=False where they are new)"
            )
    problems.raise_if_any(ConfigError)


def _refuse_renamed_targets(model: nn.Module, chosen: set[str]) -> None:
    """Raises: ConfigError for modules whose names PEFT would turn into the experts of all layers."""
    leaves = renamed_leaves(base_of(model), chosen)
    lost = sorted(n for n in chosen if n.rpartition(".")[2] in leaves)
    if lost:
        ends = sorted({".".join(n.split(".")[-2:]) for n in lost})
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ConfigError(
            f"target_modules: on this kind of model PEFT takes the names {', '.join(sorted(leaves))} for the experts of every "
            f"layer, so it cannot wrap {lost[0]}{more} by themselves. Leave them out with "
            f"exclude_modules={ends}; the experts of the chosen layers are named by target_parameters"
        )


def _namesakes(model: nn.Module, chosen: set[str]) -> set[str]:
    """Modules that PEFT would match too, because their names end with the full name of a chosen one."""
    found = set()
    for name, _ in base_of(model).named_modules():
        parts = name.split(".")
        if name not in chosen and any(".".join(parts[i:]) in chosen for i in range(1, len(parts))):
            found.add(name)
    return found


def plain_config(config: Any) -> dict[str, Any]:
    """A `LayerLoraConfig` as JSON takes it, without what is empty."""
    plain = config.to_dict()
    kept = {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items() if v not in (None, {}, [], set())}
    return kept | {"peft_type": config.kind.value}


def lora_fields(config: LoraConfig) -> dict[str, Any]:
    """What PEFT's own LoRA config takes of a config."""
    names = [f.name for f in fields(LoraConfig) if f.init and f.name != "peft_type"]
    return {name: copy.deepcopy(getattr(config, name)) for name in names}

"""What trains, as other tools say it: adapters, all weights, some layers, layers in turn, projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerpeft.recipe import cures
from layerpeft.recipe.importing import architecture, patterns
from layerpeft.recipe.importing.draft import Draft, flag, number, said, whole, words

FULL, LORA, GALORE = "full", "lora", "galore"
ORDERS = {"ascending": "ascending", "descending": "descending", "random": "permutation"}  # BAdam's names for ours
NAMES = "begins with one of these names there; here they are those of modules and tensors"


def adapters(draft: Draft, rank: int, alpha: Any, dropout: Any, targets: Any, told: Mapping[str, str]) -> None:
    """LoRA on all layers; `told`: where each of the four comes from."""
    draft.method = LORA
    draft.inside("method", LORA)
    found = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": cures.names(targets)}
    for name, value in found.items():
        if value not in (None, []):
            draft.inside(name, value, told.get(name, ""))


def everything(draft: Draft, why: str) -> None:
    """All weights, those outside of the layers too."""
    in_place(draft, "all", why)
    _outside(draft, "there they train as well")


def in_place(draft: Draft, select: Any, why: str) -> None:
    """The weights of some layers."""
    draft.method = FULL
    draft.inside("method", FULL)
    draft.inside("select", select, why)


def modules(draft: Draft, key: str, value: Any) -> None:
    """Modules that train whole beside the layers."""
    if found := words(value):
        draft.inside("modules_to_save", found, said(key, value))


def _outside(draft: Draft, why: str) -> None:
    names, known = architecture.outside(draft.given, draft.top.get("model_name_or_path"))
    guess = (
        "" if known else f"; the names are those of Llama, since no config.json is here to look at ({architecture.ASK})"
    )
    draft.inside("modules_to_save", names, f"{why}; take them out to leave embedding and head frozen{guess}")


def lisa(draft: Draft, layers: Any, steps: Any, told: str) -> None:
    """LISA: embedding, last norm and head always, some layers by turns."""
    keep, every = whole(layers), whole(steps)
    if not keep or not every or keep < 1 or every < 1:
        draft.refuse("lisa", f"expected how many layers train, and for how many steps, got {layers!r} and {steps!r}")
        return
    in_place(draft, {"pick": "uniform", "keep": keep, "reselect_steps": every}, told)
    _outside(draft, "they train all the time there, as well")


def badam(draft: Draft, order: Any, steps: Any, start: Any, told: str) -> None:
    """BAdam over layers: one after the other; embedding, last norm and head frozen."""
    every, first = whole(steps), whole(start)
    if order == "fixed" or every is not None and every < 1:  # one block, and no other
        place = first if first is not None else {"ascending": 0, "descending": -1}.get(str(order))
        if place is None:
            draft.refuse("badam_switch_mode", f"{order!r} trains one layer alone, and no badam_start_block says which")
        else:
            in_place(draft, [place], told)
    elif every is None or order not in ORDERS:
        draft.refuse(
            "badam_switch_mode",
            f"expected an order ({', '.join(ORDERS)}, fixed) and steps, got {order!r} and {steps!r}",
        )
    else:
        turns = {"pick": "cycle", "order": ORDERS[order], "keep": 1, "reselect_steps": every, "state": "clear"}
        in_place(draft, turns, told)
        if first is not None:
            draft.leave("badam_start_block", "a round begins with the first of its order", start)


def projected(draft: Draft, options: Mapping[str, Any], told: Mapping[str, str], random: bool = False) -> None:
    """GaLore's options by our names; `random`: APOLLO's, of which the subspace is all that is here."""
    draft.method = GALORE
    draft.inside("method", GALORE)
    if "select" not in draft.block:
        draft.inside("select", "all")
    for name, value in options.items():
        if value is not None:
            draft.inside(name, value, told.get(name, ""))
    draft.note("layerpeft.method", "what is not projected trains there, too; here norms in the layers stay frozen")
    _outside(draft, "they train there, unprojected")
    if random:
        draft.inside("subspace", "random")
        draft.note(
            "layerpeft.subspace", "APOLLO is not in this version: its subspace is, its scaling by channels is not"
        )


def by_names(draft: Draft, key: str, value: Any, literal: bool = False) -> None:
    """Parameters whose names begin with one of these."""
    try:
        found = patterns.choice([str(item) for item in value] if isinstance(value, list) else words(value), literal)
    except ValueError as error:
        draft.refuse(key, str(error))
        return
    if found.select is None:
        draft.refuse(key, f"{value!r} names no layer; embedding, norm and head alone are no choice of layers")
        return
    in_place(draft, found.select, key)
    if found.target_modules is not None:
        draft.inside("target_modules", found.target_modules, f"{key}: a parameter trains where its name {NAMES}")
    if found.modules_to_save:
        draft.inside("modules_to_save", list(found.modules_to_save), key)


def last(draft: Draft, key: str, count: int) -> str:
    """The last layers, the first where it is negative; no more than there are, where that is known."""
    known = architecture.depth(draft.given, draft.top.get("model_name_or_path"))
    most = min(abs(count), known) if known else abs(count)
    return f"{'last' if count > 0 else 'first'}:{most}"


def added(draft: Draft, key: str, count: Any) -> list[int] | None:
    """The layers that LLaMA Pro's expansion has put in: the last of each of `count` groups of layers."""
    known, groups = architecture.depth(draft.given, draft.top.get("model_name_or_path")), whole(count)
    if known is None:
        draft.refuse(key, f"which layers were added follows from how many there are; {architecture.ASK}")
    elif groups is None or groups < 1 or known % groups:
        draft.refuse(key, f"{known} layers do not divide into {count!r} groups, so no layer was added to each")
    else:
        stride = known // groups
        return list(range(stride - 1, known, stride))
    return None


def quantized(draft: Draft, kind: str, options: Mapping[str, Any], why: str) -> None:
    """The whole base in fewer bits, as bitsandbytes loads it."""
    config: dict[str, Any] = {f"load_in_{kind}": True}
    draft.put(
        "model_init_kwargs", {"quantization_config": config | {k: v for k, v in options.items() if v is not None}}, why
    )


def four_bits(kind: Any = "nf4", double: Any = True) -> dict[str, Any]:
    """bitsandbytes' options of 4-bit weights."""
    return {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": flag(double)}


# ---- optimizers that project ----------------------------------------------------------------------------------------

PROJECTING = ("galore_", "apollo_", "q_galore_")
_PLAIN = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "adafactor": "adafactor"}


def projecting(name: Any) -> tuple[str, str] | None:
    """Which projection an optimizer of transformers' is, and the optimizer inside: ("galore", "adamw_torch"); None of others."""
    start = next((s for s in PROJECTING if isinstance(name, str) and name.startswith(s)), None)
    if start is None:
        return None
    inner = str(name).removeprefix(start).removesuffix("_layerwise")
    return start.strip("_"), _PLAIN.get(inner, "adamw_torch")


def by_optimizer(draft: Draft, key: str, name: str, arguments: Any, targets: Any) -> None:
    """An optimizer that projects, with its arguments (`rank=64, scale=0.25`, or a mapping) and the modules it projects."""
    kind, inner = projecting(name) or ("", "")
    given = arguments if isinstance(arguments, Mapping) else _arguments(str(arguments or ""))
    ours = {"rank": "r", "update_proj_gap": "update_proj_gap", "scale": "scale", "proj_type": "proj_type"}
    random = kind == "apollo"
    options = {ours[k]: _number(v) for k, v in given.items() if k in ours and not (random and k == "scale")}
    told = {ours[k]: f"optim_args: {k}" for k in given if k in ours}
    options["target_modules"] = _targets(targets)
    told["target_modules"] = "optim_target_modules"
    projected(draft, options, told, random)
    draft.put("optim", inner, said(key, name))
    for left in [k for k in given if k not in ours or (random and k == "scale")]:
        draft.leave(f"optim_args.{left}", "projection has no such setting here", given[left])


def _targets(value: Any) -> Any:
    """transformers takes each as a regular expression, or as a part of a name."""
    if value in ("all_linear", "all-linear"):
        return "all-linear"
    items = words(value)
    plain: Sequence[str] = [item.strip(".*") for item in items]
    return list(dict.fromkeys(p for p in plain if p)) or "all-linear"


def _arguments(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(","))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def _number(value: Any) -> Any:
    found = number(value)
    return value if found is None else found

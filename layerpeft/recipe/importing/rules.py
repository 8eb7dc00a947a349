"""What a table says of a key of theirs: which key of ours takes its value, or why none does."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from layerpeft.errors import hint, nearest
from layerpeft.recipe import cures, foreign, keys
from layerpeft.recipe.importing.draft import Draft, flag, said
from layerpeft.recipe.yaml import parse
from layerpeft.selection.typecheck import Setting, complaint

Rule = Callable[[Draft, str, Any], None]
Change = Callable[[Any], Any]
# what only a recipe of ours says, whatever another tool means by the word
OWN = ("trainer", "layerpeft", "drop", "exits", "columns", "sample_tokens", "rewards", "loss")


def to(name: str, change: Change | None = None) -> Rule:
    """The top-level key `name` takes the value, changed; a ValueError of `change` says why it does not."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        try:
            new = value if change is None else change(value)
        except ValueError as error:
            draft.leave(key, str(error))
            return
        draft.put(name, new, said(key, value, new) if (key, value) != (name, new) else "")

    return rule


def lora(name: str, change: Change | None = None) -> Rule:
    """The block's `name` takes the value where low-rank adapters train."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if draft.method != "lora":
            draft.leave(key, "is of LoRA, and the weights themselves train here")
        else:
            new = value if change is None else change(value)
            draft.inside(name, new, said(key, value, new) if (key, value) != (name, new) else "")

    return rule


def out(why: str, unless: Any = ()) -> Rule:
    """No key takes it. `unless`: a value that says nothing, and goes without a word of warning."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        draft.leave(key, "says what is so in any case" if value == unless else why)

    return rule


def on(name: str, setting: Any, off: str = "false is the default") -> Rule:
    """A switch: true is a value of ours."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if flag(value):
            draft.put(name, setting, said(key, value))
        else:
            draft.leave(key, off)

    return rule


def together(draft: Draft, key: str, value: Any) -> None:
    """A key that was read with others before, and meant nothing without them."""
    if key not in draft.read:
        draft.leave(key, "means nothing without the key that switches it on")


def translate(draft: Draft, table: Mapping[str, Rule]) -> None:
    """Every key of theirs that was not read yet: by the tool's table, then as any tool spells it."""
    for key, value in draft.given.data.items():
        if value is None:
            draft.empty.append(key)
        elif key in draft.read:
            continue
        elif rule := _rule(table, key):
            rule(draft, key, value)
        else:
            _anything(draft, key, value, table)


def _rule(table: Mapping[str, Rule], key: str) -> Rule | None:
    """That of the key itself, else of the beginning of its name (`wandb_*`)."""
    found = (rule for start, rule in table.items() if start.endswith("*") and key.startswith(start[:-1]))
    return table.get(key) or next(found, None)


def _anything(draft: Draft, key: str, value: Any, table: Mapping[str, Rule]) -> None:
    known = keys.top_settings(draft.trainer)
    if key in keys.FIXED:
        draft.leave(key, keys.FIXED[key])
        return
    if key in known and key not in OWN:
        draft.put(key, value)
        return
    done = foreign.translate({key: value}, {k: v for k, v in known.items() if k not in OWN})
    if done.moved:
        new = next(iter(done.moved))
        draft.put(new, done.data[new], said(key, value, done.data[new]))
    elif done.complaints and (road := cures.cure(key, value, draft.given.data)):
        _cured(draft, key, value, road)
    elif done.complaints:
        draft.leave(key, done.complaints[0][1].removeprefix(f"{key}: "))
    elif done.notices:
        draft.leave(key, done.notices[0].removeprefix(f"{key}: "))
    elif other := _others(key, draft.trainer):
        draft.leave(key, f"is a setting of trainer: {' or '.join(other)}")
    else:
        near = hint(key, [k for k in table if not k.endswith("*")] + list(known))
        draft.leave(key, f"is no key that is known of {draft.tool}.{near}")


def _others(key: str, trainer: str) -> list[str]:
    return [name for name in keys.present() if name != trainer and key in keys.top_settings(name)][:3]


def _cured(draft: Draft, key: str, value: Any, road: cures.Cure) -> None:
    block = road.write.get("layerpeft", {})
    if not road.write:
        draft.leave(key, road.why or "says what is so in any case")
    elif {"method", "select"} & block.keys():
        draft.leave(key, f"goes with another choice of what trains than {draft.method}")
    for name, new in block.items() if not {"method", "select"} & block.keys() else ():
        if draft.method == "lora" or name in ("target_modules", "modules_to_save"):
            draft.inside(name, new, said(key, value))
        else:
            draft.leave(key, "is of LoRA, and the weights themselves train here")
    for name, new in road.write.items():
        if name != "layerpeft" and name in keys.top_settings(draft.trainer):
            draft.put(name, new, said(key, value) + (f" ({road.why})" if road.why else ""))


def fitted(setting: Setting, value: Any) -> Any:
    """The value as the setting takes it: numbers and switches may be text, and a switch a number."""
    if complaint(setting, value) is None:
        return value
    tries: list[Any] = [flag(value)] if value in ("yes", "no", "on", "off", "1", "0", 0, 1) else []
    if isinstance(value, str):
        tries.append(parse(f"value: {value}", 0).data.get("value"))
    return next((new for new in tries if new is not None and complaint(setting, new) is None), value)


def near(value: Any, names: list[str]) -> str:
    """The nearest of some names as the end of a sentence."""
    close = nearest(value, names)
    return f"; the nearest is {close}" if close else ""


# ---- what several tools say alike -----------------------------------------------------------------------------------


def engine(draft: Draft, key: str, value: Any) -> None:
    """DeepSpeed and FSDP are of a launch, not of a recipe."""
    text = str(value).lower()
    stage = re.search(r"z(?:ero)?[_-]?(?:stage[_-]?)?([123])", text)
    name = "fsdp2" if key.startswith("fsdp") else f"zero{stage[1]}" if stage else "zero2"
    copy, run = f"layerpeft recipes copy accelerate/{name}", f"accelerate launch --config_file {name}.yaml"
    if key in ("fsdp", "deepspeed") or "fsdp" not in draft.given.data:
        draft.leave(key, f"is said at launch: `{copy}`, then `{run} -m layerpeft train RECIPE`")
    else:
        draft.leave(key, "goes with fsdp")


def checkpointing(value: Any) -> bool:
    """True for "offload", "unsloth" and the like, which are kinds of it."""
    return True if isinstance(value, str) and value not in ("false", "no", "off") else flag(value)


def tracker(name: str) -> Rule:
    """A switch or a project of a tracker."""

    def rule(draft: Draft, key: str, value: Any) -> None:
        if value in (False, ""):
            draft.leave(key, "no tracker is the default")
        else:
            draft.put("report_to", name, said(key, value))
            if value is not True:
                draft.note("report_to", f"trackers read their own environment variables ({name.upper()}_PROJECT)")

    return rule


KERNEL = out("its kernels are not these; use_liger_kernel: true fuses what Liger does")
TOKENS = out("the tokenizer is used as it is; add tokens to it, and to the model, beforehand")
ELSEWHERE = out("is of another command there than training")
COMMON: dict[str, Rule] = {
    "deepspeed": engine, "fsdp": engine, "fsdp_config": engine, "fsdp_final_state_dict_type": engine, "ddp": engine,
    "gradient_checkpointing": to("gradient_checkpointing", checkpointing),
    "wandb_project": tracker("wandb"), "use_mlflow": tracker("mlflow"), "use_comet": tracker("comet_ml"),
    "use_swanlab": tracker("swanlab"), "use_tensorboard": tracker("tensorboard"), "use_wandb": tracker("wandb"),
    "push_dataset_to_hub": ELSEWHERE, "tokens": TOKENS, "added_tokens_overrides": TOKENS, "add_tokens": TOKENS,
    "add_special_tokens": TOKENS, "new_special_tokens": TOKENS, "resize_vocab": TOKENS,
    "overwrite_output_dir": out("a folder that holds a run is not written over, unless a command line says so"),
}  # fmt: skip

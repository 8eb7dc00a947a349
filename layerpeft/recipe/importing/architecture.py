"""What must be known of a model to say which layers another tool means: how many there are, and what lies outside of them."""

from __future__ import annotations

from typing import Any

import transformers

from layerpeft.errors import LayerpeftError
from layerpeft.integrations.empty import empty_model
from layerpeft.integrations.places import expanded
from layerpeft.model.layers import stacks_of
from layerpeft.recipe.importing.draft import Given
from layerpeft.recipe.shipped import beside, resolve

DEPTHS = ("num_hidden_layers", "num_layers", "n_layer")
OUTSIDE = ["embed_tokens", "norm", "lm_head"]  # as Llama and its kin call them
ASK = "name a folder that holds its config.json (--model FOLDER)"


def depth(given: Given, name: Any) -> int | None:
    """How many layers the model's text stack has, by its config; None where that is not here, which is not fetched either."""
    found = _config(given, name)
    text = found.get("text_config")
    inner = text if isinstance(text, dict) else found
    return next((n for key in DEPTHS if isinstance(n := inner.get(key), int) and n > 0), None)


def outside(given: Given, name: Any) -> tuple[list[str], bool]:
    """The modules with weights that lie in no layer of the model, and whether that is known; else what Llama calls them."""
    if not _config(given, name):
        return OUTSIDE, False
    try:
        config = transformers.AutoConfig.from_pretrained(_place(given, name), local_files_only=True)
        model = empty_model(transformers.AutoModelForCausalLM, config)
        blocks = tuple(f"{name}." for stack in stacks_of(model).blocks() for name in stack)
    except (LayerpeftError, ValueError, OSError, KeyError, AttributeError):
        return OUTSIDE, False
    names = dict.fromkeys(n.rpartition(".")[0] for n, _ in model.named_parameters() if not n.startswith(blocks))
    tied = model.get_output_embeddings()  # type: ignore[operator]
    same = {n for n, m in model.named_modules() if m is tied and n not in names}
    return [n for n in (*names, *sorted(same))], True


def _config(given: Given, name: Any) -> dict[str, Any]:
    place = _place(given, name)
    if not place:
        return {}
    try:
        return transformers.PreTrainedConfig.get_config_dict(place, local_files_only=True)[0]
    except (OSError, ValueError):
        return {}


def _place(given: Given, name: Any) -> str:
    """Where its config is looked for: the folder that was named for it, else the file's own, from here or beside the file."""
    asked = given.model or name
    if not isinstance(asked, str) or not asked:
        return ""
    return str(expanded(resolve(asked if given.model else beside(asked, given.home))))

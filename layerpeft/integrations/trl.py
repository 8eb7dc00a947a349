"""TRL's own way from rows to token ids, without its trainer and without a model."""

import copy
import os
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import nn

MAKES = "get_peft_model"  # as TRL's modules know it


def tokenized(rows: Any, tokenizer: Any, arguments: Any) -> Any:
    """The rows of a `datasets.Dataset` as `input_ids` and `labels` of their whole length, one for one, as SFTTrainer makes them.

    `tokenizer`: a `dressed` one; `arguments`: an SFTConfig. Raises: whatever TRL, the chat template and the tokenizer raise.
    """
    from trl import SFTTrainer
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers
    from trl.data_utils import is_conversational

    template = None
    if arguments.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        template = get_training_chat_template(tokenizer)
    if arguments.assistant_only_loss and not is_conversational(rows[0]):
        raise ValueError("assistant_only_loss: the rows are no conversations")
    only = arguments.completion_only_loss
    if only is None:
        only = {"prompt", "completion"} <= set(rows.column_names)
    whole = copy.copy(arguments)
    whole.max_length, whole.shuffle_dataset = None, False
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=only)
    made = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, whole, False, None, "whole")
    return made.select_columns(["input_ids", "labels"])


def dressed(tokenizer: Any, arguments: Any) -> Any:
    """A copy of the tokenizer with the end of text and the chat template that the arguments name.

    Raises: OSError or ValueError where there is no such template."""
    from trl import clone_chat_template

    tokenizer, path = copy.deepcopy(tokenizer), arguments.chat_template_path
    if arguments.eos_token is not None:
        tokenizer.eos_token = arguments.eos_token
    if path is None:
        return tokenizer
    if os.path.isfile(path) and path.endswith((".jinja", ".j2")):
        with open(path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
        return tokenizer
    sized: Any = _Sized(tokenizer)
    return clone_chat_template(sized, tokenizer, path)[1]


class _Sized:
    """As much of a model as cloning a template asks for: its embeddings have a row for each token, whatever is added."""

    def __init__(self, tokenizer: Any) -> None:
        text = SimpleNamespace()
        self.tokenizer, self.config = tokenizer, SimpleNamespace(get_text_config=lambda: text)

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer.vocab)

    def can_generate(self) -> bool:
        return False

    def resize_token_embeddings(self, **_: Any) -> None:
        """Nothing to resize."""


def referenced(kind: Any, model: Any, **given: Any) -> Any:
    """A trainer that holds a model against what it was: itself, with the adapter switched off.

    Of a PeftModel that was made elsewhere TRL would keep a copy, of its adapter or of the whole. So its class is given the base and
    a config, and the model that it makes of these is the one that is there; one that makes it in another way is given a stand-in
    for the copy, which is taken away.
    """
    modules = {sys.modules[part.__module__] for part in kind.__mro__}
    makes = [module for module in modules if hasattr(module, MAKES)]
    if not makes:
        made = kind(model=model, ref_model=nn.Identity(), **given)
        made.ref_model = None
        return made
    with ExitStack() as inside:
        for module in makes:
            inside.enter_context(patch.object(module, MAKES, lambda *_, **__: model))
        return kind(model=model.get_base_model(), peft_config=model.peft_config["default"], **given)

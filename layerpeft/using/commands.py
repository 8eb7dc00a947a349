"""What `generate`, `predict` and `eval` do, given their words as argparse has read them."""

from __future__ import annotations

import argparse
import contextlib
import sys

from layerpeft.integrations import hub
from layerpeft.using.folder import Trained, find, load_found, tokenizer_of
from layerpeft.using.generate import chat, check_template, check_writes, prompts_of, say_all
from layerpeft.using.options import read_options


def generate(args: argparse.Namespace) -> None:
    options = read_options(args.settings)
    found = _found(args)
    check_writes(found)
    tokenizer = tokenizer_of(found)
    prompts = prompts_of(args, found)
    if any(isinstance(prompt, list) for prompt in prompts) or args.chat:
        check_template(tokenizer)
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet
        model = load_found(found)
    if args.chat and not prompts:
        chat(model, tokenizer, options, args.system)
    else:
        say_all(model, tokenizer, prompts, options, args.json)


def _found(args: argparse.Namespace) -> Trained:
    """The folder that is named; until the command ends, a hub that cannot be reached is not asked again."""
    args.until_the_end.enter_context(hub.settled())
    return find(args.folder, args.model)

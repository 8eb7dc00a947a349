"""Text from a trained model: prompts one by one, or a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import set_seed
from transformers.generation.streamers import TextStreamer

from layerpeft.errors import UsageError, hint, told
from layerpeft.integrations.files import parse_json, read_text
from layerpeft.integrations.places import expanded, meant
from layerpeft.model.layers import base_of
from layerpeft.text import on_screen
from layerpeft.using.folder import Trained
from layerpeft.using.options import Options
from layerpeft.using.terminal import Screen, escaped

WRITES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
COMMANDS = {"/reset": "begin a new conversation", "/quit": "end (as Ctrl-D does)", "/help": "say this"}
Prompt = str | list[dict[str, Any]]


def check_writes(found: Trained) -> None:
    """Raises: UsageError for a model that writes no text."""
    if not any(found.kind == kind or found.kind.endswith(("CausalLM", "ConditionalGeneration")) for kind in WRITES):
        raise UsageError(
            f"{found.folder} is a {found.kind.removeprefix('AutoModelFor')} model, which writes no text; "
            "`layerpeft predict FOLDER ROWS --out FILE` says what it finds"
        )


class Streamed(TextStreamer):
    """Hands on the words of an answer as they come; keeps the tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.said = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said += text
        self.write(text)


def encoded(tokenizer: Any, prompt: Prompt) -> dict[str, torch.Tensor]:
    """Token ids of a prompt, of shape (1, tokens). Raises: UsageError where it has none, or the template refuses it."""
    try:
        if isinstance(prompt, str):
            made = tokenizer(prompt, return_tensors="pt")
        else:
            check_template(tokenizer)
            made = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
    except UsageError:
        raise
    except Exception as error:  # templates and tokenizers raise what they like
        raise UsageError(f"the prompt cannot be turned into tokens ({told(error, 300)})") from error
    if not made["input_ids"].shape[1]:
        raise UsageError("the prompt is empty: there is no token to go on from")
    return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}


def check_template(tokenizer: Any) -> None:
    """Raises: UsageError where a conversation cannot be written."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError("the tokenizer has no chat template, so there are no turns: give text with --prompt")


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompt: Prompt, options: Options, write: Callable[[str], None] = lambda text: None
) -> str:
    """What the model says to a prompt, written as it comes. The tokens are those of `model.generate`. Raises: UsageError."""
    inputs = {name: ids.to(next(model.parameters()).device) for name, ids in encoded(tokenizer, prompt).items()}
    length, most = inputs["input_ids"].shape[1], longest(model)
    if most is not None and length >= most:
        raise UsageError(f"the prompt has {length} tokens, and the model reads {most}")
    base: Any = base_of(model)
    given = options.for_model(base)
    if most is not None and given.get("max_new_tokens", 0) > most - length and base.can_generate():
        given["max_new_tokens"] = most - length if not _apart(model) else given["max_new_tokens"]
    if options.seed is not None:
        set_seed(options.seed)
    streamed = Streamed(tokenizer, write)
    more = {"streamer": streamed} if options.streams else {}
    stops = {"tokenizer": tokenizer} if "stop_strings" in given else {}
    try:
        found = model.generate(**inputs, **given, **more, **stops, pad_token_id=tokenizer.pad_token_id)
    except ValueError as error:
        raise UsageError(f"the options do not go together ({told(error, 300)})") from error
    except KeyboardInterrupt as stop:
        raise Stopped(streamed.said) from stop
    if options.streams:
        return streamed.said
    text = tokenizer.decode(found[0, 0 if _apart(model) else length :], skip_special_tokens=True)
    write(text)
    return text


class Stopped(Exception):
    """An answer that was interrupted; `said`: what there was of it."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


def _apart(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def longest(model: Any) -> int | None:
    """How many tokens the model has places for; None where it says nothing."""
    config = model.config
    found = getattr(
        config.get_text_config() if hasattr(config, "get_text_config") else config, "max_position_embeddings", None
    )
    return found if isinstance(found, int) and found > 0 else None


# ---- prompts --------------------------------------------------------------------------------------------------------


def read_prompts(place: str) -> list[Prompt]:
    """Prompts of a file, or of standard input (-): one a line, or JSON lines with `prompt` or `messages`. Raises: UsageError."""
    try:
        text = sys.stdin.read() if place == "-" else read_text(expanded(place))
    except OSError as error:
        raise UsageError(f"--prompts {place}: {error.strerror}{meant(place)}") from error
    except ValueError as error:
        raise UsageError(f"--prompts {place}: {told(error)}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if place.endswith((".jsonl", ".json")) or lines and all(_is_object(line) for _, line in lines):
        return [_of_json(place, number, line) for number, line in lines]
    return [line.removesuffix("\r") for _, line in lines]


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _of_json(place: str, number: int, line: str) -> Prompt:
    where = f"--prompts {place}, line {number}"
    try:
        row = parse_json(line, kind=(dict, str))
    except ValueError as error:
        raise UsageError(f"{where}: {told(error, 200)}") from error
    found = row if isinstance(row, str) else row.get("prompt", row.get("messages"))
    turns = (
        isinstance(found, list)
        and found
        and all(isinstance(t, dict) and isinstance(t.get("role"), str) and "content" in t for t in found)
    )
    if not (isinstance(found, str) or turns):
        have = ", ".join(row) if isinstance(row, dict) else "text"
        raise UsageError(f'{where}: a line has "prompt" (text or turns) or "messages" (turns), and this one {have}')
    return found if isinstance(found, str) else _asked(found)


def _asked(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation up to the last answer, which is to be given."""
    return turns[:-1] if len(turns) > 1 and turns[-1]["role"] == "assistant" else turns


def say_all(model: Any, tokenizer: Any, prompts: Sequence[Prompt], options: Options, as_json: bool) -> None:
    """Answers prompts in their order, on standard output: text with an empty line between answers, or JSON lines."""
    for number, prompt in enumerate(prompts):
        if as_json:
            said = answer(model, tokenizer, prompt, options)
            print(escaped(json.dumps({"prompt": prompt, "answer": said}, ensure_ascii=False)), flush=True)
            continue
        screen = Screen()
        if number:
            screen.end()
        try:
            answer(model, tokenizer, prompt, options, screen.write)
        except Stopped as stop:
            screen.end()
            raise KeyboardInterrupt("stopped in the middle of an answer") from stop
        screen.end()


# ---- a conversation -------------------------------------------------------------------------------------------------


def chat(model: Any, tokenizer: Any, options: Options, system: str | None = None) -> None:
    """A conversation in the terminal, until /quit or the end of the input. Ctrl-C ends an answer and keeps the conversation.

    Raises: UsageError where the tokenizer has no chat template."""
    check_template(tokenizer)
    begun: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    turns, seen = list(begun), sys.stdin.isatty()
    if seen:
        _aside("say something; /reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    while (line := _line(seen)) is not None:
        word = line.strip()
        if not word:
            continue
        if word.startswith("/") and " " not in word:
            if word == "/quit":
                return
            if word == "/reset":
                turns = list(begun)
                _aside("a new conversation")
            else:
                told_of = "; ".join(f"{name}: {about}" for name, about in COMMANDS.items())
                _aside(told_of if word == "/help" else f"no command {word}.{hint(word, COMMANDS)} {told_of}")
            continue
        said = _reply(model, tokenizer, [*turns, {"role": "user", "content": line}], options)
        if said is not None:
            turns += [{"role": "user", "content": line}, {"role": "assistant", "content": said}]


def _line(seen: bool) -> str | None:
    """What a person types next; None at the end."""
    while True:
        try:
            return input("> " if seen else "")
        except EOFError:
            if seen:
                print()
            return None
        except KeyboardInterrupt:
            _aside("\n/quit or Ctrl-D ends")
        except UnicodeDecodeError:
            _aside("this is no UTF-8, and was not read")


def _reply(model: Any, tokenizer: Any, turns: list[dict[str, Any]], options: Options) -> str | None:
    """The answer, as far as it came; None where there could be none, which is said."""
    screen = Screen()
    try:
        said = answer(model, tokenizer, turns, options, screen.write)
    except Stopped as stop:
        said = stop.said
        screen.write(" …")
    except UsageError as error:
        _aside(f"{error}; /reset begins a new conversation")
        return None
    screen.end()
    return said.strip()


def _aside(text: str) -> None:
    """What is not of the conversation, on standard error."""
    print(on_screen(text, sys.stderr), file=sys.stderr, flush=True)


def prompts_of(args: Any, found: Trained) -> list[Prompt]:
    """What is asked on a command line. Raises: UsageError where nothing is."""
    prompts: list[Prompt] = list(args.prompt or [])
    place = args.prompts or (None if prompts or args.chat or sys.stdin.isatty() else "-")
    prompts += read_prompts(place) if place else []
    if not prompts and not args.chat:
        raise UsageError("nothing to answer: give --prompt TEXT, --prompts FILE (- for standard input), or --chat")
    columns = found.recipe.values.get("columns")
    turns = args.chat or args.system or isinstance(columns, dict) and "user" in columns
    if not turns:
        return prompts
    begun = [{"role": "system", "content": args.system}] if args.system else []
    return [[*begun, {"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]

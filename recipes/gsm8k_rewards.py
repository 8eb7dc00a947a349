"""Rewards for answers to word problems of GSM8K, which add up. Rows have `answer`, worked out and with `#### 18` at its end.

`near_answer` is shaped: a model that never gets an answer right earns more the sooner it names a number, and the nearer that is.
"""

import math
import re

NUMBER = r"-?\d[\d,]*\.?\d*"


def numbers(text):
    return [float(n.replace(",", "").rstrip(".")) for n in re.findall(NUMBER, text)]


def wanted(answer):
    return numbers(answer.rpartition("####")[2])[0]


def on_topic(prompts, completions, **kwargs):
    """The share of an answer's words that its question has, from 0 to 0.5: what a model can earn that never gets one right."""
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        asked, said = (re.findall(r"[a-z]{3,}|\d+", part.lower()) for part in (prompt, text))
        found.append(0.5 * sum(word in set(asked) for word in said) / max(8, len(said)))
    return found


def near_answer(completions, answer, **kwargs):
    """Up to 0.5 for a number, halved by every 12 letters before it, and as much again the nearer it is to the right one: none of
    that where it is ten times as large or as small."""
    found = []
    for text, right in zip(completions, answer, strict=True):
        first = re.search(NUMBER, text)
        if first is None:
            found.append(0.0)
            continue
        off = abs(math.log10((abs(numbers(first[0])[0]) + 1) / (abs(wanted(right)) + 1)))
        found.append(0.5 * 0.5 ** (len(text[: first.start()].strip()) / 12) * (1 + max(0.0, 1 - off)))
    return found


def correct_answer(completions, answer, **kwargs):
    """1 where the first number is the right one."""
    return [float(numbers(text)[:1] == [wanted(right)]) for text, right in zip(completions, answer, strict=True)]

"""Rewards for answers to word problems of GSM8K. Rows have `answer`, worked out and with `#### 18` at its end."""

import re


def numbers(text):
    return [float(n.replace(",", "").rstrip(".")) for n in re.findall(r"-?\d[\d,]*\.?\d*", text)]


def on_topic(prompts, completions, **kwargs):
    """The share of an answer's words that its question has, from 0 to 0.5: what a model can earn that never gets one right."""
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        asked, said = (re.findall(r"[a-z]{3,}|\d+", part.lower()) for part in (prompt, text))
        found.append(0.5 * sum(word in set(asked) for word in said) / max(8, len(said)))
    return found


def correct_answer(completions, answer, **kwargs):
    """1 for the right number at the end of an answer, 0.2 for any number behind the mark, 0.1 for the mark."""
    found = []
    for text, wanted in zip(completions, answer, strict=True):
        said = numbers(text.rpartition("####")[2]) if "####" in text else []
        right = bool(said) and said[0] == numbers(wanted.rpartition("####")[2])[0]
        found.append(1.0 if right else 0.2 if said else 0.1 * ("####" in text))
    return found

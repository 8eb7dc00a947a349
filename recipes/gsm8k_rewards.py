"""Rewards for answers to word problems of GSM8K. Rows have `answer`, worked out and with `#### 18` at its end."""

import re


def numbers(text):
    return [float(n.replace(",", "").rstrip(".")) for n in re.findall(r"-?\d[\d,]*\.?\d*", text)]


def worked_out(completions, **kwargs):
    """How much of an answer is arithmetic, from 0 to 0.5: what a model can earn that never gets one right."""
    return [min(0.5, len(re.findall(r"[\d=+*/<>-]", text)) / max(1, len(text))) for text in completions]


def correct_answer(completions, answer, **kwargs):
    """1 for the right number at the end of an answer, 0.2 for any number behind the mark, 0.1 for the mark."""
    found = []
    for text, wanted in zip(completions, answer, strict=True):
        said = numbers(text.rpartition("####")[2]) if "####" in text else []
        right = bool(said) and said[0] == numbers(wanted.rpartition("####")[2])[0]
        found.append(1.0 if right else 0.2 if said else 0.1 * ("####" in text))
    return found

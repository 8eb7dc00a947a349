"""Pictures that are made by a seed: one shape each, in a colour, somewhere on a background; and questions about them."""

import io
from collections.abc import Iterator
from random import Random
from typing import Any

SIDE = 32
SHAPES = ("circle", "cross", "square", "triangle")
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "yellow": (220, 200, 50)}


def shapes(draw: Random) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows that name a picture's shape, and the picture (PNG)."""
    while True:
        shape, colour = draw.choice(SHAPES), draw.choice(sorted(COLOURS))
        yield {"label": shape}, _drawn(shape, colour, draw)


def scenes(draw: Random) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Conversations of a question about a picture and its answer, and the picture."""
    while True:
        shape, colour = draw.choice(SHAPES), draw.choice(sorted(COLOURS))
        question, answer = ("what shape is this ?", shape) if draw.random() < 0.5 else ("which colour ?", colour)
        turns = {"prompt": [{"role": "user", "content": question}]}
        turns["completion"] = [{"role": "assistant", "content": answer}]
        yield turns, _drawn(shape, colour, draw)


def _drawn(shape: str, colour: str, draw: Random) -> bytes:
    from PIL import Image, ImageDraw

    shade = draw.randint(200, 255)
    picture = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
    size = draw.randint(SIDE // 3, SIDE // 2)
    x, y = draw.randint(1, SIDE - size - 2), draw.randint(1, SIDE - size - 2)
    pen, box, fill = ImageDraw.Draw(picture), (x, y, x + size, y + size), COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=fill)
    else:
        third = size // 3
        pen.rectangle((x + third, y, x + 2 * third, y + size), fill=fill)
        pen.rectangle((x, y + third, x + size, y + 2 * third), fill=fill)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


MAKERS = {"shapes": shapes, "scenes": scenes}
WORDS = sorted({*SHAPES, *COLOURS, *["what", "shape", "is", "this", "which", "colour", "?"]})

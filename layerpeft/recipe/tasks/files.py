"""Pictures and sounds that rows name: a path from the file of the rows, or what the data set holds itself."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerpeft.integrations.places import expanded
from layerpeft.recipe.rows import Unfit


def held(name: str, value: Any, homes: Sequence[str]) -> dict[str, Any]:
    """Bytes, or the path, of a cell: a path (looked for from `homes`, where the rows lie, then from the current folder), a data
    URL, or bytes and path as `datasets` has them. Raises: Unfit."""
    if value is None or value == "":
        raise Unfit(f"has no {name}")
    if hasattr(value, "save") and hasattr(value, "mode"):  # a picture of PIL's
        file = io.BytesIO()
        value.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return {"bytes": bytes(value["bytes"]), "path": None}
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise Unfit(f"has a {name} that is neither a path nor a file: {str(value)[:60]!r}")
    if value.startswith("data:"):
        try:
            return {"bytes": base64.b64decode(value.partition(",")[2], validate=True), "path": None}
        except binascii.Error as error:
            raise Unfit(f"has a {name} whose data URL cannot be read ({error})") from None
    if "://" in value:
        raise Unfit(f"has a {name} on the web ({value[:80]}); nothing is fetched, name a file")
    places = [*(Path(home, value) for home in homes), expanded(value)]
    for place in places:
        if place.is_file():
            return {"bytes": None, "path": str(place)}
    raise Unfit(
        f"names a file that is not there ({name}): {value} (looked for {' and '.join(map(str, dict.fromkeys(places)))})"
    )


def picture(file: Mapping[str, Any]) -> Any:
    """An RGB picture of PIL's. Raises: Unfit for what is none."""
    from PIL import Image

    try:
        found = Image.open(io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"])
        return found.convert("RGB")
    except Exception as error:  # of whichever kind the decoders like
        raise Unfit(f"has a picture that cannot be read ({error})") from None

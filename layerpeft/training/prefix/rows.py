"""The rows of a batch, each with a key: a digest of everything of it that reaches the blocks.

A row is a text. Several texts in one row are told apart where `position_ids` begin anew, if the mask really stops there. Padding
belongs to no row: the same text has the same key however far its batch is padded behind it. What stands before it counts, where
no positions are given: some models number places from the left edge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Of what a model is called with, this changes nothing that enters a block.
APART = frozenset(
    name
    for line in (
        "labels class_labels start_positions end_positions next_sentence_label shift_labels num_items_in_batch reduction",
        "use_cache past_key_values return_dict output_attentions output_hidden_states output_router_logits logits_to_keep",
        "fused_lm_head",
    )
    for name in line.split()
)
_CUTS = ("cu_seq_lens", "max_length_", "seq_idx")  # say where texts begin, as positions do
IMAGES = ("pixel_values", "image_", "video_", "pixel_")
_SOME = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Row:
    """One text: its row in the batch, the places of its real tokens there, and its key of 16 bytes."""

    row: int
    places: slice | torch.Tensor
    key: bytes


def length(row: Row) -> int:
    """How many tokens it has."""
    return row.places.stop - row.places.start if isinstance(row.places, slice) else len(row.places)


def by_token(value: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Whether it says something of every token of a batch of that shape (rows, tokens), or of one row that stands for all."""
    return value.dim() > 1 and value.shape[1] == shape[1] and value.shape[0] in (1, shape[0])


def assembled(
    rows: Sequence[Row], states: Sequence[torch.Tensor], shape: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """The states (tokens, …) of rows as a batch (rows, tokens, …), with zeros at the places of padding."""
    found = torch.zeros((*shape, *states[0].shape[1:]), dtype=states[0].dtype, device=device)
    for row, state in zip(rows, states, strict=True):
        found[row.row, row.places] = state.to(device, non_blocking=True)
    return found


def rows_of(
    inputs: Mapping[str, Any],
    shape: tuple[int, int],
    *,
    several: bool = False,
    decoder: bool = False,
    image: int | None = None,
    salt: bytes = b"",
) -> list[Row] | None:
    """The rows of a batch of `shape` (rows, tokens), by what the model is called with; None where they cannot be told apart.

    `several`: texts in one row do not see each other. `decoder`: the blocks are those of a decoder behind an encoder. `image`: the
    token that stands for a part of a picture. `salt`: what else states hang on.
    """
    mask = _mask(inputs, shape, decoder)
    tokens, whole, shared = _sorted(inputs, shape, several, decoder, image)
    pictures = _pictures(inputs, shape, image)
    if pictures is None:
        return None
    common = _digest(salt)
    for name, value in shared:
        common.update(f"{name}={_text(value)};".encode())
    given, found = inputs.get("position_ids") is not None, []
    for row in range(shape[0]):
        for places, first in _texts(mask, inputs.get("position_ids") if several else None, row, shape):
            key = common.copy()
            if not given and first:
                key.update(f"from {first};".encode())
            if isinstance(places, torch.Tensor):  # holes in the mask, seen from the first token
                key.update((places - places[0]).numpy().tobytes())
            at = places.numpy() if isinstance(places, torch.Tensor) else places
            for name, bytes_ in tokens:
                key.update(name)
                key.update(bytes_[min(row, len(bytes_) - 1), at].tobytes())
            for name, bytes_ in whole:
                key.update(name)
                key.update(bytes_[row].tobytes())
            key.update(pictures[row] if pictures else b"")
            found.append(Row(row, places, key.digest()))
    return found


def _mask(inputs: Mapping[str, Any], shape: tuple[int, int], decoder: bool) -> torch.Tensor | None:
    mask = inputs.get(_SOME[decoder])
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != tuple(shape):
        return None
    real = (mask != 0).cpu()
    return None if bool(real.all()) else real


def _texts(
    mask: torch.Tensor | None, positions: Any, row: int, shape: tuple[int, int]
) -> Iterable[tuple[slice | torch.Tensor, int]]:
    """Where the texts of a row lie, and how far from its left edge."""
    places = torch.arange(shape[1]) if mask is None else mask[row].nonzero().flatten()
    parts = [places]
    if isinstance(positions, torch.Tensor) and positions.dim() == 2 and len(places):
        here = positions[min(row, len(positions) - 1)].cpu()[places]
        cuts = (here.diff() != 1).nonzero().flatten() + 1
        parts = list(places.tensor_split(cuts.tolist()))
    for part in parts:
        if len(part):
            first, last = int(part[0]), int(part[-1])
            yield (slice(first, last + 1) if last - first == len(part) - 1 else part), first


def _sorted(
    inputs: Mapping[str, Any], shape: tuple[int, int], several: bool, decoder: bool, image: int | None
) -> tuple[list[tuple[bytes, Any]], list[tuple[bytes, Any]], list[tuple[str, Any]]]:
    """What belongs to tokens (rows, tokens, bytes), to rows (rows, bytes), and to the batch as a whole."""
    tokens, whole, shared = [], [], []
    for name, value in sorted(inputs.items()):
        away = name in APART and not (decoder and name == "labels")
        if away or value is None or (several and name.startswith(_CUTS)) or (image and name.startswith(IMAGES)):
            continue
        if not isinstance(value, torch.Tensor):
            shared.append((name, value))
            continue
        if name == _SOME[decoder] and tuple(value.shape) == tuple(shape) and bool(((value == 0) | (value == 1)).all()):
            continue  # says what is real, and nothing else
        title = f"{name}:{value.dtype};".encode()
        if name == "position_ids" and value.dim() > 2:  # several numbers for each place
            value = value.movedim((-2, -1), (0, 1))
        if by_token(value, shape):
            tokens.append((title, _bytes(value, 2)))
        elif "input_ids" in inputs and (value.is_floating_point() or value.dim() == 1) and not decoder:
            shared.append((name, value))  # of pictures or sounds beside a text it is not said whose they are
        elif value.dim() and value.shape[0] == shape[0]:
            mask = inputs.get("attention_mask") if decoder else None
            real = mask.sum(1) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            if real is not None and value.dim() > 1 and value.shape[1] == mask.shape[1]:  # type: ignore[union-attr]
                value = value.masked_fill(mask.view(*mask.shape, *[1] * (value.dim() - 2)) == 0, 0)  # type: ignore[union-attr]
                value = value[:, : int(real.max())] if bool((mask[:, 0] != 0).all()) else value  # type: ignore[index]
                whole.append((title, _Trimmed(_bytes(value, 2), real.tolist())))
            else:
                whole.append((title, _bytes(value, 1)))
        else:
            shared.append((name, value))
    return tokens, whole, shared


class _Trimmed:
    """Rows of what an encoder reads, without the padding behind them."""

    def __init__(self, rows: Any, real: list[int]) -> None:
        self.rows, self.real = rows, real

    def __getitem__(self, row: int) -> Any:
        return self.rows[row, : self.real[row]]


def _pictures(inputs: Mapping[str, Any], shape: tuple[int, int], image: int | None) -> list[bytes] | None:
    """A digest of the pictures of every row, which hold as many tokens as their sizes say; None where that does not come out."""
    given = {k: v for k, v in inputs.items() if k.startswith(IMAGES) and isinstance(v, torch.Tensor)}
    ids = inputs.get("input_ids")
    if image is None or not given:
        return []
    if shape[0] == 1:
        return [_digest("".join(f"{k}={_text(v)};" for k, v in sorted(given.items())).encode()).digest()]
    grids = [v for k, v in given.items() if k.endswith("grid_thw")]
    if (
        not isinstance(ids, torch.Tensor)
        or len(grids) > 1
        or any(k.startswith(("video_", "pixel_values_v")) for k in given)
    ):
        return None
    sizes = grids[0].prod(-1).tolist() if grids else [1] * len(given["pixel_values"])
    counts = (ids == image).sum(1).tolist()
    if not sum(sizes) or sum(counts) % sum(sizes) and not grids:
        return None
    return _dealt(given, sizes, counts, grids)


def _dealt(
    given: Mapping[str, torch.Tensor], sizes: list[int], counts: list[int], grids: list[torch.Tensor]
) -> list[bytes] | None:
    share, found, at = sum(counts) / sum(sizes), [], 0
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    for count in counts:
        key, held = _digest(), 0.0
        while held < count and at < len(sizes):
            held += share * sizes[at]
            for name, value in sorted(given.items()):
                own = slice(starts[at], starts[at + 1]) if grids and len(value) == starts[-1] else slice(at, at + 1)
                if len(value) not in (starts[-1], len(sizes)):
                    return None
                key.update(f"{name}={_text(value[own])};".encode())
            at += 1
        if held != count:
            return None
        found.append(key.digest())
    return found if at == len(sizes) else None


def _digest(start: bytes = b"") -> Any:
    return hashlib.blake2b(start, digest_size=16)


def _bytes(value: torch.Tensor, dims: int) -> Any:
    """As an array of bytes whose first `dims` dimensions are those of the tensor."""
    value = value.detach().cpu().contiguous()
    return value.reshape(*value.shape[:dims], -1).view(torch.uint8).numpy()


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{_digest(_bytes(value.reshape(1, -1), 1).tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return ",".join(f"{k}:{_text(v)}" for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return repr(value)

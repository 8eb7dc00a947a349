"""The arithmetic of gradient projection on one module: bases, folds, the working weight, and what a resumed run needs.

`W + s·B·Q` with `Q` (r, in) fixed and `B` (out, r) trained is LoRA with its A frozen ("right"); `W + s·P·C` with `P` (out, r) fixed
is LoRA with its B frozen ("left"). The gradient of the trained factor is divided by s on its way, so that it is the projected
gradient `G Qᵀ` itself, as in GaLore (arXiv 2403.03507), and clipping and SGD mean what they mean there.

A weight of experts (experts, out, in) has all this once per expert, in two parameters laid out as PEFT does it: A (experts·r, in),
and B (out, r·experts) with the experts innermost. `rights` and `lefts` see them as (experts, r, in) and (experts, out, r).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import nn

from layerpeft.errors import TrainingError
from layerpeft.integrations import bitsandbytes, distributed, hqq
from layerpeft.integrations.engines.fsdp import is_cut_by_rows
from layerpeft.integrations.engines.known import cut_like, is_cut, local, overwritten, put, whole, whole_master
from layerpeft.integrations.peft import LoraLayer, lora_layers, stores_out_first
from layerpeft.integrations.torch import has_hook
from layerpeft.selection.draws import seed_of
from layerpeft.tuners.galore.folds import Factors, Folds, exactly, part, stacked, stochastically
from layerpeft.tuners.galore.subspace import rotation

LOW = (torch.bfloat16, torch.float16)
Slot = int | EllipsisType  # an expert, or all there is


@dataclass
class Projection:
    """The running state of one projected module; `steps` and `refreshes` count its own active time."""

    name: str
    adapter: str
    side: str
    scale: float
    fold: str
    seed: int
    folds: Folds
    gap: int
    experts: int = 0  # matrices in the weight, each with a basis of its own; 0 for a plain matrix
    path: str = ""  # of the wrapped module in the model, where it is not the name
    due: int = 0  # the step, of its own, whose gradient gives the next basis
    first_gap: int = 0  # from the first refresh to the second, so that later ones are spread over steps
    steps: int = 0
    refreshes: int = 0
    failed: int = 0
    overlap: float | None = None
    active: bool = True  # whether it trains now
    original: torch.Tensor | None = None  # the weight as it was, from the first fold on
    working: torch.Tensor | None = None  # the weight with the folds in it, while the module shows the original
    packed: Any = None  # the quantized weight (HQQ: its module) as it was, while it is merged
    divided: bool = False  # among processes: `original` and `working` are this one's parts
    beside: list[Factors] = field(default_factory=list)  # folds over a quantized weight, on its device
    watched: bool = False  # its next step gives a basis, so that what goes through it is handed to `watcher`
    watcher: Any = None  # called with (module, y, x), gives y
    merging: bool = False  # PEFT asks just now what to add to a weight that has the folds in it

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While PEFT merges, or takes out again."""
        self.merging = True
        try:
            yield
        finally:
            self.merging = False

    @property
    def key(self) -> str:
        """What random draws of this module go by."""
        return f"{self.seed}|{self.name}"

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What picks one matrix after the other out of tensors with one per expert."""
        return tuple(range(self.experts)) if self.experts else (...,)


def unscale(layer: Any) -> None:
    """Lets the trained factor's gradient be that of the projected problem; once for each tensor that takes its place."""
    state, trained = state_of(layer), trained_of(layer)
    if state.scale != 1.0 and trained.requires_grad and not has_hook(trained, Unscale):
        trained.register_hook(Unscale(1 / state.scale))


class Unscale:
    """A hook that multiplies a gradient."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.factor


def state_of(layer: Any) -> Projection:
    """The state of a projected module."""
    return layer._layerpeft


def projections(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The projected modules of an adapter, by their name in the unwrapped model."""
    for layer in lora_layers(model, adapter).values():
        state = getattr(layer, "_layerpeft", None)
        if state is not None and state.adapter == adapter:
            yield state.name, layer


def fixed_of(layer: LoraLayer) -> nn.Parameter:
    """The factor that is fixed within a period: Q (r, in), or P (out, r)."""
    state = state_of(layer)
    return (layer.lora_A if state.side == "right" else layer.lora_B)[state.adapter].weight  # type: ignore[return-value]


def trained_of(layer: LoraLayer) -> nn.Parameter:
    """The factor that trains: B (out, r), or C (r, in)."""
    state = state_of(layer)
    return (layer.lora_B if state.side == "right" else layer.lora_A)[state.adapter].weight  # type: ignore[return-value]


def weight_of(layer: Any) -> nn.Parameter:
    """The weight that is trained, (out, in) or (experts, out, in) or as the module stores it."""
    base = layer.get_base_layer()
    return getattr(base, getattr(layer, "parameter_name", hqq.WEIGHT if hqq.is_packed(base) else "weight"))


def rights(a: torch.Tensor, experts: int) -> torch.Tensor:
    """A view of an A as (r, in), or (experts, r, in)."""
    return a.view(experts, -1, a.shape[-1]) if experts else a


def lefts(b: torch.Tensor, experts: int) -> torch.Tensor:
    """A view of a B as (out, r), or (experts, out, r)."""
    return b.view(b.shape[0], -1, experts).permute(2, 0, 1) if experts else b


def at(t: torch.Tensor, slot: Slot) -> torch.Tensor:
    """One of a tensor's matrices, or the tensor itself."""
    return t if slot is ... else t[slot]


def basis_of(layer: LoraLayer) -> torch.Tensor:
    """The fixed factor as orthonormal rows, (r, size) or (experts, r, size); a view, but of what is cut up over processes."""
    state, fixed = state_of(layer), whole(fixed_of(layer).detach())
    return rights(fixed, state.experts) if state.side == "right" else lefts(fixed, state.experts).mT


def like_trained(layer: LoraLayer, t: torch.Tensor) -> torch.Tensor:
    """A view of what is laid out like the trained factor: (out, r) or (r, in), or that of every expert."""
    state = state_of(layer)
    return lefts(t, state.experts) if state.side == "right" else rights(t, state.experts)


@torch.no_grad()
def set_basis(layer: LoraLayer, rows: torch.Tensor, slot: Slot = ...) -> None:
    """Puts orthonormal rows (r, size) in the place of the fixed factor."""
    fixed = fixed_of(layer)
    if is_cut(fixed):
        put(fixed, rows if state_of(layer).side == "right" else rows.mT)
    else:
        basis_of(layer)[slot].copy_(rows)


def rank_of(layer: LoraLayer) -> int:
    """Columns of the running period's factors."""
    state = state_of(layer)
    return fixed_of(layer).shape[0 if state.side == "right" else 1] // max(state.experts, 1)


def running(layer: LoraLayer, trained: torch.Tensor | None = None, fixed: torch.Tensor | None = None) -> Factors:
    """The running period as factors (…, out, r), (…, r, in), scale included, in float32 (float64 for such factors).

    `trained`, `fixed`: what stands for the factors, where an optimizer has them in more digits, or somebody has them whole.
    """
    state = state_of(layer)
    fixed = wide(whole(fixed_of(layer).detach()) if fixed is None else fixed)
    trained = wide(whole(trained_of(layer).detach()) if trained is None else trained)
    a, b = (fixed, trained) if state.side == "right" else (trained, fixed)
    a, b = rights(a, state.experts), lefts(b, state.experts)
    return (state.scale * b, a) if state.side == "right" else (b, state.scale * a)


def wide(t: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is that already."""
    return t if t.dtype == torch.float64 else t.float()


@torch.no_grad()
def fold(layer: LoraLayer) -> None:
    """Takes the running period into the sum of folds and into the working weight, and zeroes the trained factor."""
    trained = whole_master(trained_of(layer))
    if not bool(trained.any()):
        return
    state_of(layer).folds.add(*_own(layer, *running(layer, trained)))
    local(trained_of(layer)).zero_()
    overwritten(trained_of(layer))
    refold(layer)


def refuse_part(layer: Any) -> None:
    """Raises: TrainingError where this process holds a part of the weight only, into which a fold cannot go."""
    state, weight = state_of(layer), weight_of(layer)
    if not weight.numel() or is_cut(weight) and (state.experts or not is_cut_by_rows(weight)):
        raise TrainingError(
            f"{state.name}: its weight is split over processes in a way (FSDP1, ZeRO-3, tensor parallel, experts) in which a fold "
            "cannot go into a part of it; use FSDP2, DDP or ZeRO-2, or LayerLoraConfig"
        )
    if state.original is None or state.divided == is_cut(weight):
        return
    if state.divided:
        raise TrainingError(
            f"{state.name}: its weight is put together just now, in a forward or backward pass, where no adapter can be switched"
        )
    raise TrainingError(
        f"{state.name}: what was trained lay in its weight before that was divided among the processes; divide the model first, "
        "and load the folder afterwards (Trainer: resume_from_checkpoint=folder)"
    )


@torch.no_grad()
def refold(layer: Any) -> None:
    """Forms the working weight anew from the original and the whole sum, so that rounding never adds up over folds."""
    state: Any = state_of(layer)
    weight = weight_of(layer)
    refuse_part(layer)
    if not weight.is_floating_point():
        like = trained_of(layer)
        state.beside = [
            (p.to(like.device, like.dtype), q.to(like.device, like.dtype)) for p, q in [state.folds.factors()]
        ]
        return
    keep_original(layer)
    original, working = original_of(layer), state.working if state.working is not None else local(weight.detach())
    for slot in state.slots:  # one expert at a time, so that no other whole weight is needed
        formed = wide(original[slot].to(weight.device))
        formed = formed + _change(layer, slot).to(formed)
        if weight.dtype in LOW:
            key = f"{state.key}|{state.folds.count}" + (f"|{slot}" if state.experts else "")
            draws = torch.rand(weight.shape[-2:], generator=torch.Generator().manual_seed(seed_of(key)))
            formed = stochastically(formed, weight.dtype, local(cut_like(draws, weight)))
        working[slot].copy_(formed)


def _change(layer: Any, slot: Slot) -> torch.Tensor:
    """The sum of all folds as the module stores its weight; of a weight that is cut up, this process's rows alone are formed."""
    folds, weight = state_of(layer).folds, weight_of(layer)
    if not is_cut(weight) or keeps_part(layer):
        return as_stored(layer, folds.sum(slot))
    if folds.dense is not None:
        return _own_rows(layer, folds.dense)
    left, right = _part_of(layer, *folds.factors())
    return as_stored(layer, left @ right)


def keeps_part(layer: Any) -> bool:
    """Whether this process keeps of the folds only what goes into its part of the weight; the first one, which saves, has all."""
    return is_cut(weight_of(layer)) and distributed.rank() > 0


def _own(layer: Any, left: torch.Tensor, right: torch.Tensor) -> Factors:
    """What this process keeps of a fold."""
    return _part_of(layer, left, right) if keeps_part(layer) else (left, right)


def _part_of(layer: Any, left: torch.Tensor, right: torch.Tensor) -> Factors:
    """The rows of a product that are in this process's part of the weight; its columns, where the module stores it turned."""
    if layer.fan_in_fan_out:
        return left, local(cut_like(right.mT.contiguous(), weight_of(layer))).mT.to(left.device)
    return local(cut_like(left, weight_of(layer))).to(right.device), right


def _own_rows(layer: Any, dense: torch.Tensor) -> torch.Tensor:
    return local(cut_like(as_stored(layer, dense).contiguous(), weight_of(layer)))


def as_stored(layer: Any, change: torch.Tensor) -> torch.Tensor:
    """A change (…, out, in) the way the module stores its weight; and back."""
    turned = not stores_out_first(layer) if state_of(layer).experts else layer.fan_in_fan_out
    return change.mT if turned else change


@torch.no_grad()
def keep_original(layer: Any) -> None:
    """Keeps the weight as it was, before anything is written into it for the first time."""
    state: Any = state_of(layer)
    weight = weight_of(layer)
    if not weight.is_floating_point():
        base = layer.get_base_layer()  # PEFT merges into another module where HQQ has packed it
        state.packed = base if hqq.is_packed(base) else bitsandbytes.kept(base)
    elif state.original is None:
        state.divided = is_cut(weight)
        state.original = local(weight.detach()).to("cpu" if state.fold == "base" else weight.device, copy=True)


@torch.no_grad()
def restart(layer: Any) -> None:
    """Lets the weight be what it is without the running period, from what was kept."""
    state: Any = state_of(layer)
    if isinstance(state.packed, tuple):
        bitsandbytes.put_back(layer.get_base_layer(), state.packed)
        state.packed = None
    elif state.packed is not None:
        layer.base_layer, state.packed = state.packed, None
    elif state.folds.count:
        refold(layer)
    elif state.original is not None:
        show(layer, working=True)
        local(weight_of(layer).detach()).copy_(original_of(layer))


def original_of(layer: Any) -> torch.Tensor:
    """The weight as it was, in the type that the weight has been cast to since, by whatever means."""
    state: Any = state_of(layer)
    if state.original.dtype != weight_of(layer).dtype:
        state.original = state.original.to(weight_of(layer).dtype)
    return state.original


@torch.no_grad()
def drop(layer: Any) -> None:
    """Forgets all folds: the weight is what it was."""
    state: Any = state_of(layer)
    if layer.merged:
        layer.unmerge()
    show(layer, working=False)
    state.folds = Folds(state.folds.out, state.folds.into, experts=state.folds.experts)
    state.original, state.working, state.divided = None, None, False
    state.beside, state.steps, state.due, state.refreshes, state.failed, state.overlap = [], 0, 0, 0, 0, None


@torch.no_grad()
def show(layer: Any, *, working: bool) -> None:
    """Puts the working weight, or the original, into the module; nothing is copied where it is there already."""
    state: Any = state_of(layer)
    if state.original is None or working == (state.working is None):
        return
    weight = weight_of(layer)
    refuse_part(layer)
    if state.divided:
        _change_places(state, local(weight.detach()), original_of(layer))
    elif working:
        weight.data = state.working.to(weight.device, weight.dtype)
        state.working = None
    else:
        state.working = weight.data
        weight.data = original_of(layer).to(weight.device)


def _change_places(state: Projection, here: torch.Tensor, original: torch.Tensor) -> None:
    """Of a weight that is cut up: its numbers, since what gathers it looks at the storage it has. `here`: this process's part."""
    before, kept = here.clone(), original if state.working is None else state.working
    here.copy_(kept)
    kept.copy_(before)
    state.original, state.working = (here, kept) if state.working is None else (kept, None)


def held(layer: Any, trained: torch.Tensor | None = None, fixed: torch.Tensor | None = None) -> Factors:
    """All that was trained, as factors (…, out, k), (…, k, in), scale included: what the weights really hold.

    A weight in a short dtype holds the sum of folds rounded, so it is the difference of working weight and original that counts;
    of one that is cut up over processes it is the sum. `trained`, `fixed`: as in `running`.
    """
    state, weight = state_of(layer), weight_of(layer)
    now = tuple(t.cpu() for t in running(layer, trained, fixed))
    if not _rounded(layer):
        both = stacked([state.folds.factors(), now])  # type: ignore[list-item]
        return both if both[0].shape[-1] < min(state.folds.out, state.folds.into) else exactly(both[0] @ both[1])
    working = state.working if state.working is not None else weight.data
    change = working.float().cpu() - original_of(layer).float().cpu()
    return exactly(as_stored(layer, change) + now[0].float() @ now[1].float())


def columns(layer: Any) -> int:
    """How many columns the factors of `held` have."""
    folds = state_of(layer).folds
    most = min(folds.out, folds.into)
    return most if _rounded(layer) else min(folds.rank + rank_of(layer), most)


def _rounded(layer: Any) -> bool:
    state = state_of(layer)
    return state.original is not None and weight_of(layer).dtype in LOW and not layer.merged and not state.divided


@torch.no_grad()
def rotate(
    old: torch.Tensor,
    new: torch.Tensor,
    means: Iterable[torch.Tensor],
    squares: Iterable[torch.Tensor],
    side: str,
    policy: str,
) -> None:
    """What a refresh does with the optimizer's moments of a trained factor: `keep`, `reset`, or `project` into the new basis.

    `project` takes first moments as coordinates, `m (old newᵀ)`, and second ones as their variances, with the squared matrix (as in
    LDAdam, arXiv 2410.16103, without its correction).
    """
    if policy == "keep":
        return
    turn = rotation(old, new)
    for moments, matrix in ((means, turn), (squares, turn.square())):
        for moment in moments:
            if policy == "reset":
                moment.zero_()
            else:
                by = matrix.to(moment)
                moment.copy_(moment @ by if side == "right" else by.T @ moment)


def tensors(
    layer: Any, trained: torch.Tensor | None = None, fixed: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """All that a resumed run needs of one module. `trained`, `fixed`: as in `running`."""
    state = state_of(layer)
    counts = [state.gap, state.due, state.steps, state.refreshes, state.failed]
    pair = fixed_of(layer) if fixed is None else fixed, trained_of(layer) if trained is None else trained
    found = {k: whole(t.detach()).cpu() for k, t in zip(("fixed", "trained"), pair, strict=True)}
    return found | {"counts": torch.tensor(counts)} | {f"folds.{k}": v for k, v in state.folds.state().items()}


@torch.no_grad()
def restore(layer: Any, saved: Mapping[str, torch.Tensor]) -> None:
    """Takes over what `tensors` gave, the working weight included."""
    state = state_of(layer)
    state.gap, state.due, state.steps, state.refreshes, state.failed = saved["counts"].tolist()
    state.folds.restore(part(saved, "folds."))
    if keeps_part(layer):
        folds = state.folds
        folds.pieces = [_part_of(layer, *pair) for pair in folds.pieces]
        folds.dense = None if folds.dense is None else as_stored(layer, _own_rows(layer, folds.dense)).cpu().clone()
    put(fixed_of(layer), saved["fixed"])
    put(trained_of(layer), saved["trained"])
    restart(layer)

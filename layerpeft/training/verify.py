"""Is what trains what was asked for: gradients, optimizer, movement, and a base that stays where it was."""

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.errors import SaveError, SelectionError, differences
from layerpeft.integrations import distributed
from layerpeft.integrations.engines.known import is_cut, is_stepped_apart, local, stepped
from layerpeft.integrations.torch import in_states
from layerpeft.model.names import clean
from layerpeft.model.targets import is_routed, leave_out
from layerpeft.text import some
from layerpeft.training.method import Method
from layerpeft.training.optimizer_states import holders

Parameters = Mapping[str, Mapping[str, nn.Parameter]]  # target -> the adapter's tensors in it
BLOCK = 1 << 14
LOW = (torch.bfloat16, torch.float16)


def checksum(t: torch.Tensor) -> int:
    """A number that changes with any bit of the tensor, and when values change places; no copy of a contiguous tensor.

    The bytes are read as 64-bit words in rows of `BLOCK`; sums by row and sums by column are each weighted by place, so that
    changes which cancel within a row still show in the columns.
    """
    data = stepped(t).detach()
    if data.device.type == "meta" or not data.numel():
        return 0
    data = data.contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 8 * 8
    end = int.from_bytes(bytes(data[whole:].tolist()), "little")
    words = data[:whole]
    words = words.view(torch.int64) if words.storage_offset() % 8 == 0 else words.clone().view(torch.int64)
    rows = words.numel() // BLOCK
    table, rest = words[: rows * BLOCK].view(rows, BLOCK), words[rows * BLOCK :]
    total = end
    for part in (table.sum(1), table.sum(0), rest) if rows else (None, None, rest):
        total <<= 64
        if part is not None and part.numel():
            # Odd weights, so that no single bit is ever multiplied out of the 64 that are kept.
            weights = torch.arange(1, 2 * part.numel(), 2, device=part.device)
            total |= int((part * weights).sum()) & 0xFFFFFFFFFFFFFFFF
    return total


def ids_of(tensors: Parameters) -> set[int]:
    """Identities of all these tensors."""
    return {id(p) for group in tensors.values() for p in group.values()}


@dataclass(frozen=True)
class Seal:
    """What a parameter (this process's part of it) was: its checksum, and the storage that the checksum is of."""

    sum: int
    dtype: torch.dtype
    shape: torch.Size


def seal(p: torch.Tensor) -> Seal:
    """The parameter's seal."""
    return Seal(checksum(p), *_kind(p))


def changed(seals: Mapping[str, Seal], now: Mapping[str, torch.Tensor]) -> list[str]:
    """Names whose bits differ; one that was cast or cut up meanwhile has no bits to compare."""
    there = [(n, s, now[n]) for n, s in seals.items() if n in now]
    return [n for n, s, p in there if (s.dtype, s.shape) == _kind(p) and s.sum != checksum(p)]


def outdated(seals: Mapping[str, Seal], now: Mapping[str, torch.Tensor]) -> set[str]:
    """Names that were cast, cut up or removed since."""
    return {n for n, s in seals.items() if n not in now or (s.dtype, s.shape) != _kind(now[n])}


def _kind(p: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    part = stepped(p)
    return part.dtype, part.shape


def same_precisions(then: Mapping[str, str] | None, now: Mapping[str, str] | None) -> None:
    """Raises: SelectionError where the run that is resumed stored linears in other precisions."""
    differ = differences(then or {}, now or {})
    if differ:
        more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise SelectionError(
            f"the run that is resumed stored {len(differ)} linears in other precisions ({'; '.join(differ[:3])}{more}); give it "
            "the same quantize_frozen, quantize_trained or quant"
        )


def before_step(tensors: Parameters, known: Set[int], stepping: Set[int]) -> tuple[list[str], list[str]]:
    """(faults, idle experts) before an optimizer step: every target needs all its tensors in an optimizer, and finite gradients.

    `known`: ids of the tensors in any optimizer; `stepping`: in the one that steps, whose targets alone need a gradient by now.
    """
    faults: list[str] = []
    idle: list[str] = []
    without: list[str] = []
    finite = _finite(tensors)
    for target, group in tensors.items():
        frozen = [n for n, p in group.items() if not p.requires_grad]
        missing = [n for n, p in group.items() if id(p) not in known and n not in frozen]
        grads = [p.grad for p in group.values() if p.grad is not None]
        if frozen:
            faults.append(f"{target}: requires_grad is switched off for {', '.join(frozen)}")
        if missing:
            faults.append(f"{target}: not in the optimizer: {', '.join(missing)}")
        if not finite[target]:
            faults.append(f"{target}: its gradient is not finite")
        if not grads and any(id(p) in stepping for p in group.values()):
            if is_routed(target):
                idle.append(target)
            else:
                without.append(target)
    return faults + _without_gradient(without, tensors), idle


def _without_gradient(targets: list[str], tensors: Parameters) -> list[str]:
    others = set(tensors).difference(targets)
    if not targets:
        return []
    found = [f"{target}: no gradient arrived" for target in targets]
    if not any(p.grad is not None for t in others for p in tensors[t].values()):
        cure = (
            "and no other target has one: was it dropped before the step (zero_grad), or is the loss another model's?"
        )
    else:
        cure = f"where its weight is used without a call of its module, or not at all, leave it out: {leave_out(targets, others)}"
    return [*found[:-1], f"{found[-1]}; {cure}"]


def _finite(tensors: Parameters) -> dict[str, bool]:
    """Target -> whether its gradients are finite, in every process that holds a part of them."""
    found = [
        all(bool(torch.isfinite(local(p.grad)).all()) for p in group.values() if p.grad is not None)
        for group in tensors.values()
    ]
    return dict(zip(tensors, distributed.agreed(found) if _cut(tensors) else found, strict=True))


def _cut(tensors: Parameters) -> bool:
    return any(is_cut(p) or is_stepped_apart(p) for group in tensors.values() for p in group.values())


def not_held(tensors: Parameters, known: Set[int]) -> list[str]:
    """Faults for tensors that no optimizer holds, and that would never train when their layer is switched on."""
    missing = {t: [n for n, p in group.items() if id(p) not in known] for t, group in tensors.items()}
    return [f"{t}: not in the optimizer: {', '.join(names)}" for t, names in missing.items() if names]


def not_asked_for(trainable: Iterable[str], asked: Set[str]) -> list[str]:
    """Faults for parameters that someone has unfrozen since the model was wrapped; heads and other adapters are none."""
    marks = (".modules_to_save.", ".token_adapter.", ".lora_")
    return [
        f"{n}: it is trainable and was not chosen; freeze it, or name its module in modules_to_save"
        for n in trainable
        if n not in asked and not any(mark in n for mark in marks)
    ]


def unmoved(tensors: Parameters, before: Mapping[str, Mapping[str, Seal]]) -> dict[str, list[str]]:
    """Target -> its tensors that are as they were sealed; targets of which every tensor moved are left out.

    Of tensors that are cut up over processes (FSDP2), those that are so in every process; each of them must ask.
    """
    still = {}
    for target, seals in before.items():
        now = tensors[target]
        moved = {*changed(seals, now), *outdated(seals, now)}
        still[target] = [n for n in seals if n not in moved]
    if _cut(tensors):
        places = sorted(
            (t, n) for t, seals in before.items() for n in seals
        )  # sets have another order in every process
        agreed = zip(places, distributed.agreed([n in still[t] for t, n in places]), strict=True)
        everywhere = {place for place, unmoved_there in agreed if unmoved_there}
        still = {t: [n for n in names if (t, n) in everywhere] for t, names in still.items()}
    return {t: names for t, names in still.items() if names}


def why_unmoved(group: Mapping[str, torch.Tensor], rate: float, in_place: bool = False) -> str:
    """The likely cause of tensors that did not move, and the cure; `in_place`: they are weights of the model itself."""
    low = [str(p.dtype).removeprefix("torch.") for p in group.values() if p.dtype in LOW]
    grads = [p.grad for p in group.values() if p.grad is not None]
    if grads and not any(bool(g.any()) for g in grads):
        return "its gradient is exactly zero: the loss does not depend on it"
    if low:
        return (
            f"its updates (learning rate {rate:.1e}) round to nothing in {low[0]}; keep the trained tensors in float32 "
            f"({'master_weights: true' if in_place else 'autocast_adapter_dtype=True'}) or raise the learning rate"
        )
    if any(map(is_stepped_apart, group.values())):
        return "no gradient but zero arrived, or the learning rate of its group is zero"
    return "the optimizer did not change it: look for a learning rate of zero in its group"


def learning_rate(optimizer: Optimizer, ids: Set[int]) -> float:
    """The largest learning rate among the groups that hold one of these tensors."""
    groups = [g for g in optimizer.param_groups if any(id(p) in ids for p in g["params"])]
    rates = [math.nan if g.get("lr") is None else float(g["lr"]) for g in groups]
    if any(g.get("lr") is None for g in groups):
        return 1.0  # the optimizer finds its rate by itself (Adafactor's relative step)
    return max((r for r in rates if math.isfinite(r)), default=0.0)


def skipped(optimizer: Optimizer) -> bool:
    """Whether a loss scaler tells the optimizer to skip this step (fused optimizers step through it without a change)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def forget(optimizers: Iterable[Optimizer], removed: Mapping[int, nn.Parameter]) -> None:
    """Takes parameters out of optimizers: out of the groups, their names, and the states."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if id(p) not in removed]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in kept]
        for parameter in removed.values():
            optimizer.state.pop(parameter, None)


def unheld(tensors: Parameters, model: nn.Module, stepping: Optimizer) -> bool:
    """Whether an optimizer steps that holds parameters of this model, while no optimizer at all holds these tensors."""
    ids = ids_of(tensors)
    inside = {id(p) for p in model.parameters()}
    if not any(id(p) in inside for g in stepping.param_groups for p in g["params"]):
        return False
    if not any(p.grad is not None for group in tensors.values() for p in group.values()):
        return False
    return not holders(ids, stepping)


def same_keys(model: nn.Module, ids: Set[int], state: Mapping[str, object], prefix: str, found: Set[str]) -> None:
    """Raises: SaveError for tensors of an adapter that would load as nothing, and where some of a module in `found` are missing.

    `ids`: of the adapter's own tensors.
    """
    named = {in_states(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    own = {prefix + n for n, p in named.items() if id(p) in ids and clean(n).partition(".lora_")[0] in found}
    known = {prefix + n for n in (*named, *(in_states(n) for n, _ in model.named_buffers()))}
    strange = [k for k in state if k.startswith(prefix) and ".lora_" in k and k not in known]
    missing = sorted(own - state.keys())
    if strange or missing:
        raise SaveError(
            f"what is loaded does not fit, so part of it would load as nothing. Missing: {some(missing) or 'none'}; without a "
            f"place: {some(strange) or 'none'} (set_peft_model_state_dict takes what get_peft_model_state_dict gave)"
        )


def same_targets(what: str, theirs: set[str], ours: set[str]) -> None:
    """Raises: SelectionError where a run or adapter of before and this model do not train the same targets."""
    if theirs != ours:
        raise SelectionError(
            f"{what} trains other targets than this model. Only there: {_named(theirs - ours)}; only here: "
            f"{_named(ours - theirs)}. To go on with that choice, pass its record: select={{'layers': [...]}} with the layers "
            "(and the unit, where there is one) of its layerpeft.json."
        )


def _named(names: set[str]) -> str:
    return some(sorted(names), more=" and {} more") or "none"


# ---- what the weights of a model were when they were wrapped and before the first update, written down as checksums

Seals = dict[str, Seal]


class Sealed:
    """The seals of one adapter's model. State is real here: what things were, before anything trained."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.frozen: Seals = {}  # what no layer of the adapter trains
        self.others: Seals = {}  # what trains besides it
        self.start: dict[str, Seals] = {}  # the adapter's own tensors, by target
        self._beside: Set[str] = set()  # adapters there were when the weights were written down

    def wrapped(self) -> None:
        """Just after wrapping, when all that may ever train requires a gradient.

        Packed weights, which the first forward pass may lay out anew, are left for the first step.
        """
        self.frozen = {n: seal(p) for n, p in self._frozen_now(frozenset()).items() if p.is_floating_point()}
        self._beside = self._adapters()

    def begin(self, tensors: Parameters, others: Iterable[str]) -> None:
        """Just before the first update."""
        now, own = self.parameters(), ids_of(tensors)
        gone = outdated(self.frozen, now)
        self.frozen = {n: s for n, s in self.frozen.items() if n not in gone}
        self.frozen |= {n: seal(p) for n, p in self._frozen_now(own).items() if n not in self.frozen}
        self.others = {clean(n): seal(now[clean(n)]) for n in others}
        self.start = {t: {n: seal(p) for n, p in group.items()} for t, group in tensors.items()}

    def forget(self, names: Iterable[str]) -> None:
        """Forgets what these frozen weights were, because they change for a good reason."""
        for name in names:
            self.frozen.pop(name, None)

    def parameters(self) -> dict[str, torch.Tensor]:
        """All parameters, by names that wrapping and unwrapping does not change."""
        return {clean(n): p for n, p in self.method.model.named_parameters()} | dict(self.method.originals())

    def changed_since_wrapping(self) -> list[str]:
        """Faults for frozen weights that are no more what they were."""
        if distributed.world_size() > 1 or self._adapters() != self._beside:
            self.frozen = {}  # some ways of starting another adapter take something out of the weights
        return [
            f"{n} is frozen and changed after the model was wrapped; wrap it when its weights are what they should be"
            for n in changed(self.frozen, self.parameters())
        ]

    def still(self, now: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What trains besides the adapter and has not moved."""
        moved = {*changed(self.others, now), *outdated(self.others, now)}
        return {n: now[n] for n in self.others if n not in moved}

    def _frozen_now(self, own: Set[int]) -> dict[str, torch.Tensor]:
        found = self.parameters().items()
        return {n: p for n, p in found if not p.requires_grad and ".lora_" not in n and id(p) not in own}

    def _adapters(self) -> set[str]:
        return {self.method.adapter, *(getattr(self.method.model, "peft_config", None) or {})}

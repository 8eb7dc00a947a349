"""The gradient probe: what the gradient of a frozen weight is, without ever making it.

A linear `y = x Wᵀ` gets a tap on its output that changes nothing. In the backward pass the tap sees `∂loss/∂y` and `x`, and takes
the sketch `Ωᵀ G` of the weight gradient `G = (∂loss/∂y)ᵀ x`, shape (k, in), with `Ω` (out, k) Gaussian, from which `‖G‖²` is
estimated without bias. Nothing is a Parameter, so no optimizer, clipping norm, trainable count or file ever meets it.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from layerpeft.errors import LayerpeftError, ScoreError
from layerpeft.integrations.torch import add_to, eager, widest
from layerpeft.model.experts import Use, Uses, flat, rows_of
from layerpeft.model.heads import HEAD, columns, holder
from layerpeft.model.layers import Target, find_module
from layerpeft.model.stacked import EXPERT, place_of
from layerpeft.selection.draws import seed_of

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
Key = tuple[str, int]  # target name, expert (0 where there are none)
TapFunction = Callable[[torch.Tensor, torch.Tensor, "Mapping[Key, Any]"], torch.Tensor]


class Statistic(Protocol):
    """What is taken of the gradient of one weight, batch by batch, so that the gradient itself need not be kept.

    `power`: of the loss's scale that a part grows with; `whole`: what is taken needs no more than its own sum over processes.
    """

    power: ClassVar[int]
    whole: ClassVar[bool]

    def part(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(tokens, out), (tokens, in) -> what is taken of `gyᵀ x`."""
        ...

    def kept(self, part: torch.Tensor) -> torch.Tensor:
        """Of a part, what is added up over batches."""
        ...

    def value(self, kept: torch.Tensor, batches: int) -> float:
        """The number that it comes to."""
        ...


class Mean:
    """A statistic that is one number a batch, of which the mean is taken over batches."""

    power: ClassVar[int] = 2
    whole: ClassVar[bool] = True

    def kept(self, part: torch.Tensor) -> torch.Tensor:
        """The part itself."""
        return part

    def value(self, kept: torch.Tensor, batches: int) -> float:
        """Its mean over the batches."""
        return float(kept) / batches


@dataclass(frozen=True)
class Sketch(Mean):
    """Estimates `‖G‖²` from 2k Gaussian directions, drawn afresh for every batch from (seed, target, batch).

    The first k find G's row space, in which the energy is then taken exactly; the other k estimate what lies outside it. Unbiased
    like the plain estimate `‖ΩᵀG‖²/k`, with a fraction of its spread, since gradients have few strong directions (the idea
    of Hutch++, arXiv 2010.09649, applied to `tr(G Gᵀ)`).
    """

    k: int = 8
    seed: int = 0

    def omega(self, key: str, batch: object, out: int, like: torch.Tensor) -> torch.Tensor:
        """Ω of shape (out, k), equal on every device and in every process."""
        generator = torch.Generator().manual_seed(seed_of(f"{self.seed}|{key}|{batch}"))
        return torch.randn(out, self.k, generator=generator).to(device=like.device, dtype=like.dtype)

    def split(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, k): G in k directions of its row space; (k, in): k random combinations of the rows of what lies outside."""
        both = torch.cat(
            [self.omega(key, batch, gy.shape[1], gy), self.omega(key, f"{batch} rest", gy.shape[1], gy)], 1
        )
        sketch = ((gy @ both).T @ x).float()  # (2k, in)
        basis = torch.linalg.qr(sketch[: self.k].T)[0]  # (in, k) orthonormal
        inside = (gy.T @ (x @ basis.to(x.dtype))).float()  # (out, k): G in the basis
        rest = sketch[self.k :]
        return inside, rest - (rest @ basis) @ basis.T

    def energy(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(tokens, out), (tokens, in) -> an estimate of `‖gyᵀ x‖²`, a scalar."""
        inside, outside = self.split(key, batch, gy, x)
        return _square(inside) + _square(outside) / self.k

    part = energy


@dataclass(frozen=True)
class Exact(Mean):
    """Forms the gradient of one target at a time, and lets go of it at once."""

    def energy(self, key: str, batch: int, gy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(tokens, out), (tokens, in) -> `‖gyᵀ x‖²`, a scalar."""
        return _square((gy.T @ x).float())

    part = energy


@dataclass
class _Slot:
    """Running state, within one batch, of one weight: a target, or one expert of a target."""

    calls: int = 0
    seen: int = 0
    waiting: Pairs = field(default_factory=list)


class Probe:
    """Taps on the outputs of targets; adds up over batches what a statistic takes of their gradients (`‖G_b‖²`, …).

    State is real here: hooks are on the model between `attach` and `detach`. A batch counts once `next_batch` closes it; one
    with a gradient that is not finite is left out if `skip_bad` (a loss scaler skips that step, too). Where it is known by what
    the loss of every batch was multiplied on its way (accumulation, a loss scaler), that is divided out. `also` is told
    (target, ∂loss/∂y, x) of what is counted, but for experts.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        how: Statistic,
        *,
        skip_bad: bool = False,
        also: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        self.targets, self.how, self.skip_bad, self.also = dict(targets), how, skip_bad, also
        self._fresh: dict[Key, torch.Tensor] = {}  # of the running batch
        self._as_it_came: dict[Key, torch.Tensor] = {}
        self._unscaled: dict[Key, torch.Tensor] = {}
        self.scales_known = True
        self.reached: set[str] = set()
        self.batches = 0
        self._slots: dict[Key, _Slot] = {}
        self._backward_began = False
        self._anchor: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module) -> None:
        """Puts the hooks on. Raises: ScoreError for targets of a kind whose gradient cannot be tapped."""
        self._handles += attach_taps(model, self.targets.values(), self.tap)

    def detach(self) -> None:
        """Takes every hook off; what was measured stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._anchor = None

    def next_batch(self, scale: float | None = None) -> None:
        """Closes the running batch, if its backward pass has begun, and opens the next one.

        `scale`: by what the batch's own loss was multiplied before its backward pass, where that is known.
        """
        if self._backward_began:
            for key, slot in self._slots.items():
                if slot.waiting:
                    self._count(key, slot.waiting)
            if not self.skip_bad or all(bool(torch.isfinite(v).all()) for v in self._fresh.values()):
                factor = 1.0 if scale is None else 1 / scale**self.how.power
                self.scales_known &= scale is not None
                for key, part in self._fresh.items():
                    add_to(self._as_it_came, key, self.how.kept(part))
                    add_to(self._unscaled, key, self.how.kept(part * factor))
                self.batches += 1
        self._fresh = {}
        self._slots.clear()
        self._backward_began = False

    def kept(self, *, unscaled: bool | None = None) -> Mapping[Key, torch.Tensor]:
        """Per weight, what was added up over batches; `unscaled`: with the losses' scales divided out (None: where all are
        known)."""
        return self._unscaled if (self.scales_known if unscaled is None else unscaled) else self._as_it_came

    def sums(self, *, unscaled: bool | None = None, batches: int = 1) -> dict[str, float]:
        """Per target: what the statistic comes to, summed over experts; with `batches` its mean over so many."""
        found: dict[str, float] = {}
        for (name, _), kept in self.kept(unscaled=unscaled).items():
            found[name] = found.get(name, 0.0) + self.how.value(kept, batches)
        return found

    def tap(self, y: torch.Tensor, x: torch.Tensor, keys: Mapping[Key, Any]) -> torch.Tensor:
        """`y` (…, out) unchanged, with a tap in its graph; x (…, in); `keys` says which rows went through which weight."""
        if not self._backward_began:
            for key in keys:
                self._slots.setdefault(key, _Slot()).calls += 1
        if not torch.is_grad_enabled() or not y.is_floating_point():
            return y
        if self._anchor is None or self._anchor.device != y.device:
            # An input that requires a gradient, so that the tap is called although everything below it is frozen.
            self._anchor = torch.zeros((), device=y.device, requires_grad=True)

        def observe(gy: torch.Tensor, xs: torch.Tensor) -> None:
            gy, xs = _flat(gy), _flat(xs)
            for key, rows in keys.items():
                self._observe(key, gy if rows is None else gy[rows], xs if rows is None else xs[rows])

        return tapped(y, x, self._anchor, observe)

    def _observe(self, key: Key, gy: torch.Tensor, x: torch.Tensor) -> None:
        self._backward_began = True
        slot = self._slots.setdefault(key, _Slot())
        slot.seen += 1
        self.reached.add(key[0])
        # Where several calls share a weight, their gradients must be added before the norm is taken: the pairs wait for the last.
        slot.waiting.append((gy, x))
        if slot.seen >= slot.calls:
            self._count(key, slot.waiting)
            slot.waiting = []

    def _count(self, key: Key, pairs: Pairs) -> None:
        name, expert = key
        gy = torch.cat([g for g, _ in pairs]) if len(pairs) > 1 else pairs[0][0]
        x = torch.cat([v for _, v in pairs]) if len(pairs) > 1 else pairs[0][1]
        low = gy.dtype == x.dtype == torch.bfloat16
        common = torch.bfloat16 if low else torch.promote_types(torch.promote_types(gy.dtype, x.dtype), torch.float32)
        gy, x = gy.to(common), x.to(common)
        kind = self.targets[name].kind
        if self.also is not None and kind not in ("experts", EXPERT):
            self.also(name, gy, x)
        # the same draws for an expert that is a target of its own, so that parts add up to the whole
        stack, number = place_of(name) if kind == EXPERT else (name, expert)
        label = f"{stack}[{number}]" if kind in ("experts", EXPERT) else name
        add_to(self._fresh, key, self.how.part(label, self.batches, gy, x))


def _square(t: torch.Tensor) -> torch.Tensor:
    return t.square().sum(dtype=widest(t.device))


def _flat(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, t.shape[-1])


def tapped(y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, observe: Callable) -> torch.Tensor:
    """`y` with a tap that hands (∂loss/∂y, x) to `observe` in the backward pass, which `anchor` makes sure of."""
    return _Tap.apply(y, x, anchor, observe)  # type: ignore[return-value]


class _Tap(torch.autograd.Function):
    """The identity; its backward hands (∂loss/∂y, x) to an observer and passes the gradient on untouched."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, observe: Callable) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.observe = observe
        return y.data  # not a view: the model may go on to change its output in place

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.observe(grads[0].detach(), x.detach())
        return grads[0], None, None, None


class _ExpertTaps(Uses):
    """Taps the products that use one weight of experts.

    Any other use of it is an error: a gradient that cannot be seen is never scored as zero.
    """

    def __init__(self, tap: TapFunction, owner: nn.Module, name: str, keys: Mapping[int, Key]) -> None:
        super().__init__(name, getattr(owner, name.rpartition(".")[2]), out_first=None)
        self.tap, self.keys = tap, keys  # of the experts that are watched

    def used(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The output, tapped."""
        y = compute()
        keys = {self.keys[e]: rows for e, rows in rows_of(use) if e in self.keys}
        return self.tap(*flat(use, y), keys).view_as(y) if keys else y

    def unknown(self, how: str) -> LayerpeftError:
        """Says how else the model may be scored."""
        return ScoreError(
            f"the experts of {self.name!r} use their weight in a way that cannot be watched ({how}); leave the experts out "
            "of target_parameters, or load the model with experts_implementation='grouped_mm' or 'eager'"
        )


def attach_taps(model: nn.Module, targets: Iterable[Target], tap: TapFunction) -> list[RemovableHandle]:
    """Hooks that hand every use of the targets' weights to `tap(y, x, keys)` and put its result in the place of `y`.

    `keys` maps (target, expert) to the rows that went through that weight (None: all of them).
    Raises: ScoreError for kinds of target that have no such use (convolutions).
    """
    targets = list(targets)
    unfit = [t.name for t in targets if t.kind not in ("linear", "conv1d", "experts", EXPERT, HEAD)]
    if unfit:
        raise ScoreError(
            f"this score is measured on linear layers, Conv1D and experts; not on {', '.join(unfit[:6])}. "
            "Leave them out of target_modules, or choose by another scorer."
        )
    handles: list[RemovableHandle] = []
    experts: dict[str, dict[str, dict[int, Key]]] = {}  # by module and weight in it
    linears: dict[str, list[Target]] = {}  # of a projection that was taken apart into its heads, those
    for target in targets:
        if target.kind in ("experts", EXPERT):
            one = target.kind == EXPERT
            stack, number = place_of(target.name) if one else (target.name, None)
            keys = experts.setdefault(stack.rpartition(".")[0], {}).setdefault(stack, {})
            keys |= {
                e: (target.name, 0 if one else e) for e in (range(target.shape[0]) if number is None else [number])
            }
        else:
            linears.setdefault(holder(target.name), []).append(target)
    for name, held in linears.items():
        # first of all hooks, so that it sees the product itself and not what another hook makes of it
        module = find_module(model, name)
        handles.append(module.register_forward_hook(_linear_hook(held, tap), prepend=True, with_kwargs=True))
    for owner, held in experts.items():
        handles += _expert_hooks(find_module(model, owner), held, tap)
    return handles


def _linear_hook(held: list[Target], tap: TapFunction) -> Callable[..., torch.Tensor]:
    def hook(
        _module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], y: torch.Tensor
    ) -> Any:
        x = args[0] if args else kwargs["input"]
        for target in held:
            read = x[..., columns(target.name, target.shape[1])] if target.kind == HEAD else x
            y = tap(y, read, {(target.name, 0): None})
        return y

    return eager(hook)


def _expert_hooks(owner: nn.Module, held: Mapping[str, Mapping[int, Key]], tap: TapFunction) -> list[RemovableHandle]:
    running: list[ExitStack] = []  # one for each call of the module that has not returned

    def enter(*_: Any) -> None:
        taps = ExitStack()
        for name, keys in () if running else held.items():
            taps.enter_context(_ExpertTaps(tap, owner, name, keys))
        running.append(taps)

    def leave(*_: Any) -> None:
        running.pop().close()

    return [
        owner.register_forward_pre_hook(eager(enter)),
        owner.register_forward_hook(eager(leave), always_call=True),
    ]

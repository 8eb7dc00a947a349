"""What a model does with a weight of experts (experts, out, in) while its experts module runs.

Known are: one expert in `linear` or `matmul`, gathered experts in `bmm`, all of them in the grouped matmul. Any other use is an
error, which is found out on zeros before anything is wrapped.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from layerpeft.errors import ConfigError, LayerpeftError, told
from layerpeft.integrations.peft import is_traced

TURNS = {"transpose", "t", "mT", "T"}
KEEPS = {"to", "contiguous", "float", "bfloat16", "half", "double", "detach", "data"}
WEIGHT_SECOND = {"matmul": "other", "__matmul__": "other", "mm": "mat2", "linear": "weight"}
TRIAL_TOKENS = 2
ARGUMENTS = ("hidden states", "the experts of each token", "their weights")
UNSEEN = "without any call of torch's that could be seen"


@dataclass(frozen=True)
class _Seen:
    """A weight of experts, or what was made from it: of which experts (None: of all), and whether it was transposed."""

    tensor: torch.Tensor  # held, so that its id is not used again
    which: Any = None
    turned: bool = False


@dataclass(frozen=True)
class Use:
    """`y` comes of `x` and a weight: `form` says how, `which` of which experts, `out` and `into` are its sizes."""

    form: str  # one, gathered, gathered_columns, grouped
    x: torch.Tensor
    weight: torch.Tensor
    which: Any
    out: int
    into: int


@dataclass(frozen=True)
class Asker:
    """Who has to know how a model uses its experts, and what to do otherwise."""

    name: str
    other: str


PROJECTION = Asker(
    "gradient projection", "leave the experts out of target_parameters, or train them with LayerLoraConfig"
)
SINGLE = Asker("training of single experts", "or train all experts of a layer together (unit: target)")


class Uses(TorchFunctionMode):
    """Follows one weight of experts through a forward pass, and hands each use to `used`.

    `out_first`: whether it is stored (out, in), which a use then has to agree with; None: either will do. `who` asks.
    """

    def __init__(
        self, name: str, weight: torch.Tensor, out_first: bool | None, said: str = "", who: Asker | None = None
    ) -> None:
        super().__init__()
        self.name, self.out_first, self.said, self.count, self.who = name, out_first, said, 0, who or PROJECTION
        self._known = {id(weight): _Seen(weight)}

    def used(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The output of a use; `compute` gives that of the weight alone."""
        raise NotImplementedError

    def picked(self, weight: torch.Tensor, which: Any) -> torch.Tensor:
        """The weights of some experts."""
        return weight[which]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [k for v in (*args, *kwargs.values()) for k in self._of(v)]
        if not found:
            return func(*args, **kwargs)
        kind, seen = _name(func), found[0]
        use = self._use(kind, func, seen, args, kwargs) if len(found) == 1 else None
        if use is not None:
            self.count += 1
            # transformers' own fallback makes the gradient of the whole weight, frozen or not
            by_rows = "grouped_mm_fallback" in str(func)
            return self.used(use, partial(_one_by_one, use) if by_rows else partial(func, *args, **kwargs))
        if kind == "__getitem__" and seen.which is None and _is_index(args[1]):
            return self._made(self.picked(args[0], args[1]), args[1], seen.turned)
        try:
            result = func(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError, LookupError) as error:
            raise self.unknown(kind) from error
        if kind in TURNS and isinstance(result, torch.Tensor) and _swaps_last(kind, args):
            return self._made(result, seen.which, not seen.turned)
        if kind in KEEPS and isinstance(result, torch.Tensor):
            return self._made(result, seen.which, seen.turned)
        if _has_tensors(result):
            raise self.unknown(kind)
        return result

    def unknown(self, how: str) -> LayerpeftError:
        """What to raise for a use that is none of the known ones."""
        return ConfigError(
            f"{self.name}: the model uses the weights of its experts in a way that {self.who.name} does not know "
            f"({how}{self.said}); load it with experts_implementation='grouped_mm', 'batched_mm' or 'eager' where it has "
            f"them, {self.who.other}"
        )

    def _of(self, value: Any) -> list[_Seen]:
        values = value if isinstance(value, list | tuple) else (value,)
        return [self._known[id(v)] for v in values if isinstance(v, torch.Tensor) and id(v) in self._known]

    def _made(self, result: torch.Tensor, which: Any, turned: bool) -> torch.Tensor:
        self._known.setdefault(id(result), _Seen(result, which, turned))
        return result

    def _use(self, kind: str, func: Any, seen: _Seen, args: Any, kwargs: Any) -> Use | None:
        """What a call with a weight computes; None where it is no product of a known form."""
        if kind in WEIGHT_SECOND and _is_one(seen.which):
            x, weight = _two(args, kwargs, WEIGHT_SECOND[kind])
            form, reads_rows = "one", kind == "linear"
        elif kind == "bmm" and isinstance(seen.which, torch.Tensor) and seen.which.dim() == 1:
            x, weight = _two(args, kwargs, "mat2")
            form, reads_rows = "gathered", False
            if weight is not seen.tensor:  # the weight comes first, and what it is applied to are columns
                x, weight, form, reads_rows = weight, x, "gathered_columns", True
            if x.shape[-1 if reads_rows else -2] != 1:
                return None
        elif "grouped_mm" in f"{kind} {func}" and seen.which is None:
            x, weight = _two(args, kwargs, "mat2")
            form, reads_rows = "grouped", False
            seen = _Seen(seen.tensor, kwargs["offs"] if "offs" in kwargs else args[2], seen.turned)
        else:
            return None
        if weight is not seen.tensor:
            return None
        if self.out_first is not None and (reads_rows != seen.turned) != self.out_first:
            raise self.unknown("it stores them (in, out), and the module does not say is_transposed")
        sizes = weight.shape[-2:] if reads_rows else weight.shape[-2:][::-1]
        return Use(form, x, weight, seen.which, *sizes)


def rows_of(use: Use) -> list[tuple[int, Any]]:
    """Which rows of a use went through which expert."""
    if use.form == "one":
        return [(int(use.which), None)]
    if use.form != "grouped":
        return [(e, use.which == e) for e in use.which.unique().tolist()]
    ends = [0, *use.which.tolist()]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(ends, ends[1:], strict=False)) if b > a]


SHARED_OUT = "activations of single experts are counted as if each expert got its share of the tokens"


def rows_among(use: Use, experts: Collection[int], number: int) -> list[tuple[int, Any]]:
    """As `rows_of`, of these experts out of `number`; where nothing has values (`plan`, which lets all rows through one expert)
    as many rows as fall to them if each expert gets its share."""
    if not is_traced(use.x):
        return [(e, rows) for e, rows in rows_of(use) if e in experts]
    return [(next(iter(experts)), slice(0, -(-len(use.x) * len(experts) // number)))]


def flat(use: Use, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input of a use with one row a token, as `rows_of` counts them."""
    return (y, use.x) if use.form in ("one", "grouped") else (y.flatten(1), use.x.flatten(1))


def _one_by_one(use: Use) -> torch.Tensor:
    """The grouped matmul of the weight alone, one expert after the other."""
    x = use.x.to(use.weight.dtype)
    return joined([x[rows] @ use.weight[e] for e, rows in rows_of(use)], use)


def joined(parts: list[torch.Tensor], use: Use) -> torch.Tensor:
    return torch.cat(parts) if parts else use.x.new_zeros(0, use.out)


class _Trial(Uses):
    """Computes nothing: a use of the weight gives zeros of the right shape."""

    def used(self, use: Use, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Zeros (…, out). Raises: _OtherWidth where the input has another width than the weight."""
        columns = use.form == "gathered_columns"
        if use.x.shape[-2 if columns else -1] != use.into:
            raise _OtherWidth
        shape = (len(use.x), use.out, 1) if columns else (*use.x.shape[:-1], use.out)
        return use.x.new_zeros(shape)

    def picked(self, weight: torch.Tensor, which: Any) -> torch.Tensor:
        """Of zeros without memory, without making any."""
        return _zeros(weight[0] if _is_one(which) else weight[:1].expand(len(which), -1, -1))


class _Beside(_Trial):
    """A weight that is not to train: it may be used in any way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except ConfigError:
            return func(*args, **(kwargs or {}))


class _OtherWidth(Exception):
    """The experts read something of another width."""


def check_experts(model: nn.Module, names: Iterable[str], who: Asker = PROJECTION) -> None:
    """Tries the experts that hold these weights on zeros, one module of a kind; `who` asks.

    Raises: ConfigError where they use them in a way that is not known, or cannot be tried.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        owner, _, parameter = name.rpartition(".")
        groups.setdefault(owner, []).append(parameter)
    tried = set()
    for owner, parameters in groups.items():
        module: Any = model.get_submodule(owner)
        shapes = tuple(tuple(getattr(module, p).shape) for p in parameters)
        kind = type(module), getattr(getattr(module, "config", None), "_experts_implementation", None), shapes
        if kind not in tried:
            with torch.device("cpu"):  # also where a plan builds everything on meta
                _try(owner, module, parameters, kind[1], who)
            tried.add(kind)


def _try(owner: str, module: Any, parameters: list[str], implementation: str | None, who: Asker) -> None:
    packed = [p for p in parameters if not getattr(module, p).is_floating_point()]
    if packed:
        raise ConfigError(f"{owner}.{packed[0]}: {who.name} does not go with experts that are quantized")
    if getattr(module, "_is_expert_parallel", False):
        raise ConfigError(f"{owner}: {who.name} does not go with experts that are split over processes")
    twin = _without_memory(module)
    said = f" with experts_implementation={implementation!r}" if implementation else ""
    out_first = not getattr(module, "is_transposed", False)
    held = {n: p for n, p in twin._parameters.items() if p is not None and p.dim() == 3}
    uses = [_Trial(f"{owner}.{p}", held[p], out_first, said, who) for p in parameters]
    others = [_Beside(f"{owner}.{n}", p, out_first) for n, p in held.items() if n not in parameters]
    try:
        inspect.signature(type(module).forward).bind(module, *ARGUMENTS)
    except TypeError as error:
        raise uses[0].unknown(f"{type(module).__name__} takes other arguments than {', '.join(ARGUMENTS)}") from error
    first = held[parameters[0]]
    for width in dict.fromkeys(s for p in held.values() for s in p.shape[1:]):
        try:
            _run(twin, [*uses, *others], torch.zeros(TRIAL_TOKENS, width, dtype=first.dtype), len(first))
        except _OtherWidth:
            continue
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ImportError) as error:
            why = f"tried on zeros, {type(module).__name__} says: {told(error, 160)}"
            raise uses[0].unknown(why) from error
        break
    unused = [u for u in uses if not u.count]
    if unused:
        raise unused[0].unknown(UNSEEN)


def _run(twin: nn.Module, uses: list[_Trial], x: torch.Tensor, experts: int) -> None:
    """Two tokens through the first and the last expert."""
    index = torch.tensor([[0, experts - 1]] * TRIAL_TOKENS)
    for mode in uses:
        mode.__enter__()
    try:
        with torch.no_grad():
            type(twin).forward(twin, x, index, torch.full(index.shape, 0.5, dtype=x.dtype))
    finally:
        for mode in reversed(uses):
            mode.__exit__(None, None, None)


def _without_memory(module: Any) -> Any:
    """A copy whose tensors are zeros that take no memory."""
    twin = copy.copy(module)
    twin._modules = {k: _without_memory(m) if m is not None else None for k, m in module._modules.items()}
    for group in ("_parameters", "_buffers"):
        tensors = {k: None if t is None else _zeros(t) for k, t in getattr(module, group).items()}
        setattr(twin, group, tensors)
    return twin


def _zeros(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=t.dtype, device="cpu").expand(t.shape)


def _name(func: Any) -> str:
    """What a call is called; for an attribute (`weight.mT`) the attribute's name."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _two(args: Any, kwargs: Any, second: str) -> tuple[Any, Any]:
    """The first two operands of a product."""
    first = args[0] if args else kwargs.get("input")
    return first, args[1] if len(args) > 1 else kwargs.get(second)


def _is_one(which: Any) -> bool:
    is_number = isinstance(which, torch.Tensor) and which.dim() == 0 and which.dtype != torch.bool
    return is_number or (isinstance(which, int) and not isinstance(which, bool))


def _is_index(which: Any) -> bool:
    """One expert, or a tensor of their numbers."""
    numbers = isinstance(which, torch.Tensor) and which.dim() == 1 and which.dtype in (torch.int64, torch.int32)
    return _is_one(which) or numbers


def _swaps_last(kind: str, args: Any) -> bool:
    """Whether a transposition swaps the two last dimensions and nothing else."""
    dims = args[0].dim()
    if kind != "transpose":
        return kind == "mT" or dims == 2
    return {d % dims for d in args[1:3]} == {dims - 1, dims - 2}


def _has_tensors(result: Any) -> bool:
    return isinstance(result, torch.Tensor) or (
        isinstance(result, list | tuple) and any(isinstance(r, torch.Tensor) for r in result)
    )

"""What a module is called in the user's own model, whatever adapters, compilers and sharders have put around it."""

from collections.abc import Callable, Iterable

from torch import nn

# under these names a wrapper keeps the one module that it stands for
COMPILED = "_orig_mod"
_FORWARDING = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ADAPTED = ("base_layer", "original_module")
_INSIDE = frozenset((*_ADAPTED, *_FORWARDING))


def clean(name: str) -> str:
    """A module's or parameter's name in the unwrapped model."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def upwards(name: str) -> list[str]:
    """The name, and those of the modules around it, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def modules_in(unit: str) -> tuple[str, ...]:
    """The modules that a unit's name stands for: `….3.fc1+fc2` for two beside each other, any other for itself."""
    above, dot, last = unit.rpartition(".")
    return tuple(above + dot + part for part in last.split("+"))


def lying_in(units: Iterable[str]) -> Callable[[str], bool]:
    """Whether something of this name is, or lies in, one of these units."""
    inside = tuple(f"{module}." for unit in units for module in modules_in(unit))
    return lambda name: f"{name}.".startswith(inside)


def place_among(units: Iterable[str]) -> Callable[[str], int | None]:
    """The place of the first of these units that something of this name is, or lies in."""
    each = [lying_in([unit]) for unit in units]
    return lambda name: next((i for i, inside in enumerate(each) if inside(name)), None)


def adapted(name: str) -> str:
    """A name in a model with adapters, without what compilers and sharders have put around modules."""
    return ".".join(part for part in name.split(".") if part not in _FORWARDING)


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module behind adapters (PEFT marks them with `adapter_layer_names`) and one-module wrappers."""
    while True:
        modules = module._modules
        inside = (*_ADAPTED, "token_adapter") if hasattr(type(module), "adapter_layer_names") else ()
        inner = next((found for key in (*inside, *_FORWARDING) if (found := modules.get(key)) is not None), None)
        if inner is None:
            return module
        module = inner

"""Float32 masters of 16-bit weights: an optimizer steps on them, and the weights are what they round to."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.errors import SaveError

LOW = (torch.bfloat16, torch.float16)
Named = Mapping[str, nn.Parameter]


class Masters:
    """The masters of one adapter's parameters, by name. State is real here: they are what the run goes on from.

    Between `before_step` and `after_step` a parameter *is* its master, so that any optimizer keeps its states in float32 too.
    """

    def __init__(self) -> None:
        self.copies: dict[str, torch.Tensor] = {}
        self._lent: dict[str, tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = {}  # with their weight and gradient

    def before_step(self, parameters: Named) -> None:
        """Puts masters and float32 gradients in the place of 16-bit parameters that have a gradient, each of which gets a master.

        A master that the weight is no longer the rounding of (weights were loaded meanwhile) is made anew from the weight.
        """
        for name, parameter in parameters.items():
            gradient, weight = parameter.grad, parameter.data
            if gradient is None or weight.dtype not in LOW:
                continue
            master = self.copies.get(name)
            if master is not None and master.device != weight.device:
                master = self.copies[name] = master.to(weight.device)
            if master is None or not torch.equal(master.to(weight.dtype), weight):
                master = self.copies[name] = weight.float()
            self._lent[name] = (parameter, weight, gradient)
            parameter.grad = None
            parameter.data = master
            parameter.grad = gradient.float()

    def after_step(self) -> None:
        """Rounds to nearest what the step has made of the masters, and puts weights and gradients back in their place."""
        for parameter, weight, gradient in self._lent.values():
            parameter.grad = None
            weight.copy_(parameter.data)
            parameter.data = weight
            parameter.grad = gradient
        self._lent.clear()

    def ahead(self, parameters: Named) -> set[str]:
        """Parameters whose master has moved by less than shows in the weight."""
        found = ((n, m, parameters[n].data) for n, m in self.copies.items() if n in parameters)
        return {n for n, m, w in found if w.dtype in LOW and not torch.equal(m, w.to(m.device, m.dtype))}

    def forget(self, names: Iterable[str]) -> None:
        """Drops these masters; a later step starts from the rounded weights."""
        for name in names:
            self.copies.pop(name, None)

    def rest(self, names: Iterable[str], policy: str) -> None:
        """What becomes of masters of weights that stop training for a while: `keep`, `clear`, or `offload` to the CPU."""
        if policy == "clear":
            self.forget(names)
        elif policy == "offload":
            for name in names:
                if name in self.copies:
                    self.copies[name] = self.copies[name].to("cpu")

    def tensors(self, parameters: Named, optimizers: Iterable[Optimizer] = ()) -> dict[str, torch.Tensor]:
        """What a resumed run needs: masters, and the float32 states that torch rounds to the weights' type when it loads."""
        found = {f"{name}|master": t for name, t in self.copies.items()}
        for name, parameter in parameters.items():
            for optimizer in optimizers if name in self.copies else ():
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor) and value.dim() and value.dtype == torch.float32:
                        found[f"{name}|state|{key}"] = value
        return found

    def restore(
        self, tensors: Mapping[str, torch.Tensor], parameters: Named, optimizers: Iterable[Optimizer] = ()
    ) -> None:
        """Takes up what `tensors` gave, after weights and optimizers are loaded. Raises: SaveError for another model's masters."""
        optimizers = list(optimizers)
        for key, tensor in tensors.items():
            name, rest = _split(key)
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != tensor.shape and rest == "master":
                raise SaveError(
                    f"the masters that were saved are of another model: {name} is not here, or has another shape"
                )
            value = tensor.to(parameter.device, copy=True)
            if rest == "master":
                self.copies[name] = value
                continue
            for optimizer in optimizers:
                if parameter in optimizer.state:
                    optimizer.state[parameter][rest.removeprefix("state|")] = value


def _split(key: str) -> tuple[str, str]:
    """A key's parameter (whose name may hold a bar itself) and what of it the tensor is."""
    if key.endswith("|master"):
        return key.removesuffix("|master"), "master"
    name, _, state = key.rpartition("|state|")
    return name, f"state|{state}"

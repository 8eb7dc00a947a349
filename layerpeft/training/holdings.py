"""The tensors of one adapter, looked up once until something puts others in their place, and which optimizers hold them."""

import weakref

from torch.optim.optimizer import Optimizer

from layerpeft.integrations.engines.known import is_cut
from layerpeft.selection.select import Selection
from layerpeft.training import verify
from layerpeft.training.method import Method, Tensors
from layerpeft.training.optimizer_states import held_by


class Holdings:
    """State is real here: what was looked up."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._tensors: Tensors = {}
        self._layers: dict[int, list[str]] = {}
        self._held: weakref.WeakKeyDictionary[Optimizer, tuple[int, set[int]]] = weakref.WeakKeyDictionary()

    def tensors(self) -> Tensors:
        """Target -> the adapter's tensors in it, with the bias that it trains."""
        if not self._tensors:
            self._tensors = self._method.tensors()
        return self._tensors

    def ids(self) -> set[int]:
        """Identities of the adapter's tensors."""
        return verify.ids_of(self.tensors())

    @property
    def is_divided(self) -> bool:
        """Whether this process holds a part of them only."""
        return any(is_cut(p) for group in self.tensors().values() for p in group.values())

    @property
    def is_empty(self) -> bool:
        """Whether some have no values yet: Accelerate is handing the model its own weights back, cut up (FSDP2)."""
        return any(p.is_meta for group in self.tensors().values() for p in group.values())

    def by_layer(self, selection: Selection | None) -> dict[int, list[str]]:
        """Layer -> the targets in it."""
        if not self._layers and selection is not None:
            self._layers = selection.by_layer(self.tensors())
        return self._layers

    def of(self, optimizer: Optimizer) -> set[int]:
        """Identities of the adapter's tensors that the optimizer holds."""
        count = sum(len(g["params"]) for g in optimizer.param_groups)
        if self._held.get(optimizer, (None,))[0] != count:
            ids = self.ids()
            self._held[optimizer] = count, held_by(optimizer) & ids
        return self._held[optimizer][1]

    def stepping(self) -> bool:
        """Whether an optimizer that holds some has begun to step; `gc.freeze()` may have hidden it from others who look."""
        return any(ids for _, ids in self._held.values())

    def forget(self) -> None:
        """Tensors are looked up anew."""
        self._tensors, self._layers = {}, {}
        self._held.clear()

"""A training in which nothing would train: seen before it begins, with the cause."""

from collections.abc import Iterable

from torch import nn
from torch.optim.optimizer import Optimizer

from layerpeft.errors import TrainingError
from layerpeft.integrations.peft import AuxiliaryTrainingWrapper, BaseTunerLayer
from layerpeft.training.optimizer_states import held_by

OFF = "the adapter is switched off: model.enable_adapter_layers() before training"
INACTIVE = "the adapter {name!r} is not active: model.set_adapter({name!r}) before training"
FROZEN = (
    "it was frozen after it was wrapped (requires_grad_(False)), or loaded to be used only: layerpeft.load(folder, model, "
    "is_trainable=True) and PeftModel.from_pretrained(model, folder, is_trainable=True) load it to be trained"
)


def refuse(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Raises: TrainingError where no parameter of a model with adapters requires a gradient (and the optimizer holds some)."""
    if any(p.requires_grad for p in model.parameters()) or not any(map(_is_adapter, model.modules())):
        return
    if optimizer is None or not held_by(optimizer).isdisjoint(map(id, model.parameters())):
        raise TrainingError(f"nothing would train, no parameter of the model requires a gradient: {_why(model)}")


def refuse_adapter(model: nn.Module, adapter: str, tensors: Iterable[nn.Parameter]) -> None:
    """Raises: TrainingError where none of these, the adapter's own, requires a gradient."""
    if not any(p.requires_grad for p in tensors):
        raise TrainingError(
            f"nothing of the adapter {adapter!r} would train, none of its tensors requires a gradient: {_why(model, adapter)}"
        )


def _why(model: nn.Module, adapter: str | None = None) -> str:
    layers: list[AuxiliaryTrainingWrapper | BaseTunerLayer] = [m for m in model.modules() if _is_adapter(m)]  # type: ignore[misc]
    if all(m.disable_adapters for m in layers):
        return OFF
    if adapter is not None and not any(adapter in m.active_adapters for m in layers):
        return INACTIVE.format(name=adapter)
    return FROZEN


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)

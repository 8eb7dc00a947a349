"""What gradient projection tells those who follow it: bases that are renewed around steps, and folds in the weights."""

import copy
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from layerpeft.integrations.peft import lora_layers
from layerpeft.integrations.tracing import is_stand_in
from layerpeft.model.layers import Target
from layerpeft.model.load import Work
from layerpeft.model.names import COMPILED, clean
from layerpeft.text import size_text
from layerpeft.training.method import Method, Step
from layerpeft.tuners.galore import saving
from layerpeft.tuners.galore.experts import ProjectedExperts
from layerpeft.tuners.galore.folds import Folds
from layerpeft.tuners.galore.layer import project, release
from layerpeft.tuners.galore.projection import Projection, state_of, weight_of
from layerpeft.tuners.galore.refresh import Refresher
from layerpeft.tuners.galore.subspace import side_of
from layerpeft.tuners.galore.watch import Watcher
from layerpeft.tuners.lora.method import LoraMethod
from layerpeft.tuners.stock import lora_fields


class GaloreMethod(LoraMethod):
    """LoRA modules with one factor fixed. State is real here: the refresher that renews it."""

    whole = folds = True
    needs = frozenset(("projection",))
    single = None

    def __init__(self, model: nn.Module, adapter: str, config: Any, watcher: Watcher | None = None) -> None:
        super().__init__(model, adapter, config)
        self.asked = config._layerpeft.asked
        self.refresher = Refresher(self, self.asked.refreshing, watcher)

    @classmethod
    def work(cls, config: Any) -> Work:
        return Work(config.r, fixed=True)

    def wrap(self, targets: Iterable[Target]) -> None:
        """Turns the LoRA modules into projected ones."""
        asked = self.asked
        shapes = {t.name: t.shape for t in targets}
        for name, layer in lora_layers(self.model, self.adapter).items():
            path = name.removeprefix(f"{COMPILED}.")
            parameter = getattr(layer, "parameter_name", None)
            name = f"{clean(path)}.{parameter}" if parameter else clean(path)
            *experts, out, into = shapes[name]
            state = Projection(
                name=name,
                adapter=self.adapter,
                side=side_of(asked.proj_type, out, into),
                scale=asked.scale,
                fold=asked.fold,
                seed=asked.seed,
                folds=Folds(out, into, experts=sum(experts)),
                gap=asked.update_proj_gap,
                experts=sum(experts),
                path=path,
            )
            project(layer, state, ProjectedExperts if experts else None)

    def assumed(self) -> list[str]:
        """When the step is, and what lies beside the weights then."""
        size = size_text(sum(w.nbytes for w in self.beside()))
        return [f"a step without a refresh, once weights were folded (their originals take {size})"]

    def beside(self) -> list[torch.Tensor]:
        """Those that are folded into, where their originals stay on their device; folds lie beside what is quantized."""
        found = [layer for _, layer in self.refresher.layers() if state_of(layer).fold == "beside"]
        return [weight_of(layer) for layer in found if not is_stand_in(layer.get_base_layer())]

    def originals(self) -> Mapping[str, torch.Tensor]:
        """Those that have folds in them now."""
        found = ((n, state_of(layer)) for n, layer in self.refresher.layers())
        return {n if s.experts else f"{n}.weight": s.original for n, s in found if s.original is not None}

    def moved(self) -> set[str]:
        """What was trained may lie in the weights by now."""
        return {n for n, layer in self.refresher.layers() if state_of(layer).folds.count}

    def ready(self) -> None:
        """Watches what is due."""
        self.refresher.arm()

    def skipped(self) -> None:
        """Forgets what the step has shown."""
        self.refresher.watcher.restart()

    def before_step(self, step: Step) -> None:
        """Exact subspaces serve the step that they come from."""
        self.refresher.before_step(step)

    def after_step(self, step: Step) -> None:
        """Others serve from the next one on."""
        self.refresher.after_step(step)

    def switched(self, training: Set[str] | None, policy: str) -> None:
        """Those that did not train until now get a new basis."""
        super().switched(training, policy)
        if training is not None:
            self.refresher.switched(training)

    def on_load(self, state: Mapping[str, Any], prefix: str, found: Set[str], folder: str | None) -> None:
        """Takes over what lies beside the stock adapter. Raises: SaveError where that is missing, or of another run."""
        saving.on_load(self.model, self.adapter, state, prefix, self.asked.identity, folder)
        self.ready()

    def as_stock(self, folder: str) -> dict[str, Any]:
        """The sum of all that was trained as factors, and the options they are read by. Raises: SaveError."""
        asked, checks = self.asked, self.config._layerpeft.checks
        found = saving.write(folder, self.model, self.adapter, asked.identity, asked.max_rank)
        if found["error"]:
            checks["max_rank"] = {"rank": asked.max_rank, "largest_error": found["error"]}
        return saving.stock_options(found["rank"])

    def twin(self, model: nn.Module, config: Any, memo: dict[int, Any]) -> Method:
        """Whose watcher is the one that its modules know."""
        return GaloreMethod(model, self.adapter, config, copy.deepcopy(self.refresher.watcher, memo))

    def close(self) -> None:
        """Stops watching."""
        self.refresher.watcher.close()

    def covers(self) -> bool:
        """While a working weight is shown."""
        found = [state_of(layer) for _, layer in self.refresher.layers()]
        return any(state.original is not None and state.working is None for state in found)

    def swapped(self) -> None:
        """What was folded was of the old adapter: from now on this is ordinary LoRA, which nobody follows."""
        for _, layer in list(self.refresher.layers()):
            release(layer)
        configs: Any = self.model.peft_config
        configs[self.adapter] = LoraConfig(**lora_fields(self.config))

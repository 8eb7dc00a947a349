"""One run, from weights that are in memory: what it learned, and what that took."""

from __future__ import annotations

import statistics
import time
from typing import Any

import peft
import torch

import layerpeft
from benchmarks import count
from benchmarks.arm import Ready
from benchmarks.evidence.cell import Cell
from benchmarks.evidence.losses import measured, of_language
from benchmarks.evidence.run import Run, counts
from benchmarks.healing import share_of_rate
from layerpeft.integrations.files import version_of
from layerpeft.selection.choose import choose_among

VERSIONS = ("layerpeft", "torch", "transformers", "peft")
COUNTED = 3  # steps, of a run whose layers change
ENDS = ("embed_tokens", "wte", "word_embeddings", "norm", "ln_f", "lm_head")


def made_run(cell: Cell, run: Run) -> dict[str, Any]:
    """The result of a run, as its line holds it. Processor seconds, set-up apart; operations and bytes of a step."""
    found = {"score": _score, "choose": _choose, "train": _train}[run.kind](cell, run)
    return found | {"weights": cell.weights, "versions": {name: version_of(name) for name in VERSIONS}}


def _score(cell: Cell, run: Run) -> dict[str, Any]:
    select = {k: v for k, v in run.select.items() if k not in ("name", "by")}
    model, batches = cell.fresh(run.seed), cell.batches(10_000 + run.seed, cell.design.criteria.num_batches)
    passes = _Passes(model)

    def asked() -> Any:
        return layerpeft.score_layers(
            model, run.select["by"], batches=batches, num_batches=len(batches), target_modules="all-linear",
            seed=run.seed, progress=False, **select,
        )  # fmt: skip

    began = time.process_time()
    scores = asked()
    found = {"scores": list(scores.values), "seconds": time.process_time() - began, "passes": passes.count}
    if run.seed == cell.design.criteria.seeds[0]:
        found["bytes"] = count.counted(asked, [*model.parameters(), *model.buffers()]).peak
    return found


def _choose(cell: Cell, run: Run) -> dict[str, Any]:
    select = {k: v for k, v in run.select.items() if k != "name"}
    model, batches = cell.fresh(run.seed), cell.batches(10_000 + run.seed, cell.design.criteria.num_batches)
    r = cell.design.training.r
    config = cell.config("lora", {**select, "num_batches": len(batches), "seed": run.seed}, r=r, lora_alpha=2 * r)
    found = config.examine(model)
    began = time.process_time()
    chosen = choose_among(model, found.select, found.layers, found.targets, batches, progress=False, costs=found.costs)
    return {"layers": list(chosen.layers), "seconds": time.process_time() - began}


class _Passes:
    """Counts how often a model is called."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._more)

    def _more(self, *_: Any) -> None:
        self.count += 1


def _train(cell: Cell, run: Run) -> dict[str, Any]:
    model, before = cell.fresh(run.seed), cell.before(run.seed)
    torch.manual_seed(run.seed)
    wrapped = _wrapped(cell, run, model)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    seconds, counted = _learn(cell, run, wrapped, counts(cell.design, run))
    after = measured(wrapped, cell.held_out) | {"retained": _retained(cell, wrapped)}
    found = {"before": before, "after": after, "trainable": trainable, "seconds": seconds}
    if counted:
        operations = round(statistics.fmean(c["flops"] for c in counted))
        found["step"] = {"operations": operations, "bytes": max(c["together_bytes"] for c in counted)}
    return found


def _wrapped(cell: Cell, run: Run, model: Any) -> Any:
    options = dict(run.options)
    if run.method == "lora":
        options |= {"r": run.r, "lora_alpha": 2 * run.r}
    if run.ends:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        options["modules_to_save"] = [name for name in ENDS if name in names]
    select = {"layers": run.select} if isinstance(run.select, list) else run.select
    if isinstance(select, dict) and not isinstance(run.select, list):
        select = {**select, "seed": run.seed}
    batches = cell.batches(10_000 + run.seed, cell.design.criteria.num_batches)
    return layerpeft.get_peft_model(model, cell.config(run.method, select, **options), batches=batches).train()


def _learn(cell: Cell, run: Run, model: Any, counts: bool) -> tuple[float, list[dict[str, int]]]:
    """AdamW on rows drawn from the seed; the rate rises over a tenth of the steps and falls in a line to nothing.

    Gives the processor seconds of all steps, and the counts of some, which are slow and not timed.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, run.lr, weight_decay=0.0)
    ready, seconds, counted = Ready(model, optimizer), 0.0, []
    number = min(run.steps, 1 if isinstance(run.select, str) else COUNTED) * counts
    looked = {(2 * i + 1) * run.steps // (2 * number) for i in range(number)}
    for step, batch in enumerate(cell.batches(run.seed, run.steps, run.epoch)):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * share_of_rate(step, run.steps)
        if step in looked:
            counted.append(count.counts(ready, batch, step))
            continue
        began = time.process_time()
        count.step(ready, batch, step)
        seconds += time.process_time() - began
    return seconds * run.steps / max(1, run.steps - len(looked)), counted


def _retained(cell: Cell, wrapped: Any) -> float | None:
    """The loss on the text of pre-training, if that is at hand: of a model of classes by the trunk that was trained, under the head
    it was pre-trained with."""
    if cell.retained is None:
        return None
    own = wrapped.get_base_model() if isinstance(wrapped, peft.PeftModel) else wrapped
    if not cell.classes:
        return of_language(cell.source, wrapped, cell.tokenizer, cell.retained)
    language, prefix = cell.language, str(own.base_model_prefix)
    trunk = getattr(language, prefix)
    setattr(language, prefix, getattr(own, prefix))
    try:
        return of_language(cell.source, language, cell.tokenizer, cell.retained)
    finally:
        setattr(language, prefix, trunk)

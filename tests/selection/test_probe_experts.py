"""The gradient of a weight of experts is seen in every form of use, and a use that is not known is an error."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerpeft import layer_map
from layerpeft.errors import ScoreError
from layerpeft.model.layers import Target
from layerpeft.selection.probe import Exact, Probe
from tests.helpers.expert_models import build
from tests.helpers.models import batch


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_norms_equal_those_of_a_plain_backward(name, how):
    model = build(name, how)
    targets = {t.name: t for t in layer_map(model).targets if t.kind == "experts"}
    given = batch(name, model, length=12)
    model(**given).loss.backward()
    wanted = {n: float(model.get_parameter(n).grad.double().norm()) for n in targets}
    model.requires_grad_(False)
    probe = Probe(targets, Exact())
    probe.attach(model)
    model(**given).loss.backward()
    probe.next_batch()
    probe.detach()
    assert {n: v**0.5 for n, v in probe.sums().items()} == pytest.approx(wanted, rel=1e-4)
    assert min(wanted.values()) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Experts(nn.Module):
    """Experts of one's own; `use` says what is done with their weight."""

    def __init__(self, use):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 4), requires_grad=False)
        self.use = use

    def forward(self, x):
        return self.use(x, self.up)


KNOWN = {
    "stored the other way round": lambda x, w: x @ w.transpose(1, 2)[1],
    "columns": lambda x, w: torch.bmm(w[torch.tensor([0, 2])], x[:2].unsqueeze(-1)).squeeze(-1),
    "by keyword": lambda x, w: nn.functional.linear(x, weight=w[1].to(x.dtype)),
}
UNKNOWN = {
    "einsum": lambda x, w: torch.einsum("ti,eoi->teo", x, w),
    "stacked": lambda x, w: nn.functional.linear(x, torch.cat([w[0], w[1]])),
    "all at once": lambda x, w: torch.bmm(x.expand(3, -1, -1), w.mT),
}


def probed(use, call=lambda model, x: model(x)):
    model = Experts(use)
    probe = Probe({"up": Target("up", 0, "up", "experts", (3, 5, 4), 60)}, Exact())
    probe.attach(model)
    x = torch.randn(2, 4, requires_grad=True)
    try:
        call(model, x).square().sum().backward()
        probe.next_batch()
    finally:
        probe.detach()
    copy = Experts(use)
    copy.up = nn.Parameter(model.up.detach().clone())
    copy(x.detach()).square().sum().backward()
    return probe.sums()["up"], float(copy.up.grad.square().sum())


@pytest.mark.matrix
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_use_in_another_form_is_seen(name, recomputed):
    again = [lambda model, x: checkpoint(model, x, use_reentrant=False)] if recomputed else []
    found, wanted = probed(KNOWN[name], *again)
    assert found == pytest.approx(wanted, rel=1e-5) and found > 0


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_use_that_is_not_known_is_an_error(name):
    with pytest.raises(ScoreError, match="the experts of 'up' use their weight in a way that cannot be watched"):
        probed(UNKNOWN[name])
    assert torch.overrides._get_current_function_mode_stack() == []

"""Stochastic rounding: what it is on average, and that no two draws go together."""

import pytest
import torch

from layerpeft import LayerGaloreConfig, get_peft_model
from layerpeft.tuners.galore.folds import Folds, stochastically
from layerpeft.tuners.galore.projection import projections, refold, state_of, weight_of
from tests.helpers import expert_models
from tests.helpers.loops import llama

DRAWS = 20_000
SIGMAS = 4.5  # one test in 150,000 fails by chance, and the draws are seeded
FRACTIONS = torch.tensor([0.0, 0.03, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.97])
# a power of two, whose lower neighbour is nearer than its upper one; both signs; numbers near the ends of the range
STARTS = {torch.bfloat16: (1.0, -1.0, 3.140625, -1e-30, 2e38), torch.float16: (1.0, -1.0, 3.140625, -6e-8, 6e4)}


@pytest.mark.parametrize("dtype", STARTS, ids=str)
@pytest.mark.parametrize("direction", [float("inf"), 0.0], ids=["away", "towards zero"])
def test_the_mean_is_kept_between_any_two_neighbours(dtype, direction):
    generator = torch.Generator().manual_seed(11)
    for start in STARTS[dtype]:
        low = torch.tensor(start, dtype=dtype)
        towards = torch.tensor(direction, dtype=dtype).copysign(low) if direction else torch.zeros((), dtype=dtype)
        high = torch.nextafter(low, towards)
        gap = high.float() - low.float()
        whole = low.float() + FRACTIONS * gap
        exact = (whole - low.float()) / gap  # what is left of the fraction in float32
        found = stochastically(whole.repeat(DRAWS, 1), dtype, generator)
        assert bool(((found == low) | (found == high)).all()), "a number that is no neighbour"
        share = (found == high).double().mean(0)
        sigma = (exact * (1 - exact) / DRAWS).sqrt().double()
        assert bool(((share - exact).abs() <= SIGMAS * sigma).all()), (start, exact.tolist(), share.tolist())


def test_every_fold_and_every_module_draws_anew_and_the_weights_are_right_on_average():
    config = LayerGaloreConfig(select="last:1", r=2, target_modules=["q_proj", "k_proj", "v_proj"], scale=1.0)
    model = get_peft_model(llama(num_key_value_heads=4).to(torch.bfloat16), config)
    sums, ups = {}, {}
    change = torch.full((32, 32), 2.0**-11)
    for _, layer in projections(model, "default"):
        state, weight = state_of(layer), weight_of(layer)
        weight.data.fill_(0.375)  # whose neighbours are 2**-9 away: a quarter of the draws go up
        state.folds = Folds(32, 32, dense=change)
        seen = []
        for count in range(1, 65):
            state.folds.count = count
            refold(layer)
            seen.append(weight.float() - 0.375)
        ups[state.name] = torch.stack(seen) > 0
        sums[state.name] = torch.stack(seen).double().mean()
    chance = 0.25
    sigma = (chance * (1 - chance) / (64 * 32 * 32)) ** 0.5
    for name, mean in sums.items():
        assert abs(float(mean) / 2.0**-9 - chance) < SIGMAS * sigma, name
    pairs = [(a[i], b[j]) for a in ups.values() for b in ups.values() for i, j in ((0, 1), (3, 5))]
    names = list(ups)
    pairs += [(ups[names[0]][0], ups[n][0]) for n in names[1:]]
    for one, other in pairs:
        # of draws that have nothing to do with each other, chance² go up together
        assert abs(float((one & other).double().mean()) - chance**2) < SIGMAS * (chance**2 / 32**2) ** 0.5


def test_every_expert_draws_anew():
    model = expert_models.wrap(expert_models.build(dtype=torch.bfloat16))
    for layer in expert_models.modules(model).values():
        state, weight = state_of(layer), weight_of(layer)
        weight.data.fill_(0.375)
        state.folds = Folds(state.folds.out, state.folds.into, experts=state.experts, count=1)
        state.folds.dense = torch.full((state.experts, state.folds.out, state.folds.into), 2.0**-11)
        refold(layer)
        ups = weight.float() > 0.375
        size = ups[0].numel()
        for other in ups[1:]:
            assert abs(float((ups[0] & other).double().mean()) - 1 / 16) < SIGMAS * (1 / 16 / size) ** 0.5

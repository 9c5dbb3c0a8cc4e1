"""The gap project's MTAdam with a beta2 for each term: with one for all it is MTAdam."""

import numpy as np
import pytest
import torch
from torch import nn

from example_projects.gap.beta2_per_term import Beta2PerTerm
from example_projects.gap.memory import SHORTEST, fallen, fixed
from lightning_mtadam import MTAdam

TERMS = ("fit", "small", "head")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def losses(model, step):
    """The second term does not reach the last layer, the third one is zero until the fourth step."""
    inputs = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    output = model(inputs)
    return {
        "fit": (output - 1).square().mean() / (1 + step),
        "small": 1e-3 * model[1](model[0](inputs)).abs().mean(),
        "head": (step >= 4) * 50 * output.abs().mean(),
    }


def trained(make):
    """The parameters after each of 40 steps, [40, N]."""
    model = network()
    optimizer, trajectory = make(model), []
    for step in range(40):
        optimizer.zero_grad()
        optimizer.backward(losses(model, step))
        optimizer.step()
        trajectory.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return torch.stack(trajectory)


def per_term(memory, **options):
    return lambda model: Beta2PerTerm(model.parameters(), 0.01, memory, terms=TERMS, **options)


@pytest.mark.parametrize("layers", ["parameter", "global"])
@pytest.mark.parametrize("anchor", ["fit", "small", "mean", "max", "unit", None])
def test_one_beta2_for_all_terms_is_mtadam(anchor, layers):
    options = {"anchor": anchor, "layers": layers, "importance": {"small": 0.3}}
    expected = trained(
        lambda model: MTAdam(model.named_parameters(), lr=0.01, betas=(0.8, 0.97, 0.6), terms=TERMS, **options)
    )
    found = trained(per_term(fixed([0.97] * 3), betas=(0.8, 0.6), **options))
    assert (found - expected).abs().max() < 1e-10
    assert (found - trained(per_term(fixed([0.97, 0.97, 0.9]), betas=(0.8, 0.6), **options))).abs().max() > 1e-5


def test_every_term_has_its_own_beta2():
    generator, decays = np.random.default_rng(0), (0.999, 0.9)
    gradients = generator.normal(size=(30, 2, 4)) * [[[1.0], [20.0]]]
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Beta2PerTerm([parameter], 0.1, fixed(decays), terms=("a", "b"), anchor=None)
    value, first, second = np.zeros(4), np.zeros(4), np.zeros((2, 4))
    for step, found in enumerate(gradients, start=1):
        optimizer.backward({name: parameter @ torch.tensor(row) for name, row in zip("ab", found, strict=True)})
        optimizer.step()
        first = 0.9 * first + 0.1 * found.sum(0)
        for row, decay in enumerate(decays):
            second[row] = decay * second[row] + (1 - decay) * found[row] ** 2
        largest = np.maximum(*(second / (1 - np.array(decays)[:, None] ** step)))
        value = value - 0.1 * first / (1 - 0.9**step) / (np.sqrt(largest) + 1e-8)
        assert np.abs(parameter.detach().numpy() - value).max() < 1e-10


def test_whatever_the_memory_a_constant_gradient_takes_steps_of_the_learning_rate():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    decays = iter(torch.linspace(0.99, 0.5, 20, dtype=torch.float64))
    optimizer = Beta2PerTerm(
        [parameter], 0.1, lambda norms, largest: next(decays).expand_as(norms), terms=("a",), eps=0.0
    )
    for step in range(1, 21):
        optimizer.backward({"a": parameter @ torch.tensor([3.0, -5.0], dtype=torch.float64)})
        optimizer.step()
        assert parameter.tolist() == pytest.approx([-0.1 * step, 0.1 * step])


def test_the_memory_shrinks_as_the_gradient_does():
    largest = torch.tensor([[8.0, 8.0, 8.0, 8.0]], dtype=torch.float64)
    beta2 = fallen(0.999)(largest * torch.tensor([1.0, 0.5, 0.1, 1e-9], dtype=torch.float64), largest)
    assert (1 / (1 - beta2)).flatten().tolist() == pytest.approx([1000, 500, 100, 1 / (1 - SHORTEST)])


def test_the_memory_goes_by_the_largest_norm_so_far():
    parameter, seen = nn.Parameter(torch.zeros(1, dtype=torch.float64)), []

    def memory(norms, largest):
        seen.append((norms.item(), largest.item()))
        return torch.full_like(norms, 0.9)

    optimizer = Beta2PerTerm([parameter], 0.1, memory, terms=("a",), betas=(0.9, 0.5))
    for slope in (2.0, 6.0, 0.0):
        optimizer.backward({"a": slope * parameter.sum()})
        optimizer.step()
    assert seen == [(2.0, 2.0), (4.0, 4.0), (2.0, 4.0)]

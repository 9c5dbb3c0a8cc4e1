"""The three small problems: seeded, and with terms that every method finds alike."""

import pytest
import torch
from torch.nn import functional as F

from example_projects.mnist.data import SUBSET
from example_projects.problems.catalogue import PROBLEMS
from example_projects.problems.problem import shuffled_batches


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param](SUBSET)


def test_a_seed_decides_over_network_and_batches(problem):
    def draw(seed):
        network = problem.make_network(seed)
        return [problem.losses(network, batch) for batch in problem.batches(seed, 3)]

    once, again, other = draw(0), draw(0), draw(1)
    assert once == again
    assert once != other


def test_making_a_network_takes_no_random_numbers(problem):
    before = torch.random.get_rng_state()
    problem.make_network(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_terms_are_those_that_have_weights(problem):
    network = problem.make_network(0)
    (batch,) = problem.batches(0, 1)
    losses = problem.losses(network, batch)
    assert tuple(losses) == problem.terms == tuple(problem.given_weights(0))
    assert problem.anchor in (*problem.terms, "mean")
    assert all(loss.dim() == 0 and loss >= 0 for loss in losses.values())


def test_training_with_the_balanced_weights_improves_the_metric(problem):
    network = problem.make_network(0)
    before = problem.metric(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=10 * problem.lr)
    for batch in problem.batches(0, 400):
        optimizer.zero_grad()
        sum(problem.balanced_weights[name] * loss for name, loss in problem.losses(network, batch).items()).backward()
        optimizer.step()
    assert (problem.metric(network) > before) == problem.higher_is_better


def test_the_class_terms_add_up_to_the_cross_entropy():
    problem = PROBLEMS["digits"](SUBSET)
    network = problem.make_network(0)
    (batch,) = problem.batches(0, 1)
    total = sum(problem.losses(network, batch).values())
    torch.testing.assert_close(total, F.cross_entropy(network(batch[0]), batch[1]))


def test_batches_are_whole_and_epochs_have_other_orders():
    rows = [batch.tolist() for (batch,) in shuffled_batches((torch.arange(7),), 3, 0, 4)]
    assert [len(row) for row in rows] == [3] * 4
    assert len(set(rows[0] + rows[1])) == len(set(rows[2] + rows[3])) == 6
    assert rows[:2] != rows[2:]

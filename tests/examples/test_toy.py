"""The toy of the GradNorm paper: its tasks, the network, the methods, the command and its figure."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from example_projects.toy import __main__ as command
from example_projects.toy.data import INPUTS, OUTPUTS, SIGMAS, Samples, Tasks, make_matrices, targets
from example_projects.toy.figure import read_curve, weight_curves
from example_projects.toy.methods import METHODS, SHARED, oracle, terms_of
from example_projects.toy.module import Toy, normalised_loss, task_losses
from example_projects.toy.network import Net
from tests.examples.running import QUIET, output_of, read_results, read_rows

pytestmark = QUIET


def test_targets_are_scaled_tanh_of_each_tasks_own_matrix():
    generator = torch.Generator().manual_seed(0)
    x, matrices = 0.01 * torch.randn(3, INPUTS, generator=generator), make_matrices(2, 5)
    found = targets(x, matrices, (2.0, 30.0))
    assert found.shape == (2, 3, OUTPUTS)
    for task, sigma in enumerate((2.0, 30.0)):
        for sample in range(3):
            expected = sigma * np.tanh(matrices[task].double().numpy() @ x[sample].double().numpy())
            np.testing.assert_allclose(found[task, sample].numpy(), expected, atol=1e-3)


def test_matrices_share_a_part_of_deviation_10_and_have_one_of_3_5_of_their_own():
    matrices = make_matrices(40, 0)
    assert float(matrices.mean(0).std()) == pytest.approx(10, rel=0.02)
    assert float((matrices - matrices.mean(0)).std()) == pytest.approx(3.5, rel=0.02)
    assert not torch.equal(matrices, make_matrices(40, 1))


def test_scales_go_from_1_to_100_by_equal_factors():
    for tasks, sigmas in SIGMAS.items():
        assert len(sigmas) == tasks
        assert (sigmas[0], sigmas[-1]) == (1, pytest.approx(100))
        assert np.diff(np.log(sigmas)) == pytest.approx(math.log(100) / (tasks - 1))


def test_batches_are_new_at_every_step_and_the_same_at_every_reading():
    samples = Samples(make_matrices(2, 0), SIGMAS[2], 3, 4, seed=0)
    (x, y), (again, same), (other, _) = samples[0], samples[0], samples[1]
    assert torch.equal(x, again)
    assert torch.equal(y, same)
    assert not torch.equal(x, other)


def test_held_out_samples_are_of_the_same_functions_and_are_not_trained_on():
    tasks = Tasks(SIGMAS[2], 50, 0)
    assert torch.equal(tasks.held_out.matrices, tasks.training.matrices)
    held_out, _ = tasks.held_out[0]
    trained = torch.cat([tasks.training[index][0] for index in range(50)])
    assert float(torch.cdist(held_out, trained).min()) > 1


def test_the_trunk_is_shared_and_a_head_is_its_tasks_own():
    network = Net(3)
    losses = task_losses(network(torch.randn(5, INPUTS)), torch.ones(3, 5, OUTPUTS))
    for task, loss in enumerate(losses):
        found = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        names = [name for name, _ in network.named_parameters()]
        reached = {name for name, gradient in zip(names, found, strict=True) if gradient is not None}
        assert {name for name in reached if "heads" in name} == {f"heads.{task}.weight", f"heads.{task}.bias"}
        assert SHARED in reached
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in network.trunk) == 4


def test_the_normalised_loss_does_not_depend_on_the_scales():
    predicted, wanted = torch.randn(2, 2, 5, OUTPUTS, generator=torch.Generator().manual_seed(0))
    expected = sum(float(((predicted[i] - wanted[i]) ** 2).mean()) for i in range(2))
    scales = torch.tensor([3.0, 70.0])[:, None, None]
    assert float(normalised_loss(predicted, wanted, (1.0, 1.0))) == pytest.approx(expected)
    assert float(normalised_loss(scales * predicted, scales * wanted, (3.0, 70.0))) == pytest.approx(expected)


def test_the_oracles_weighted_sum_is_the_normalised_loss():
    predicted, wanted = torch.randn(2, 10, 5, OUTPUTS, generator=torch.Generator().manual_seed(0))
    weights = oracle(SIGMAS[10]).weights
    losses = dict(zip(terms_of(10), map(float, task_losses(predicted, wanted)), strict=True))
    total = sum(weights[term] * loss for term, loss in losses.items())
    assert total == pytest.approx(float(normalised_loss(predicted, wanted, SIGMAS[10])))


@pytest.mark.parametrize("name", METHODS)
def test_only_the_oracle_is_told_the_scales(name):
    """With other scales the balancer of any other method is made alike."""
    one, two = (Toy(METHODS[name], sigmas, 1e-3).balancer for sigmas in ((1.0, 2.0), (3.0, 4.0)))
    if name == "oracle":
        assert one.weights != two.weights
    else:
        assert (one is two is None) or (vars(one).keys() == vars(two).keys() and one.alpha == two.alpha == 0.12)


# The command


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The command's folder and what it printed: every method, two learning rates to choose from, two seeds."""
    folder = tmp_path_factory.mktemp("toy")
    arguments = ["--steps", 3, "--lr", 1e-3, 1e-2, "--seeds", 0, 1, "--accelerator", "cpu", "--output-dir", folder]
    return folder / "2-tasks", output_of(command.main, *arguments), arguments


def test_the_table_has_every_method_with_its_learning_rate(done):
    folder, printed, _ = done
    rows = read_rows(folder / "table.csv")
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row["runs"] == "2" and row["normalised_loss"] for row in rows)
    assert (folder / "table.md").read_text() in printed


def test_every_method_takes_the_rate_that_did_best_with_a_seed_of_its_own(done):
    folder, _, _ = done
    tuning, results = read_rows(folder / "tuning.csv"), read_results(folder)
    assert {row["seed"] for row in tuning} == {"100"}
    for name in METHODS:
        best = min((row for row in tuning if row["method"] == name), key=lambda row: float(row["normalised_loss"]))
        assert {row["lr"] for row in results if row["method"] == name} == {best["lr"]}


def test_methods_differ_and_seeds_differ(done):
    losses = [row["normalised_loss"] for row in read_results(done[0])]
    assert len(set(losses)) == len(losses) == 8


def test_margins_are_taken_seed_by_seed():
    losses = {"oracle": (1.0, 2.0), "mtadam": (1.5, 2.5), "equal": (1.5, 3.3)}
    results = [{"method": name, "normalised_loss": loss} for name, found in losses.items() for loss in found]
    assert command.margins(results) == [
        {"step": "oracle to mtadam", "margin": "0.500 +- 0.000"},
        {"step": "mtadam to equal", "margin": "0.400 +- 0.566"},
    ]


def test_resuming_repeats_nothing(done, monkeypatch):
    _, printed, arguments = done
    monkeypatch.setattr(Toy, "training_step", None)
    assert output_of(command.main, *arguments, "--resume") == printed


@pytest.mark.parametrize("name", ["mtadam", "gradnorm"])
def test_the_drawn_weights_sum_to_the_number_of_tasks(done, name):
    (run,) = done[0].glob(f"*/{name}-seed0")
    curves = weight_curves(run, 2)
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    for (_, one), (_, two) in zip(*curves, strict=True):
        assert one + two == pytest.approx(2)
    assert curves[0][-1][1] > 1 > curves[1][-1][1]  # the task with the smaller scale weighs more


def test_the_figure_shows_the_loss_that_the_table_has(done):
    folder, _, _ = done
    for row in read_results(folder):
        run = folder / f"lr{float(row['lr']):g}" / f"{row['method']}-seed{row['seed']}"
        assert read_curve(run, "validation/normalised_loss")[-1][1] == pytest.approx(float(row["normalised_loss"]))
    with Image.open(folder / "curves.png") as image:
        assert image.width > 3 * image.height  # three panels

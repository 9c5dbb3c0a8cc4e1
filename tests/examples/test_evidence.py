"""The evidence project: its problems, equal budgets, a runner that resumes, and tables with the right numbers."""

import csv
import gzip
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from example_projects.common.run_file import read_runs
from example_projects.evidence import __main__ as command
from example_projects.evidence import runner as runner_module
from example_projects.evidence.method import Method
from example_projects.evidence.methods import METHODS, adam
from example_projects.evidence.momentum_config import MomentumConFIG
from example_projects.evidence.problems import burgers, gradnorm_toy, images, tox21, toy2d, vae
from example_projects.evidence.problems.catalogue import PROBLEMS
from example_projects.evidence.problems.problem import Problem, factors, shuffled_batches
from example_projects.evidence.record import best_of, chosen_tests, loss_of
from example_projects.evidence.runner import Plan, Runner
from example_projects.evidence.search import USUAL_LR, affordable, candidate, replay
from example_projects.evidence.tables import at_given_rates, costs, groups, progress, quartiles, results, tables
from example_projects.evidence.training import Outcome, train
from tests.examples.running import output_of

SMILES = [
    "CCO", "CC", "CCN", "CCC", "c1ccccc1", "CCCl", "CO", "CN", "CC=O", "CCCC", "OCC", "NCC", "CBr", "CF", "C",
    "CCCCC", "CCS", "CS", "CI", "CC#N",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All data sets, tiny: of MNIST there is the shipped subset, since there is no folder of that name."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "burgers").mkdir()
    np.save(folder / "burgers" / "simulation_data.npy", np.zeros((4, 8), np.float32))
    (folder / "tox21").mkdir()
    with gzip.open(folder / "tox21" / "tox21.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["one", "other", "mol_id", "smiles"])
        for row in range(400):
            missing = row % 5 == 0
            writer.writerow([row % 2, "" if missing else int(row % 3 == 0), row, SMILES[row % 20]])
    return folder


@pytest.fixture(scope="module")
def problems(data):
    """Read once, but for the large images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tox21, "fingerprints", lambda smiles: torch.eye(20).repeat(len(smiles) // 20, 52)[:, : tox21.BITS]
        )
        return {name: make(data) for name, make in PROBLEMS.items() if name != "mnist"}


NAMES = [name for name in PROBLEMS if name != "mnist"]


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_over_network_and_batches(problems, name):
    problem = problems[name]

    def draw(seed):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = problem.make_network(seed).eval()
            return [problem.losses(network, batch) for batch in problem.batches(seed, 2)]

    once, again, other = draw(0), draw(0), draw(1)
    assert once == again
    assert once != other


@pytest.mark.parametrize("name", NAMES)
def test_the_terms_have_losses_and_the_parts_have_figures(problems, name):
    problem = problems[name]
    before = torch.random.get_rng_state()
    network = problem.make_network(0).eval()
    validation, test = (problem.measure(network, part) for part in ("validation", "test"))
    assert torch.equal(torch.random.get_rng_state(), before)  # neither draws random numbers from those of the training
    (batch,) = problem.batches(0, 1)
    losses = problem.losses(network, batch)
    assert tuple(losses) == problem.terms
    assert all(loss.dim() == 0 and loss >= 0 for loss in losses.values())
    assert problem.anchor in (*problem.terms, "mean")
    assert {problem.figure, *problem.allowed} <= set(validation)
    assert list(validation) == list(test)
    assert name == "toy2d" or validation != test  # which has no data
    shared = problem.shared
    found = dict(network.named_modules()) | dict(network.named_parameters())
    assert shared in found
    weights = [found[shared]] if isinstance(found[shared], nn.Parameter) else list(found[shared].parameters())
    for loss in losses.values():
        reached = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        assert any(gradient is not None for gradient in reached)


def test_images_are_in_three_parts_that_share_nothing(data):
    parts = images.read_images(images_folder(), small=True)
    sizes = [len(labels) for _, labels in (parts.train, parts.validation, parts.test)]
    assert sizes == [8334, 1666, 2000]
    assert parts.train[0].shape[1] == images.PIXELS


def images_folder():
    from example_projects.mnist.data import SUBSET

    return SUBSET


def test_error_rates_by_hand():
    logits = torch.eye(10).repeat(2, 1)
    labels = torch.arange(10).repeat(2)
    labels[0] = 3
    assert images.error_rates(logits, labels) == {"error": 5.0, "worst_class_error": pytest.approx(100 / 3)}


def test_the_divergence_is_that_of_torch():
    torch.manual_seed(0)
    network = vae.VAEClassifier()
    pixels = torch.randn(5, vae.PIXELS)
    mean, log_variance = network.encoder(pixels).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(network(pixels)[2], wanted)


def test_a_vae_whose_divergence_has_collapsed_has_failed(problems):
    problem = problems["vae"]
    sound = {"joint_error": 1.0, "error": 4.0, "mse": 0.02, "kl": 8.0}
    assert not problem.failed(sound)
    assert problem.failed({**sound, "kl": 0.9})
    assert problem.failed({**sound, "error": 25.0})
    assert problem.failed({**sound, "mse": 0.05})
    assert problem.failed({**sound, "joint_error": math.nan})


def test_the_collapsed_network_of_each_problem_has_failed(problems):
    """One that says nothing: all parameters are zero."""
    for name in ("vae", "autoencoder", "equation", "digits", "gradnorm_toy", "tox21"):
        network = problems[name].make_network(0).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        assert problems[name].failed(problems[name].measure(network, "test")), name


def test_the_plane_s_functions_at_hand_computed_points():
    """Far up there are the logarithms alone, far down the bowls alone."""
    up = toy2d.functions(torch.tensor([1.0, 50.0]))
    torch.testing.assert_close(torch.stack(up), torch.tensor([math.log(3.0) + 6, math.log(2.0) + 6]))
    down = toy2d.functions(torch.tensor([7.0, -50.0]))
    torch.testing.assert_close(torch.stack(down), torch.tensor([17.64 - 20, 19.6 + 17.64 - 20]))


def test_the_first_seeds_are_the_five_starts_and_others_lie_near():
    for seed, start in enumerate(toy2d.STARTS):
        assert toy2d.Point(seed).position.tolist() == pytest.approx(start)
        assert toy2d.Point(seed + 5).position.tolist() != pytest.approx(start)


def test_the_distance_is_from_the_pareto_set():
    point = toy2d.Point(0)
    with torch.no_grad():
        point.position.copy_(torch.tensor([10.0, toy2d.FRONT_HEIGHT + 4]))
    assert toy2d.measure(point, "test")["distance"] == pytest.approx(5.0)
    slopes = [
        torch.autograd.grad(function, x)[0]
        for function, x in ((toy2d.functions(x)[index], x) for index, x in ((0, _middle()), (1, _middle())))
    ]
    torch.testing.assert_close(slopes[0] + slopes[1], torch.zeros(2), atol=1e-3, rtol=0)  # no step is good for both


def _middle():
    return torch.tensor([0.0, toy2d.FRONT_HEIGHT], requires_grad=True)


def test_a_network_that_says_nothing_leaves_all_of_each_task():
    network = gradnorm_toy.Net(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    figures = gradnorm_toy.measure(network, "test")
    assert figures["normalised_loss"] == pytest.approx(2, abs=0.1)
    assert figures["worst_task"] == pytest.approx(1, abs=0.05)


def test_the_latin_hypercube_is_scipy_s():
    qmc = pytest.importorskip("scipy.stats.qmc")
    theirs, ours = qmc.LatinHypercube(2, seed=19018), np.random.default_rng(19018)
    for _ in range(2):
        np.testing.assert_allclose(burgers.latin_hypercube(7, 2, ours), theirs.random(7))


def test_the_residual_of_burgers_equation_vanishes_for_a_solution():
    """By Cole and Hopf ``-2 nu phi_x / phi`` is one, if phi solves the heat equation: ``exp(a x + nu a^2 t) + 1``."""
    slope = 10.0
    network = nn.Module()
    network.forward = lambda x, t: (
        -2 * burgers.VISCOSITY * slope * torch.sigmoid(slope * x + burgers.VISCOSITY * slope**2 * t)
    )
    (batch,) = burgers.batches(0, 1)
    losses = burgers.losses(network, batch)
    assert losses["residual"].item() < 1e-12
    places, _ = batch["initial"]
    wanted = (network(places, torch.tensor(0.0)) + torch.sin(math.pi * places)).square().mean()
    torch.testing.assert_close(losses["initial"], wanted)
    torch.testing.assert_close(losses["boundary"], network(*batch["boundary"]).square().mean())


def test_the_solution_is_split_by_times(problems):
    solution = torch.stack([torch.full((8,), 1.0 if time % 2 else 0.0) for time in range(4)])
    network = nn.Module()
    network.forward = lambda x, t: torch.zeros_like(x)
    assert burgers.measure(network, solution, "validation") == {"mse": 0.0, "mse_everywhere": 0.5}
    assert burgers.measure(network, solution, "test") == {"mse": 1.0, "mse_everywhere": 0.5}


def test_a_task_that_was_measured_for_no_molecule_is_absent():
    network, labels = nn.Identity(), torch.tensor([[1.0, math.nan, math.nan], [0.0, 1.0, math.nan]])
    logits = torch.tensor([[2.0, 5.0, 5.0], [1.0, 3.0, 5.0]])
    losses = tox21.losses(network, (logits, labels), ("a", "b", "c"))
    assert list(losses) == ["a", "b"]
    torch.testing.assert_close(losses["a"], F.binary_cross_entropy_with_logits(logits[:, 0], torch.tensor([1.0, 0.0])))
    torch.testing.assert_close(losses["b"], F.binary_cross_entropy_with_logits(logits[1, 1], torch.tensor(1.0)))


def test_the_area_is_the_share_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (40,), generator=generator).float()
    labels = torch.randint(0, 2, (40,), generator=generator).float()
    labels[:5] = math.nan
    pairs = [(a, b) for a, b in itertools.product(scores[labels == 1].tolist(), scores[labels == 0].tolist())]
    wanted = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert tox21.auroc(scores, labels) == pytest.approx(wanted)


def test_fingerprints_tell_molecules_apart_and_bear_what_cannot_be_read():
    pytest.importorskip("rdkit")
    same, again, other, none = tox21.fingerprints(["CCO", "OCC", "c1ccccc1", "no molecule"])
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert not none.any()


def test_batches_are_whole_and_epochs_have_other_orders():
    rows = [batch.tolist() for (batch,) in shuffled_batches((torch.arange(7),), 3, 0, 4)]
    assert [len(row) for row in rows] == [3] * 4
    assert len(set(rows[0] + rows[1])) == len(set(rows[2] + rows[3])) == 6
    assert rows[:2] != rows[2:]


# --- a problem of microseconds, and what is done with it ---


def measure_square(network, part):
    return {"distance": abs(network.weight.item() - (2 if part == "validation" else 2.5))}


def small_problem():
    """A weight that two losses pull to one and to three; trained, it is somewhere between."""
    return Problem(
        name="small",
        make_network=lambda seed: nn.Linear(1, 1, bias=False).requires_grad_(True),
        batches=lambda seed, steps: iter([None] * steps),
        losses=lambda network, batch: {
            "one": (network.weight - 1).square().sum(),
            "three": (network.weight - 3).square().sum(),
        },
        terms=("one", "three"),
        anchor="one",
        shared="weight",
        measure=measure_square,
        figure="distance",
        higher_is_better=False,
        allowed={"distance": (0, 1.5)},
        steps=4,
    )


def test_the_first_loss_keeps_its_factor_and_the_last_has_all(problems):
    assert factors(small_problem(), 1e4) == {"one": 1.0, "three": 1e4}
    assert list(factors(problems["vae"], 1e-4).values()) == pytest.approx([1, 1e-2, 1e-4])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(problems, name):
    problem = problems["autoencoder"]
    shares = {"reconstruction": 1.0, "classification": 2.0} if METHODS[name].searches_weights else None
    outcome = train(problem, METHODS[name], 1e-2, 0, shares=shares, steps=20, parts=("validation", "test"))
    before = problem.measure(problem.make_network(0), "test")
    assert outcome.figures["test"]["joint_error"] < before["joint_error"]
    assert outcome.seconds > 0


def test_searched_weights_undo_a_factor(problems):
    """The losses are weighed over their first values."""
    problem = problems["autoencoder"]
    runs = [
        train(
            problem,
            METHODS["adam_searched"],
            1e-3,
            0,
            factor,
            shares={"reconstruction": 1, "classification": 2},
            steps=5,
        )
        for factor in (1.0, 1e4)
    ]
    assert runs[0].figures["validation"] == pytest.approx(runs[1].figures["validation"], rel=1e-3)


def test_a_run_that_diverges_has_failed():
    problem = replace(
        small_problem(),
        losses=lambda network, batch: {"one": network.weight.sum() * math.inf, "three": network.weight.sum()},
    )
    outcome = train(problem, METHODS["mtadam_paper"], 1e-2, 0)
    assert math.isnan(outcome.figures["validation"]["distance"])
    assert problem.failed(outcome.figures["validation"])


def test_of_several_starts_the_worst_counts():
    problem = replace(small_problem(), make_network=make_at, starts=3)
    outcome = train(problem, METHODS["adam_sum"], 0.0, 1)
    assert outcome.figures["validation"] == {"distance": pytest.approx(3.0)}  # of the networks at 3, 4 and 5
    assert outcome.steps == 12


def test_the_least_on_the_way_is_kept_beside_the_end():
    """The weight goes on to where the losses pull it, past the place that is measured from."""
    measured = []

    def measure(network, part):
        measured.append(abs(network.weight.item() - 1))
        return {"distance": measured[-1]}

    problem = replace(small_problem(), measure=measure, watched="distance", make_network=make_at)
    figures = train(problem, METHODS["adam_sum"], 0.1, 0, steps=26).figures["validation"]
    assert len(measured) == 4  # after steps 1, 11 and 21, and at the end
    assert figures == {"distance": measured[-1], "least_distance": min(measured)}
    assert min(measured) < measured[-1]


def test_measuring_on_the_way_changes_nothing(problems):
    """Not even dropout, or a figure that is drawn at random."""
    problem = problems["vae"]
    plain, watched = (
        train(replace(problem, watched=name), METHODS["adam_sum"], 1e-3, 0, steps=12).figures["validation"]
        for name in (None, "kl")
    )
    assert watched.pop("least_kl") <= plain["kl"]
    assert watched == plain


def test_m_config_on_one_term_is_adam():
    torch.manual_seed(0)
    ours, adams = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    adams.load_state_dict(ours.state_dict())
    momenta = MomentumConFIG(ours, ("error",))
    pairs = [(ours, momenta.backward), (adams, lambda losses: losses["error"].backward())]
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-2) for network, _ in pairs]
    for _ in range(30):
        inputs = torch.randn(5, 3, dtype=torch.float64)
        for (network, backward), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            backward({"error": network(inputs).square().mean()})
            optimizer.step()
    torch.testing.assert_close(ours.weight, adams.weight, rtol=1e-12, atol=1e-12)


def test_m_config_is_algorithm_2_of_its_paper():
    """Written again, for two losses that are linear in the weights, so that their gradients are known."""
    slopes, lr = np.array([[1.0, 2.0, -1.0], [-40.0, 10.0, 30.0]]), 0.1
    network = nn.Linear(3, 1, bias=False).double()
    place = network.weight.detach().numpy().flatten().copy()
    momenta, optimizer = MomentumConFIG(network, ("first", "second")), torch.optim.Adam(network.parameters(), lr=lr)
    means, counts, old, squares = np.zeros((2, 3)), np.zeros(2), np.zeros(3), np.zeros(3)
    for step in range(9):
        factor = 1 + 0.3 * step
        optimizer.zero_grad()
        momenta.backward(
            {name: factor * (network.weight @ torch.tensor(slopes[at])).sum() for at, name in enumerate(momenta.counts)}
        )
        optimizer.step()
        term = step % 2
        means[term] = 0.9 * means[term] + 0.1 * factor * slopes[term]
        counts[term] += 1
        if step > 0:
            corrected = means / (1 - 0.9 ** counts[:, None])
            units = corrected / np.linalg.norm(corrected, axis=1, keepdims=True)
            way = np.linalg.lstsq(units, np.ones(2), rcond=None)[0]  # equal cosines to both
            way /= np.linalg.norm(way)
            combined = (corrected @ way).sum() * way
            new = combined * (1 - 0.9**step)
            squares = 0.999 * squares + 0.001 * ((new - 0.9 * old) / 0.1) ** 2
            old = new
            place -= lr * combined / (np.sqrt(squares / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(network.weight.detach().numpy().flatten(), place, rtol=1e-9)


def test_m_config_takes_terms_in_turn_and_passes_over_those_that_are_absent():
    network = nn.Linear(1, 1, bias=False)
    momenta = MomentumConFIG(network, ("a", "b", "c"))
    for names in ("abc", "ac", "ac", "abc", "abc"):
        network.zero_grad()
        momenta.backward({name: network.weight.sum() for name in names})
        assert (network.weight.grad is None) == (min(momenta.counts.values()) == 0)
    assert momenta.counts == {"a": 2, "b": 2, "c": 1}


def make_at(seed):
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(float(seed))
    return network


def test_all_methods_try_the_same_learning_rates():
    problem = small_problem()
    assert candidate(problem, 0, weights=True).lr == USUAL_LR
    assert candidate(problem, 0, weights=True).shares is None
    drawn = [candidate(problem, trial, weights=True) for trial in range(1, 300)]
    assert [one.lr for one in drawn] == [candidate(problem, trial, weights=False).lr for trial in range(1, 300)]
    assert 1e-4 <= min(one.lr for one in drawn) < 2e-4 < 5e-2 < max(one.lr for one in drawn) <= 1e-1
    shares = [one.shares["three"] for one in drawn]
    assert all(one.shares["one"] == 1 for one in drawn)
    assert 1e-4 <= min(shares) < 1e-3 < 1e3 < max(shares) <= 1e4


def test_a_trial_is_affordable_if_it_is_likely_to_fit():
    assert affordable([], 0.0)
    assert affordable([2.0, 4.0], 9.0)
    assert not affordable([2.0, 4.0], 8.9)


def spending(seconds):
    """A training that takes so many seconds, and is the better the larger the learning rate."""

    def run(problem, method, lr, seed, factor, *, shares, steps, parts):
        return Outcome({part: {"distance": 1 / lr / 1e4} for part in parts}, seconds, steps)

    return run


PLAN = Plan(("adam_sum", "mtadam_paper"), (1.0,), (0, 1), 10.0)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.0])
def test_searches_have_equal_budgets(tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(runner_module, "train", spending(seconds))
    runner = Runner(tmp_path / "runs.csv")
    runner.carry_out(small_problem(), PLAN)
    for name in PLAN.methods:
        trials = [run for run in runner.runs if run["method"] == name and run["stage"] == "search"]
        assert len(trials) == int(10 / seconds)
        best = max(trials, key=lambda run: float(run["lr"]))
        tests = [run for run in runner.runs if run["method"] == name and run["stage"] == "test"]
        assert [(run["seed"], run["lr"]) for run in tests] == [("0", best["lr"]), ("1", best["lr"])]
        assert not {run["seed"] for run in trials} & {"0", "1"}
        assert all(run["test"] == "" for run in trials)


def test_an_interruption_loses_the_run_in_progress_and_no_other(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    monkeypatch.setattr(runner_module, "train", spending(1.0))
    Runner(whole).carry_out(small_problem(), PLAN)
    calls = itertools.count()

    def interrupted(*arguments, **options):
        if next(calls) % 4 == 3:
            raise KeyboardInterrupt
        return spending(1.0)(*arguments, **options)

    monkeypatch.setattr(runner_module, "train", interrupted)
    interruptions = 0
    while interruptions < 20:
        before = len(read_runs(cut))
        try:
            Runner(cut).carry_out(small_problem(), PLAN)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert len(read_runs(cut)) == before + 3
            with cut.open("a") as file:
                file.write("small,adam_sum,1,te")  # what was being written does not count
    assert 3 < interruptions < 20
    assert read_runs(cut) == read_runs(whole)
    done = next(calls)
    Runner(cut).carry_out(small_problem(), PLAN)
    assert next(calls) == done + 1


def test_a_larger_budget_goes_on_with_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "train", spending(1.0))
    runner = Runner(tmp_path / "runs.csv")
    runner.carry_out(small_problem(), PLAN)
    first = list(runner.runs)
    runner.carry_out(small_problem(), replace(PLAN, budget=20.0))
    assert runner.runs[: len(first)] == first
    searched = [run for run in runner.runs if run["stage"] == "search" and run["method"] == "adam_sum"]
    assert len(searched) == 20


def row(method, stage, seed, *, figure="error", better="lower", **values):
    return {
        "problem": "digits", "method": method, "factor": "1", "stage": stage, "seed": str(seed), "lr": "0.1",
        "weights": "", "steps": "4", "seconds": "1", "figure": figure, "better": better, "validation": "1",
        "test": "", "failed": "0", **{name: str(value) for name, value in values.items()},
    }  # fmt: skip


def test_the_best_has_not_failed_and_is_the_best_on_the_validation_part():
    trials = [
        row("adam_sum", "search", 0, validation=1, failed=1),
        row("adam_sum", "search", 1, validation=3),
        row("adam_sum", "search", 2, validation=2),
        row("adam_sum", "search", 3, validation="nan", failed=1),
    ]
    assert best_of(trials)["seed"] == "2"
    assert best_of([trials[3], trials[0]])["seed"] == "0"
    areas = [row("adam_sum", "search", seed, better="higher", validation=seed / 10) for seed in range(3)]
    assert best_of(areas)["seed"] == "2"
    assert loss_of(areas[2], "validation") == -0.2


def test_only_tests_of_what_was_chosen_count():
    runs = [
        row("adam_sum", "search", 1000, lr=0.1, validation=2),
        row("adam_sum", "search", 1001, lr=0.2, validation=1),
        row("adam_sum", "test", 0, lr=0.1, test=5),
        row("adam_sum", "test", 0, lr=0.2, test=4),
    ]
    assert chosen_tests(runs) == [runs[3]]
    assert chosen_tests(runs[2:]) == []


def test_the_table_of_results_by_hand():
    ours = [row("recommended", "test", seed, test=value) for seed, value in enumerate([1, 2, 3, 10, "nan"])]
    ours[3]["failed"] = ours[4]["failed"] = "1"
    ours[0]["seconds"] = "3"
    rival = [row("adam_searched", "test", seed, test=2.5) for seed in range(5)]
    search = [row("recommended", "search", 1000 + trial, seconds=2.5) for trial in range(4)]
    search.append(row("adam_searched", "search", 1000))
    searched, found = results([*ours, *rival, *search])
    assert found == {
        "method": "MTAdam, recommended",
        "median": "3",
        "quartiles": "2 to 10",
        "worst": "diverged",
        "failed": "2 of 5",
        "beats searched": "2 of 5",
        "lr": "0.1",
        "seconds a run": "1",
        "trials": "4",
        "seconds of search": "10",
    }
    assert searched["quartiles"] == "2.5 to 2.5"


def test_where_more_is_better_the_worst_is_the_least():
    runs = [row("adam_sum", "test", seed, better="higher", test=value) for seed, value in enumerate([0.7, 0.8, 0.9])]
    (found,) = results([*runs, row("adam_sum", "search", 1000)])
    assert (found["median"], found["worst"]) == ("0.8", "0.7")
    assert found["quartiles"] == "0.85 to 0.75"


def test_quartiles_are_numpy_s():
    values = np.random.default_rng(0).normal(size=11).tolist()
    for count in (1, 2, 7, 10, 11):
        np.testing.assert_allclose(quartiles(values[:count]), np.quantile(values[:count], [0.25, 0.5, 0.75]))
    assert quartiles([1.0, math.inf]) == (math.inf, math.inf, math.inf)


def test_a_replay_counts_what_has_ended_in_time():
    trials = [(1.0, 5.0), (2.0, 3.0)]
    early, middle, late = replay(trials, [0.5, 1.0, 3.0], repeats=50)
    assert set(early) == {math.inf}
    assert set(middle) == {5.0, math.inf}  # by which of the two comes first
    assert set(late) == {3.0}


def test_the_progress_of_a_search_by_hand():
    search = [row("adam_sum", "search", 1000, seconds=4, validation=7), row("uncertainty", "search", 1000, seconds=1)]
    assert progress(search) == [
        {"method": "Adam, sum", "1 s": "none yet", "2 s": "none yet", "4 s": "7"},
        {"method": "uncertainty", "1 s": "1", "2 s": "1", "4 s": "1"},
    ]


def test_runs_at_a_given_rate_have_a_table_of_their_own(tmp_path):
    runner = Runner(tmp_path / "runs.csv")
    problem = replace(small_problem(), watched="distance")
    runner.carry_out(problem, replace(PLAN, methods=("adam_sum",), lr=0.5, steps=40))
    assert [run["stage"] for run in runner.runs] == ["given", "given"]
    assert list(groups(runner.runs)) == []
    ((found,),) = at_given_rates(runner.runs).values()
    ends = [json.loads(run["figures"])["test"] for run in runner.runs]
    assert found["seeds"] == "0 1"
    assert float(found["distance"]) == pytest.approx(sum(end["distance"] for end in ends) / 2, rel=1e-2)
    assert float(found["least_distance"]) == pytest.approx(sum(end["least_distance"] for end in ends) / 2, rel=1e-2)
    assert "## small, at given learning rates" in tables(runner.runs)


def test_costs_are_ratios_seed_by_seed():
    runs = [
        row("adam_sum", "cost", 0, seconds=1), row("adam_sum", "cost", 1, seconds=2),
        row("recommended", "cost", 0, seconds=1.5), row("recommended", "cost", 1, seconds=2),
    ]  # fmt: skip
    assert costs(runs)[1] == {
        "problem": "digits", "method": "MTAdam, recommended", "median": "1.25", "quartiles": "1.12 to 1.38",
        "runs": "2",
    }  # fmt: skip


def test_times_are_compared_in_turn_and_once(tmp_path):
    order = []

    def noting(name):
        def prepare(setup):
            training = adam(setup)
            return replace(training, backward=lambda losses: (order.append(name), training.backward(losses)))

        return Method(prepare, name)

    with pytest.MonkeyPatch.context() as context:
        context.setitem(METHODS, "adam_sum", noting("a"))
        context.setitem(METHODS, "recommended", noting("b"))
        context.setattr(runner_module, "BLOCK", 2)
        runner = Runner(tmp_path / "runs.csv")
        plan = Plan(("adam_sum", "recommended"), (1.0,), (0,), 0.0, steps=5)
        runner.time(small_problem(), plan)
        runner.time(small_problem(), plan)
    assert "".join(order) == "aabbaabbab"
    assert [run["stage"] for run in runner.runs] == ["cost", "cost"]


def test_the_commands_work_together(tmp_path):
    out = tmp_path / "runs.csv"
    common = ["--problems", "digits", "--methods", "adam_sum", "recommended", "--seeds", "2", "--steps", "3"]
    printed = output_of(
        command.main,
        "run",
        *common,
        "--factors",
        1,
        100,
        "--budget-seconds",
        1e-9,
        "--data-dir",
        tmp_path,
        "--out",
        out,
    )
    assert len(printed.splitlines()) == 2 * 2 * 3
    output_of(command.main, "cost", *common, "--data-dir", tmp_path, "--out", out)
    runs = read_runs(out)
    assert [run["stage"] for run in runs[:3]] == ["search", "test", "test"]
    assert set(json.loads(runs[1]["figures"])) == {"validation", "test"}
    assert runs[0]["torch"] == torch.__version__
    printed = output_of(command.main, "tables", "--runs", out, "--output-dir", tmp_path)
    assert "## digits\n" in printed
    assert "## digits, losses times up to 100\n" in printed
    assert (tmp_path / "tables.md").read_text() == tables(runs)
    output_of(command.main, "figures", "--runs", out, "--output-dir", tmp_path)
    assert {file.stem for file in tmp_path.glob("*.png")} == {"failed", "quality", "factors", "budget", "cost"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--problems", "digits", "digits"], "argument --problems: digits is given more than once"),
        (["--methods", "recommended", "adam_sum", "recommended"], "argument --methods: recommended is given more than"),
        (["--factors", "1", "1.0"], "argument --factors: 1.0 is given more than once"),
        (["--factors", "0"], "argument --factors: must be more than 0, but is 0"),
        (["--first-seed", "-1"], "argument --first-seed: must be from 0 to 4294967295, but is -1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(given, said, capsys):
    with pytest.raises(SystemExit):
        command.main(["run", "--problems", "toy2d", *given])
    assert said in capsys.readouterr().err


def test_an_interrupted_command_says_that_it_can_go_on(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "carry_out", interrupt)
    printed = output_of(command.main, "run", "--problems", "toy2d", "--out", tmp_path / "runs.csv")
    assert "again" in printed

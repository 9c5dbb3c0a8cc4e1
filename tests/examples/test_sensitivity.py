"""The sensitivity project: the factors, every method, runs that are not repeated, tables, search, and MTAdam's law."""

import math
import statistics
from functools import partial

import pytest
import torch

from example_projects.common.run_file import append_run, read_runs
from example_projects.mnist.data import SUBSET
from example_projects.problems.catalogue import PROBLEMS
from example_projects.sensitivity import __main__ as command
from example_projects.sensitivity.cells import cells_of
from example_projects.sensitivity.grid import factors, first_term
from example_projects.sensitivity.law import EPS, deviation, to_a_power_of_two
from example_projects.sensitivity.methods import METHODS
from example_projects.sensitivity.search import hyperband, random_search
from example_projects.sensitivity.table import table
from example_projects.sensitivity.training import train
from tests.examples.running import output_of, read_rows

call = partial(output_of, command.main)


@pytest.fixture(scope="module")
def problems():
    return {name: make(SUBSET) for name, make in PROBLEMS.items()}


# The factors


def test_factors_go_in_equal_ratios_from_one_to_the_spread(problems):
    found = list(factors(problems["digits"], 512.0).values())
    assert found == pytest.approx([2.0**power for power in range(10)])


def test_the_anchor_keeps_its_loss(problems):
    for problem in problems.values():
        kept = first_term(problem)
        assert problem.anchor in (kept, "mean")
        found = factors(problem, 1e-4)
        assert found[kept] == 1
        assert min(found.values()) == pytest.approx(1e-4)
        assert set(found) == set(problem.terms)


# The methods


SUITED = [(problem, method) for problem in PROBLEMS for method in METHODS if METHODS[method].suits(problem)]


@pytest.mark.parametrize(("problem", "method"), SUITED)
def test_every_method_trains_every_problem_it_suits(problem, method, problems):
    if method in ("pcgrad", "aligned-mtl"):
        pytest.importorskip("torchjd")
    problem = problems[problem]
    before = problem.metric(problem.make_network(0))
    outcome = train(problem, METHODS[method], 1.0, 1e-3, 4, 0)
    assert math.isfinite(outcome.value)
    assert outcome.value != before
    assert outcome.seconds_per_step > 0


def test_the_output_balancer_does_not_suit_an_equation(problems):
    with pytest.raises(KeyError):
        train(problems["equation"], METHODS["output-balancer"], 1.0, 1e-3, 1, 0)


def test_the_oracle_does_not_feel_the_factors(problems):
    values = [
        train(problems["autoencoder"], METHODS["adam-by-hand"], s, 1e-3, 4, 0).value for s in (2.0**-13, 1, 2**13)
    ]
    assert values[0] == values[1] == values[2]
    felt = [train(problems["autoencoder"], METHODS["adam"], spread, 1e-3, 4, 0).value for spread in (1e-4, 1.0)]
    assert felt[0] != felt[1]


def test_a_run_that_diverges_is_infinitely_bad(problems):
    assert train(problems["equation"], METHODS["adam"], 1.0, 1e30, 8, 0).value == math.inf


def test_the_early_figure_is_that_of_a_quarter_of_the_steps(problems):
    """A run of a quarter as many steps sees the same batches."""
    problem = problems["autoencoder"]
    early = train(problem, METHODS["adam"], 1.0, 1e-3, 8, 0).early
    assert early == train(problem, METHODS["adam"], 1.0, 1e-3, 2, 0).value


def test_backward_passes_are_counted_as_they_run(problems, monkeypatch):
    """By the number of times autograd is called, for the methods that go through the whole network."""
    calls = []
    grad, backward = torch.autograd.grad, torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), grad(*a, **k))[1])
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: (calls.append(1), backward(*a, **k))[1])
    for name in ("mtadam", "mtadam-every-20", "adatask"):
        calls.clear()
        train(problems["digits"], METHODS[name], 1.0, 1e-3, 12, 0)
        assert len(calls) / 12 == pytest.approx(METHODS[name].passes(10, 12)), name


# MTAdam's law


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("balance_every", [1, 20])
def test_factors_change_nothing_in_double_precision(name, balance_every, problems):
    spreads = (1e-4, 1e4)
    assert deviation(problems[name], spreads, 6, balance_every, to_a_power_of_two) == 0
    assert deviation(problems[name], spreads, 6, balance_every) < 1e-9


def test_eps_is_felt_where_the_anchor_does_not_reach(problems):
    """The classifier's head is trained by its own term alone, as by Adam."""
    assert deviation(problems["autoencoder"], (1e-4,), 6, 1, eps=EPS) > 1e-9


# The command


def test_runs_are_not_repeated_and_tables_and_figures_are_made(tmp_path, monkeypatch):
    arguments = ["--data-dir", SUBSET, "--output-dir", tmp_path, "--method", "adam", "adam-by-hand", "mtadam"]
    arguments += ["--spreads", 1e-4, 1e4, "--lrs", 1e-3, 1e-2, "--seeds", 0, "--steps", 2]
    printed = call(*arguments)
    rows = read_rows(tmp_path / "runs.csv")
    assert len(rows) == len({tuple(row.items()) for row in rows}) == 3 * 3 * 2 * 2
    assert printed.count("| mtadam ") == 3
    for name in PROBLEMS:
        assert "mtadam" in (tmp_path / f"{name}.md").read_text()
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert (tmp_path / "law.md").read_text().count(" 0.0e+00 ") >= len(PROBLEMS) * 2
    with monkeypatch.context() as patched:
        patched.delattr(command, "train")
        call(*arguments)
    assert read_rows(tmp_path / "runs.csv") == rows
    printed = call(*arguments, "--problem", "equation", "--seeds", 0, 1, "--lrs", 1e-3, "--method", "adam")
    assert len(read_rows(tmp_path / "runs.csv")) == len(rows) + 2
    assert "| adam   | 4 " in printed  # two spreads, two seeds, and nothing else
    assert "mtadam " not in printed


def test_a_line_that_was_cut_short_is_trained_again(tmp_path):
    file = tmp_path / "runs.csv"
    append_run(file, run_of("adam", 1, 0.1, 2.0))
    whole = file.read_text()
    file.write_text(whole + "digits,adam,1,0.")
    assert len(read_runs(file)) == 1
    assert file.read_text() == whole


# The table


def run_of(method, spread, lr, value, *, early=1.0, seed=0, seconds=1.0):
    what = {"problem": "p", "method": method, "spread": spread, "lr": lr, "steps": 8, "seed": seed}
    return {name: str(v) for name, v in {**what, "value": value, "early": early, "seconds_per_step": seconds}.items()}


def test_cells_are_medians_over_the_seeds():
    cells = cells_of([run_of("adam", 1, lr, lr * v, seed=s) for lr in (1, 2) for s, v in enumerate((3.0, 1.0, 9.0))])
    assert cells.values == {1.0: {1.0: 3.0, 2.0: 6.0}}
    assert cells.best() == {1.0: 3.0}
    assert cells.worst() == {1.0: 6.0}
    assert cells.best_lr() == 1.0


def test_a_row_holds_best_median_worst_and_costs():
    adam = [run_of("adam", s, lr, v) for s, lr, v in ((1, 1, 2.0), (1, 2, 4.0), (9, 1, 30.0), (9, 2, math.inf))]
    own = [run_of("mtadam", s, lr, v, seconds=3.0) for s, lr, v in ((1, 1, 3.0), (1, 2, 8.0), (9, 1, 5.0), (9, 2, 6.0))]
    first, second = table([*own, *adam], terms=2)
    assert first["method"] == "adam"
    assert (first["best"], first["worst"], first["worst spread, best lr"]) == ("2", "diverged", "30")
    assert (second["best"], second["median"], second["worst"]) == ("3", "5.5", "8")
    assert (second["median spread, best lr"], second["worst spread, best lr"]) == ("4", "5")
    assert (second["seconds"], second["backwards"]) == ("3", "2")
    assert second["random search"] == f"{5 / 3:.1f}"  # two of Adam's four are as good as 4


# The search


def test_random_search_is_what_drawing_without_putting_back_gives():
    runs = [run_of("adam", spread, 1, spread) for spread in range(1, 10)]
    draws = [torch.randperm(9, generator=torch.Generator().manual_seed(seed)) for seed in range(4000)]
    needed = [1 + min(int((draw == good).nonzero()) for good in (0, 1)) for draw in draws]  # 1 and 2 are as good as 2
    assert random_search(runs, 2.0) == pytest.approx(statistics.fmean(needed), rel=0.03)
    assert random_search(runs, 0.5) == math.inf


def test_hyperband_is_cheaper_if_early_figures_tell_which_runs_are_good():
    telling = [run_of("adam", value, 1, value, early=value) for value in range(1, 61)]
    misleading = [run_of("adam", value, 1, value, early=-value) for value in range(1, 61)]
    assert hyperband(telling, 3.0) < random_search(telling, 3.0) < hyperband(misleading, 3.0)
    assert hyperband(telling, 0.5) == math.inf


def test_hyperband_with_nothing_to_find_costs_one_short_round():
    """All are good: four runs of a quarter, and what is left of one."""
    assert hyperband([run_of("adam", 1, 1, 1.0)], 1.0) == pytest.approx(1.75)

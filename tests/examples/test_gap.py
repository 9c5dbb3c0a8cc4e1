"""The gap project: settings as they are written, runs that are not repeated, and the table."""

import json
import math
from functools import partial

import pytest
import torch

from example_projects.gap import __main__ as command
from example_projects.gap.anchors import AnchorSchedule
from example_projects.gap.settings import read_setting
from example_projects.gap.table import table
from example_projects.gap.training import train
from example_projects.mnist.data import SUBSET
from example_projects.problems.catalogue import PROBLEMS
from lightning_mtadam import MTAdam
from tests.examples.running import output_of, read_rows

call = partial(output_of, command.main)


def equation():
    return PROBLEMS["equation"](SUBSET)


# Settings


def test_the_options_reach_mtadam():
    problem = equation()
    setting = read_setting("mtadam:denominator=sum,beta3=0.99,boundary=2,anchor=mean,layers=global")
    optimizer = setting.configure(problem, problem.make_network(0), 0.1)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999, 0.99)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert "'boundary': 2" in repr(optimizer._options)
    assert "'sum'" in repr(optimizer._options)
    assert (optimizer._options.anchor, optimizer._options.layers) == ("mean", "global")


def test_adam_has_the_balanced_weights_and_mtadam_the_given_ones():
    problem = PROBLEMS["digits"](SUBSET)
    given = problem.given_weights(3)
    assert given["class_0"] == 1
    assert max(given.values()) > 100
    assert read_setting("mtadam").weights(problem, 3) == given
    assert read_setting("mtadam:class_3=2").weights(problem, 3) == given
    assert read_setting("adam:weights=given").weights(problem, 3) == given
    assert read_setting("adam").weights(problem, 3) == problem.balanced_weights
    assert read_setting("adam:class_3=2").weights(problem, 3) == {**problem.balanced_weights, "class_3": 2}


@pytest.mark.parametrize("name", ["sgd", "mtadam:beta3", "adam,beta1=0"])
def test_what_is_no_setting_is_refused(name):
    with pytest.raises(ValueError, match=rf"mtadam:option=value,option=value, or adam, but got '{name}'"):
        read_setting(name)


def test_an_anchor_may_change_and_a_share_outside_of_training_is_refused():
    problem = equation()
    anchors = read_setting("mtadam:anchor=residual-boundary@0.25").anchors(problem)
    assert (anchors.early, anchors.late, anchors.change_at(40)) == ("residual", "boundary", 10)
    assert read_setting("mtadam").anchors(problem) == AnchorSchedule(problem.anchor, problem.anchor, 1.0)
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 'max-mean@1.5'"):
        read_setting("mtadam:anchor=max-mean@1.5").anchors(problem)


@pytest.mark.parametrize(
    ("options", "beta2"),
    [
        ("beta2=fallen", [0.999, 0.99]),
        ("beta2.boundary=0.9", [0.999, 0.9]),
        ("beta2=0.8,beta2.boundary=0.9", [0.8, 0.9]),
    ],
)
def test_a_beta2_for_each_term_comes_with_mtadams_other_options(options, beta2):
    problem = equation()
    setting = read_setting(f"mtadam:{options},boundary=2,layers=global,beta1=0.5,beta3=0.6")
    optimizer = setting.configure(problem, problem.make_network(0), 0.1)
    norms = torch.tensor([[3.0, 0.1]], dtype=torch.float64)
    assert optimizer.memory(norms, torch.tensor([[3.0, 1.0]], dtype=torch.float64)).tolist() == [pytest.approx(beta2)]
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.1, (0.5, 0.6))
    assert optimizer.options.importance == {"boundary": 2}
    assert (optimizer.options.anchor, optimizer.options.layers) == ("residual", "global")


# Training


def test_the_learning_rate_falls_to_zero_in_equal_steps(monkeypatch):
    problem, seen = equation(), []
    original = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self, *args: (seen.append(self.param_groups[0]["lr"]), original(self, *args))[1],
    )
    train(problem, read_setting("adam"), 0.4, "linear", 4, 0)
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_anchor_changes_at_its_share_of_the_steps(monkeypatch):
    problem, seen = equation(), []
    original = MTAdam.step
    monkeypatch.setattr(
        MTAdam, "step", lambda self, *args: (seen.append(self._options.anchor), original(self, *args))[1]
    )
    train(problem, read_setting("mtadam:anchor=max-boundary@0.5"), 0.01, "linear", 6, 0)
    assert seen == ["max"] * 3 + ["boundary"] * 3


@pytest.mark.parametrize("more", ["", ",balance_every=3", ",beta2=fallen"])
def test_an_anchor_that_changes_to_itself_changes_nothing(more):
    figures = [
        train(equation(), read_setting(f"mtadam:anchor={anchor}{more}"), 0.01, "linear", 20, 0)
        for anchor in ("max", "max-max@0.5", "max-mean@0.5")
    ]
    assert figures[0] == figures[1] != figures[2]


def test_a_run_that_diverges_has_no_figures():
    figures = train(equation(), read_setting("adam"), 1e30, "none", 20, 0)
    assert all(math.isnan(value) for value in figures.values())


# The command


def test_every_problem_is_trained_by_every_setting_and_runs_are_not_repeated(tmp_path, monkeypatch):
    arguments = ["--lrs", 1e-3, 1e-2, "--decay", "linear", "--seeds", 0, "--steps", 3, "--data-dir", SUBSET]
    arguments += ["--output-dir", tmp_path, "--settings", "adam", "mtadam:denominator=sum"]
    printed = call(*arguments)
    rows = read_rows(tmp_path / "runs.csv")
    assert len(rows) == len({json.dumps(row) for row in rows}) == len(PROBLEMS) * 2 * 2
    assert all(math.isfinite(json.loads(row["figures"])[row["metric"]]) for row in rows)
    assert printed.count("| mtadam:denominator=sum") == len(PROBLEMS)
    with monkeypatch.context() as patched:
        patched.delattr(command, "train")
        call(*arguments)
    assert read_rows(tmp_path / "runs.csv") == rows
    call(*arguments, "--problem", "equation", "--seeds", 0, 1)
    assert len(read_rows(tmp_path / "runs.csv")) == len(rows) + 4


# The table


def runs_of(setting, errors):
    """Runs with an error for every learning rate and seed."""
    return [
        {
            "problem": "p",
            "setting": setting,
            "decay": "none",
            "lr": str(lr),
            "seed": str(seed),
            "metric": "error",
            "figures": json.dumps({"error": error}),
        }
        for lr, by_seed in errors.items()
        for seed, error in enumerate(by_seed)
    ]


def test_every_setting_is_shown_at_its_own_best_learning_rate():
    runs = [
        *runs_of("mtadam", {0.1: [2.0, 8.0], 0.2: [4.0, 9.0], 0.3: [1.0, math.nan]}),
        *runs_of("adam:a=2", {0.1: [9.0, 9.0], 0.2: [3.0, 3.0]}),
        *runs_of("adam", {0.1: [1.0, 4.0], 0.2: [3.0, 3.0]}),
        *runs_of("adam:weights=given", {0.1: [1.0, 1.0]}),
    ]
    rows = {row["setting"]: row for row in table(runs)}
    assert list(rows) == ["adam:weights=given", "adam", "adam:a=2", "mtadam"]
    assert rows["mtadam"]["best_lr"] == "0.1 (smallest)"
    assert rows["adam:a=2"]["best_lr"] == "0.2 (largest)"
    assert rows["mtadam"]["metric"] == "4 (2 to 8)"
    assert rows["mtadam"]["against_oracle"] == "2 (2 to 2)"
    assert rows["adam"]["n"] == "2"


def test_learning_rates_with_fewer_seeds_do_not_count():
    runs = runs_of("adam", {0.1: [2.0, 2.0], 0.2: [1.0]})
    (row,) = table(runs)
    assert row["best_lr"].startswith("0.1")

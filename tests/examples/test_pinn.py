"""The PINN project: its equation, its runs that resume exactly, and the command."""

import json
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from example_projects.common import runs
from example_projects.pinn import __main__ as command
from example_projects.pinn import module as pinn_module
from example_projects.pinn.data import TRAINING_POINTS, Points
from example_projects.pinn.methods import METHODS
from example_projects.pinn.module import Equation
from example_projects.pinn.network import Net
from example_projects.pinn.problem import grid, pinn_losses, relative_error, second_derivative, solution, source
from tests.examples.running import (
    QUIET,
    CtrlCAt,
    EndedError,
    InterruptAt,
    assert_row_of_each,
    assert_same_weights,
    output_of,
    read_results,
    run_quietly,
    stopped_by_ctrl_c,
    untimed,
)
from tests.lightning_models import needs_exact_resume

pytestmark = QUIET

call = partial(output_of, command.main)

STEPS = 8


# The equation


def points(count=23):
    return grid(count).double().requires_grad_()


def test_the_solution_satisfies_the_equation_and_the_boundary():
    x = points()
    losses = pinn_losses(solution(x), x)
    assert tuple(losses) == ("residual", "boundary")
    assert losses["residual"].item() < 1e-20 * source(x).square().mean().item()
    assert losses["boundary"].item() < 1e-28
    assert relative_error(solution(x), x).item() == 0


def test_the_source_is_the_second_derivative_of_the_solution():
    x, h = points().detach()[1:-1], 1e-4
    central = (solution(x + h) - 2 * solution(x) + solution(x - h)) / h**2
    torch.testing.assert_close(source(x), central, rtol=0, atol=1e-3)


def test_a_function_that_is_off_by_a_line_leaves_the_boundary_alone_unsatisfied():
    x = points()
    losses = pinn_losses(solution(x) + 3 - 5 * x, x)
    assert losses["residual"].item() < 1e-18 * source(x).square().mean().item()
    assert losses["boundary"].item() == pytest.approx((3**2 + 2**2) / 2, rel=1e-12)


def test_a_function_that_is_off_by_a_parabola_has_the_residual_of_its_curvature():
    x = points()
    losses = pinn_losses(solution(x) + 1.5 * x * (x - 1), x)
    assert losses["residual"].item() == pytest.approx(9, rel=1e-10)
    assert losses["boundary"].item() < 1e-28


def forward_mode(network, x):
    """The second derivative of the network by propagating value, slope and curvature through its layers."""
    value, slope, curvature = x, torch.ones_like(x), torch.zeros_like(x)
    for layer in network.layers:
        if isinstance(layer, nn.Linear):
            value = layer(value)
            slope, curvature = (part @ layer.weight.T for part in (slope, curvature))
        else:
            value = value.tanh()
            change = 1 - value.square()
            curvature = change * curvature - 2 * value * change * slope.square()
            slope = change * slope
    return curvature


def test_the_second_derivative_and_its_gradient_equal_those_of_forward_propagation():
    torch.manual_seed(0)
    network, x = Net().double(), points()
    ours, oracle = second_derivative(network(x), x), forward_mode(network, x.detach())
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-14)
    weights = [layer.weight for layer in network.layers if isinstance(layer, nn.Linear)]
    gradients = [torch.autograd.grad(found.square().sum(), weights) for found in (ours, oracle)]
    for ours, oracle in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-14)


def test_the_relative_error_is_one_for_zero_and_two_for_the_negative():
    x = points()
    assert relative_error(torch.zeros_like(x), x).item() == 1
    assert relative_error(-solution(x), x).item() == pytest.approx(2)


# The module


@pytest.mark.parametrize(
    ("name", "factor", "expected"), [("mtadam", 1.0, 1), ("adam", 1e4, 1e4), ("adam-weight-1000", 10.0, 1e4)]
)
def test_the_boundary_loss_takes_the_factor_and_the_weight_by_hand(name, factor, expected):
    torch.manual_seed(0)
    module, x = Equation(METHODS[name], factor, 1e-3), grid(9)
    plain = pinn_losses(module.network(y := x.clone().requires_grad_()), y)
    losses = module.training_step(x, 0)
    assert losses["residual"].item() == pytest.approx(plain["residual"].item())
    assert losses["boundary"].item() == pytest.approx(expected * plain["boundary"].item())
    assert not x.requires_grad


@pytest.mark.parametrize("name", ["mtadam", "mtadam-every-5"])
def test_a_factor_on_the_boundary_changes_nothing_with_mtadam(name, tmp_path):
    results = []
    for factor in (1.0, 2.0**13):
        folder = tmp_path / str(factor)
        arguments = ["--method", name, "--seeds", 0, "--steps", 30, "--boundary-factor", factor]
        call(*arguments, "--output-dir", folder, "--accelerator", "cpu")
        results.append(float(read_results(folder)[0]["relative_error"]))
    assert results[0] == pytest.approx(results[1], rel=1e-3)


# The command


@pytest.fixture(scope="module")
def all_methods(tmp_path_factory):
    """One call with every method: the folder and what was printed."""
    output = tmp_path_factory.mktemp("all")
    return output, call(
        "--method", *METHODS, "--seeds", 0, "--steps", 6, "--output-dir", output, "--accelerator", "cpu"
    )


def test_every_method_runs_and_has_a_row(all_methods):
    output, printed = all_methods
    for row, shown in assert_row_of_each(METHODS, command.COLUMNS, output, printed):
        assert row["seed"] == "0"
        assert row["steps"] == "6"
        assert 0 < float(row["relative_error"]) < 100
        assert float(row["seconds_per_step"]) > 0
        assert float(shown[2]) == pytest.approx(float(row["relative_error"]), rel=0.06)
    assert f"tensorboard --logdir {output}" in printed


def test_the_methods_differ(all_methods):
    """But for those with ``balance_every``: in so few steps they all measure nearly always."""
    errors = [row["relative_error"] for row in read_results(all_methods[0]) if "-every-" not in row["method"]]
    assert len(set(errors)) == len(errors)


def test_a_method_balances_at_every_step_unless_its_name_says_otherwise():
    for name, method in METHODS.items():
        _, every, k = name.partition("-every-")
        assert method.options.get("balance_every") == (int(k) if every else None)


def test_every_step_sees_the_whole_grid(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch)

    run_equation(tmp_path, callbacks=[Watch()])
    assert len(seen) == STEPS
    assert all(torch.equal(batch, torch.linspace(0, 1, TRAINING_POINTS)[:, None]) for batch in seen)


# Resume


def run_equation(folder, *, resume=False, callbacks=(), seed=0, every=3, steps=STEPS):
    """A run of one epoch. Returns its module and its result."""
    pl.seed_everything(seed, verbose=False)
    module = Equation(METHODS["mtadam"], 1.0, 1e-2)
    result = run_quietly(
        folder,
        module,
        Points(steps),
        "relative_error",
        settings={"steps": steps},
        resume=resume,
        checkpoint_every=every,
        callbacks=callbacks,
        max_epochs=1,
    )
    return module, result


@needs_exact_resume
@pytest.mark.parametrize("interrupt_at", [4, 7])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, interrupt_at):
    expected, expected_result = run_equation(tmp_path / "whole")
    with pytest.raises(EndedError):
        run_equation(tmp_path / "parts", callbacks=[InterruptAt(interrupt_at)])
    count = InterruptAt()
    module, result = run_equation(tmp_path / "parts", resume=True, callbacks=[count], seed=123)
    assert len(count.seen) == STEPS - interrupt_at // 3 * 3
    assert_same_weights(module.state_dict(), expected.state_dict())
    assert {**result, "seconds_per_step": 0} == {**expected_result, "seconds_per_step": 0}


@needs_exact_resume
def test_ctrl_c_loses_nothing(tmp_path, capsys):
    expected, _ = run_equation(tmp_path / "whole")
    with stopped_by_ctrl_c(capsys, step=6):
        run_equation(tmp_path / "parts", callbacks=[CtrlCAt(5)], every=100)
    count = InterruptAt()
    module, _ = run_equation(tmp_path / "parts", resume=True, callbacks=[count], every=100, seed=7)
    assert len(count.seen) == STEPS - 6
    assert_same_weights(module.state_dict(), expected.state_dict())


def test_resume_skips_what_has_ended_and_runs_what_has_not(tmp_path, monkeypatch):
    arguments = [
        "--method",
        "mtadam",
        "adam",
        "--seeds",
        0,
        "--steps",
        4,
        "--output-dir",
        tmp_path,
        "--accelerator",
        "cpu",
    ]
    call(*arguments)
    whole = read_results(tmp_path)
    folder = tmp_path / "factor1-lr0.001"
    (folder / "adam-seed0" / "result.json").unlink()
    trained = []
    original = Equation.training_step
    monkeypatch.setattr(
        pinn_module.Equation,
        "training_step",
        lambda self, *args: (trained.append(self.method), original(self, *args))[1],
    )
    monkeypatch.setattr(runs, "_step_of", lambda checkpoint: 0)  # and from its beginning
    call(*arguments, "--resume")
    assert trained == [METHODS["adam"]] * 4
    assert untimed(read_results(tmp_path)) == untimed(whole)


def test_a_run_with_other_steps_is_not_resumed(tmp_path):
    arguments = ["--method", "adam", "--seeds", 0, "--output-dir", tmp_path, "--accelerator", "cpu"]
    call(*arguments, "--steps", 2)
    with pytest.raises(ValueError, match=r"steps was 2 and is 3\. Give the options it was made with"):
        call(*arguments, "--steps", 3, "--resume")
    assert json.loads((tmp_path / "options.json").read_text())["steps"] == 2

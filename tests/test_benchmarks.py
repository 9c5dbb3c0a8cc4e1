"""The benchmarks measure what they say, and their commands run: on little work, so that they do not rot."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from example_projects.common.image_module import ImageModule
from example_projects.common.methods import IMAGE_METHODS as METHODS
from lightning_mtadam import MTAdam
from tests.benchmarks import (
    exchange,
    gradient_report,
    importance,
    memory,
    monitor,
    noise,
    optimizer_step,
    paper_size,
    rivals,
    scaling,
    step_cost,
)
from tests.benchmarks.authors import AuthorsMTAdam
from tests.benchmarks.measuring import Piece, interleave, ratio
from tests.benchmarks.methods import GradNorm, Method, weight_gradients
from tests.benchmarks.networks import Task, UNet, mlp_task, size_of
from tests.benchmarks.peak import peak_of
from tests.lightning_models import QUIET

QUICK = ("--quick", "--threads", "1")
RATIO = r"(\d+\.\d\d) \(\d+\.\d\d to \d+\.\d\d\)"
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def small_task(terms=2):
    return mlp_task(terms, 100, batch=3)


@pytest.fixture
def known_peaks(monkeypatch):
    """The sum of the numbers among the arguments, and one, in place of a measurement in another process."""
    for module in (memory, scaling, rivals):
        monkeypatch.setattr(
            module,
            "in_a_process",
            lambda function, *arguments: 1 + sum(number for number in arguments if not isinstance(number, str)),
        )


@QUIET
@pytest.mark.filterwarnings("ignore:.*tensorboardX", "ignore:.*does not have many workers")
def test_the_cost_of_the_monitor_is_told_by_what_it_did(monkeypatch, capsys):
    monkeypatch.setattr(monitor, "CASES", {"small": small_task})
    monitor.main(["--quick"])
    printed = capsys.readouterr().out
    assert re.search(r"case +\| not logged +\| logged +\| with pictures", printed)
    quiet, logged, pictures = (float(one) for one in re.findall(r"([\d.]+) \([\d.]+ to [\d.]+\)", printed))
    assert quiet < logged < pictures


def test_the_authors_algorithm_equals_ours():
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    data = torch.randn(8, 4, dtype=torch.float64)
    mtadam = MTAdam(ours.named_parameters(), lr=1e-2)
    authors = AuthorsMTAdam(theirs.parameters(), terms=3, lr=1e-2)
    for _ in range(30):
        output = ours(data)
        mtadam.zero_grad()
        mtadam.backward({"fit": (output - 1).square().mean(), "size": 300 * output.abs().mean(), "low": output.mean()})
        mtadam.step()
        output = theirs(data)
        authors.step([(output - 1).square().mean(), 300 * output.abs().mean(), output.mean()])
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_gradnorms_closed_form_equals_double_backward():
    torch.manual_seed(0)
    shared = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64, requires_grad=True)
    progress = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64)
    losses = [(shared - 1).square().sum(), 10 * shared.cos().sum(), shared.exp().sum()]
    norms = torch.stack(
        [
            torch.autograd.grad(weight * loss, shared, create_graph=True)[0].norm()
            for weight, loss in zip(weights, losses, strict=True)
        ]
    )
    target = (norms.mean() * (progress / progress.mean()) ** 1.5).detach()
    (expected,) = torch.autograd.grad((norms - target).abs().sum(), weights)
    found = weight_gradients(weights.detach(), norms.detach() / weights.detach(), progress, 1.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_gradnorm_raises_the_weight_of_the_loss_with_the_smaller_gradient():
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    task = Task(
        network,
        (torch.randn(4, 3), torch.randn(4, 2)),
        lambda output, target: {"small": (output - target).square().mean(), "large": 1e3 * (output - 1).abs().mean()},
        network.weight,
    )
    method = GradNorm(task)
    for _ in range(20):
        method.step()
    small, large = method.logits.tolist()
    assert small > large


def test_pieces_are_timed_in_turn_and_prepared_before():
    calls = []
    pieces = {name: Piece(lambda n=name: calls.append(n), prepare=lambda: calls.append("-")) for name in "ab"}
    times = interleave(pieces, 2)
    assert calls == ["-", "a", "-", "b"] * 5
    assert [len(times[name]) for name in "ab"] == [2, 2]


def test_a_ratio_is_of_medians_with_quartiles_of_pairs():
    assert str(ratio([2.0, 4.0, 9.0], [2.0, 2.0, 3.0])) == "2.00 (1.00 to 3.00)"


def test_the_line_is_fitted_to_relative_errors():
    line = scaling.fit([1, 2, 4], [5, 7, 11])
    assert (round(line.start, 9), round(line.slope, 9), line.r_squared) == (3, 2, pytest.approx(1))


@needs_linux
def test_the_peak_is_what_a_step_holds_at_once_beyond_what_was_there():
    def make():
        kept = torch.ones(16 << 20)  # 64 MiB, there before

        def step():
            for _ in range(2):
                torch.ones_like(kept)  # one after the other

        return step

    assert 63 << 20 < peak_of(make) < 72 << 20  # the kernel counts in batches


def test_the_networks_have_the_sizes_they_claim():
    assert 7e6 < size_of(UNet()) < 10e6
    assert 1.8e6 < size_of(UNet(16)) < 2e6
    assert size_of(mlp_task(6, 7e6).network) == pytest.approx(7e6, rel=0.01)
    assert UNet(4)(torch.ones(2, 3, 32, 16)).shape == (2, 3, 32, 16)


def test_the_command_for_the_optimizer_prints_its_table(monkeypatch, capsys):
    monkeypatch.setitem(optimizer_step.NETWORKS, "400 tiny", lambda: nn.Linear(3, 2))
    monkeypatch.setattr(optimizer_step, "STREAMED", 1000)
    optimizer_step.main([*QUICK, "--variants", "eager", "--terms", "2", "3", "--networks", "400 tiny"])
    assert len(re.findall(rf"\| 400 tiny \| [23] +\| {RATIO} ", capsys.readouterr().out)) == 2


def test_the_command_for_memory_prints_its_table(known_peaks, capsys):
    memory.main(["--parameters", "1e3", "--methods", "MTAdam", "authors' MTAdam"])
    assert re.search(r"\| MTAdam +\| 1007\.00 +\| 15 +\| 1\.00 ", capsys.readouterr().out)


def test_the_command_for_scaling_prints_its_lines(known_peaks, capsys):
    scaling.main([*QUICK, "--terms", "1", "2", "--parameters", "1e3", "2e3", "--fixed-parameters", "1e3"])
    assert capsys.readouterr().out.count("R^2") == 4


def test_the_command_for_rivals_names_what_it_leaves_out(known_peaks, monkeypatch, capsys):
    monkeypatch.setitem(rivals.METHODS, "GradNorm", Method(lambda task: None, needs=("no_such_package",)))
    monkeypatch.setattr(rivals, "TASKS", {"small": small_task})
    rivals.main([*QUICK, "--tasks", "small", "--methods", "MTAdam", "authors' MTAdam", "GradNorm"])
    printed = capsys.readouterr().out
    assert "Left out: GradNorm, which needs no_such_package." in printed
    assert re.search(rf"\| MTAdam +\| {RATIO}", printed)


def test_the_command_for_noise_prints_its_tables(capsys):
    noise.main(["--quick"])
    rows = re.findall(r"\| (float\d+) +\| (.e-\d+) .* (.e-\d+) +\| (\d\.\de-\d+) +\|", capsys.readouterr().out)
    assert [dtype for dtype, *_ in rows] == ["float64", "float32"]
    for _, share, _, threshold in rows:
        assert float(share) < float(threshold) / 30


def test_the_command_for_the_importance_prints_its_table(capsys):
    importance.main(["--seeds", "1", "--steps", "100", "--only", "importance 0"])
    rows = re.findall(r"\| importance (\S+) \| 100 \| ([\d.]+) \| ([\d.]+) \|", capsys.readouterr().out)
    assert [float(name) for name, *_ in rows] == [0.3, 0.1, 0.03, 0.01]
    assert [float(kl) for *_, kl in rows] == sorted(float(kl) for *_, kl in rows)


@QUIET
def test_the_report_is_timed_against_the_steps_beside_it(capsys, monkeypatch):
    monkeypatch.setattr(gradient_report, "CASES", {"small": small_task})
    gradient_report.main([*QUICK, "--cases", "small"])
    printed = capsys.readouterr().out
    assert len(re.findall(RATIO, printed)) == 4
    assert len(re.findall(r"\d\.\d\d %", printed)) == 2
    assert len(re.findall(r"\d\.\d{3}, at most", printed)) == 2


@QUIET
def test_the_command_for_the_whole_step_prints_its_three_ratios(monkeypatch, capsys):
    monkeypatch.setattr(step_cost, "CASES", {"small": small_task})
    step_cost.main([*QUICK, "--cases", "small"])
    printed = capsys.readouterr().out
    assert [heading in printed for heading in ("1. step", "2. Adam", "3. step")] == [True] * 3
    assert len(re.findall(RATIO, printed)) == 3


def test_the_cost_of_an_exchange_is_measured_and_modelled(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["exchange", "--ranks", "2", "--repeats", "5"])
    exchange.main()
    found = capsys.readouterr().out
    assert re.search(r"\| 2 \| \d+\.\d\d ms \(\d+\.\d\d to \d+\.\d\d\) \| measured", found)
    assert "| 64 | 1.26 ms | modelled" in found


def test_the_work_of_a_step_at_the_papers_size_is_that_of_its_convolutions():
    """One step of a 1x1 generator on one term: forward, and the weights' gradient; the input needs none."""

    class Tiny(ImageModule):
        def __init__(self):
            super().__init__(METHODS["adam"], {"l1": 1.0}, 1.0)
            self.generator = nn.Conv2d(3, 5, 1, bias=False)

        def training_step(self, batch, batch_idx):
            self.update({"l1": self.generator(batch[0]).sum()}, self.optimizers())

    run = paper_size.Run(lambda method: Tiny(), [(2, 3, 8, 8)], lambda module: module.generator, 1)
    work, kernels = paper_size.count(run, "adam")
    assert work * 1e12 == 2 * (2 * 2 * 64 * 3 * 5)
    assert kernels > 2 * paper_size.UPDATE["adam"]

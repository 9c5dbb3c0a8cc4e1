"""plot_balance draws the monitor's pictures of an optimizer, a balancer, a Trainer or a log directory."""

import sys

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import nn

from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import FixedWeights
from lightning_mtadam.callbacks import BalanceWeightMonitor, balance_pictures, plot_balance
from tests.callbacks.test_balance_weights import Adversaries, TwoHeads, fit
from tests.lightning_models import QUIET

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


class Weighted(TwoHeads):
    def configure_balancer(self):
        return FixedWeights({"fit": 2.0, "big": 0.5})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.fixture(scope="module", params=["mtadam", "gan", "weights"])
def run(request, tmp_path_factory):
    """A trainer after a run of four steps, of which all have pictures, its folder, and what they are of."""
    module, prefixes = {
        "mtadam": (TwoHeads, ["balance_weight"]),
        "gan": (Adversaries, ["balance_weight-MTAdam", "balance_weight-MTAdam-1"]),
        "weights": (Weighted, ["term_weight"]),
    }[request.param]
    folder = tmp_path_factory.mktemp("run")
    return fit(folder, BalanceWeightMonitor(image_every_n=1), module=module(), batches=4), folder, prefixes


@pytest.fixture
def drawn(monkeypatch):
    """The tables and series that are drawn, in order."""
    found = []
    for name in ("heatmap", "line_chart"):
        draw = getattr(balance_pictures, name)
        watch = lambda *args, draw=draw, name=name: found.append((name, *args)) or draw(*args)  # noqa: E731
        monkeypatch.setattr(balance_pictures, name, watch)
    return found


def train(optimizer, network, steps=3):
    for _ in range(steps):
        output = network(torch.ones(4, 3))
        optimizer.zero_grad()
        optimizer.backward({"fit": (output - 1).square().mean(), "size": 30 * output.abs().mean()})
        optimizer.step()


def test_an_optimizer_gives_its_balance_as_it_is_now_without_the_layers_that_do_not_train(drawn):
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = MTAdam(network.named_parameters())
    train(optimizer, network)
    network[0].bias.requires_grad_(False)
    picture = plot_balance(optimizer)
    ((kind, table, rows, columns, *_),) = drawn
    assert kind == "heatmap"
    assert rows == ["0.weight", "1.weight", "1.bias"]
    assert tuple(columns) == ("fit", "size")
    torch.testing.assert_close(table, torch.stack([optimizer.balance_weights()[row] for row in rows]))
    assert isinstance(picture, Image.Image)
    assert picture._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"


def test_a_trainer_gives_the_run_and_its_balance_now(run, drawn):
    trainer, _, prefixes = run
    plot_balance(trainer)
    lines = [found for found in drawn if found[0] == "line_chart"]
    assert [found[1] for found in lines] == [[0, 1, 2, 3]] * len(prefixes)
    assert len(drawn) == 2 * len(prefixes)
    assert drawn[-1][0] == "heatmap"


def test_the_log_directory_of_tensorboard_gives_what_the_monitor_drew_last(run):
    trainer, folder, prefixes = run
    found = np.array(plot_balance(folder / "tb"))
    history = next(one for one in trainer.callbacks if isinstance(one, BalanceWeightMonitor)).history
    top = np.array(balance_pictures.terms_over_steps(prefixes[0], history[prefixes[0]]))
    np.testing.assert_array_equal(found[: top.shape[0], : top.shape[1]], top)
    if prefixes[0].startswith("balance_weight"):
        assert found.shape[0] > len(prefixes) * top.shape[0], "and the heatmaps"


def test_the_log_directory_of_csv_needs_no_tensorboard(run, drawn, monkeypatch):
    trainer, folder, prefixes = run
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    plot_balance(str(folder / "csv"))
    monitor = next(one for one in trainer.callbacks if isinstance(one, BalanceWeightMonitor))
    assert [found[1] for found in drawn] == [[0, 1, 2, 3]] * len(prefixes)
    found = {term: values for _, _, series, *_ in drawn for term, values in series.items()}
    logged = {term: values for prefix in prefixes for term, values in monitor.history[prefix].series.items()}
    assert found.keys() == logged.keys()
    for term, values in logged.items():
        assert found[term] == pytest.approx(values, rel=1e-5)


def test_the_heatmap_in_the_event_files_is_found_from_a_folder_above(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="runs", version="one", prefix="mine")
    fit(tmp_path, BalanceWeightMonitor(), logger=[logger], batches=2)
    assert plot_balance(tmp_path).height > 900


# Refused


def test_what_balances_nothing_is_refused():
    optimizer = torch.optim.Adam([torch.ones(1, requires_grad=True)])
    with pytest.raises(TypeError, match="takes an MTAdam optimizer, a balancer, a Trainer or a log directory, but got"):
        plot_balance(optimizer)
    with pytest.raises(TypeError, match="got a dict"):
        plot_balance({})


def test_before_the_first_step_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match=r"The MTAdam has no balance yet.*Train a step"):
        plot_balance(MTAdam(nn.Linear(1, 1).named_parameters()))


def test_directories_without_a_balance_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no directory .*nowhere"):
        plot_balance(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no event file of TensorBoard and no metrics\.csv"):
        plot_balance(tmp_path)
    fit(tmp_path / "a", logger=CSVLogger(tmp_path / "a", name="", version=""), batches=2)
    with pytest.raises(ValueError, match=r"No balance was logged.*BalanceWeightMonitor"):
        plot_balance(tmp_path)
    fit(tmp_path / "b", logger=CSVLogger(tmp_path / "b", name="", version=""), batches=2)
    with pytest.raises(ValueError, match=r"holds 2 runs. Give the directory of one of them: .*/a.*/b"):
        plot_balance(tmp_path)


def test_event_files_without_tensorboard_are_refused_with_the_remedy(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ImportError, match=r"pip install tensorboard.*CSVLogger"):
        plot_balance(run[1] / "tb")


def test_without_pillow_the_remedy_is_named(monkeypatch):
    from lightning_mtadam.callbacks import drawing

    drawing.font.cache_clear()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'pillow>=10\.1'"):
        drawing.font()

"""BalanceWeightMonitor: what it logs is the optimizer's balance, where, when and at what cost."""

import csv
import io
import json
import logging
import math
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.utils.data import DataLoader

from lightning_mtadam import MTAdam, MultiTermLightningModule
from lightning_mtadam.balancers import FixedWeights
from lightning_mtadam.callbacks import BalanceWeightMonitor, tensorboard
from lightning_mtadam.callbacks.balance_weights import named_optimizers, summaries
from tests.lightning_models import QUIET, MemoryLogger, needs_exact_resume

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated"),
]

LAYERS = ["trunk.weight", "trunk.bias", "left.weight", "left.bias", "right.weight", "right.bias"]
REACHED = {"fit": [*LAYERS[:4]], "big": [*LAYERS[:2], *LAYERS[4:]]}
SUMMARIES = ("median", "p10", "p90")
IMAGE_TAG = "balance_weight/layers_by_terms"


class TwoHeads(MultiTermLightningModule):
    """Two terms that share a trunk; neither reaches the other's head."""

    def __init__(self):
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        hidden = self.trunk(batch).tanh()
        return {"fit": (self.left(hidden) - 1).square().mean(), "big": 30 * self.right(hidden).abs().mean()}

    def configure_optimizers(self):
        return MTAdam(self.named_parameters(), lr=1e-2)


class Adversaries(MultiTermLightningModule):
    """Two MTAdams in manual optimization; the second one may start late."""

    def __init__(self, second_starts_at=0):
        super().__init__()
        self.automatic_optimization = False
        self.second_starts_at = second_starts_at
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.update(first, self.first(batch), "l1", "l2")
        if batch_idx >= self.second_starts_at:
            self.update(second, self.second(batch), "real", "fake")

    def update(self, optimizer, output, one, other):
        optimizer.zero_grad()
        self.backward_terms({one: output.abs().mean(), other: output.square().mean()}, optimizer)
        optimizer.step()

    def configure_optimizers(self):
        return [MTAdam(self.first.named_parameters()), MTAdam(self.second.named_parameters())]


class Record(pl.Callback):
    """Keeps the balance weights after every optimizer step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step:
            read = trainer.optimizers[0].balance_weights()
            self.weights[trainer.global_step - 1] = {layer: row.clone() for layer, row in read.items()}


def loader(batches):
    generator = torch.Generator().manual_seed(1)
    return DataLoader(torch.randn(2 * batches, 3, generator=generator), 2)


def fit(folder, *callbacks, module=None, batches=6, resume_from=None, **options):
    """Train for some steps, logging to ``folder``/tb and ``folder``/csv."""
    torch.manual_seed(0)
    options = {
        "logger": [TensorBoardLogger(folder, name="tb", version=""), CSVLogger(folder, name="csv", version="")],
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **options,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module or TwoHeads(), loader(batches), ckpt_path=resume_from)
    return trainer


def events(folder):
    """What TensorBoard reads from a run of ``fit``."""
    accumulator = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


def points(folder):
    """Every scalar series: tag -> {step: value}. Fails on two points at one step."""
    accumulator = events(folder)
    series = {}
    for tag in accumulator.Tags()["scalars"]:
        found = [(event.step, event.value) for event in accumulator.Scalars(tag)]
        if tag != "epoch":  # Lightning's own, beside every other value
            assert len({step for step, _ in found}) == len(found), f"{tag} has a step twice"
        series[tag] = dict(found)
    return series


def balance_tags(series, prefix="balance_weight"):
    return {tag for tag in series if tag.startswith(prefix)}


def shown_layout(folder):
    """The layout that TensorBoard's Custom Scalars page shows: category -> {chart: its margin series}."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

    multiplexer = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0})
    multiplexer.AddRunsFromDirectory(str(folder / "tb"))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder / "tb"))
    layout = CustomScalarsPlugin(TBContext(data_provider=provider)).layout_impl(RequestContext(), "")
    layout = json.loads(layout) if layout else {}
    return {
        category["title"]: {
            chart["title"]: [(s["value"], s["lower"], s["upper"]) for s in chart["margin"]["series"]]
            for chart in category["chart"]
        }
        for category in layout.get("category", [])
    }


def margin(prefix, term):
    return [tuple(f"{prefix}/{term}.{name}" for name in ("median", "p10", "p90"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that logs every step, and the weights that were there."""
    folder, record = tmp_path_factory.mktemp("trained"), Record()
    fit(folder, BalanceWeightMonitor(), record, batches=12)
    return folder, record.weights


# What is logged


def test_tags_are_a_series_per_term_and_layer_it_reaches_and_three_summaries_per_term(trained):
    folder, _ = trained
    series = {f"balance_weight.{term}/{layer}" for term, layers in REACHED.items() for layer in layers}
    series |= {f"balance_weight/{term}.{name}" for term in REACHED for name in SUMMARIES}
    assert balance_tags(points(folder)) == series


def test_a_term_that_never_reaches_a_layer_has_no_tag_there(trained):
    tags = balance_tags(points(trained[0]))
    assert "balance_weight.fit/left.weight" in tags
    assert "balance_weight.fit/right.weight" not in tags
    assert "balance_weight.big/left.weight" not in tags


def test_series_equal_the_optimizers_balance_weights_at_that_step(trained):
    folder, weights = trained
    series = points(folder)
    for column, (term, layers) in enumerate(REACHED.items()):
        for layer in layers:
            found = series[f"balance_weight.{term}/{layer}"]
            assert sorted(found) == sorted(weights)
            for step, value in found.items():
                assert value == pytest.approx(weights[step][layer][column].item(), rel=1e-6)
    assert len(set(series["balance_weight.big/trunk.weight"].values())) > 1, "the weights never moved"


def test_summaries_are_numpys_quantiles_over_the_layers_that_the_term_reaches(trained):
    folder, weights = trained
    series = points(folder)
    for column, (term, layers) in enumerate(REACHED.items()):
        low, middle, high = (series[f"balance_weight/{term}.{name}"] for name in ("p10", "median", "p90"))
        for step, rows in weights.items():
            expected = np.quantile([rows[layer][column].item() for layer in layers], [0.1, 0.5, 0.9])
            np.testing.assert_allclose([low[step], middle[step], high[step]], expected, rtol=1e-6)
            assert low[step] <= middle[step] <= high[step]
    assert any(series["balance_weight/big.p10"][step] < series["balance_weight/big.p90"][step] for step in weights)


def test_csv_has_the_numbers_of_tensorboard(trained):
    folder, _ = trained
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["balance_weight/fit.median"]]
    series = {tag: found for tag, found in points(folder).items() if tag.startswith("balance_weight")}
    assert [int(row["step"]) for row in rows] == list(range(12))
    assert {name for name in rows[0] if name.startswith("balance_weight")} == set(series)
    for tag, found in series.items():
        for row in rows:
            assert float(row[tag]) == pytest.approx(found[int(row["step"])], rel=1e-6)


def test_summaries_are_over_the_reached_layers_alone_and_missing_for_a_term_that_reaches_none():
    table = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    table[2:5, 1] = math.nan
    table[:, 2] = math.nan
    expected = {}
    for column, term in enumerate("ab"):
        quantiles = np.nanquantile(table[:, column].numpy(), [0.1, 0.5, 0.9])
        expected |= {f"w/{term}.{name}": q for name, q in zip(("p10", "median", "p90"), quantiles, strict=True)}
    assert summaries("w", ("a", "b", "c"), table) == pytest.approx(expected, rel=1e-5)


def test_a_term_that_comes_late_to_a_layer_has_points_from_then_on(tmp_path):
    class Late(TwoHeads):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            return losses if batch_idx >= 2 else {"fit": losses["fit"]}

        def configure_optimizers(self):
            return MTAdam(self.named_parameters(), terms=("fit", "big"))

    fit(tmp_path, BalanceWeightMonitor(), module=Late())
    series = points(tmp_path)
    assert sorted(series["balance_weight.fit/trunk.weight"]) == [0, 1, 2, 3, 4, 5]
    assert sorted(series["balance_weight.big/trunk.weight"]) == [2, 3, 4, 5]
    assert sorted(series["balance_weight/big.median"]) == [2, 3, 4, 5]


# When


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("interval", [None, "step"])
def test_it_logs_at_the_steps_at_which_the_loss_is_logged(tmp_path, interval, every):
    fit(tmp_path, BalanceWeightMonitor(interval), batches=9, log_every_n_steps=every)
    series = points(tmp_path)
    assert len(series["train/loss"]) == 9 // every
    for tag in balance_tags(series):
        assert sorted(series[tag]) == sorted(series["train/loss"]), tag


def test_epoch_logs_once_an_epoch_what_was_there_at_its_end(tmp_path):
    class EpochMean(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            module.log("mean", 1.0, on_step=False, on_epoch=True)

    record = Record()
    fit(tmp_path, EpochMean(), BalanceWeightMonitor("epoch"), record, batches=4, max_epochs=3)
    series = points(tmp_path)
    for tag in balance_tags(series):
        assert len(series[tag]) == 3, tag
        assert sorted(series[tag]) == sorted(series["mean"]) == [3, 7, 11], f"{tag} is filed beside other epochs' means"
    for step, value in series["balance_weight.big/trunk.weight"].items():
        assert value == pytest.approx(record.weights[step]["trunk.weight"][1].item(), rel=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_accumulation_logs_once_per_optimizer_step(tmp_path, every):
    record = Record()
    fit(
        tmp_path, BalanceWeightMonitor(), record, batches=10, accumulate_grad_batches=3, log_every_n_steps=every
    )  # steps after batches 3, 6, 9 and, with what is left, 10
    series = points(tmp_path)
    assert sorted(record.weights) == [0, 1, 2, 3]
    for tag in balance_tags(series):
        assert sorted(series[tag]) == sorted(series["train/loss"]) == list(range(every - 1, 4, every)), tag
    for step, value in series["balance_weight.big/trunk.weight"].items():
        assert value == pytest.approx(record.weights[step]["trunk.weight"][1].item(), rel=1e-6)


def test_balance_weights_are_read_at_logging_steps_only(tmp_path, monkeypatch):
    read_at, now = [], []

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            now[:] = [batch_idx]

    original = MTAdam.balance_weights
    monkeypatch.setattr(MTAdam, "balance_weights", lambda self: read_at.append(now[0]) or original(self))
    fit(tmp_path, Clock(), BalanceWeightMonitor(), batches=11, log_every_n_steps=5)
    assert read_at == [4, 9]


@needs_exact_resume
def test_a_resumed_run_logs_what_the_uninterrupted_run_does(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, BalanceWeightMonitor(image_every_n=4), batches=10)
    saved = ModelCheckpoint(parts, filename="half", every_n_train_steps=6)
    fit(parts, BalanceWeightMonitor(image_every_n=4), saved, batches=10, max_steps=6)
    fit(parts, BalanceWeightMonitor(image_every_n=4), batches=10, resume_from=str(parts / "half.ckpt"))
    assert [image.step for image in events(parts).Images(IMAGE_TAG)] == [0, 4, 8]
    assert [image.step for image in events(whole).Images(IMAGE_TAG)] == [0, 4, 8]
    expected = points(whole)
    found = points(parts)
    tags = balance_tags(expected)
    assert balance_tags(found) == tags
    for tag in tags:
        assert sorted(found[tag]) == list(range(10)), tag
        assert found[tag][5] == expected[tag][5]  # the data loader starts over after that


def test_a_resumed_run_in_a_folder_of_its_own_has_the_charts_too(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    saved = ModelCheckpoint(before, filename="half", every_n_train_steps=3)
    fit(before, BalanceWeightMonitor(), saved, max_steps=3)
    fit(after, BalanceWeightMonitor(), resume_from=str(before / "half.ckpt"))
    assert shown_layout(after) == shown_layout(before) != {}


def test_its_state_is_how_often_it_has_logged(tmp_path):
    monitor, restored = BalanceWeightMonitor(), BalanceWeightMonitor()
    fit(tmp_path, monitor, batches=5, log_every_n_steps=2)
    restored.load_state_dict(monitor.state_dict())
    assert restored.state_dict() == monitor.state_dict() == {"logged": 2}


# Pictures and charts


def test_the_heatmap_is_written_at_the_first_logging_step_and_every_tenth_after(trained):
    assert [image.step for image in events(trained[0]).Images(IMAGE_TAG)] == [0, 10]


def test_no_heatmap_is_written_when_switched_off(tmp_path):
    fit(tmp_path, BalanceWeightMonitor(image_every_n=0))
    assert events(tmp_path).Tags()["images"] == []


def test_the_heatmap_decodes_to_the_drawing_of_that_steps_weights(trained):
    folder, weights = trained
    for event in events(folder).Images(IMAGE_TAG):
        decoded = np.array(Image.open(io.BytesIO(event.encoded_image_string)))
        rows = weights[event.step]
        expected = tensorboard.draw_heatmap(list(REACHED), LAYERS, torch.stack([rows[layer] for layer in LAYERS]))
        assert list(rows) == LAYERS
        assert decoded.shape == (event.height, event.width, 3) == tuple(expected.shape)
        np.testing.assert_array_equal(decoded, expected.numpy())


def cells_of(image, table):
    """The cells of a heatmap whose first weight is far above one: [L, I] -> the colour of each, and the corner."""
    darkest = (image == torch.tensor((178, 24, 43), dtype=torch.uint8)).all(-1).nonzero()
    top, left = darkest.min(0).values.tolist()
    size = tensorboard.CELL
    block = image[top : top + table.shape[0] * size, left : left + table.shape[1] * size]
    cells = block.unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2)
    assert (cells == cells[:, :, :1, :1]).all(), "a cell has two colours"
    return cells[:, :, 0, 0].int(), top, left


def test_the_heatmap_is_white_at_one_red_above_blue_below_and_dark_where_never_reached():
    table = torch.tensor([[1e3, 1.0, 1e-3], [10.0, math.nan, 0.1], [900.0, 100.0, 0.0011]])
    colours, _, _ = cells_of(tensorboard.draw_heatmap(["a", "b", "c"], ["x", "y", "z"], table), table)
    assert colours[0, 1].tolist() == [247, 247, 247]
    assert colours[0, 0].tolist() == [178, 24, 43]
    assert colours[0, 2].tolist() == [33, 102, 172]
    assert colours[1, 1].tolist() == [90, 90, 90]
    redness, blueness = (colours[..., a] - colours[..., b] for a, b in ((0, 2), (2, 0)))
    assert 0 < redness[1, 0] < redness[2, 1] < redness[0, 0]
    assert 0 < blueness[1, 2] < blueness[0, 2]
    wider, _, _ = cells_of(tensorboard.draw_heatmap(["a"], ["x", "y"], torch.tensor([[1e5], [1e3]])), torch.ones(2, 1))
    assert wider[0, 0].tolist() == [178, 24, 43], "the scale ends at the next power of ten"
    assert wider[1, 0].tolist() != wider[0, 0].tolist()


@pytest.mark.parametrize(("layers", "terms"), [(1, 1), (3, 2), (30, 10)])
def test_the_heatmap_has_a_cell_per_layer_and_term_and_room_for_every_label(layers, terms):
    layer_names = [f"encoder.block_{index}.attention.in_proj_weight" for index in range(layers)]
    term_names = [f"reconstruction_gjpqy_{index}" for index in range(terms)]
    table = torch.full((layers, terms), 1e4)
    image = tensorboard.draw_heatmap(term_names, layer_names, table)
    _, top, left = cells_of(image, table)
    assert image.dtype == torch.uint8
    assert image.shape[0] == top + layers * tensorboard.CELL + tensorboard.LABEL_HEIGHT + 4
    assert image.shape[1] >= left + terms * tensorboard.CELL
    inked = image.float().mean(-1) < 128
    bottom, right = top + layers * tensorboard.CELL, left + terms * tensorboard.CELL
    for row in range(layers):
        assert inked[top + row * tensorboard.CELL : top + (row + 1) * tensorboard.CELL, :left].any()
    for column in range(terms):
        assert inked[:top, left + column * tensorboard.CELL : left + (column + 1) * tensorboard.CELL].any()
    assert not inked[:2].any(), "a term's label is cut"
    assert not inked[top:bottom, left - 2 : left].any(), "a layer's label is cut"
    assert not inked[:, -2:].any() or image.shape[1] == right, "the legend is cut"
    assert not inked[-1:].any(), "the legend is cut"


def test_neighbouring_labels_do_not_touch():
    table = torch.full((4, 4), 1e4)
    names = ["gjpqyÅ|"] * 4
    image = tensorboard.draw_heatmap(names, names, table)
    _, top, left = cells_of(image, table)
    inked = image.float().mean(-1) < 128
    for index in range(1, 4):
        edge = index * tensorboard.CELL
        assert not inked[top + edge, :left].any()
        assert not inked[:top, left + edge].any()


def test_the_layout_has_a_margin_chart_per_term_between_the_percentiles(trained):
    folder, _ = trained
    (event,) = events(folder).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "balance_weight"
    assert [chart.title for chart in category.chart] == ["big", "fit"], "TensorBoard shows the last one first"
    for chart in category.chart:
        (series,) = chart.margin.series
        assert [(series.value, series.lower, series.upper)] == margin("balance_weight", chart.title)
    assert {name for term in REACHED for name in margin("balance_weight", term)[0]} <= set(points(folder))


def test_tensorboards_page_shows_the_layout(trained):
    assert shown_layout(trained[0]) == {"balance_weight": {term: margin("balance_weight", term) for term in REACHED}}


# Balancers


def test_weights_that_differ_by_term_only_share_a_chart(tmp_path):
    """And no tag of anything else is in it, whatever the terms are called."""

    class Weighted(TwoHeads):
        def configure_balancer(self):
            return FixedWeights({"fit": 2.0, "big": 0.5})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    fit(tmp_path, BalanceWeightMonitor(), module=Weighted())
    series = points(tmp_path)
    assert {tag for tag in series if tag.startswith("term_weight")} == {"term_weight/fit", "term_weight/big"}
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    (chart,) = category.chart
    (tags,) = chart.multiline.tag
    assert category.title == "term_weight"
    assert [tag for tag in series if re.match(tags, tag)] == ["term_weight/fit", "term_weight/big"]


# Several optimizers


@pytest.fixture(scope="module")
def adversaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adversaries")
    fit(folder, BalanceWeightMonitor(), module=Adversaries(), batches=4)
    return folder


def test_two_optimizers_are_told_apart_by_name(adversaries):
    series = points(adversaries)
    expected = set()
    for prefix, terms in (("balance_weight-MTAdam", ("l1", "l2")), ("balance_weight-MTAdam-1", ("real", "fake"))):
        expected |= {f"{prefix}.{term}/{layer}" for term in terms for layer in ("weight", "bias")}
        expected |= {f"{prefix}/{term}.{name}" for term in terms for name in SUMMARIES}
    assert balance_tags(series) == expected
    for tag in expected:
        assert sorted(series[tag]) == sorted(series["train/l1"]) == [0, 1, 2, 3], tag
    assert set(events(adversaries).Tags()["images"]) == {
        "balance_weight-MTAdam/layers_by_terms",
        "balance_weight-MTAdam-1/layers_by_terms",
    }


def test_two_optimizers_both_have_their_charts_on_tensorboards_page(adversaries):
    assert shown_layout(adversaries) == {
        prefix: {term: margin(prefix, term) for term in terms}
        for prefix, terms in (("balance_weight-MTAdam", ("l1", "l2")), ("balance_weight-MTAdam-1", ("real", "fake")))
    }


def test_an_optimizer_that_starts_late_has_its_charts_and_heatmap_too(tmp_path):
    fit(tmp_path, BalanceWeightMonitor(image_every_n=2), module=Adversaries(second_starts_at=2), batches=5)
    assert sorted(points(tmp_path)["balance_weight-MTAdam-1.real/weight"]) == [2, 3, 4]
    assert [image.step for image in events(tmp_path).Images("balance_weight-MTAdam-1/layers_by_terms")] == [2, 4]
    assert set(shown_layout(tmp_path)) == {"balance_weight-MTAdam", "balance_weight-MTAdam-1"}


def test_other_optimizers_do_not_count_in_the_names():
    weight = nn.Parameter(torch.ones(2))
    adam, first, second = torch.optim.Adam([weight]), MTAdam([weight]), MTAdam([weight])
    assert list(named_optimizers([adam, first])) == [("balance_weight", first)]
    assert list(named_optimizers([first, adam, second])) == [
        ("balance_weight-MTAdam", first),
        ("balance_weight-MTAdam-1", second),
    ]


# Limits and errors


def test_above_max_series_only_the_summaries_are_logged_and_it_says_so_once(tmp_path, caplog):
    for name in ("lightning.pytorch", "lightning.fabric"):  # whatever other tests left
        caplog.set_level(logging.INFO, logger=name)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    from lightning_utilities.core import rank_zero

    rank_zero.log.addHandler(handler)
    try:
        fit(tmp_path, BalanceWeightMonitor(max_series=11, image_every_n=1))
    finally:
        rank_zero.log.removeHandler(handler)
    series = points(tmp_path)
    assert balance_tags(series) == {f"balance_weight/{term}.{name}" for term in REACHED for name in SUMMARIES}
    assert all(sorted(series[tag]) == [0, 1, 2, 3, 4, 5] for tag in balance_tags(series))
    assert events(tmp_path).Tags()["images"] == []
    said = [record.getMessage() for record in records if "max_series" in record.getMessage()]
    assert len(said) == 1
    assert "12 series" in said[0]
    assert "max_series=11" in said[0]


def test_at_max_series_every_series_is_logged(tmp_path):
    fit(tmp_path, BalanceWeightMonitor(max_series=12))
    assert "balance_weight.fit/trunk.weight" in points(tmp_path)
    assert events(tmp_path).Tags()["images"] == [IMAGE_TAG]


@pytest.mark.parametrize("interval", ["batch", "", 1, False])
def test_an_unknown_interval_raises(interval):
    with pytest.raises(MisconfigurationException, match="should be `step` or `epoch` or `None`"):
        BalanceWeightMonitor(interval)


def test_without_a_logger_it_raises(tmp_path):
    with pytest.raises(MisconfigurationException, match="`BalanceWeightMonitor` with a `Trainer` that has no logger"):
        fit(tmp_path, BalanceWeightMonitor(), logger=False)


def test_without_mtadam_it_raises_and_names_the_optimizers(tmp_path):
    class Plain(TwoHeads):
        def configure_optimizers(self):
            return torch.optim.RMSprop(self.parameters())

    with pytest.raises(MisconfigurationException, match=r"needs an MTAdam .* returned \['RMSprop'\].*Return MTAdam"):
        fit(tmp_path, BalanceWeightMonitor(), module=Plain())


# Surroundings


def test_any_logger_gets_the_scalars_and_nothing_is_drawn_for_it(tmp_path, monkeypatch):
    def draw(*args):
        raise AssertionError("a heatmap that nobody sees")

    monkeypatch.setattr(tensorboard, "draw_heatmap", draw)
    memory, record = MemoryLogger(), Record()
    fit(tmp_path, BalanceWeightMonitor(), record, logger=memory, log_every_n_steps=2)
    rows = {step: metrics for step, metrics in memory.rows if "balance_weight/fit.median" in metrics}
    assert sorted(rows) == [1, 3, 5]
    for step, metrics in rows.items():
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
        expected = record.weights[step]["trunk.weight"][1].item()
        assert metrics["balance_weight.big/trunk.weight"] == pytest.approx(expected, rel=1e-6)


def test_fast_dev_run_passes_and_leaves_no_files(tmp_path):
    trainer = fit(tmp_path, BalanceWeightMonitor(), fast_dev_run=2)
    assert trainer.global_step == 2
    assert list(tmp_path.iterdir()) == []


def test_watching_does_not_change_training(tmp_path):
    watched, alone = TwoHeads(), TwoHeads()
    alone.load_state_dict(watched.state_dict())
    fit(tmp_path / "watched", BalanceWeightMonitor(image_every_n=1), module=watched)
    fit(tmp_path / "alone", module=alone)
    for ours, theirs in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_weight_beyond_all_measure_is_neither_logged_nor_in_the_way_of_the_heatmap():
    table = torch.tensor([[1.0, math.inf], [1.0, 10.0]])
    assert summaries("w", ("a", "b"), table)["w/b.median"] == 10.0
    assert tensorboard.draw_heatmap(["a", "b"], ["x", "y"], table).dtype == torch.uint8

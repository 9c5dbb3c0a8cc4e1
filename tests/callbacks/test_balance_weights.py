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
from lightning_mtadam.callbacks import BalanceWeightMonitor, balance_weights
from lightning_mtadam.callbacks.balance_pictures import layers_by_terms
from lightning_mtadam.callbacks.balance_weights import summaries
from lightning_mtadam.callbacks.readings import Reading, named_optimizers
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
HEATMAP, OVER_STEPS = "balance_weight/layers_by_terms", "balance_weight/all_terms"


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


def balance_tags(series):
    return {tag for tag in series if tag.startswith(("balance_weight", "weights_by_layer"))}


def summary_tags(terms, optimizer=""):
    """A median per term, and beside the details its percentiles."""
    details = {f"weights_by_layer{optimizer}/{term}.{name}" for term in terms for name in ("p10", "p90")}
    return {f"balance_weight{optimizer}/{term}.median" for term in terms} | details


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


def margin(term, optimizer=""):
    details = f"weights_by_layer{optimizer}/{term}"
    return [(f"balance_weight{optimizer}/{term}.median", f"{details}.p10", f"{details}.p90")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that logs every layer at every step, and the weights that were there."""
    folder, record = tmp_path_factory.mktemp("trained"), Record()
    fit(folder, BalanceWeightMonitor(max_series=300), record, batches=12)
    return folder, record.weights


# What is logged


def test_tags_are_a_series_per_term_and_layer_it_reaches_and_three_summaries_per_term(trained):
    folder, _ = trained
    series = {f"weights_by_layer.{term}/{layer}" for term, layers in REACHED.items() for layer in layers}
    assert balance_tags(points(folder)) == series | summary_tags(REACHED)


def test_a_term_that_never_reaches_a_layer_has_no_tag_there(trained):
    tags = balance_tags(points(trained[0]))
    assert "weights_by_layer.fit/left.weight" in tags
    assert "weights_by_layer.fit/right.weight" not in tags
    assert "weights_by_layer.big/left.weight" not in tags


def test_series_equal_the_optimizers_balance_weights_at_that_step(trained):
    folder, weights = trained
    series = points(folder)
    for column, (term, layers) in enumerate(REACHED.items()):
        for layer in layers:
            found = series[f"weights_by_layer.{term}/{layer}"]
            assert sorted(found) == sorted(weights)
            for step, value in found.items():
                assert value == pytest.approx(weights[step][layer][column].item(), rel=1e-6)
    assert len(set(series["weights_by_layer.big/trunk.weight"].values())) > 1, "the weights never moved"


def test_summaries_are_numpys_quantiles_over_the_layers_that_the_term_reaches(trained):
    folder, weights = trained
    series = points(folder)
    for column, (term, layers) in enumerate(REACHED.items()):
        low, high = (series[f"weights_by_layer/{term}.{name}"] for name in ("p10", "p90"))
        middle = series[f"balance_weight/{term}.median"]
        for step, rows in weights.items():
            expected = np.quantile([rows[layer][column].item() for layer in layers], [0.1, 0.5, 0.9])
            np.testing.assert_allclose([low[step], middle[step], high[step]], expected, rtol=1e-6)
            assert low[step] <= middle[step] <= high[step]
    assert any(low[step] < high[step] for step in weights)


def test_csv_has_the_numbers_of_tensorboard(trained):
    folder, _ = trained
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["balance_weight/fit.median"]]
    series = points(folder)
    series = {tag: series[tag] for tag in balance_tags(series)}
    assert [int(row["step"]) for row in rows] == list(range(12))
    assert balance_tags(rows[0]) == set(series)
    for tag, found in series.items():
        for row in rows:
            assert float(row[tag]) == pytest.approx(found[int(row["step"])], rel=1e-6)


def test_summaries_are_over_the_reached_layers_alone_and_missing_for_a_term_that_reaches_none():
    table = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    table[2:5, 1] = math.nan
    table[:, 2] = math.nan
    found = summaries(("a", "b", "c"), table)
    for name, level in (("p10", 0.1), ("median", 0.5), ("p90", 0.9)):
        quantiles = np.nanquantile(table[:, :2].numpy(), level, axis=0)
        assert found[name] == pytest.approx(dict(zip("ab", quantiles, strict=True)), rel=1e-5)


def test_a_term_that_comes_late_to_a_layer_has_points_from_then_on(tmp_path):
    class Late(TwoHeads):
        def training_step(self, batch, batch_idx):
            losses = super().training_step(batch, batch_idx)
            return losses if batch_idx >= 2 else {"fit": losses["fit"]}

        def configure_optimizers(self):
            return MTAdam(self.named_parameters(), terms=("fit", "big"))

    fit(tmp_path, BalanceWeightMonitor(max_series=300), module=Late())
    series = points(tmp_path)
    assert sorted(series["weights_by_layer.fit/trunk.weight"]) == [0, 1, 2, 3, 4, 5]
    assert sorted(series["weights_by_layer.big/trunk.weight"]) == [2, 3, 4, 5]
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
    fit(tmp_path, EpochMean(), BalanceWeightMonitor("epoch", max_series=300), record, batches=4, max_epochs=3)
    series = points(tmp_path)
    for tag in balance_tags(series):
        assert len(series[tag]) == 3, tag
        assert sorted(series[tag]) == sorted(series["mean"]) == [3, 7, 11], f"{tag} is filed beside other epochs' means"
    for step, value in series["weights_by_layer.big/trunk.weight"].items():
        assert value == pytest.approx(record.weights[step]["trunk.weight"][1].item(), rel=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_accumulation_logs_once_per_optimizer_step(tmp_path, every):
    record = Record()
    fit(
        tmp_path,
        BalanceWeightMonitor(max_series=300),
        record,
        batches=10,
        accumulate_grad_batches=3,
        log_every_n_steps=every,
    )  # steps after batches 3, 6, 9 and, with what is left, 10
    series = points(tmp_path)
    assert sorted(record.weights) == [0, 1, 2, 3]
    for tag in balance_tags(series):
        assert sorted(series[tag]) == sorted(series["train/loss"]) == list(range(every - 1, 4, every)), tag
    for step, value in series["weights_by_layer.big/trunk.weight"].items():
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
    assert [image.step for image in events(parts).Images(HEATMAP)] == [0, 4, 8]
    assert [image.step for image in events(whole).Images(HEATMAP)] == [0, 4, 8]
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
    assert restored.state_dict() == monitor.state_dict()
    assert monitor.state_dict()["logged"] == 2
    assert monitor.state_dict()["history"]["balance_weight"]["steps"] == [1, 3]


def test_a_state_from_before_there_were_pictures_over_the_steps_is_taken():
    monitor = BalanceWeightMonitor()
    monitor.load_state_dict({"logged": 3})
    assert monitor.state_dict() == {"logged": 3, "history": {}}


# Pictures and charts


def decoded(event):
    return np.array(Image.open(io.BytesIO(event.encoded_image_string)))


def test_pictures_are_written_at_the_first_logging_step_and_every_tenth_after(trained):
    found = events(trained[0])
    assert set(found.Tags()["images"]) == {HEATMAP, OVER_STEPS}
    for tag in (HEATMAP, OVER_STEPS):
        assert [image.step for image in found.Images(tag)] == [0, 10]


def test_no_picture_is_written_when_switched_off(tmp_path):
    fit(tmp_path, BalanceWeightMonitor(image_every_n=0))
    assert events(tmp_path).Tags()["images"] == []


def test_the_heatmap_decodes_to_the_drawing_of_that_steps_weights(trained):
    folder, weights = trained
    for event in events(folder).Images(HEATMAP):
        rows = weights[event.step]
        assert list(rows) == LAYERS
        table = torch.stack([rows[layer] for layer in LAYERS])
        expected = layers_by_terms(
            Reading("balance_weight", tuple(REACHED), tuple(LAYERS), table, {}), f"at step {event.step}"
        )
        np.testing.assert_array_equal(decoded(event), np.array(expected))


def test_a_layer_that_is_frozen_or_reached_by_no_term_is_in_no_picture_and_no_number(monkeypatch, tmp_path):
    class Partly(TwoHeads):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.trunk.bias.requires_grad_(False)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                self.left.weight.requires_grad_(False)

    drawn = []
    draw = balance_weights.layers_by_terms
    monkeypatch.setattr(
        balance_weights, "layers_by_terms", lambda reading, when: drawn.append(reading) or draw(reading)
    )
    fit(tmp_path, BalanceWeightMonitor(image_every_n=1, max_series=300), module=Partly())
    before = ("trunk.weight", *LAYERS[2:])
    assert [reading.layers for reading in drawn[:3]] == [before] * 3
    assert [reading.layers for reading in drawn[3:]] == [tuple(one for one in before if one != "left.weight")] * 3
    series = points(tmp_path)
    assert sorted(series["weights_by_layer.fit/left.weight"]) == [0, 1, 2]
    assert not [tag for tag in series if "unused" in tag or tag.endswith("trunk.bias")]


def test_the_picture_over_the_steps_shows_the_whole_run_after_a_resume(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, BalanceWeightMonitor(image_every_n=3), batches=6)
    monitor = BalanceWeightMonitor(image_every_n=3)
    fit(parts, monitor, ModelCheckpoint(parts, filename="half", every_n_train_steps=3), batches=6, max_steps=3)
    again = BalanceWeightMonitor(image_every_n=3)
    fit(parts, again, batches=6, resume_from=str(parts / "half.ckpt"))
    assert again.history["balance_weight"].steps == [0, 1, 2, 3, 4, 5]
    steps = [event.step for event in events(parts).Images(OVER_STEPS)]
    assert steps == [event.step for event in events(whole).Images(OVER_STEPS)] == [0, 3]


def described(folder):
    """Tag -> what TensorBoard says of it."""
    accumulator = events(folder)
    found = {}
    for tags in ("scalars", "images"):
        for tag in accumulator.Tags()[tags]:
            if tag.partition("/")[0] not in ("epoch", "test") and not tag.endswith("_epoch"):
                try:
                    found[tag] = accumulator.SummaryMetadata(tag).summary_description
                except KeyError:
                    found[tag] = ""
    return found


def test_every_tag_says_what_it_means(tmp_path):
    fit(tmp_path, BalanceWeightMonitor(), batches=3)
    found = described(tmp_path)
    assert summary_tags(REACHED) | {HEATMAP, OVER_STEPS, "train/fit", "train/big"} <= set(found)
    assert [tag for tag, text in found.items() if not text] == ["train/loss"]
    assert "divided down" in found["balance_weight/big.median"]
    assert "90th percentile" in found["weights_by_layer/big.p90"]


def test_the_layout_has_a_margin_chart_per_term_between_the_percentiles(trained):
    folder, _ = trained
    (event,) = events(folder).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "balance_weight"
    assert [chart.title for chart in category.chart] == ["big", "fit"], "TensorBoard shows the last one first"
    for chart in category.chart:
        (series,) = chart.margin.series
        assert [(series.value, series.lower, series.upper)] == margin(chart.title)
    assert {name for term in REACHED for name in margin(term)[0]} <= set(points(folder))


def test_tensorboards_page_shows_the_layout(trained):
    assert shown_layout(trained[0]) == {"balance_weight": {term: margin(term) for term in REACHED}}


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
    expected = summary_tags(("l1", "l2"), "-MTAdam") | summary_tags(("real", "fake"), "-MTAdam-1")
    assert balance_tags(series) == expected
    for tag in expected:
        assert sorted(series[tag]) == sorted(series["train/l1"]) == [0, 1, 2, 3], tag
    assert set(events(adversaries).Tags()["images"]) == {
        f"balance_weight-{optimizer}/{picture}"
        for optimizer in ("MTAdam", "MTAdam-1")
        for picture in ("layers_by_terms", "all_terms")
    }


def test_two_optimizers_both_have_their_charts_on_tensorboards_page(adversaries):
    assert shown_layout(adversaries) == {
        f"balance_weight{optimizer}": {term: margin(term, optimizer) for term in terms}
        for optimizer, terms in (("-MTAdam", ("l1", "l2")), ("-MTAdam-1", ("real", "fake")))
    }


def test_an_optimizer_that_starts_late_has_its_charts_and_heatmap_too(tmp_path):
    fit(tmp_path, BalanceWeightMonitor(image_every_n=2), module=Adversaries(second_starts_at=2), batches=5)
    assert sorted(points(tmp_path)["balance_weight-MTAdam-1/real.median"]) == [2, 3, 4]
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
    assert balance_tags(series) == summary_tags(REACHED)
    assert all(sorted(series[tag]) == [0, 1, 2, 3, 4, 5] for tag in balance_tags(series))
    assert set(events(tmp_path).Tags()["images"]) == {HEATMAP, OVER_STEPS}
    said = [record.getMessage() for record in records if "max_series" in record.getMessage()]
    assert len(said) == 1
    assert "12 series" in said[0]
    assert "max_series=11" in said[0]


def test_at_max_series_every_series_is_logged(tmp_path):
    fit(tmp_path, BalanceWeightMonitor(max_series=12))
    assert "weights_by_layer.fit/trunk.weight" in points(tmp_path)


class Classes(MultiTermLightningModule):
    """Ten terms, each of which reaches all layers."""

    def __init__(self, layers):
        super().__init__()
        self.network = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers // 2)])

    def training_step(self, batch, batch_idx):
        output = self.network(batch)
        return {f"class_{index}": (index + 1) * (output - index).square().mean() for index in range(10)}

    def configure_optimizers(self):
        return MTAdam(self.named_parameters(), lr=1e-3)


@pytest.fixture(scope="module", params=[8, 500])
def ten_terms(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    fit(folder, BalanceWeightMonitor(), module=Classes(request.param), batches=2)
    return folder


def test_ten_terms_and_their_training_are_at_most_45_scalars_however_many_layers_there_are(ten_terms):
    """As many as the job on MNIST has, but for its two of the test."""
    terms = [f"class_{index}" for index in range(10)]
    train = {f"train/{name}" for name in (*terms, "loss", "loss_epoch")}
    assert set(points(ten_terms)) == summary_tags(terms) | train | {"epoch"}
    assert len(points(ten_terms)) + 2 == 45


def test_the_heatmap_of_many_layers_can_be_read(ten_terms):
    (event,) = events(ten_terms).Images(HEATMAP)
    assert event.height < 1600
    assert event.width < 1100


def test_train_stands_before_the_details_in_tensorboards_order(ten_terms):
    """TensorBoard orders groups of tags by the alphabet."""
    groups = sorted({tag.partition("/")[0] for tag in points(ten_terms)})
    assert groups == ["balance_weight", "epoch", "train", "weights_by_layer"]


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
        raise AssertionError("a picture that nobody sees")

    monkeypatch.setattr(balance_weights, "layers_by_terms", draw)
    monkeypatch.setattr(balance_weights, "terms_over_steps", draw)
    memory, record = MemoryLogger(), Record()
    fit(tmp_path, BalanceWeightMonitor(max_series=12), record, logger=memory, log_every_n_steps=2)
    rows = {step: metrics for step, metrics in memory.rows if "balance_weight/fit.median" in metrics}
    assert sorted(rows) == [1, 3, 5]
    for step, metrics in rows.items():
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
        expected = record.weights[step]["trunk.weight"][1].item()
        assert metrics["weights_by_layer.big/trunk.weight"] == pytest.approx(expected, rel=1e-6)


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
    assert summaries(("a", "b"), table)["median"]["b"] == 10.0
    assert layers_by_terms(Reading("balance_weight", ("a", "b"), ("x", "y"), table, {})).mode == "RGB"

"""GradientReport in several processes: what it says is what one process says of the joined batch."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_mtadam import MultiTermLightningModule
from lightning_mtadam.balancers import GradNorm, MetaBalance
from lightning_mtadam.callbacks import GradientReport
from tests.distributed.ranks import results, run_ranks
from tests.distributed.sharded import RANKS, TERMS, Network, batches, losses_of, needs_fsdp2, shard, wholes
from tests.distributed.training import fit_rank, joined_rounds, rounds
from tests.lightning_models import GAN, QUIET, Regression, adam, assert_same, fit, make_mtadam, make_trainer, sgd

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified")]
BATCHES = 6


def told(report):
    """What a report says, as plain dicts."""
    return dataclasses.asdict(report.latest)


def assert_alike(found, expected):
    """Fail unless two reports say the same; what is nan is nan in both."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_alike(found[key], value)
    elif isinstance(expected, float):
        assert (math.isnan(found) and math.isnan(expected)) or found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    else:
        assert found == expected


class Balanced(Regression):
    """With a balancer and Adam."""

    def __init__(self, make_balancer):
        super().__init__(lambda _: torch.optim.Adam(self.parameters(), lr=1e-2))
        self.make_balancer = make_balancer

    def configure_balancer(self):
        return self.make_balancer()


MODULES = {
    "adam": partial(Regression, adam),
    "mtadam": Regression,
    "mtadam, low_memory": partial(Regression, partial(make_mtadam, low_memory=True)),
    "gradnorm": partial(Balanced, partial(GradNorm, shared="network.0")),
    "metabalance": partial(Balanced, MetaBalance),
}


def in_ranks(rank, name, accumulate):
    """A rank's report, and whether it has trained as without one."""
    data, options = rounds(2, BATCHES, torch.float64), {"accumulate_grad_batches": accumulate}
    report, module, without = GradientReport(2), MODULES[name](), MODULES[name]()
    fit_rank(module, rank, data, callbacks=[report], **options)
    fit_rank(without, rank, data, **options)
    assert_same(module, without)
    return told(report)


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [("adam", 1), ("adam", 2), ("mtadam", 2), ("mtadam, low_memory", 1), ("gradnorm", 1), ("metabalance", 1)],
)
def test_two_ranks_say_what_one_process_says_of_the_joined_batch(name, accumulate, tmp_path):
    first, second = results(run_ranks(in_ranks, tmp_path, name, accumulate))
    report, data = GradientReport(2), DataLoader(joined_rounds(2, BATCHES, torch.float64), batch_size=None)
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 1}
    fit(MODULES[name](), data, callbacks=[report], **options)
    assert_alike(first, second)
    assert_alike(first, told(report))
    assert first["step"] == (4 if accumulate == 1 else 2)


class OneSided(Regression):
    """A term that the second rank does not have."""

    def __init__(self, rank):
        super().__init__(sgd)
        self.rank = rank

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        return {"decay": losses["decay"], "fit": losses["fit"]} if self.rank else losses


def one_sided(rank):
    report, module, without = GradientReport(), OneSided(rank), OneSided(rank)
    for one, callbacks in ((module, [report]), (without, [])):
        fit_rank(one, rank, rounds(2, 1, torch.float64), callbacks=callbacks)
    assert_same(module, without)
    return told(report)


def test_a_term_that_one_rank_lacks_counts_as_zero_there(tmp_path):
    first, second = results(run_ranks(one_sided, tmp_path))
    assert first["norms"] == pytest.approx(second["norms"], rel=1e-12)
    assert first["norms"].keys() == {"fit", "size", "decay"}
    assert sum(first["shares"].values()) == pytest.approx(1)


def gan_in_ranks(rank):
    report, module, without = GradientReport(2), GAN(adam), GAN(adam)
    for one, callbacks in ((module, [report]), (without, [])):
        options = {"strategy": {"find_unused_parameters": True}}
        fit_rank(one, rank, rounds(2, 3, torch.float64), callbacks=callbacks, **options)
    assert_same(module, without)
    return {name: dataclasses.asdict(found) for name, found in report.reports.items()}


def test_a_gan_in_two_ranks_has_the_reports_of_one_process(tmp_path):
    first, second = results(run_ranks(gan_in_ranks, tmp_path))
    report = GradientReport(2)
    fit(GAN(adam), DataLoader(joined_rounds(2, 3, torch.float64), batch_size=None), max_epochs=1, callbacks=[report])
    assert_alike(first, second)
    assert_alike(first, {name: dataclasses.asdict(found) for name, found in report.reports.items()})


def with_static_graph(rank):
    module = Regression(adam)
    options = {"callbacks": [GradientReport()], "strategy": {"static_graph": True}}
    fit_rank(module, rank, rounds(2, 1, torch.float64), **options)


def test_a_static_graph_is_refused_where_it_would_average_nothing(tmp_path):
    for outcome in run_ranks(with_static_graph, tmp_path):
        assert "static_graph=True" in outcome.error


# Sharded parameters


class Sharded(MultiTermLightningModule):
    """Trains the small network of ``sharded.py``; a penalty is computed outside of its forward pass."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.network, self.make_optimizer = Network(), make_optimizer

    def configure_model(self):
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return {**losses_of(self.network, batch), "gain": 0.1 * self.network.gain.square().sum()}

    def configure_optimizers(self):
        return self.make_optimizer(self.network)


def adam_of(network):
    return torch.optim.Adam(network.parameters(), lr=1e-2)


def mtadam_of(network, **options):
    return make_mtadam(network, terms=(*TERMS, "gain"), **options)


def sharded_fit(rank, make_optimizer, ranks, accumulate, *callbacks):
    strategy = {"strategy": ModelParallelStrategy(ranks, 1), "devices": ranks, "use_distributed_sampler": False}
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, "callbacks": list(callbacks)}
    trainer, module = make_trainer(**options, **(strategy if ranks else {})), Sharded(make_optimizer)
    trainer.fit(module, DataLoader(list(batches(rank, BATCHES)), batch_size=None))
    return wholes(module)


def in_shards(rank, make_optimizer, accumulate):
    report = GradientReport(2)
    with_it = sharded_fit(rank, make_optimizer, RANKS, accumulate, report)
    without = sharded_fit(rank, make_optimizer, RANKS, accumulate)
    assert all(torch.equal(with_it[name], one) for name, one in without.items())
    return told(report)


@needs_fsdp2
@pytest.mark.parametrize(
    ("make_optimizer", "accumulate"),
    [(adam_of, 1), (adam_of, 2), (mtadam_of, 1), (partial(mtadam_of, low_memory=True), 1)],
    ids=["adam", "adam, accumulating", "mtadam", "mtadam, low_memory"],
)
def test_sharded_parameters_have_the_figures_of_whole_ones(make_optimizer, accumulate, tmp_path):
    first, second = results(run_ranks(in_shards, tmp_path, make_optimizer, accumulate))
    report = GradientReport(2)
    sharded_fit(None, make_optimizer, 0, accumulate, report)
    assert_alike(first, second)
    assert_alike(first, told(report))

"""What the module logs of its terms is the same on all ranks: the mean over them, of a batch and of an epoch."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_mtadam.distributed.averaging import means_over_ranks
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank, rounds
from tests.lightning_models import GAN, QUIET, MemoryLogger, Regression, adam, make_mtadam, three_losses

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified")]

STEPS = 6
FIND_UNUSED = {"find_unused_parameters": True}


def tags(losses):
    """What is logged of named losses."""
    return {f"train/{name}": float(one) for name, one in {**losses, "loss": sum(losses.values())}.items()}


def mean(rows):
    """The mean of each tag over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


class Reading(Regression):
    """Reads what it logs when a batch ends, as callbacks may, and when an epoch does."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen, self.of_rank = [], []

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        self.of_rank.append(tags({name: loss.item() for name, loss in losses.items()}))
        return losses

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.read())

    def read(self):
        found = self.trainer.callback_metrics
        return {name: float(value) for name, value in found.items() if name.startswith("train/")}


def train_reading(rank, make_optimizer, accumulate):
    module, logger = Reading(make_optimizer), MemoryLogger()
    options = {"accumulate_grad_batches": accumulate, "logger": logger, "log_every_n_steps": 1, "max_epochs": 1}
    fit_rank(module, rank, rounds(2, STEPS, torch.float64), **options)
    return module.of_rank, module.seen, module.read(), logger.rows


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_terms_and_their_sum_are_means_over_the_ranks_in_every_batch_and_epoch(make_optimizer, accumulate, tmp_path):
    first, second = results(run_ranks(train_reading, tmp_path, make_optimizer, accumulate))
    assert first[0] != second[0], "the ranks' own losses differ"
    assert first[1:3] == second[1:3]
    batches = [mean(rows) for rows in zip(first[0], second[0], strict=True)]
    for found, expected in zip(first[1], batches, strict=True):
        assert found == pytest.approx(expected, rel=1e-12)
    ends = {**batches[-1], **{f"{name}_epoch": value for name, value in mean(batches).items()}}
    assert first[2] == pytest.approx(ends, rel=1e-12)
    assert [row["train/loss_epoch"] for _, row in first[3] if "train/loss_epoch" in row] == [
        pytest.approx(ends["train/loss_epoch"], rel=1e-12)
    ]


class Steered(Reading):
    """The rank's losses go another way than the other's: one falls, one grows."""

    def __init__(self, rank, **options):
        super().__init__(**options)
        self.rank = rank

    def training_step(self, batch, batch_idx):
        losses = three_losses(self.network, batch)
        factor = 1 + self.current_epoch * (1.0 if self.rank else -0.2)
        return {name: loss * factor for name, loss in losses.items()}


def steer(rank, monitor, interval, folder):
    def schedule(optimizer):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"scheduler": plateau, "monitor": monitor, "interval": interval}

    saver = ModelCheckpoint(folder, "{epoch}-{train/loss:.3f}", monitor, save_top_k=2, auto_insert_metric_name=False)
    stopping = EarlyStopping(monitor, patience=1, check_on_train_epoch_end=True)
    module = Steered(rank, make_schedule=schedule)
    options = {"max_epochs": 6, "enable_checkpointing": True, "callbacks": [saver, stopping]}
    trainer = fit_rank(module, rank, rounds(2, STEPS, torch.float64), **options)
    rates = trainer.optimizers[0].param_groups[0]["lr"]
    paths = sorted(saver.best_k_models)
    return rates, trainer.current_epoch, paths, saver.best_model_path, [p.detach() for p in module.parameters()]


@pytest.mark.parametrize(
    ("monitor", "interval"), [("train/loss", "epoch"), ("train/loss", "step"), ("train/loss_epoch", "epoch")]
)
@pytest.mark.filterwarnings("ignore:.*checkpoint directory")
def test_what_follows_the_loss_does_the_same_on_all_ranks(monitor, interval, tmp_path):
    (tmp_path / "ranks").mkdir()
    first, second = results(run_ranks(steer, tmp_path / "ranks", monitor, interval, tmp_path / "saved"))
    assert first[:4] == second[:4]
    assert first[0] < 1e-2, "the learning rate was reduced"
    assert first[1] < 6, "it was stopped early"
    assert all(torch.equal(one, other) for one, other in zip(first[4], second[4], strict=True))
    assert {str(path) for path in (tmp_path / "saved").rglob("*.ckpt")} == set(first[2]), "each file is there"


def train_gan(rank):
    module = GAN(lambda network: make_mtadam(network) if network[2].out_features == 2 else adam(network))
    trainer = fit_rank(module, rank, rounds(2, STEPS, torch.float64), strategy=FIND_UNUSED)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_terms_of_several_optimizers_are_the_same_on_all_ranks(tmp_path):
    first, second = results(run_ranks(train_gan, tmp_path))
    assert first == second
    assert {"train/l1", "train/fake", "train/l1_epoch", "train/fake_epoch"} <= set(first)


def count_collectives(rank, log_terms):
    """How often the main process group is used in a batch."""
    counted, all_reduce, barrier = [], dist.all_reduce, dist.barrier

    class Counting(Reading):
        def on_train_batch_start(self, batch, batch_idx):
            counted.append(0)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            """Nothing is read."""

    def count(real, *arguments, **options):
        counted[-1:] = [one + 1 for one in counted[-1:]]
        return real(*arguments, **options)

    dist.all_reduce, dist.barrier = partial(count, all_reduce), partial(count, barrier)
    module = Counting()
    module.log_terms = log_terms
    fit_rank(module, rank, rounds(2, STEPS, torch.float64), log_every_n_steps=1, logger=MemoryLogger())
    return counted[:-1]  # what follows the last batch may be of the trainer's end


def test_all_terms_take_one_collective_a_batch(tmp_path):
    (tmp_path / "silent").mkdir()
    counted, silent = (
        results(run_ranks(count_collectives, folder, log_terms))
        for folder, log_terms in ((tmp_path, True), (tmp_path / "silent", False))
    )
    assert counted == [[number + 1 for number in numbers] for numbers in silent]


class Different(Reading):
    """With Adam, which takes what it gets: each rank has terms of its own, in an order of its own."""

    def __init__(self, rank):
        super().__init__(adam)
        self.rank = rank

    def training_step(self, batch, batch_idx):
        losses = three_losses(self.network, batch)
        names = ("decay", "fit") if self.rank else ("fit", "size", "decay")
        losses = {name: losses[name] for name in names}
        self.of_rank.append(tags({name: loss.item() for name, loss in losses.items()}))
        return losses


def train_different(rank):
    module = Different(rank)
    fit_rank(module, rank, rounds(2, STEPS, torch.float64))
    return module.of_rank, module.seen


def test_a_term_that_some_ranks_lack_is_the_mean_over_those_that_have_it(tmp_path):
    first, second = results(run_ranks(train_different, tmp_path))
    assert first[1] == second[1]
    for found, *rows in zip(first[1], first[0], second[0], strict=True):
        assert found == pytest.approx(mean(rows), rel=1e-12)


class Zero(Reading):
    """Rank 1 has nothing for a term: a constant zero, of another precision, which counts."""

    def training_step(self, batch, batch_idx):
        losses = three_losses(self.network, batch)
        if self.global_rank:
            losses["size"] = torch.zeros(())
        self.of_rank.append(tags({name: loss.item() for name, loss in losses.items()}))
        return losses


def train_zero(rank):
    module = Zero()
    fit_rank(module, rank, rounds(2, STEPS, torch.float64))
    return module.of_rank, module.seen


def test_a_constant_zero_counts(tmp_path):
    first, second = results(run_ranks(train_zero, tmp_path))
    assert first[1] == second[1]
    for found, *rows in zip(first[1], first[0], second[0], strict=True):
        assert found == pytest.approx(mean(rows), rel=1e-12)


class Own(Reading):
    """Its own number under the module's tag is the rank's own affair."""

    def training_step(self, batch, batch_idx):
        self.log("train/loss", float(self.global_rank))
        return three_losses(self.network, batch)


def train_own(rank):
    module = Own()
    fit_rank(module, rank, rounds(2, STEPS, torch.float64))
    return module.read()


def test_what_the_user_logs_stands_on_each_rank(tmp_path):
    first, second = results(run_ranks(train_own, tmp_path))
    assert (first.pop("train/loss"), second.pop("train/loss")) == (0, 1)
    assert first == second
    assert "train/loss_epoch" not in first


class FailsOn(Reading):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and self.global_rank == 1:
            raise OSError("the disk is full")
        return super().training_step(batch, batch_idx)


def train_failing(rank, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    fit_rank(FailsOn(), rank, rounds(2, STEPS, torch.float64), **options)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_rank_that_fails_is_named_by_the_others_as_without_logs(accumulate, tmp_path):
    first, second = run_ranks(train_failing, tmp_path, accumulate)
    assert second.error == "OSError: the disk is full"
    assert first.error.startswith("RankError: Stopped, because another rank has failed. rank 1: OSError")


def reduce(rank, agreed):
    numbers = {"b": torch.tensor(2.0 + rank), "a": torch.tensor(float(rank), dtype=torch.float64)}
    if rank and not agreed:
        del numbers["a"]
    numbers = dict(reversed(numbers.items())) if rank else numbers
    return means_over_ranks(numbers, torch.device("cpu"), agreed=agreed)


@pytest.mark.parametrize("agreed", [True, False])
def test_means_over_ranks(agreed, tmp_path):
    for names, means in results(run_ranks(reduce, tmp_path, agreed)):
        assert names == ("a", "b")
        assert means.tolist() == [0.5 if agreed else 0.0, 2.5]

"""Where the batches come from, and how large they are."""

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tests.lightning_models import (
    Regression,
    adam,
    assert_same,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.loops import by_hand, hand_loop
from tests.trainer_matrix.table import HAND_LOOP, row

GROUP = "Data, evaluation"


def losses_of_two(network, batch: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """A term for each loader."""
    small, large = (three_losses(network, batch[name]) for name in ("small", "large"))
    return {"small": small["fit"], "large": large["size"]}


class TwoLoaders(Regression):
    """Its batch is a dict of two."""

    def training_step(self, batch, batch_idx):
        return losses_of_two(self.network, batch)


@row(GROUP, "several loaders", HAND_LOOP, cases=["min_size", "max_size_cycle"])
def each_of_several_loaders_may_have_a_term(folder: Path, mode: str) -> None:
    small, large = make_loader(4, seed=2), make_loader(6, seed=3)
    module = TwoLoaders()
    fit(module, CombinedLoader({"small": small, "large": large}, mode))
    smalls = [*small, *small] if mode == "max_size_cycle" else list(small)
    batches = [{"small": one, "large": other} for one, other in zip(smalls, large, strict=False)]
    assert len(batches) == (4 if mode == "min_size" else 6)
    assert_same(module.network, by_hand(batches=batches, losses=losses_of_two)[0])


class Stream(IterableDataset):
    """The samples of ``make_loader``, without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from make_loader().dataset


@row(GROUP, "`IterableDataset`", HAND_LOOP, cases=[1, 4])
def a_stream_without_a_length_is_like_a_data_set(folder: Path, accumulate: int) -> None:
    module = Regression()
    fit(module, DataLoader(Stream(), batch_size=4), accumulate_grad_batches=accumulate)
    assert_same(module.network, by_hand(accumulate=accumulate)[0])


class NewDataEveryEpoch(pl.LightningDataModule):
    """Other batches in every epoch."""

    def train_dataloader(self) -> DataLoader:
        return make_loader(seed=self.trainer.current_epoch)


@row(GROUP, "`LightningDataModule`, `reload_dataloaders_every_n_epochs`", HAND_LOOP)
def data_may_be_reloaded_every_epoch(folder: Path) -> None:
    module = Regression()
    fit(module, NewDataEveryEpoch(), reload_dataloaders_every_n_epochs=1, max_epochs=3)
    network = make_network()
    optimizer = make_mtadam(network)
    for epoch in range(3):
        hand_loop(network, optimizer, make_loader(seed=epoch), epochs=1)
    assert_same(module.network, network)


class Resizable(Regression):
    """Makes its loader with the batch size that a finder sets."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader(make_loader().dataset, batch_size=self.batch_size)


@row(GROUP, "`BatchSizeFinder`", HAND_LOOP, cases=["power", "binsearch"])
def the_batch_size_finder_finds_what_it_finds_with_adam_and_leaves_no_trace(folder: Path, mode: str) -> None:
    found = []
    for make_optimizer in (make_mtadam, adam):
        module = Resizable(make_optimizer)
        finder = BatchSizeFinder(mode=mode, steps_per_trial=2, max_trials=2)
        trainer = fit(module, None, callbacks=[finder], default_root_dir=folder)
        found.append(module.batch_size)
        assert trainer.global_step == 2 * -(-24 // module.batch_size)
        assert_same(module.network, by_hand(make_optimizer, batches=module.train_dataloader())[0])
    assert found[0] == found[1] > 2

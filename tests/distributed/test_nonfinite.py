"""A gradient that is inf or nan on one rank stops or skips the step on all of them, and changes nothing on any."""

import copy
import warnings
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch

from tests.distributed.cases import Case
from tests.distributed.ranks import PATIENCE, results, run_ranks
from tests.distributed.training import Trained, fit_rank, rounds, same_summary, summary
from tests.lightning_models import QUIET, half_precision
from tests.spoiling import in_gradient

pytestmark = QUIET

BATCHES = 6
SPOILT = 2


class Spoilt(Trained):
    """In one batch, a term's gradient is spoilt on one rank."""

    def __init__(self, rank, bad, term, factor, dtype=torch.float64, **optimizer):
        super().__init__(Case(optimizer=optimizer), rank, dtype)
        self.bad, self.term, self.factor = bad, term, factor

    def training_step(self, batch, batch_idx):
        losses = super().training_step(batch, batch_idx)
        if self.rank == self.bad and batch_idx in (SPOILT, SPOILT + 3):
            losses[self.term] = in_gradient(losses[self.term].float(), self.factor)
        return losses


class Snapshots(pl.Callback):
    """Parameters, state and norms after every batch, and the gradient scaler's scale."""

    def __init__(self):
        self.taken, self.scales = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.taken.append(copy.deepcopy(summary(pl_module.network, trainer.optimizers[0])))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append(None if scaler is None else scaler.get_scale())


def fit_spoilt(rank, ranks, bad, term, factor, options, trainer):
    module = Spoilt(rank, bad, term, factor, **options)
    batches = rounds(ranks, BATCHES, options.get("dtype", torch.float64))
    snapshots = Snapshots()
    if trainer.pop("half", False):
        trainer["plugins"] = [half_precision(16.0)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_rank(module, rank, batches, callbacks=[snapshots], **trainer)
    said = [str(warning.message) for warning in caught if "skipped" in str(warning.message)]
    return snapshots.taken, snapshots.scales, said


def check_ranks(found, accumulate):
    """The ranks are the same after every batch, and just the spoilt steps are missing."""
    first, *others = [taken for taken, _, _ in found]
    for other in others:
        assert all(same_summary(mine, theirs) for mine, theirs in zip(first, other, strict=True))
    unchanged = [same_summary(one, two) for one, two in pairwise(first)]
    assert unchanged == ([False, True, False, False, True] if accumulate == 1 else [False, True, True, True, True])
    assert {float(clock[0]) for clock in first[-1]["clocks"]} == {4.0 if accumulate == 1 else 1.0}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
@pytest.mark.parametrize(("ranks", "bad", "term"), [(2, 0, "size"), (2, 1, "fit"), (3, 2, "decay")])
def test_a_scaler_skips_the_step_on_every_rank(ranks, bad, term, factor, accumulate, tmp_path):
    trainer = {"half": True, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    found = results(
        run_ranks(fit_spoilt, tmp_path, ranks, bad, term, factor, {"dtype": torch.float32}, trainer, ranks=ranks)
    )
    check_ranks(found, accumulate)
    for _, scales, _ in found:
        assert scales == ([16.0] * 2 + [8.0] * 3 + [4.0] if accumulate == 1 else [16.0] * 3 + [8.0] * 2 + [4.0])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("ranks", "bad", "term"), [(2, 0, "size"), (2, 1, "fit"), (3, 2, "decay")])
def test_the_step_is_skipped_on_every_rank_if_the_optimizer_is_told_to(ranks, bad, term, accumulate, tmp_path):
    arguments = (ranks, bad, term, torch.inf, {"on_nonfinite": "skip"}, {"accumulate_grad_batches": accumulate})
    found = results(run_ranks(fit_spoilt, tmp_path, *arguments, ranks=ranks))
    check_ranks(found, accumulate)
    for _, _, (said,) in found:
        assert said.startswith("A step was skipped; others will be without a word.")
        assert f"{term!r}" in said


@pytest.mark.parametrize("bad", [0, 1])
def test_otherwise_it_raises_on_every_rank_naming_term_and_layer(bad, tmp_path):
    for outcome in run_ranks(fit_spoilt, tmp_path, 2, bad, "size", torch.nan, {}, {}):
        assert outcome.error.startswith("NonFiniteError: ")
        assert "'size' at the layer '0.weight' is not finite" in outcome.error
        assert outcome.seconds < PATIENCE

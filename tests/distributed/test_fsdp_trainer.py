"""FSDP2 under Lightning's trainer: training, checkpoints of every kind and number of processes, refusals."""

from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_mtadam import MultiTermLightningModule
from lightning_mtadam.optim.state import BALANCE_KEYS
from tests.distributed.ranks import results, run_ranks
from tests.distributed.sharded import (
    RANKS,
    TERMS,
    Network,
    batches,
    difference,
    losses_of,
    needs_fsdp2,
    shard,
    train_rows,
    whole_state,
    wholes,
)
from tests.lightning_models import QUIET, make_mtadam, make_trainer

pytestmark = QUIET
BATCHES = 6


class Model(MultiTermLightningModule):
    def __init__(self, cut=True, **options):
        super().__init__()
        self.network, self.cut, self.options = Network(), cut, options

    def configure_model(self):
        if self.device_mesh is not None and self.cut:
            shard(self.network, self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return losses_of(self.network, batch)

    def configure_optimizers(self):
        return make_mtadam(self, terms=TERMS, **self.options)


class GAN(Model):
    """Manual optimization; "l1" does not reach the judge."""

    def __init__(self):
        super().__init__()
        self.judge = Network()
        self.automatic_optimization = False

    def configure_model(self):
        super().configure_model()
        if self.device_mesh is not None:
            shard(self.judge, self.device_mesh["data_parallel"])

    def score(self, x, output):
        return self.judge(torch.cat([x[:, 1:], output], 1))[1]

    def training_step(self, batch, batch_idx):
        x, y = batch
        made = self.network(x)[1]
        generator, judge = self.optimizers()
        fake = self.score(x, made.detach()).square().mean()
        self.update(judge, {"real": (1 - self.score(x, y)).square().mean(), "fake": fake})
        gan = (1 - self.score(x, made)).square().mean()
        self.update(generator, {"gan": gan, "l1": (made - y).abs().mean()})

    def update(self, optimizer, losses):
        optimizer.zero_grad()
        self.backward_terms(losses, optimizer)
        self.clip_gradients(optimizer, gradient_clip_val=0.1)
        optimizer.step()

    def configure_optimizers(self):
        return [make_mtadam(self.network), make_mtadam(self.judge)]


def sharded(ranks, full=False):
    """The trainer's options, for as many processes; one without a strategy for none."""
    if not ranks:
        return {}
    strategy = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=not full)
    return {"strategy": strategy, "devices": ranks, "use_distributed_sampler": False}


def loader(rank, ranks):
    return DataLoader(list(batches(rank if ranks == RANKS else None, BATCHES)), batch_size=None)


def fitted(rank, model, ranks, trainer_options):
    module = model()
    make_trainer(**sharded(ranks), **trainer_options).fit(module, loader(rank, ranks))
    return wholes(module)


@needs_fsdp2
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Model, {"accumulate_grad_batches": 4}),
        (Model, {"gradient_clip_val": 0.05}),
        (Model, {"gradient_clip_val": 0.005, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}),
        (GAN, {}),
    ],
)
def test_a_sharded_fit_equals_one_process(model, options, tmp_path):
    expected = fitted(None, model, 0, options)
    assert difference(expected, wholes(model())) > 0.01, "it has been trained"
    for weights in results(run_ranks(fitted, tmp_path, model, RANKS, options)):
        assert difference(weights, expected) < 1e-12


def epochs(rank, ranks, full, count, load=None, save=None, options=()):
    """Train up to an epoch, from a checkpoint or the start, and save one."""
    module = Model(**dict(options))
    trainer = make_trainer(max_epochs=count, **sharded(ranks, full))
    trainer.fit(module, loader(rank, ranks), ckpt_path=load)
    if save:
        trainer.save_checkpoint(save)
    return wholes(module), whole_state(trainer.optimizers[0])


def run(folder, ranks, *arguments):
    if not ranks:
        return epochs(None, ranks, *arguments)
    folder.mkdir()
    return results(run_ranks(epochs, folder, ranks, *arguments, ranks=ranks))[-1]


@needs_fsdp2
@pytest.mark.filterwarnings("ignore:.*weights_only")
@pytest.mark.parametrize(
    ("before", "after", "full"),
    [(2, 2, False), (2, 1, False), (1, 2, False), (2, 2, True), (2, 0, True), (0, 2, True)],
)
def test_a_checkpoint_resumes_on_any_number_of_processes(before, after, full, tmp_path):
    """In one full file, or a folder of shards. 0 stands for a trainer without a strategy, which reads files only."""
    options = (("amsgrad", True), ("denominator", "own"))
    path = str(tmp_path / "checkpoint")
    run(tmp_path / "before", before, full, 1, None, path, options)
    weights, state = run(tmp_path / "after", after, full, 2, path, None, options)
    straight = run(tmp_path / "straight", after if before == after else 0, full, 2, None, None, options)
    tolerance = 0 if before == after else 1e-12
    assert difference(weights, straight[0]) <= tolerance
    assert max(map(difference, state, straight[1])) <= 1e3 * tolerance
    assert set(state[0]) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", *BALANCE_KEYS}


def states(network, optimizer):
    return {"network": get_model_state_dict(network), "optimizer": get_optimizer_state_dict(network, optimizer)}


def by_hand(rank, path, options):
    """Save, go on; load into new ones, go on."""
    network = shard(Network())
    optimizer = make_mtadam(network, terms=TERMS, **options)
    train_rows(network, optimizer, rank, steps=4)
    dcp.save(states(network, optimizer), checkpoint_id=path)
    train_rows(network, optimizer, rank, skip=4)

    resumed = shard(Network())
    other = make_mtadam(resumed, terms=TERMS, lr=1.0, **options)
    saved = states(resumed, other)
    dcp.load(saved, checkpoint_id=path)
    set_model_state_dict(resumed, saved["network"])
    set_optimizer_state_dict(resumed, other, saved["optimizer"])
    train_rows(resumed, other, rank, skip=4)
    return [{**wholes(n), **dict(enumerate(whole_state(o)))} for n, o in ((network, optimizer), (resumed, other))]


@needs_fsdp2
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", [{}, {"balance_every": 5}], ids=str)
def test_a_checkpoint_by_hand_resumes_bitwise(options, tmp_path):
    for straight, resumed in results(run_ranks(by_hand, tmp_path, str(tmp_path / "checkpoint"), options)):
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_checkpoint_without_known_terms_is_refused_and_nothing_changes(scheduled):
    """The first step of ``torch.distributed.checkpoint`` has no processes in it."""
    network = Network()
    optimizer = make_mtadam(network)
    if scheduled:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match=r"not before the terms are known.*MTAdam\(\.\.\., terms=\(\.\.\.\)\)"):
        get_optimizer_state_dict(network, optimizer)
    assert optimizer.param_groups == groups
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not optimizer.state
    train_rows(network, optimizer, None, steps=2)
    assert get_optimizer_state_dict(network, optimizer)["state"], "known now"


def refused(rank, make_module, make_strategy):
    module = make_module()
    trainer = make_trainer(strategy=make_strategy(), devices=RANKS, use_distributed_sampler=False)
    before = wholes(module)
    with pytest.raises(Exception, match=r".") as caught:
        trainer.fit(module, loader(rank, RANKS))
    assert difference(wholes(module), before) == 0
    assert trainer.global_step == 0
    return f"{type(caught.value).__name__}: {caught.value}"


class HalfModel(Model):
    def configure_model(self):
        fully_shard(self.network.first, mesh=self.device_mesh["data_parallel"])


def hooked():
    return DDPStrategy(ddp_comm_hook=fp16_compress_hook)


@pytest.mark.parametrize(
    ("make_module", "make_strategy", "reason", "alternative"),
    [
        (Model, hooked, "A DDP communication hook", "Leave it out"),
        (partial(Model, cut=False), partial(ModelParallelStrategy, RANKS, 1), "No parameter is sharded", "'ddp'"),
        (HalfModel, partial(ModelParallelStrategy, RANKS, 1), "some are not", "the root module last"),
    ],
)
def test_strategies_that_cannot_work_raise_before_the_first_batch(
    make_module, make_strategy, reason, alternative, tmp_path
):
    for error in results(run_ranks(refused, tmp_path, make_module, make_strategy)):
        assert reason in error
        assert alternative in error

"""ImportanceScheduler: the optimizer has the value of its own count before every backward pass."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mtadam.balancers import FixedWeights, GradNorm
from lightning_mtadam.callbacks import ImportanceScheduler
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank, rounds
from tests.lightning_models import (
    GAN,
    QUIET,
    MemoryLogger,
    Regression,
    StepwiseRegression,
    adam,
    assert_same,
    assert_same_state,
    fit,
    make_loader,
    make_mtadam,
    make_trainer,
    needs_exact_resume,
    three_losses,
)

pytestmark = [
    QUIET,
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


def ramp(step):
    return min(1.0, step / 10)


def cycle(step):
    return 0.5 + 0.5 * math.cos(step)


class Seen(Regression):
    """Notes the importance that each backward pass has."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def backward(self, loss):
        super().backward(loss)
        optimizer = self.trainer.optimizers[0]
        self.seen.append((optimizer.param_groups[0]["steps"], optimizer._options.importance.get("size", 1)))


@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("function", [ramp, cycle])
def test_every_backward_pass_has_the_value_of_the_steps_done(function, accumulated):
    module = Seen()
    fit(
        module,
        make_loader(6),
        callbacks=[ImportanceScheduler({"size": function})],
        accumulate_grad_batches=accumulated,
    )
    assert module.seen == [(step // accumulated, function(step // accumulated)) for step in range(12)]


def test_it_equals_setting_it_by_hand():
    module, network = Regression(), Regression().network
    fit(module, make_loader(6), callbacks=[ImportanceScheduler({"size": ramp, "decay": cycle})], max_epochs=2)
    optimizer = make_mtadam(network)
    for step, batch in enumerate([*make_loader(6)] * 2):
        optimizer.set_importance({"size": ramp(step), "decay": cycle(step)})
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch))
        optimizer.step()
    assert_same(module.network, network)


def test_epochs_are_counted_with_that_interval():
    module = Seen()
    fit(module, make_loader(2), callbacks=[ImportanceScheduler({"size": lambda epoch: 1.0 + epoch}, "epoch")])
    assert module.seen == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


@needs_exact_resume
@pytest.mark.parametrize("stop", [3, 6, 7])
def test_a_resumed_run_goes_on_at_the_right_count(stop, tmp_path):
    def run(steps, resume_from=None):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = StepwiseRegression()
        trainer = make_trainer(
            max_epochs=-1,
            max_steps=steps,
            callbacks=[ImportanceScheduler({"size": ramp}), saver],
            enable_checkpointing=True,
        )
        trainer.fit(module, make_loader(6), ckpt_path=resume_from)
        return module, trainer

    whole, trainer = run(12)
    again, resumed = run(12, tmp_path / f"step={stop}.ckpt")
    assert_same(whole.network, again.network)
    assert_same_state(trainer.optimizers[0], resumed.optimizers[0])


def test_it_is_logged():
    logger = MemoryLogger()
    fit(
        Regression(), make_loader(6), max_epochs=1, logger=logger, log_every_n_steps=2,
        callbacks=[ImportanceScheduler({"size": ramp})],
    )  # fmt: skip
    rows = [(step, row["importance/size"]) for step, row in logger.rows if "importance/size" in row]
    assert rows == [(1, 0.1), (3, 0.3), (5, 0.5)]


def test_epochs_are_logged_at_their_end():
    logger = MemoryLogger()
    scheduler = ImportanceScheduler({"size": lambda epoch: 2.0**epoch}, interval="epoch")
    fit(Regression(), make_loader(3), logger=logger, log_every_n_steps=1, callbacks=[scheduler])
    rows = [(step, row["importance/size"]) for step, row in logger.rows if "importance/size" in row]
    assert rows == [(2, 1.0), (5, 2.0)]


class Adversaries(GAN):
    """Notes the importance that each backward pass has."""

    def __init__(self):
        super().__init__()
        self.seen = {"gan": [], "fake": []}

    def after_backward(self, optimizer):
        name = "gan" if "gan" in optimizer.terms else "fake"
        self.seen[name].append((optimizer.param_groups[0]["steps"], optimizer.param_groups[0]["importance"][name]))


def test_each_of_several_optimizers_counts_its_own_steps_and_takes_its_own_terms():
    module, logger = Adversaries(), MemoryLogger()
    scheduler = ImportanceScheduler({"gan": ramp, "fake": cycle})
    fit(module, make_loader(4), max_epochs=1, callbacks=[scheduler], logger=logger, log_every_n_steps=1)
    assert module.seen["gan"] == [(step, ramp(step)) for step in range(4)]
    assert module.seen["fake"] == [(step, cycle(step)) for step in range(4)]
    tags = {tag for _, row in logger.rows for tag in row if tag.startswith("importance")}
    assert tags == {"importance-MTAdam/gan", "importance-MTAdam-1/fake"}


def test_a_term_of_none_of_several_optimizers_is_refused():
    with pytest.raises(ValueError, match=r"schedule names the term 'gaan', but the terms are .*Did you mean 'gan'"):
        fit(GAN(), make_loader(2), callbacks=[ImportanceScheduler({"gaan": ramp, "l1": ramp})])


def test_an_unknown_term_is_refused():
    with pytest.raises(ValueError, match=r"importance names the term 'sise'.*Did you mean 'size'"):
        fit(Regression(), make_loader(2), callbacks=[ImportanceScheduler({"sise": ramp})])


class Weights(FixedWeights):
    """Stands in for a balancer whose weights have an importance; notes what was set."""

    def __init__(self):
        super().__init__({"fit": 1.0, "size": 1.0, "decay": 1.0, "l1": 1.0, "gan": 1.0})
        self.seen = []

    def set_importance(self, importance):
        self.seen.append(importance)


class Balanced(Regression):
    def configure_balancer(self):
        return self.made

    def __init__(self, balancer):
        super().__init__(adam)
        self.made = balancer


def test_a_balancer_that_has_an_importance_is_scheduled_by_the_trainers_steps():
    balancer = Weights()
    fit(
        Balanced(balancer), make_loader(4), max_epochs=1, accumulate_grad_batches=2,
        callbacks=[ImportanceScheduler({"size": ramp})],
    )  # fmt: skip
    assert balancer.seen == [{"size": 0.0}, {"size": 0.1}]


class BalancedGAN(GAN):
    def __init__(self, balancer):
        super().__init__(adam)
        self.balancer = balancer

    def backward_terms(self, losses, optimizer, **options):
        return super().backward_terms(losses, optimizer, balanced="gan" in losses, **options)


def test_in_manual_optimization_the_balanced_optimizers_steps_are_counted(tmp_path):
    def run(batches, resume_from=None):
        balancer, scheduler = Weights(), ImportanceScheduler({"gan": ramp})
        trainer = make_trainer(max_epochs=-1, max_steps=2 * batches, callbacks=[scheduler])
        trainer.fit(BalancedGAN(balancer), make_loader(4), ckpt_path=resume_from)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return balancer.seen

    assert run(3) == [{"gan": 0.0}, {"gan": 0.1}, {"gan": 0.2}]
    assert run(4, tmp_path / "last.ckpt") == [{"gan": 0.3}]


class BalancedByGradNorm(Regression):
    def configure_balancer(self):
        return GradNorm("network.0.weight")


@pytest.mark.parametrize(
    ("module", "named"), [(Regression(adam), "Adam"), (BalancedByGradNorm(adam), "GradNorm")], ids=["adam", "gradnorm"]
)
def test_nothing_to_set_is_refused_before_the_first_step(module, named):
    if hasattr(GradNorm, "set_importance") and named == "GradNorm":
        pytest.skip("GradNorm has an importance")
    with pytest.raises(TypeError, match=rf"needs something that has an importance, but there is only \['{named}'"):
        fit(module, make_loader(2), callbacks=[ImportanceScheduler({"size": ramp})])


@pytest.mark.parametrize("made", [torch.tensor(0.25), torch.tensor([0.25]), np.float32(0.25), 1])
def test_numbers_of_other_kinds_are_taken_as_floats(made):
    module = Seen()
    fit(module, make_loader(1), max_epochs=1, callbacks=[ImportanceScheduler({"size": lambda step: made})])
    assert module.seen == [(0, float(made))]


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (math.nan, ValueError, r"schedule\['size'\]\(0\) must return a finite number of at least 0, but returned nan"),
        (-1.0, ValueError, "returned -1.0"),
        (math.inf, ValueError, "returned inf"),
        (torch.ones(2), TypeError, r"schedule\['size'\]\(0\) must return a number, but returned a Tensor"),
        (None, TypeError, "returned None"),
        ("1", TypeError, "returned a str"),
    ],
)
def test_what_a_function_returns_is_checked(made, error, message):
    module, before = Regression(), Regression()
    with pytest.raises(error, match=message):
        fit(module, make_loader(1), callbacks=[ImportanceScheduler({"size": lambda step: made})])
    assert_same(module.network, before.network)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([("kl", ramp)],), TypeError, "schedule must be a mapping of terms' names to functions, but is a list of 1"),
        (({},), ValueError, "schedule is empty"),
        (({"kl": 0.1},), TypeError, r"schedule\['kl'\] must be a function .*but got 0.1. A constant"),
        (({1: ramp},), TypeError, "must be a non-empty string"),
        (({"kl": ramp}, "batch"), ValueError, "interval must be 'step' or 'epoch', but got 'batch'"),
    ],
)
def test_what_it_is_made_with_is_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        ImportanceScheduler(*arguments)


def test_two_schedulers_have_states_of_their_own():
    steps, epochs = ImportanceScheduler({"size": ramp}), ImportanceScheduler({"decay": ramp}, "epoch")
    assert steps.state_key != epochs.state_key
    module = Seen()
    fit(module, make_loader(2), callbacks=[steps, epochs], max_epochs=2)
    assert module.seen[-1] == (3, ramp(3))
    assert module.trainer.optimizers[0].param_groups[0]["importance"] == {"fit": 1.0, "size": ramp(3), "decay": ramp(1)}


def scheduled(rank):
    module = Regression()
    batches = rounds(2, 6, torch.float64)
    fit_rank(module, rank, batches, callbacks=[ImportanceScheduler({"size": ramp})])
    return dict(module.network.state_dict())


def test_two_ranks_equal_one_process(tmp_path):
    first, second = results(run_ranks(scheduled, tmp_path))
    module = Regression()
    joined = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in rounds(2, 6, torch.float64)]
    loader = torch.utils.data.DataLoader(joined, batch_size=None)
    fit(module, loader, max_epochs=1, callbacks=[ImportanceScheduler({"size": ramp})])
    for name, value in module.network.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-12)

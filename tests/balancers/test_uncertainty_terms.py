"""UncertaintyWeighting without terms: the parameter is there from the start, and grows with the first losses."""

import copy
import functools
import pickle

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.tuner import Tuner
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_mtadam import NonFiniteError
from lightning_mtadam.balancers import UncertaintyWeighting
from tests.balancers.cases import CASES, Balanced, Case, balanced_by_hand, fit_from
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank, joined_rounds, rounds
from tests.lightning_models import (
    LR,
    QUIET,
    assert_same,
    assert_same_state,
    fit,
    make_loader,
    make_network,
    make_trainer,
    three_losses,
)

pytestmark = QUIET
UNNAMED, NAMED = CASES["uncertainty"], CASES["uncertainty, terms given"]
TERMS = ("fit", "size", "decay")
OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=LR),
    "foreach": functools.partial(torch.optim.Adam, lr=LR, foreach=True),
    "fused": functools.partial(torch.optim.AdamW, lr=LR, fused=True),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=LR),
    "Rprop": functools.partial(torch.optim.Rprop, lr=LR),
}


def prepared(case, make_optimizer=OPTIMIZERS["Adam"]):
    module = Balanced(case)
    _ = module.balancer  # what it learns is then among the parameters
    return module, make_optimizer(module.parameters())


def step(module, optimizer, losses):
    optimizer.zero_grad()
    module.balancer.backward(losses, optimizer, model=module)
    optimizer.step()


def trained(case, make_optimizer):
    module, optimizer = prepared(case, make_optimizer)
    for batch in make_loader():
        step(module, optimizer, three_losses(module.network, batch))
    return module, optimizer


def first_losses(module):
    return three_losses(module.network, next(iter(make_loader())))


def size_of(module):
    return tuple(module.balancer.learned.log_variances.shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_terms_equals_terms_given(name):
    (ours, optimizer), (expected, other) = (trained(case, OPTIMIZERS[name]) for case in (UNNAMED, NAMED))
    assert ours.balancer.terms == TERMS
    assert_same(ours, expected)
    assert_same_state(optimizer, other)


def test_an_optimizer_that_has_stepped_before_the_first_losses_learns_them():
    module, optimizer = prepared(UNNAMED)
    module.network(torch.ones(4, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    step(module, optimizer, first_losses(module))
    assert torch.allclose(module.balancer.learned.log_variances.abs(), torch.tensor(LR, dtype=torch.float64))


def test_an_optimizer_with_state_of_the_empty_parameter_is_refused():
    with pytest.raises(ValueError, match=r"Adagrad has made its state .* UncertaintyWeighting\(terms=\('fit', 'size'"):
        trained(UNNAMED, torch.optim.Adagrad)
    assert size_of(trained(NAMED, torch.optim.Adagrad)[0]) == (3,)


WRONG = {
    "nan": (lambda losses: {**losses, "fit": losses["fit"] * torch.nan}, NonFiniteError),
    "no graph": (lambda losses: {**losses, "fit": losses["fit"].detach()}, ValueError),
    "no scalar": (lambda losses: {**losses, "fit": losses["fit"][None]}, ValueError),
    "differentiated before": (lambda losses: losses["fit"].backward() or losses, RuntimeError),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_first_losses_leave_the_terms_open(wrong):
    spoil, error = WRONG[wrong]
    module, optimizer = prepared(UNNAMED)
    with pytest.raises(error):
        module.balancer.backward(spoil(first_losses(module)), optimizer, model=module)
    assert (size_of(module), module.balancer.terms, module.balancer.term_weights()) == ((0,), (), {})
    step(module, optimizer, {"other": first_losses(module)["fit"]})
    assert module.balancer.terms == ("other",)


def test_the_first_losses_are_the_terms():
    module, optimizer = prepared(UNNAMED)
    losses, more = (three_losses(module.network, batch) for batch in make_loader(2))
    del losses["size"]
    step(module, optimizer, losses)
    with pytest.raises(ValueError, match="'size'"):
        module.balancer.backward(more, optimizer, model=module)
    assert size_of(module) == (2,)


def test_a_checkpoint_brings_the_number_of_terms():
    source, fresh = balanced_by_hand(UNNAMED, make_loader()), Balanced(UNNAMED)
    held = fresh.balancer.learned.log_variances
    fresh.load_state_dict(source.state_dict(), strict=True)
    assert fresh.balancer.learned.log_variances is held
    assert_same(fresh, source)
    assert fresh.balancer.term_weights() == {}  # weights alone have no names
    for module in (source, fresh):
        step(module, module.configure_optimizers(), first_losses(module))
    assert_same(fresh, source)


def test_log_variances_of_another_number_of_terms_are_refused():
    module = Balanced(UNNAMED)
    module.load_state_dict(balanced_by_hand(UNNAMED, make_loader()).state_dict())
    losses = first_losses(module)
    del losses["size"]
    with pytest.raises(ValueError, match=r"has learned 3 log variances, but the losses are \('fit', 'decay'\)"):
        module.balancer.backward(losses, module.configure_optimizers(), model=module)
    with pytest.raises(RuntimeError, match="size mismatch for learned_balance"):
        Balanced(Case(lambda: UncertaintyWeighting(("fit", "size")))).load_state_dict(module.state_dict())


@pytest.mark.parametrize("case", [UNNAMED, NAMED], ids=["without terms", "terms given"])
@pytest.mark.parametrize("batches", [[], make_loader()], ids=["fresh", "trained"])
def test_a_checkpoint_from_before_the_first_losses_begins_at_zero_again(case, batches):
    module, begun = balanced_by_hand(case, batches), prepared(UNNAMED)[0].state_dict()
    assert begun["learned_balance.log_variances"].shape == (0,)
    module.load_state_dict(begun)
    step(module, module.configure_optimizers(), first_losses(module))
    assert_same(module, balanced_by_hand(UNNAMED, list(make_loader())[:1]))


def test_a_checkpoint_of_other_terms_is_refused(tmp_path):
    fit(Balanced(UNNAMED), make_loader()).save_checkpoint(tmp_path / "three.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint's balancer has the terms \('fit', 'size', 'decay'\)"):
        fit_from(Balanced(Case(lambda: UncertaintyWeighting(("fit", "size", "bend")))), tmp_path / "three.ckpt")


def test_the_terms_come_from_the_checkpoint(tmp_path):
    fit(Balanced(UNNAMED), make_loader(), max_epochs=1).save_checkpoint(tmp_path / "three.ckpt")
    module = Balanced(UNNAMED)
    module.training_step = lambda batch, batch_idx: {"fitt": module.network(batch[0]).mean()}
    with pytest.raises(ValueError, match="Did you mean 'fit'"):
        fit_from(module, tmp_path / "three.ckpt")
    assert module.balancer.terms == TERMS


def averaged(case):
    module, optimizer = prepared(case)
    average = AveragedModel(module, avg_fn=get_ema_avg_fn(0.9))
    for batch in make_loader():
        step(module, optimizer, three_losses(module.network, batch))
        average.update_parameters(module)
    return average.module


def test_a_copy_from_before_the_first_losses_averages_the_log_variances():
    ours, expected = averaged(UNNAMED), averaged(NAMED)
    assert_same(ours, expected)
    assert ours.learned_balance.log_variances.all()


def test_a_pickled_module_is_a_module_of_its_own():
    module, _ = prepared(UNNAMED)
    copied = copy.deepcopy(module)
    pickled = pickle.loads(pickle.dumps(module.balancer))
    step(module, module.configure_optimizers(), first_losses(module))
    assert (size_of(module), size_of(copied)) == ((3,), (3,))
    assert pickled.learned.log_variances.shape == (0,)


def test_a_copy_that_is_trained_itself_may_have_other_terms():
    module, _ = prepared(UNNAMED)
    copied = copy.deepcopy(module)
    step(module, module.configure_optimizers(), first_losses(module))
    assert copied.balancer.term_weights() == {}
    losses = first_losses(copied)
    del losses["size"]
    optimizer = copied.configure_optimizers()
    step(copied, optimizer, losses)
    assert (size_of(module), size_of(copied)) == ((3,), (2,))
    assert copied.balancer.terms == ("fit", "decay")
    with pytest.raises(ValueError, match="'size'"):
        copied.balancer.backward(first_losses(copied), optimizer, model=copied)


def averaging(name):
    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    options = {"swa_lrs": 1e-3, "swa_epoch_start": 1} if name == "StochasticWeightAveraging" else {}
    return getattr(callbacks, name)(**options)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "WeightAveraging"])
def test_callbacks_that_average_see_no_difference(name):
    modules = [Balanced(case) for case in (UNNAMED, NAMED)]
    for module in modules:
        fit(module, make_loader(), callbacks=[averaging(name)], max_epochs=4)
    assert_same(*modules)


def test_the_learning_rate_finder_leaves_the_module_as_it_was(tmp_path):
    found, expected = Balanced(UNNAMED), Balanced(UNNAMED)
    trainer = make_trainer(default_root_dir=tmp_path)
    Tuner(trainer).lr_find(found, make_loader(), num_training=5, update_attr=False)
    trainer.fit(found, make_loader())
    fit(expected, make_loader())
    assert_same(found, expected)


def test_the_summary_of_the_model_warns_of_nothing():
    fit(Balanced(UNNAMED), make_loader(), enable_model_summary=True)


def disagree(rank):
    module = Balanced(UNNAMED)
    names = TERMS[: 3 - rank]
    module.training_step = lambda batch, batch_idx: {
        name: loss for name, loss in three_losses(module.network, batch).items() if name in names
    }
    with pytest.raises(ValueError, match=r"different terms: rank 0 has \('fit', 'size', 'decay'\); rank 1 has"):
        fit_rank(module, rank, rounds(2, 2, torch.float64))
    return size_of(module)


def test_ranks_that_disagree_about_the_first_terms_say_so_and_stay_empty(tmp_path):
    assert results(run_ranks(disagree, tmp_path)) == [(0,), (0,)]


def of_two_types(rank):
    """An empty parameter that is the only one of its type: what the wrapper sends of it is nothing at all."""
    module = Balanced(Case(UncertaintyWeighting))
    fit_rank(module, rank, rounds(2, 4, torch.float64))
    return [parameter.detach() for parameter in module.parameters()]


def test_the_wrapper_takes_the_empty_parameter(tmp_path):
    first, second = results(run_ranks(of_two_types, tmp_path))
    alone = balanced_by_hand(Case(UncertaintyWeighting), joined_rounds(2, 4, torch.float64))
    for one, two, expected in zip(first, second, alone.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.allclose(one, expected, atol=1e-6)


def test_a_loop_without_lightning_needs_no_module():
    network, balancer = make_network(), UncertaintyWeighting()
    balancer.learned.double()
    optimizer = torch.optim.Adam([*network.parameters(), *balancer.learned.parameters()], lr=LR)
    for batch in make_loader():
        optimizer.zero_grad()
        balancer.backward(three_losses(network, batch), optimizer, model=network)
        optimizer.step()
    assert_same(network, balanced_by_hand(NAMED, make_loader()).network)

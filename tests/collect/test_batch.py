"""A batch is checked first, then taken: with its losses in the order of the terms, whoever takes it."""

import pytest
import torch
from torch import nn

from lightning_mtadam.collect import Batch, collect
from lightning_mtadam.distributed.joint_terms import Ranks

W = torch.ones(3, requires_grad=True)
ALONE = Ranks(late=True)


def losses(*names):
    return {name: (index + 1) * W.sum() for index, name in enumerate(names)}


def collected(batch, known=(), pending=(), log=None):
    """What is taken, and in which order things are done."""
    log = [] if log is None else log
    taken = collect(batch, lambda: log.append("check") or (), lambda found: log.append(found), known, pending, ALONE)
    assert log == ["check", taken]
    return taken


def test_the_first_losses_name_the_terms_in_their_order():
    taken = collected(Batch(losses("b", "a"), [W]))
    assert (taken.terms, taken.collected, list(taken.losses)) == (("b", "a"), ("b", "a"), ["b", "a"])


def test_known_terms_order_the_losses_that_are_present():
    batch = Batch(losses("c", "a"), [W])
    taken = collected(batch, known=("a", "b", "c"))
    assert (taken.terms, list(taken.losses)) == (("a", "b", "c"), ["a", "c"])
    assert all(taken.losses[name] is batch.losses[name] for name in "ac")


def test_what_is_collected_so_far_are_the_terms_of_earlier_batches_and_then_these():
    taken = collected(Batch(losses("b", "c"), [W]), known=("a", "b", "c"), pending=("c", "a"))
    assert taken.collected == ("c", "a", "b")


def test_all_else_is_as_it_came():
    factor, model = torch.tensor(2.0), nn.Linear(1, 1)
    batch = Batch(losses("a"), [W], model, factor, factor)
    taken = collected(batch)
    for name in ("parameters", "model", "grad_output", "loss_scale", "processes"):
        assert getattr(taken, name) is getattr(batch, name)


def test_a_subclass_stays_one():
    class Own(Batch):
        pass

    assert type(collected(Own(losses("a"), [W]))) is Own


def test_what_the_check_refuses_is_not_taken():
    def refuse():
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        collect(Batch(losses("a"), [W]), refuse, lambda batch: pytest.fail("it was taken"), (), (), ALONE)


def test_an_error_while_it_is_taken_is_passed_on():
    def failing(batch):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        collect(Batch(losses("a"), [W]), lambda: (), failing, (), (), ALONE)


def test_alone_nothing_is_averaged_and_each_loss_is_differentiated_times_its_factor():
    batch = Batch(losses("a", "b"), [W], grad_output=torch.tensor(10.0))
    assert batch.averaging is None
    assert not batch.replicated
    assert {name: found[0].tolist() for name, found in batch.gradients()} == {"a": [10.0] * 3, "b": [20.0] * 3}

"""With ``on_nonfinite="skip"`` a step with an inf or nan in any term changes nothing, and is told of once."""

import warnings

import pytest
import torch
from torch import nn

from lightning_mtadam import NonFiniteError
from lightning_mtadam.optim import MTAdam
from tests.lightning_models import (
    QUIET,
    Regression,
    assert_same,
    assert_same_state,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.loops import take_step
from tests.spoiling import in_gradient, in_loss

BAD = [torch.inf, -torch.inf, torch.nan]


def skipping_run(spoil=None, term="size", factor=torch.nan, at=(2, 4), accumulate=1, clip=None, leave_out=False):
    """Six steps; those in ``at`` are spoilt in their first batch, or left out."""
    network = make_network()
    optimizer = make_mtadam(network, on_nonfinite="skip")
    batches = list(make_loader(6 * accumulate))
    for step in range(6):
        if leave_out and step in at:
            continue
        optimizer.zero_grad()
        for index, batch in enumerate(batches[step * accumulate : (step + 1) * accumulate]):
            losses = three_losses(network, batch)
            if spoil is not None and step in at and index == 0:
                losses[term] = spoil(losses[term], factor)
            optimizer.backward(losses)
        if clip is not None:
            optimizer.clip_gradients(clip)
        optimizer.step()
    return network, optimizer


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.01)])
@pytest.mark.parametrize("term", ["fit", "size", "decay"])
@pytest.mark.parametrize("factor", BAD)
@pytest.mark.parametrize("spoil", [in_loss, in_gradient])
def test_skipped_steps_are_as_if_they_had_not_been(spoil, factor, term, accumulate, clip):
    with pytest.warns(UserWarning, match="A step was skipped") as caught:
        network, optimizer = skipping_run(spoil, term, factor, accumulate=accumulate, clip=clip)
    assert len(caught) == 1
    assert f"The gradient of the term {term!r} at the layer '0." in str(caught[0].message)
    expected, expected_optimizer = skipping_run(accumulate=accumulate, clip=clip, leave_out=True)
    assert_same(network, expected)
    assert_same_state(optimizer, expected_optimizer)
    for layer, scales in expected_optimizer.scales().items():
        assert torch.equal(optimizer.scales()[layer], scales)


def test_the_warning_points_to_the_step():
    with pytest.warns(UserWarning, match="A step was skipped") as caught:
        skipping_run(in_loss)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("terms", [None, ("fit", "size", "decay")])
def test_the_first_steps_may_be_skipped(terms):
    network = make_network()
    optimizer = make_mtadam(network, on_nonfinite="skip", terms=terms)
    for batch in make_loader(2):
        optimizer.zero_grad()
        optimizer.backward({name: loss * torch.nan for name, loss in three_losses(network, batch).items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert_same(network, make_network())
    assert not any(tensor.any() for state in optimizer.state.values() for tensor in state.values())
    assert optimizer.scales() == {}
    expected = make_network()
    expected_optimizer = make_mtadam(expected)
    for batch in make_loader():
        take_step(optimizer, three_losses(network, batch))
        take_step(expected_optimizer, three_losses(expected, batch))
    assert_same(network, expected)


@pytest.mark.parametrize("spoil", [in_loss, in_gradient])
def test_the_default_is_to_raise_and_to_change_nothing(spoil):
    network = nn.Linear(3, 2)
    optimizer = MTAdam(network.named_parameters())
    before = network.weight.detach().clone()

    def step():
        optimizer.backward({"fit": spoil(network.weight.sum(), torch.nan)})
        optimizer.step()

    with pytest.raises(NonFiniteError, match="'fit'"):
        step()
    assert torch.equal(network.weight, before)


@QUIET
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_the_trainer_goes_on_after_a_skipped_step():
    class Spoilt(Regression):
        spoilt = True

        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and not self.spoilt:
                return None
            losses = super().training_step(batch, batch_idx)
            return losses | {"size": losses["size"] * torch.nan} if batch_idx == 2 else losses

    module = Spoilt(lambda network: make_mtadam(network, on_nonfinite="skip"))
    with pytest.warns(UserWarning, match="A step was skipped"):
        fit(module, make_loader())
    other = Spoilt()
    other.spoilt = False
    fit(other, make_loader())
    assert_same(module.network, other.network)

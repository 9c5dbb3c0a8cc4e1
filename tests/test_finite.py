"""What is not finite is noticed, at once on the host, else in the next step."""

import pytest
import torch

from lightning_mtadam import finite
from lightning_mtadam.terms import NonFiniteError

LAYERS, TERMS = ("one", "two"), ("fit", "size")


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_on_the_host_a_norm_that_is_not_finite_raises_at_once(bad):
    watch = finite.FiniteWatch()
    with pytest.raises(NonFiniteError, match="term 'fit' at the layer 'two' is not finite"):
        watch.check(torch.tensor([[1.0, 2.0], [bad, 3.0]]), LAYERS, TERMS)
    watch.recall()


def test_finite_norms_whose_sum_overflows_are_finite():
    watch = finite.FiniteWatch()
    assert watch.check(torch.full((2, 2), 3e38), LAYERS, TERMS) is None
    assert watch.check(torch.zeros(2, 2), LAYERS, TERMS) is None


@pytest.fixture
def _accelerator(monkeypatch):
    monkeypatch.setattr(finite, "is_host", lambda device: False)


@pytest.mark.usefixtures("_accelerator")
def test_elsewhere_a_flag_comes_back_and_the_next_call_raises_once():
    watch = finite.FiniteWatch()
    flag = watch.check(torch.tensor([[1.0, torch.inf], [1.0, 3.0]]), LAYERS, TERMS)
    assert (flag.shape, flag.dtype, bool(flag)) == ((), torch.bool, False)
    with pytest.raises(NonFiniteError, match="term 'size' at the layer 'one' is not finite"):
        watch.recall()
    watch.recall()


@pytest.mark.usefixtures("_accelerator")
def test_elsewhere_finite_norms_raise_nothing():
    watch = finite.FiniteWatch()
    assert bool(watch.check(torch.full((2, 2), 3e38), LAYERS, TERMS))
    watch.recall()

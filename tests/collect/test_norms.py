"""Norms are taken in fp32 or better, and tell whether all gradients are finite."""

import pytest
import torch

from lightning_mtadam import NonFiniteError
from lightning_mtadam.collect import norms

LAYERS, TERMS = ("one", "two"), ("fit", "size")


@pytest.mark.parametrize(
    ("dtypes", "wide"),
    [
        ((), torch.float32),
        ((torch.bfloat16,), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_the_wide_dtype_is_fp32_or_the_widest(dtypes, wide):
    assert norms.wide_dtype([torch.zeros(1, dtype=dtype) for dtype in dtypes]) == wide


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_are_those_of_the_entries_also_where_a_narrow_square_would_overflow(dtype):
    gradients = [
        torch.tensor([300.0, 400.0], dtype=dtype),
        None,
        torch.zeros(0, dtype=dtype),
        torch.ones((), dtype=dtype),
    ]
    found = norms.norms_of(gradients)
    assert found[1] is None
    assert [float(found[index]) for index in (0, 2, 3)] == [500.0, 0.0, 1.0]
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)


def test_where_nothing_is_there_no_norm_is():
    assert norms.norms_of([None, None]) == [None, None]
    assert norms.norms_of([]) == []


@pytest.mark.parametrize("uniform", [False, True])
def test_a_table_has_a_column_for_each_term_and_zeros_where_nothing_is(uniform):
    one = torch.tensor
    columns = [[one(1.0), None, one(3.0)], [None, one(5.0), one(6.0)]]
    table = norms.norm_table(columns, torch.zeros(3, 2), uniform=uniform)
    assert table.tolist() == [[1.0, 0.0], [0.0, 5.0], [3.0, 6.0]]
    assert table.is_contiguous()


def test_a_table_takes_the_dtype_that_it_is_told():
    columns = [[torch.tensor(0.5), torch.tensor(2.0, dtype=torch.float64)]]
    assert norms.norm_table(columns, torch.zeros(0, dtype=torch.float64)).dtype == torch.float64


def test_tensors_are_on_the_host_if_all_are():
    assert norms.are_on_host([torch.zeros(1), torch.zeros(1)])
    assert not norms.are_on_host([torch.zeros(1), torch.zeros(1, device="meta")])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_on_the_host_a_norm_that_is_not_finite_raises_at_once(bad):
    watch = norms.FiniteWatch()
    with pytest.raises(NonFiniteError, match="term 'fit' at the layer 'two' is not finite"):
        watch.check(torch.tensor([[1.0, 2.0], [bad, 3.0]]), LAYERS, TERMS)
    watch.recall()


def test_finite_norms_whose_sum_overflows_are_finite():
    watch = norms.FiniteWatch()
    assert watch.check(torch.full((2, 2), 3e38), LAYERS, TERMS) is None
    assert watch.check(torch.zeros(2, 2), LAYERS, TERMS) is None


@pytest.fixture
def _accelerator(monkeypatch):
    monkeypatch.setattr(norms, "is_host", lambda device: False)


@pytest.mark.usefixtures("_accelerator")
def test_elsewhere_a_flag_comes_back_and_the_next_call_raises_once():
    watch = norms.FiniteWatch()
    flag = watch.check(torch.tensor([[1.0, torch.inf], [1.0, 3.0]]), LAYERS, TERMS)
    assert (flag.shape, flag.dtype, bool(flag)) == ((), torch.bool, False)
    with pytest.raises(NonFiniteError, match="term 'size' at the layer 'one' is not finite"):
        watch.recall()
    watch.recall()


@pytest.mark.usefixtures("_accelerator")
def test_elsewhere_finite_norms_raise_nothing():
    watch = norms.FiniteWatch()
    assert bool(watch.check(torch.full((2, 2), 3e38), LAYERS, TERMS))
    watch.recall()

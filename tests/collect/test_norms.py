"""Norms are taken in fp32 or better, and tell whether all gradients are finite."""

import pytest
import torch

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

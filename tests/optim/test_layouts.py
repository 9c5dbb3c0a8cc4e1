"""Parameters that lie in memory in unusual ways are trained as others are, and nothing beside them is touched."""

import pytest
import torch
from torch import nn

from lightning_mtadam.optim import MTAdam
from tests.loops import take_step

OPTIONS = [
    {},
    {"denominator": "own"},
    {"denominator": "mean"},
    {"low_memory": True},
    {"balance_every": 2},
    {"amsgrad": True},
]
LARGE = 3000
"""More elements than are packed with others."""


def column(size):
    whole = torch.zeros(size, 2)
    return whole, whole[:, 0], whole[:, 1]


def real(size):
    whole = torch.zeros(size, dtype=torch.complex64)
    return whole, whole.real, whole.imag


def every_third(size):
    whole = torch.zeros(3 * size)
    return whole, whole[::3], whole[1::3]


def rows_in_a_middle(size):
    whole = torch.zeros(3, size)
    return whole, whole[1], whole[::2]


def one_column(size):
    whole = torch.zeros(size, 1)
    return whole, whole, whole[:0]


def block_of_a_matrix(size):
    whole = torch.zeros(size, 8)
    return whole, whole[:, 2:4], whole[:, 4:]


def transposed(size):
    whole = torch.zeros(5, size)
    return whole, whole.t(), whole[:0]


LAYOUTS = [column, real, every_third, rows_in_a_middle, one_column, block_of_a_matrix, transposed]


def train(parameter, options):
    beside = nn.Parameter(torch.ones(3))  # a small one packs with it
    optimizer = MTAdam([parameter, beside], lr=0.1, **options)
    grid = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
    for _ in range(4):
        take_step(
            optimizer, {"fit": (parameter - grid).square().sum(), "size": 30 * (parameter.sum() + beside.sum()).abs()}
        )
    return parameter.detach().clone()


@pytest.mark.parametrize("size", [1, 4, LARGE])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_it_is_trained_as_a_contiguous_one_and_its_neighbours_stay(make, options, size):
    whole, view, others = make(size)
    parameter = nn.Parameter(view)
    assert parameter.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    expected = train(nn.Parameter(view.clone(memory_format=torch.contiguous_format)), options)
    assert torch.equal(train(parameter, options), expected)
    assert torch.equal(view, expected)
    assert not others.any()


@pytest.mark.parametrize(
    "parameter",
    [
        torch.zeros(1).expand(8),
        torch.zeros(1).expand(1 << 22),
        torch.zeros(3, 1).expand(3, 4),
        torch.zeros(6).as_strided((3, 3), (1, 1)),
    ],
    ids=lambda parameter: str(tuple(parameter.shape)),
)
def test_elements_that_share_memory_are_refused(parameter):
    with pytest.raises(ValueError, match="share memory") as caught:
        MTAdam([nn.Parameter(torch.zeros(2)), nn.Parameter(parameter)])
    assert "parameter 1" in str(caught.value)
    optimizer = MTAdam([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(parameter)]})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_have_no_shape_yet_are_taken():
    MTAdam(nn.LazyLinear(3).parameters())


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (), (1, 1), (4, 1, 3)])
def test_other_shapes_are_not(shape):
    MTAdam([nn.Parameter(torch.zeros(shape))])
    MTAdam([nn.Parameter(torch.zeros(shape).expand(shape))])

"""Chunks cover exactly what is wanted, and what a chunk holds belongs to its elements."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.layout import Place
from lightning_mtadam.optim.chunks import Chunk, Chunks, Coefficients, Moments, Numbers
from tests.collect.packs import networks, small_packs

TERMS = 2
GROUP = {"lr": 0.1, "eps": 1e-8, "betas": (0.9, 0.999, 0.9), "weight_decay": 0.0, "maximize": False}


def wholes(parameters, trained, keys):
    """A chunk for each pack; a gradient's entries are the member's number, and a hundred for each row."""
    memory = GradientMemory(parameters, trained, keys, TERMS)
    for row, views in enumerate(memory.views):
        for member, view in enumerate(views):
            if view is not None:
                view.fill_(100 * row + member)
    for place, pack in enumerate(memory.packs):
        gradients = memory.columns(place)
        moments = gradients[:1] + 1000, gradients + 2000
        members = tuple(parameters[member] for member in pack)
        owner = memory.places[place], place, 0, 0, gradients.shape[1]
        yield Chunk(tuple(pack), members, *owner, gradients, moments, GROUP, 0, None)


def sizes_of(chunk):
    """How many elements of each of its parameters are in it."""
    return [chunk.size] if not chunk.packed else [parameter.numel() for parameter in chunk.parameters]


def alone(parameter, row=0):
    """A chunk of one parameter."""
    gradients, first, second = (torch.zeros(1, parameter.numel()) for _ in range(3))
    owner = (Place.of(parameter, 1),), 0, 0, 0, parameter.numel()
    return Chunk((row,), (parameter,), *owner, gradients, (first, second), GROUP, row, None)


def rows_of(trained):
    """Rows of tables that are no members' own numbers: those that are trained, in order."""
    return {member: row for row, member in enumerate(at for at, flag in enumerate(trained) if flag)}


def runs(network, wanted, limit):
    parameters, trained, keys = network
    return [part for whole in wholes(parameters, trained, keys) for part in whole.runs(wanted, rows_of(trained), limit)]


cases = given(networks(), st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 25))


@small_packs
@cases
def test_chunks_cover_exactly_the_wanted_members(network, wanted, limit):
    parameters, trained, keys = network
    seen = {member: [] for member in range(len(parameters))}
    for whole in wholes(parameters, trained, keys):
        for chunk in whole.runs(wanted, rows_of(trained), limit):
            assert len(chunk.members) == len(chunk.places) == len(chunk.parameters) > 0
            assert sum(sizes_of(chunk)) == chunk.size <= limit
            assert torch.equal(chunk.gradients, whole.gradients[:, chunk.begin : chunk.begin + chunk.size])
            begin = chunk.start
            for member, parameter, size in zip(chunk.members, chunk.parameters, sizes_of(chunk), strict=True):
                assert parameter is parameters[member]
                seen[member] += range(begin, begin + size)
                begin = 0
    for member, elements in seen.items():
        covered = trained[member] and wanted[member]
        assert elements == list(range(parameters[member].numel() if covered else 0))


@small_packs
@cases
def test_gradients_moments_and_rows_are_those_of_the_chunks_elements(network, wanted, limit):
    trained = network[1]
    for chunk in runs(network, wanted, limit):
        members = torch.tensor(chunk.members).repeat_interleave(torch.tensor(sizes_of(chunk))).to(chunk.gradients.dtype)
        expected = torch.stack([members, members + 100])
        assert torch.equal(torch.stack(chunk.gradient_rows), expected)
        assert torch.equal(torch.stack(list(chunk.moment_rows.first)), expected[:1] + 1000)
        assert torch.equal(torch.stack(list(chunk.moment_rows.second)), expected + 2000)
        assert not chunk.moment_rows.largest
        rows = chunk.rows.tolist() if chunk.packed else [chunk.rows] * chunk.size
        assert rows == [rows_of(trained)[int(member)] for member in members]


@small_packs
@cases
def test_each_element_gets_the_row_of_its_parameter(network, wanted, limit):
    trained = network[1]
    found = runs(network, wanted, limit)
    table = torch.arange(3.0 * max(1, sum(trained))).view(-1, 3)
    chunks = Chunks(found, table.device)
    assert [chunk.members for chunk in chunks] == [chunk.members for chunk in found]
    for chunk, spread in zip(found, chunks.spread(table), strict=True):
        assert spread.dtype == torch.promote_types(chunk.gradients.dtype, torch.float32)
        assert spread.shape == (3, chunk.size if chunk.packed else 1)
        expected = [rows_of(trained)[member] for member in chunk.members]
        sizes = torch.tensor(sizes_of(chunk)) if chunk.packed else torch.ones(1, dtype=torch.int64)
        assert torch.equal(spread, table[expected].T.repeat_interleave(sizes, dim=1).to(spread.dtype))


@small_packs
@cases
def test_elements_that_are_put_back_move_the_wanted_parameters_and_no_other(network, wanted, limit):
    parameters, trained, _ = network
    before = [parameter.clone() for parameter in parameters]
    for chunk in runs(network, wanted, limit):
        flat = chunk.gathered()
        flat += 1
        chunk.put_back(flat)
    for member, (parameter, old) in enumerate(zip(parameters, before, strict=True)):
        assert torch.equal(parameter, old + (trained[member] and wanted[member]))


@pytest.mark.parametrize("limit", [1, 7, 24, 100])
def test_a_parameter_that_is_not_contiguous_is_copied_once_and_put_back(limit):
    values = torch.arange(24.0).view(4, 6)
    parameter = values.t().contiguous().t()
    whole = alone(parameter)
    (chunk,) = whole.runs([True], {0: 0}, limit)
    assert chunk.gathered() is None
    flat = chunk.copied()
    assert torch.equal(flat, values.view(-1))
    chunk.put_back(flat + 100)
    assert torch.equal(parameter, values + 100)
    assert not parameter.is_contiguous()


def test_elements_of_one_contiguous_parameter_are_a_view():
    parameter = torch.zeros(10)
    whole = alone(parameter)
    for chunk in whole.runs([True], {0: 0}, 4):
        chunk.gathered().add_(chunk.start)
    assert parameter.tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_numbers_are_those_of_the_group_as_it_is_now():
    group = {**GROUP, "lr": 0.5, "betas": (0.75, 0.9, 0.9)}
    assert Numbers.of(group, "max", None) == Numbers(0.5, 0.25, 1e-8, None, "max", False, None)
    group.update(weight_decay=0.5, maximize=True, eps=0, lr=torch.tensor(0.5))
    flag = torch.tensor(True)
    assert Numbers.of(group, "own", flag) == Numbers(-0.5, 0.25, 0.0, 0.75, "own", True, flag)


def test_coefficients_of_all_parameters_become_those_of_each_chunk():
    parts = [alone(parameter, row) for row, parameter in enumerate((torch.zeros(2), torch.zeros(3)))]
    tables = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0], [6.0]])
    local = list(Chunks(parts, torch.device("cpu")).local(Coefficients(*tables, tables[1], None, None)))
    assert [one.scales.flatten().tolist() for one in local] == [[1, 2], [3, 4]]
    assert [one.weights.item() for one in local] == [5, 6]
    assert all(one.reaching is None and one.correction is None for one in local)


def test_moments_in_the_dtype_of_the_arithmetic_are_the_rows_themselves():
    rows = Moments([torch.ones(2)], [torch.ones(2), torch.ones(2)])
    assert rows.widened(torch.float32) is rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_a_narrow_dtype_are_widened_and_saturate_when_they_are_kept(dtype):
    rows = Moments([torch.ones(2, dtype=dtype)], [torch.zeros(2, dtype=dtype)], [torch.zeros(2, dtype=dtype)])
    wide = rows.widened(torch.float32)
    assert {row.dtype for rows_of_kind in wide for row in rows_of_kind} == {torch.float32}
    wide.first[0].mul_(2)
    wide.second[0].fill_(torch.finfo(torch.float32).max)
    wide.largest[0].fill_(torch.inf)
    rows.keep(wide)
    largest = torch.finfo(dtype).max
    assert rows.first[0].tolist() == [2, 2]
    assert rows.second[0].tolist() == rows.largest[0].tolist() == [largest, largest]

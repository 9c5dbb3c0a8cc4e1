"""Every trained parameter lies in exactly one place, and blocks cover exactly what is wanted."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mtadam.optim import layout
from lightning_mtadam.optim.layout import TermMemory, lay_out, place
from tests.lightning_models import make_loader, make_mtadam, make_network, three_losses

LIMITS = {"PACKED": 6, "PACK": 15}
"""Small ones, so that small parameters are enough to meet them."""


@st.composite
def networks(draw):
    """Parameters of two dtypes, with keys (groups, or none), and whether each is trained."""
    count = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    dtypes = draw(st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=count, max_size=count))
    keys = draw(st.lists(st.sampled_from([None, "a", "b"]), min_size=count, max_size=count))
    trained = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    parameters = [torch.arange(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    return parameters, trained, keys


@pytest.fixture(autouse=True)
def _small():
    with mock.patch.multiple(layout, **LIMITS):
        yield


def test_all_parameters_have_one_place_each():
    @settings(deadline=None)
    @given(networks())
    def check(network):
        parameters, trained, keys = network
        spans = place(parameters, trained, keys)
        members = [member for span in spans for member in span.members]
        assert sorted(members) == [index for index, flag in enumerate(trained) if flag]
        memories = {}
        for span in spans:
            sizes = [parameters[member].numel() for member in span.members]
            assert list(span.bounds) == [sum(sizes[:index]) for index in range(len(sizes) + 1)]
            assert span.size == sum(sizes)
            assert len({(parameters[member].dtype, keys[member]) for member in span.members}) == 1
            if len(span.members) > 1:
                assert span.size <= LIMITS["PACK"]
                assert max(sizes) <= LIMITS["PACKED"]
                assert keys[span.members[0]] is not None
            memories.setdefault(span.memory, []).append((span.start, span.start + span.size))
            assert parameters[span.members[0]].dtype == parameters[spans_first(spans, span.memory)].dtype
        for places in memories.values():
            ends = [0, *(end for _, end in sorted(places))]
            assert [start for start, _ in sorted(places)] == ends[:-1], "side by side, without a gap"

    check()


def spans_first(spans, memory):
    return next(span.members[0] for span in spans if span.memory == memory)


def test_all_trained_is_what_lay_out_gives():
    parameters = [torch.zeros(size) for size in (3, 20, 2, 0, 9)]
    keys = ["a", "a", "a", None, "b"]
    assert place(parameters, [True] * 5, keys) == lay_out(parameters, keys)


def test_blocks_cover_exactly_the_wanted_members():
    @settings(deadline=None)
    @given(networks(), st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 25))
    def check(network, wanted, limit):
        parameters, trained, keys = network
        seen = {member: [] for member in range(len(parameters))}
        for span in place(parameters, trained, keys):
            for block in span.runs(wanted, limit):
                assert len(block.members) == len(block.sizes) > 0
                assert sum(block.sizes) == block.end - block.begin
                assert len(span.members) > 1 or 0 < block.end - block.begin <= limit
                begin = block.begin - span.bounds[block.first]
                for member, size in zip(block.members, block.sizes, strict=True):
                    seen[member] += range(begin, begin + size)
                    begin = 0
        for member, elements in seen.items():
            covered = trained[member] and wanted[member]
            assert elements == list(range(parameters[member].numel() if covered else 0))

    check()


def test_views_share_the_memory_at_their_place():
    @settings(deadline=None)
    @given(networks(), st.integers(1, 3))
    def check(network, count):
        parameters, trained, keys = network
        memory = TermMemory(parameters, trained, keys, count)
        for row, views in enumerate(memory.views):
            for index, (view, parameter, flag) in enumerate(zip(views, parameters, trained, strict=True)):
                assert (view is not None) is flag
                if view is not None:
                    assert (view.shape, view.dtype) == (parameter.shape, parameter.dtype)
                    view.fill_(100 * row + index)
        for span in memory.spans:
            for block in span.runs(trained, 7):
                columns = memory.columns(block)
                start = 0
                for member, size in zip(block.members, block.sizes, strict=True):
                    expected = torch.arange(count)[:, None] * 100 + member
                    assert torch.equal(columns[:, start : start + size], expected.expand(-1, size).to(columns.dtype))
                    start += size

    check()


def test_what_was_not_written_becomes_zero():
    @settings(deadline=None)
    @given(networks(), st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4))
    def check(network, reached_in_each_step):
        parameters, trained, keys = network
        memory = TermMemory(parameters, trained, keys, 2)
        memory.rows = [rows.fill_(0) for rows in memory.rows]
        for step, flags in enumerate(reached_in_each_step, start=1):
            reached = flags[: len(parameters)]
            for view, flag in zip(memory.views[1], reached, strict=True):
                if view is not None and flag:
                    view.fill_(step)
            memory.wrote(1, reached)
            for view, flag in zip(memory.views[1], reached, strict=True):
                if view is not None:
                    assert bool((view == (step if flag else 0)).all())
            assert not any(rows[0].any() for rows in memory.rows), "the other row is as it was"

    check()


def test_it_fits_what_it_was_made_for_and_nothing_else():
    parameters, trained, keys = [torch.zeros(3, 2), torch.zeros(4)], [True, False], ["a", "a"]
    memory = TermMemory(parameters, trained, keys, 2)
    alike = [torch.ones(3, 2), torch.ones(4)]
    assert memory.fits(parameters, trained, keys, 2)
    assert memory.fits(alike, trained, keys, 2)
    assert not memory.fits(parameters, trained, keys, 3)
    assert not memory.fits(parameters, [True, True], keys, 2)
    assert not memory.fits(parameters, trained, ["a", "b"], 2)
    assert not memory.fits(parameters[:1], trained, keys, 2)
    assert not memory.fits([torch.zeros(2, 3), parameters[1]], trained, keys, 2)
    assert not memory.fits([parameters[0].double(), parameters[1]], trained, keys, 2)


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}])
def test_the_memory_stays_from_step_to_step(options):
    """In light steps too, which need one row of it."""
    network = make_network()
    optimizer = make_mtadam(network, **options)
    places, counts = set(), set()
    for batch in make_loader(14):
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch))
        places.add(optimizer._pending.memory.rows[0].data_ptr())
        counts.add(optimizer._pending.active.count)
        optimizer.step()
    assert len(places) == 1
    assert counts == ({1, 3} if options.get("balance_every") else {3})


def test_the_rows_of_a_light_step_leave_the_next_full_step_right():
    """A term that is absent after a light step finds zeros, not what was there before it."""

    def train(forget):
        network = make_network()
        optimizer = make_mtadam(network, balance_every=2, terms=("fit", "size", "decay"))
        for index, batch in enumerate(make_loader(12)):
            losses = three_losses(network, batch)
            if index >= 8:
                del losses["fit" if index % 4 == 0 else "size"]
            if forget:
                optimizer._pending.memory = None
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()
        return [parameter.detach() for parameter in network.parameters()]

    for kept, fresh in zip(train(False), train(True), strict=True):
        assert torch.equal(kept, fresh)

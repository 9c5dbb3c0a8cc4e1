"""Every trained parameter has exactly one place, and memory is right whatever was written to it before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mtadam.collect.memory import GradientMemory
from lightning_mtadam.layout import pack_up
from tests.collect.packs import LIMITS, networks, small_packs
from tests.lightning_models import make_loader, make_mtadam, make_network, three_losses
from tests.loops import backward, take_step


def widths(memory):
    """The number of elements by dtype."""
    return {rows.dtype: rows.shape[1] for rows in memory.rows}


@small_packs
@given(networks())
def test_all_trained_parameters_are_in_one_pack_each(network):
    parameters, trained, keys = network
    packs = pack_up(parameters, trained, keys)
    assert sorted(member for pack in packs for member in pack) == [at for at, flag in enumerate(trained) if flag]
    for pack in packs:
        sizes = [parameters[member].numel() for member in pack]
        assert len({(parameters[member].dtype, keys[member]) for member in pack}) == 1
        if len(pack) > 1:
            assert sum(sizes) <= LIMITS["PACK"]
            assert max(sizes) <= LIMITS["PACKED"]
            assert keys[pack[0]] is not None


@small_packs
@given(networks())
def test_what_is_not_trained_leaves_the_packs_of_the_rest_as_they_are(network):
    parameters, trained, keys = network
    left = [index for index, flag in enumerate(trained) if flag]
    alone = pack_up([parameters[index] for index in left], [True] * len(left), [keys[index] for index in left])
    assert pack_up(parameters, trained, keys) == [[left[member] for member in pack] for pack in alone]


@pytest.mark.parametrize(
    ("sizes", "packs"),
    [
        ((6, 6, 3), [[0, 1, 2]]),
        ((6, 6, 4), [[0, 1], [2]]),
        ((7, 6, 7, 6), [[0], [1, 3], [2]]),
        ((0, 0), [[0, 1]]),
    ],
    ids=["full", "one too many", "large ones between", "empty"],
)
def test_small_parameters_share_a_pack_until_it_is_full(sizes, packs):
    with small_packs:
        assert pack_up([torch.ones(size) for size in sizes], [True] * len(sizes), ["a"] * len(sizes)) == packs


@small_packs
@given(networks(), st.integers(1, 3))
def test_packs_lie_side_by_side_without_a_gap(network, count):
    parameters, trained, keys = network
    memory = GradientMemory(parameters, trained, keys, count)
    kept = [parameter for parameter, flag in zip(parameters, trained, strict=True) if flag]
    sizes = {one.dtype: sum(other.numel() for other in kept if other.dtype == one.dtype) for one in kept}
    assert widths(memory) == sizes
    for place in range(len(memory.packs)):
        memory.columns(place).add_(1)
    assert all(bool((rows == 1).all()) for rows in memory.rows), "each element was written once"


@small_packs
@given(networks(), st.integers(1, 3))
def test_views_share_the_memory_at_their_place(network, count):
    parameters, trained, keys = network
    memory = GradientMemory(parameters, trained, keys, count)
    for row, views in enumerate(memory.views):
        for index, (view, parameter, flag) in enumerate(zip(views, parameters, trained, strict=True)):
            assert (view is not None) is flag
            if view is not None:
                assert (view.shape, view.dtype) == (parameter.shape, parameter.dtype)
                view.fill_(100 * row + index)
    for place, pack in enumerate(memory.packs):
        columns, start = memory.columns(place), 0
        for member in pack:
            size = parameters[member].numel()
            expected = torch.arange(count)[:, None] * 100 + member
            assert torch.equal(columns[:, start : start + size], expected.expand(-1, size).to(columns.dtype))
            start += size
        assert columns.shape == (count, start)


@small_packs
@given(networks(), st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4))
def test_what_was_not_written_becomes_zero(network, reached_in_each_step):
    parameters, trained, keys = network
    memory = GradientMemory(parameters, trained, keys, 2)
    assert not any(rows.any() for rows in memory.rows)
    for step, flags in enumerate([*reached_in_each_step, None], start=1):
        gradients = [None] * len(parameters)
        for index, view in enumerate(memory.views[1]):
            if view is not None and flags is not None and flags[index]:
                gradients[index] = view.fill_(step)
        memory.wrote(1, None if flags is None else gradients)
        for view, gradient in zip(memory.views[1], gradients, strict=True):
            if view is not None:
                assert bool((view == (0 if gradient is None else step)).all())
        assert not any(rows[0].any() for rows in memory.rows), "the other row is as it was"


def test_of_the_rows_in_use_only_the_first_are_seen():
    memory = GradientMemory([torch.zeros(3), torch.zeros(2)], [True, True], ["a", "a"], 3)
    assert (memory.active, memory.columns(0).shape) == (3, (3, 5))
    assert memory.use(1) is memory
    assert (memory.active, memory.columns(0).shape) == (1, (1, 5))
    assert memory.use(3).columns(0).shape == (3, 5)


def test_flat_tensors_of_each_dtype_take_the_parameters_shapes():
    parameters = [torch.zeros(2, 2), torch.zeros(3).double(), torch.zeros(1), torch.zeros(())]
    memory = GradientMemory(parameters, [True, True, False, True], [0] * 4, 1)
    flats = [torch.arange(rows.shape[1]).to(rows.dtype) for rows in memory.rows]
    first, second, untrained, scalar = memory.shaped(flats)
    assert torch.equal(first, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert torch.equal(second, torch.arange(3).double())
    assert untrained is None
    assert torch.equal(scalar, torch.tensor(4.0))


OTHERS = {
    "another number of rows": lambda parameters, trained, keys: (parameters, trained, keys, 3),
    "another is trained": lambda parameters, trained, keys: (parameters, [True, True], keys, 2),
    "other groups": lambda parameters, trained, keys: (parameters, trained, ["a", "b"], 2),
    "fewer parameters": lambda parameters, trained, keys: (parameters[:1], trained[:1], keys[:1], 2),
    "more parameters": lambda parameters, trained, keys: (
        [*parameters, torch.zeros(1)], [*trained, True], [*keys, "a"], 2,
    ),
    "another shape": lambda parameters, trained, keys: ([torch.zeros(2, 3), parameters[1]], trained, keys, 2),
    "another dtype": lambda parameters, trained, keys: ([parameters[0].double(), parameters[1]], trained, keys, 2),
    "another device": lambda parameters, trained, keys: ([parameters[0].to("meta"), parameters[1]], trained, keys, 2),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_it_fits_what_it_was_made_for_and_nothing_else(other):
    parameters, trained, keys = [torch.zeros(3, 2), torch.zeros(4)], [True, False], ["a", "a"]
    memory = GradientMemory.fitting(None, parameters, trained, keys, 2)
    alike = [torch.ones(3, 2), torch.ones(4)]
    assert GradientMemory.fitting(memory, parameters, trained, keys, 2) is memory
    assert GradientMemory.fitting(memory, alike, list(trained), list(keys), 2) is memory
    assert GradientMemory.fitting(memory.use(1), parameters, trained, keys, 2) is memory
    changed = GradientMemory.fitting(memory, *OTHERS[other](parameters, trained, keys))
    assert changed is not memory
    assert GradientMemory.fitting(changed, *OTHERS[other](parameters, trained, keys)) is changed


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}])
def test_the_memory_stays_from_step_to_step(options):
    """In light steps too, which need one row of it."""
    network = make_network()
    optimizer = make_mtadam(network, **options)
    places, counts = set(), set()
    for batch in make_loader(14):
        optimizer.zero_grad()
        backward(optimizer, three_losses(network, batch))
        places.add(optimizer._pending.memory.rows[0].data_ptr())
        counts.add(optimizer._pending.memory.active)
        optimizer.step()
    assert len(places) == 1
    assert counts == ({1, 3} if options.get("balance_every") else {3})


def test_the_rows_of_a_light_step_leave_the_next_full_step_right():
    """A term that is absent after a light step finds zeros, not what was there before it."""

    def parameters_after(forget):
        network = make_network()
        optimizer = make_mtadam(network, balance_every=2, terms=("fit", "size", "decay"))
        for index, batch in enumerate(make_loader(12)):
            losses = three_losses(network, batch)
            if index >= 8:
                del losses["fit" if index % 4 == 0 else "size"]
            if forget:
                optimizer._pending.memory = None
            take_step(optimizer, losses)
        return [parameter.detach() for parameter in network.parameters()]

    for kept, fresh in zip(parameters_after(False), parameters_after(True), strict=True):
        assert torch.equal(kept, fresh)

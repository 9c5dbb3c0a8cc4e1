"""The state of a parameter: its shapes, what a checkpoint gives it, and memory that small ones share."""

import copy

import pytest
import torch

from lightning_mtadam.layout import Place
from lightning_mtadam.optim.options import Options
from lightning_mtadam.optim.state import (
    AVERAGE_KEYS,
    BALANCE_KEYS,
    allocate,
    check_checkpoint,
    expected_shapes,
    join_moments,
    restore,
)

TERMS = ("a", "b", "c")
DENOMINATORS = {"max": ((2, 5), 3), "mean": ((2, 5), 3), "own": ((3, 2, 5), 3), "sum": ((2, 5), 1)}
"""The shape of the first moment, and the number of second moments."""


def parameter(shape=(2, 5), dtype=torch.float32, **options):
    return torch.ones(shape, dtype=dtype, **options).requires_grad_()


def made(*parameters, held=(), amsgrad=False, **options):
    state, group = {}, {"params": list(parameters), "amsgrad": amsgrad}
    allocate(state, [group], list(held), Options(**options), len(TERMS))
    return state, group


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_shapes_are_those_of_the_moments_that_the_denominator_takes(denominator, amsgrad):
    first, count = DENOMINATORS[denominator]
    shapes = expected_shapes(parameter(), Options(denominator=denominator), len(TERMS), amsgrad=amsgrad)
    balance = {"step": (4,), **dict.fromkeys(BALANCE_KEYS[1:], (3,))}
    largest = {"max_exp_avg_sq": (count, 2, 5)} if amsgrad else {}
    assert shapes == {"exp_avg": first, "exp_avg_sq": (count, 2, 5), **balance, **largest}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_state_begins_with_zeros_of_these_shapes_the_small_entries_wide(dtype):
    one = parameter(dtype=dtype)
    state, _ = made(one, amsgrad=True)
    shapes = expected_shapes(one, Options(), len(TERMS), amsgrad=True)
    assert {key: tuple(value.shape) for key, value in state[one].items()} == shapes
    for key, value in state[one].items():
        assert value.dtype == (torch.promote_types(dtype, torch.float32) if key in BALANCE_KEYS else dtype)
        assert not value.any()


def test_what_is_trained_or_has_a_gradient_gets_a_state_and_nothing_else_does():
    trained, held, frozen = parameter(), parameter().requires_grad_(False), parameter().requires_grad_(False)
    state, _ = made(trained, held, frozen, held=[False, True, False])
    assert list(state) == [trained, held]


def test_gradients_may_be_held_of_fewer_parameters_than_there_are_now():
    first, added = parameter().requires_grad_(False), parameter()
    assert list(made(first, added, held=[True])[0]) == [first, added]


def test_a_state_that_is_there_stays():
    one, other = parameter(), parameter()
    state, group = made(one)
    kept = state[one]["exp_avg"]
    group["params"].append(other)
    allocate(state, [group], [], Options(), len(TERMS))
    assert state[one]["exp_avg"] is kept
    assert set(state) == {one, other}


# Moments of small parameters lie side by side


def places(sizes):
    return [Place.of(torch.empty(size), 1) for size in sizes]


def random_states(sizes, leading, *, squeezed=False):
    generator = torch.Generator().manual_seed(0)
    shape = (lambda size: (size,)) if squeezed else (lambda size: (leading, size))
    return [{"m": torch.randn(shape(size), generator=generator)} for size in sizes]


@pytest.mark.parametrize("sizes", [(3,), (3, 4), (3, 0, 4), (0, 3), (1, 1, 1), (0, 0)], ids=str)
@pytest.mark.parametrize(("leading", "squeezed"), [(1, False), (3, False), (1, True)])  # a merged one has no rows
def test_joined_moments_are_the_states_in_order_and_share_their_memory(sizes, leading, squeezed):
    states = random_states(sizes, leading, squeezed=squeezed)
    before = copy.deepcopy(states)
    joined = join_moments(states, "m", leading, places(sizes))
    assert torch.equal(joined, torch.cat([state["m"].reshape(leading, -1) for state in before], 1))
    for state, old in zip(states, before, strict=True):
        assert torch.equal(state["m"], old["m"])
        assert state["m"].shape == old["m"].shape
    joined += 1
    for state, old in zip(states, before, strict=True):
        assert torch.equal(state["m"], old["m"] + 1)


@pytest.mark.parametrize("leading", [1, 3])
@pytest.mark.parametrize("sizes", [(3, 4), (3, 0, 4), (5,)], ids=str)
def test_what_is_joined_already_is_left_where_it_is(leading, sizes):
    states = random_states(sizes, leading)
    first = join_moments(states, "m", leading, places(sizes))
    kept = [state["m"] for state in states]
    again = join_moments(states, "m", leading, places(sizes))
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, first)
    assert all(state["m"] is one for state, one in zip(states, kept, strict=True))


CHANGES = {
    "one replaced": lambda states: states[1].update(m=states[1]["m"].clone()),
    "two exchanged": lambda states: states.reverse(),
    "one left out": lambda states: states.pop(1),
    "the last left out": lambda states: states.pop(),
    "all loaded": lambda states: [state.update(m=state["m"].clone()) for state in states],
}


@pytest.mark.parametrize("leading", [1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_what_no_longer_lies_side_by_side_is_joined_anew(leading, change):
    states = random_states((3, 4, 5), leading)
    join_moments(states, "m", leading, places((3, 4, 5)))
    CHANGES[change](states)
    before = [state["m"].clone() for state in states]
    joined = join_moments(states, "m", leading, places(state["m"].shape[1] for state in states))
    assert torch.equal(joined, torch.cat(before, 1))
    joined.fill_(7)
    assert all(bool((state["m"] == 7).all()) for state in states)
    assert joined.is_contiguous()


# Checkpoints


def saved_of(state, group):
    """As ``MTAdam.state_dict`` gives it."""
    numbers = {key: value for key, value in group.items() if key != "params"}
    meaning = {**Options().state_meaning, "terms": TERMS}
    entries = {index: dict(state[one]) for index, one in enumerate(group["params"])}
    return {"state": entries, "param_groups": [{**numbers, **meaning, "params": list(entries)}]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_restored_is_a_copy_in_the_dtypes_that_are_kept(dtype):
    one, source = parameter(dtype=dtype), parameter()
    state, group = made(source)
    for value in state[source].values():
        value.fill_(1.001)
    saved, target = saved_of(state, group), {one: {}}
    restore(target, [{"params": [one]}], saved, Options())
    for key, value in target[one].items():
        wide = torch.promote_types(dtype, torch.float32)
        assert value.dtype == (wide if key in BALANCE_KEYS else dtype)
        assert torch.equal(value, saved["state"][0][key].to(value.dtype))
        value.zero_()
        assert bool(saved["state"][0][key].any())


def test_a_checkpoint_from_before_scales_were_averaged_begins_their_average():
    one = parameter()
    state, group = made(one)
    saved = saved_of(state, group)
    for key in AVERAGE_KEYS:
        del saved["state"][0][key]
    check_checkpoint(saved, [group], ["w"], Options(), TERMS)
    target = {one: {}}
    restore(target, [group], saved, Options())
    assert all(torch.equal(target[one][key], torch.zeros(3)) for key in AVERAGE_KEYS)


def altered(**changes):
    one = parameter()
    state, group = made(one)
    saved = saved_of(state, group)
    saved["state"][0].update(changes)
    return saved, group


def test_a_checkpoint_that_fits_is_let_through_before_the_terms_are_known_too():
    saved, group = altered()
    for terms in (TERMS, ()):
        check_checkpoint(saved, [group], ["w"], Options(), terms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_avg": None}, "no 'exp_avg' for the parameter 'w'"),
        ({"step": torch.zeros(3)}, r"'step' of the parameter 'w' has shape \(3,\), but \(4,\) is needed"),
        ({"exp_avg_sq": torch.zeros(3, 5, 2)}, r"'exp_avg_sq' .* has shape \(3, 5, 2\), but \(3, 2, 5\) is needed"),
        ({AVERAGE_KEYS[0]: torch.zeros(1)}, rf"'{AVERAGE_KEYS[0]}' .* has shape \(1,\)"),
    ],
    ids=["missing", "clocks", "moments", "average"],
)
def test_an_entry_of_another_shape_is_refused_by_its_name_and_the_parameters(changes, message):
    saved, group = altered(**changes)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(saved, [group], ["w"], Options(), TERMS)


def test_amsgrads_moments_must_be_there_if_the_checkpoints_group_says_so():
    saved, group = altered()
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="no 'max_exp_avg_sq' for the parameter 'w'"):
        check_checkpoint(saved, [group], ["w"], Options(), TERMS)

"""What the optimizer keeps from step to step, and in which form, changes no step."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_mtadam.optim import MTAdam, update
from lightning_mtadam.optim.chunks import Chunk
from tests.lightning_models import assert_same_state
from tests.loops import parameters_in, take_step


def losses_of(*parameters):
    flat = torch.cat([parameter.double().flatten() for parameter in parameters])
    return {"fit": (flat - 1).square().sum(), "size": 3 * flat.exp().sum(), "wave": flat.sin().abs().sum()}


def advance(optimizer):
    take_step(optimizer, losses_of(*parameters_in(optimizer)))


def test_a_parameter_that_is_not_contiguous_is_copied_once_and_one_at_a_time(monkeypatch):
    monkeypatch.setattr(update, "BLOCK", 1000)
    copies, alive = [], []
    flatten = Chunk.copied

    def watched(chunk):
        flat = flatten(chunk)
        copies.append(StorageWeakRef(flat.untyped_storage()))
        alive.append(sum(not held.expired() for held in copies))
        return flat

    monkeypatch.setattr(Chunk, "copied", watched)
    advance(MTAdam([torch.randn(100, 80).t().requires_grad_() for _ in range(3)]))
    assert len(alive) == 3
    assert max(alive) <= 2  # the next is made before the last is let go


@pytest.mark.parametrize("plain", [False, True])
def test_a_layout_that_is_not_contiguous_changes_nothing(monkeypatch, plain):
    monkeypatch.setattr(update, "BLOCK", 1000)
    options = {"denominator": "mean"} if plain else {}  # which the fused Adam cannot do
    start = torch.linspace(-1, 1, 8000).view(80, 100)
    parameters = [start.clone().requires_grad_(), start.t().contiguous().t().requires_grad_()]
    for parameter in parameters:
        optimizer = MTAdam([parameter], **options)
        for _ in range(3):
            advance(optimizer)
    assert torch.equal(*parameters)


@pytest.mark.parametrize(("options", "sizes"), [({}, [1000, 1000, 500]), ({"compile": True}, [2500])])
def test_a_large_parameter_is_cut_where_no_kernel_takes_it_whole(monkeypatch, options, sizes):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(update, "BLOCK", 1000)
    optimizer = MTAdam([torch.ones(2500).requires_grad_()], **options)
    advance(optimizer)
    assert [chunk.size for chunk in optimizer._updater()._now.chunks] == sizes


def test_a_pack_of_empty_parameters_is_updated():
    parameters = [torch.zeros(0).requires_grad_() for _ in range(2)]
    optimizer = MTAdam(parameters)
    advance(optimizer)
    assert all(bool((optimizer.state[parameter]["step"] == 0).any()) for parameter in parameters)  # nothing reaches it


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float64)])
def test_parameters_of_several_dtypes_are_trained_together(dtypes):
    parameters = [torch.linspace(0, 1, 5, dtype=dtype).requires_grad_() for dtype in dtypes]
    optimizer = MTAdam(parameters)
    before = copy.deepcopy(parameters)
    advance(optimizer)
    assert all(bool((now != then).any()) for now, then in zip(parameters, before, strict=True))


# What is kept is made anew when it no longer holds


def made(**options):
    """Small parameters, which share a pack, a large one, and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    shapes = (7,), (5, 3), (60, 50)
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return parameters, MTAdam(parameters, terms=("fit", "size", "wave"), lr=0.01, **options)


def assert_equal(first, second):
    for one, other in zip(parameters_in(first), parameters_in(second), strict=True):
        assert torch.equal(one, other)
    assert_same_state(first, second)


def in_other_memory(optimizer):
    for parameter in parameters_in(optimizer):
        parameter.data = parameter.data.clone()


def in_another_layout(optimizer):
    for parameter in parameters_in(optimizer):
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


def loaded(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def loaded_in_parts(optimizer):
    """As some libraries do, past ``load_state_dict``."""
    for parameter, state in list(optimizer.state.items()):
        optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}


def read_in_an_evaluation(optimizer):
    loaded(optimizer)
    with torch.inference_mode():
        optimizer.balance_weights(), optimizer.gradient_norms(), optimizer.average_weights()


def with_other_threads(optimizer):
    torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)


CHANGES = {
    "replaced p.data": in_other_memory,
    "another layout": in_another_layout,
    "loaded": loaded,
    "replaced states": loaded_in_parts,
    "read in an evaluation": read_in_an_evaluation,
    "threads": with_other_threads,
}


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("options", [{}, {"denominator": "own", "amsgrad": True}, {"balance_every": 3}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_no_number_changes_no_step(change, options):
    (_, optimizer), (_, expected) = made(**options), made(**options)
    for step in range(8):
        if step in (3, 6):
            CHANGES[change](optimizer)
        advance(optimizer)
        advance(expected)
    assert_equal(optimizer, expected)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps", "maximize", "betas"])
def test_what_a_group_says_holds_from_the_next_step_on(name):
    """It equals an optimizer that goes on from there with these numbers from its start."""
    changed = {"lr": 0.1, "weight_decay": 0.3, "eps": 0.0, "maximize": True, "betas": (0.5, 0.9, 0.1)}[name]
    (_, optimizer), (_, resumed) = made(), made()
    for _ in range(3):
        advance(optimizer)
    optimizer.param_groups[0][name] = changed
    with torch.no_grad():
        for one, other in zip(parameters_in(resumed), parameters_in(optimizer), strict=True):
            one.copy_(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [parameter.detach().clone() for parameter in parameters_in(optimizer)]
    for _ in range(3):
        advance(optimizer)
        advance(resumed)
    assert_equal(optimizer, resumed)
    assert any(not torch.equal(one, other) for one, other in zip(before, parameters_in(optimizer), strict=True))


def test_a_group_that_is_added_is_trained_from_then_on():
    """As in an optimizer that had it all the time, where nothing reached it."""
    (_, late), (_, early) = made(), made()
    new = [torch.linspace(0, 1, 9, dtype=torch.float64).requires_grad_() for _ in range(2)]
    early.add_param_group({"params": [new[0]]})
    for step in range(6):
        if step == 3:
            late.add_param_group({"params": [new[1]]})
        for optimizer in (late, early):
            own = parameters_in(optimizer)
            take_step(optimizer, losses_of(*(own if step >= 3 else own[:3])))
    for one, other in zip(parameters_in(late), parameters_in(early), strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(value, early.state[other][key]) for key, value in late.state[one].items())
    assert not torch.equal(new[0], torch.linspace(0, 1, 9, dtype=torch.float64))


def test_a_parameter_that_is_frozen_for_a_while_stays_then_goes_on():
    (parameters, optimizer), (others, expected) = made(), made()
    for step in range(8):
        frozen = 3 <= step < 6
        parameters[1].requires_grad_(not frozen)
        kept = parameters[1].detach().clone()
        advance(optimizer)
        assert torch.equal(parameters[1], kept) is frozen
        found = losses_of(*(other.detach() if at == 1 and frozen else other for at, other in enumerate(others)))
        take_step(expected, found)
    assert_equal(optimizer, expected)


def test_states_that_share_memory_are_saved_each_by_itself(tmp_path):
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = MTAdam(parameters)
    advance(optimizer)
    storages = {optimizer.state[parameter]["exp_avg"].untyped_storage().data_ptr() for parameter in parameters}
    assert len(storages) == 1, "they lie side by side"
    saved = optimizer.state_dict()["state"].values()
    for state in saved:
        assert state["exp_avg_sq"].is_contiguous()
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    read = torch.load(tmp_path / "saved", weights_only=True)["state"].values()
    for state, other in zip(saved, read, strict=True):
        assert all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.mark.parametrize("options", [{}, {"denominator": "own"}, {"low_memory": True}], ids=str)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("shape", [(3,), (70, 40)])
def test_a_moment_that_is_replaced_counts(shape, key, options):
    """As a user may begin anew: with another tensor in the state, or with zeros in the one that is there."""
    found = []
    for replaced in (False, True):
        parameter = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()
        optimizer = MTAdam([parameter, torch.ones(2, requires_grad=True)], lr=0.1, **options)
        for step in range(5):
            if step == 3:
                state = optimizer.state[parameter]
                state[key] = torch.zeros_like(state[key]) if replaced else state[key].zero_()
            advance(optimizer)
        found.append(parameter.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("before", [False, True])
def test_amsgrad_may_change_before_a_parameter_is_unfrozen(before):
    parameters = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=False)]
    optimizer = MTAdam(parameters, amsgrad=before)
    losses = [{"fit": (parameters[0] - 2).square().sum()}, {"fit": sum((p - 2).square().sum() for p in parameters)}]
    take_step(optimizer, losses[0])
    optimizer.param_groups[0]["amsgrad"] = not before
    parameters[1].requires_grad_(True)
    for _ in range(2):
        take_step(optimizer, {"fit": sum((p - 2).square().sum() for p in parameters)})
    assert all("max_exp_avg_sq" in optimizer.state[p] for p in parameters)


def test_a_kept_checkpoint_does_not_follow_the_training():
    parameters = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = MTAdam(parameters)  # they lie side by side, in memory that is not to be saved with each of them
    advance(optimizer)
    kept = optimizer.state_dict()["state"]
    before = copy.deepcopy(kept)
    advance(optimizer)
    for index, state in kept.items():
        for name, value in state.items():
            assert torch.equal(value, before[index][name]), name


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}, {"low_memory": True}, {"denominator": "own"}], ids=str)
@pytest.mark.parametrize("between", [False, True])
def test_a_state_that_was_cleared_begins_anew(options, between):
    """As if the optimizer had been made then; also between ``backward`` and ``step``."""
    (parameters, optimizer), steps = made(**options), 4
    for _ in range(steps):
        advance(optimizer)
    optimizer.state.clear()
    again = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    fresh = MTAdam(again, terms=("fit", "size", "wave"), lr=0.01, **options)
    if between and not options:
        for one in (optimizer, fresh):
            one.zero_grad()
            one.backward(losses_of(*parameters_in(one)))
            one.state.clear()
            one.step()
    for _ in range(8):
        advance(optimizer)
        advance(fresh)
        assert_equal(optimizer, fresh)

"""What the optimizer keeps from step to step, and in which form, changes no step."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_mtadam.balancing import balance_scales, geometric_mean
from lightning_mtadam.optim import MTAdam, fused
from lightning_mtadam.optim.blocks import Work


def losses_of(*parameters):
    flat = torch.cat([parameter.double().flatten() for parameter in parameters])
    return {"fit": (flat - 1).square().sum(), "size": 3 * flat.exp().sum(), "wave": flat.sin().abs().sum()}


def advance(optimizer):
    optimizer.zero_grad()
    optimizer.backward(losses_of(*optimizer.param_groups[0]["params"]))
    optimizer.step()


def test_one_copy_at_a_time_of_a_parameter_that_is_not_contiguous(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 1000)
    copies, alive = [], []
    flatten = Work.elements

    def watched(work):
        flat = flatten(work)
        copies.append(StorageWeakRef(flat.untyped_storage()))
        alive.append(sum(not held.expired() for held in copies))
        return flat

    monkeypatch.setattr(Work, "elements", watched)
    advance(MTAdam([torch.randn(100, 80).t().requires_grad_()]))
    assert len(alive) == 8
    assert max(alive) <= 2  # the next is made before the last is let go


def test_a_layout_that_is_not_contiguous_changes_nothing(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 1000)
    start = torch.linspace(-1, 1, 8000).view(80, 100)
    parameters = [start.clone().requires_grad_(), start.t().contiguous().t().requires_grad_()]
    for parameter in parameters:
        optimizer = MTAdam([parameter])
        for _ in range(3):
            advance(optimizer)
    assert torch.equal(*parameters)


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


def test_what_is_read_in_an_evaluation_does_not_stop_training():
    parameter = torch.linspace(0, 1, 5).requires_grad_()
    optimizer = MTAdam([parameter])
    advance(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    with torch.inference_mode():
        optimizer.balance_weights()
    advance(optimizer)


def test_the_geometric_mean_of_norms_far_apart_is_not_zero():
    norms = torch.tensor([[1e-25, 1e25, 0.0], [1e-30, 1e15, 1e15]])
    torch.testing.assert_close(geometric_mean(norms), torch.tensor([[1.0], [1.0]]), rtol=1e-4, atol=0)
    assert bool((balance_scales(norms, geometric_mean(norms), torch.ones(3), float("inf"))[:, :2] > 0).all())


def test_more_numbers_of_threads_than_torch_keeps_programs_of_one_function():
    real = torch.compile
    threads = torch.get_num_threads()
    parameter = torch.ones(1, requires_grad=True)  # only the tables are compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: real(function, backend="eager", fullgraph=True))
        optimizer = MTAdam([parameter], compile=True)
        try:
            for count in range(1, torch._dynamo.config.recompile_limit + 3):
                torch.set_num_threads(count)
                advance(optimizer)
        finally:
            torch.set_num_threads(threads)
    assert optimizer.param_groups[0]["steps"] == torch._dynamo.config.recompile_limit + 2


def test_compiled_training_continues_bit_for_bit_from_any_step():
    """Light steps too: in fp32 the last digit of a compiled scale may be another than that of an eager one."""

    def make():
        generator = torch.Generator().manual_seed(0)
        sizes = ((7,), (5, 3), (60, 50))
        parameters = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
        return parameters, MTAdam(parameters, compile=True, balance_every=10)

    _, optimizer = make()
    _, resumed = make()
    for _ in range(30):
        advance(optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        resumed.load_state_dict(saved)
        assert torch.equal(resumed._stepper().frozen_scales, optimizer._stepper().frozen_scales)

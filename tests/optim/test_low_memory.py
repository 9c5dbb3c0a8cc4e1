"""With ``low_memory=True`` every step is the default's, and what needs all gradients at once is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mtadam import NonFiniteError
from lightning_mtadam.optim import MTAdam
from tests.lightning_models import (
    QUIET,
    Regression,
    fit,
    half_precision,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)
from tests.loops import take_step
from tests.optim.streams import LENGTH, feed, make, start, stream
from tests.spoiling import spoilt

pytestmark = QUIET

BATCHES = list(make_loader(8))
WHOLE = (45, 50)
"""More than are packed with others."""


def numbers(parameters, optimizer):
    tensors = {f"parameter {index}": parameter.detach().clone() for index, parameter in enumerate(parameters)}
    for index, parameter in enumerate(parameters):
        tensors |= {f"{key} {index}": value.clone() for key, value in optimizer.state[parameter].items()}
    return tensors


def assert_close(ours, theirs, tolerance=1e-12):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda message, name=name: f"{name}: {message}"
        )


def run(low_memory, *, dtype=torch.float64, steps=LENGTH, **options):
    second_group = {"lr": 3e-3, "betas": (0.8, 0.99, 0.5)}
    parameters, optimizer = make(
        start(0), dtype=dtype, second_group=second_group, lr=1e-2, low_memory=low_memory, **options
    )
    generator = np.random.default_rng(1)
    values = torch.tensor(generator.normal(size=WHOLE)).to(dtype)
    parameters.append(values.t().requires_grad_())  # not contiguous
    optimizer.add_param_group({"params": [("whole", parameters[-1])]})
    for gradients in stream(steps, 0):
        large = {term: generator.normal(size=WHOLE[::-1]) for term in gradients}
        feed(optimizer, parameters, {term: [*found, large[term]] for term, found in gradients.items()})
        optimizer.step()
    scales = {f"scale {layer}": value for layer, value in optimizer.scales().items()}
    return numbers(parameters, optimizer) | scales


@pytest.mark.parametrize("anchor", ["first", "b", "c", "unit", None])
@pytest.mark.parametrize("denominator", ["max", "mean", "sum"])
def test_it_equals_the_default(anchor, denominator):
    """Terms are absent for a while, and the anchor never reaches some layers, or reaches them late."""
    options = {"anchor": anchor, "denominator": denominator, "weight_decay": 0.1}
    assert_close(run(True, **options), run(False, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"amsgrad": True, "denominator": "sum"},
        {"update": "mean"},
        {"rule": "module"},
        {"rule": "global"},
        {"rule": lambda name: name[-1], "anchor": "b"},
        {"rule": "group", "anchor": "c", "norm_init": "one"},
        {"norm_init": "unbiased"},
        {"norm_init": "one", "anchor": "b"},
        {"maximize": True, "eps": 0.0},
        {"max_scale": 0.5, "importance": {"b": 0.25, "c": 2.0}},
    ],
    ids=lambda options: "-".join(options),
)
def test_it_equals_the_default_with_every_other_option(options):
    assert_close(run(True, **options), run(False, **options))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_narrow_dtypes_follow_the_default(dtype, tolerance):
    assert_close(run(True, dtype=dtype, steps=20), run(False, dtype=dtype, steps=20), tolerance)


def made(**options):
    network = make_network()
    return network, make_mtadam(network, low_memory=True, **options)


def step(network, optimizer, batch, names=("fit", "size", "decay")):
    losses = three_losses(network, batch)
    take_step(optimizer, {name: losses[name] for name in names})


@pytest.mark.parametrize("options", [{}, {"anchor": "size", "amsgrad": True}, {"denominator": "sum"}])
def test_resuming_continues_bit_for_bit(options):
    network, optimizer = made(**options)
    for batch in BATCHES[:4]:
        step(network, optimizer, batch)
    other, resumed = made(**options)
    other.load_state_dict(network.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in BATCHES[4:]:
        step(network, optimizer, batch)
        step(other, resumed, batch)
    assert_close(
        numbers(list(network.parameters()), optimizer), numbers(list(other.parameters()), resumed), tolerance=0
    )


def test_the_gradient_of_a_parameter_is_the_balanced_sum():
    network, optimizer = made(anchor="size")
    plain = make_network()
    reference = make_mtadam(plain, anchor="size")
    for batch in BATCHES[:3]:
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch))
        reference.zero_grad()
        reference.backward(three_losses(plain, batch))
        terms = {
            name: [None if g is None else g.clone() for g in found]
            for name, found in reference._pending.gradients.items()
        }
        optimizer.step()
        reference.step()
        scales = reference.scales()
        for index, (name, parameter) in enumerate(network.named_parameters()):
            expected = sum(
                scales[name][row] * terms[term][index]
                for row, term in enumerate(optimizer.terms)
                if terms[term][index] is not None
            )
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)


def test_the_trainer_trains_as_by_default():
    modules = [Regression(lambda network, low=low: make_mtadam(network, low_memory=low)) for low in (True, False)]
    for module in modules:
        fit(module, make_loader())
    for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


REFUSED = {
    "anchor='mean'": {"anchor": "mean"},
    "anchor='max'": {"anchor": "max"},
    "denominator='own'": {"denominator": "own"},
    "on_nonfinite='skip'": {"on_nonfinite": "skip"},
    "compile=True": {"compile": True},
    "balance_every=5": {"balance_every": 5},
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_need_all_gradients_at_once_are_refused(option):
    with pytest.raises(ValueError, match=f"low_memory=True consumes .*, but {option} needs those of"):
        made(**REFUSED[option])


def unchanged(network, optimizer, action, error, message):
    before = numbers(list(network.parameters()), optimizer)
    with pytest.raises(error, match=message):
        action()
    assert_close(numbers(list(network.parameters()), optimizer), before, tolerance=0)


def test_accumulation_scalers_and_clipping_are_refused():
    network, optimizer = made()
    step(network, optimizer, BATCHES[0])
    scale = torch.tensor(8.0)
    losses = three_losses(network, BATCHES[1])
    optimizer.zero_grad()
    unchanged(network, optimizer, lambda: optimizer.clip_gradients(1.0), ValueError, "but clipping needs")
    unchanged(
        network,
        optimizer,
        lambda: optimizer.backward(losses, grad_output=scale, loss_scale=scale),
        ValueError,
        "but a gradient scaler needs",
    )
    optimizer.backward(losses)
    unchanged(
        network,
        optimizer,
        lambda: optimizer.backward(three_losses(network, BATCHES[2])),
        ValueError,
        "but accumulation over several backward passes needs",
    )
    optimizer.step()  # what was consumed is still good


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulation"),
        ({"gradient_clip_val": 0.1}, "clipping"),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, "clipping"),
        ({"plugins": [half_precision(8.0)]}, "a gradient scaler"),
    ],
    ids=["accumulation", "clipping by norm", "clipping by value", "scaler"],
)
def test_the_trainer_refuses_them_too(trainer, message):
    module = Regression(lambda network: make_mtadam(network, low_memory=True), dtype=torch.float32)
    with pytest.raises(ValueError, match=f"low_memory=True .* but {message}"):
        fit(module, make_loader(dtype=torch.float32), **trainer)


@pytest.mark.parametrize("anchor", ["first", "size", None])
@pytest.mark.parametrize("term", ["fit", "size", "decay"])
def test_a_gradient_that_is_not_finite_leaves_what_the_message_says(term, anchor):
    network, optimizer = made(anchor=anchor)
    for batch in BATCHES[:3]:
        step(network, optimizer, batch)
    before = numbers(list(network.parameters()), optimizer)
    message = (
        rf"term {term!r} at the layer '0\..* not finite.*parameters were not changed, but second moments have seen"
    )
    optimizer.zero_grad()
    with pytest.raises(NonFiniteError, match=message):
        optimizer.backward(spoilt(three_losses(network, BATCHES[3]), term))
    after = numbers(list(network.parameters()), optimizer)
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    first = term == (anchor if anchor == "size" else "fit")
    assert bool(moved) is not first
    assert all(name.startswith("exp_avg_sq") for name in moved)
    rows = {"fit": 0, "size": 1, "decay": 2}
    for name in moved:
        assert torch.equal(after[name][rows[term]], before[name][rows[term]]), "its own is as it was"
    with pytest.raises(RuntimeError, match="nothing to consume"):
        optimizer.step()
    step(network, optimizer, BATCHES[3])


def test_zero_grad_of_the_model_between_backward_and_step_drops_what_is_pending():
    network, optimizer = made()
    for batch in BATCHES[:3]:
        step(network, optimizer, batch)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.zero_grad()
    optimizer.backward(three_losses(network, BATCHES[3]))
    network.zero_grad()
    optimizer.backward(three_losses(network, BATCHES[4]))  # this is no accumulation
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    optimizer.step()
    other, expected = made()
    for batch in (*BATCHES[:3], BATCHES[4]):
        step(other, expected, batch)
    for parameter, reference in zip(network.parameters(), other.parameters(), strict=True):
        for key in ("step", "gradient_norm", "exp_avg"):
            torch.testing.assert_close(optimizer.state[parameter][key], expected.state[reference][key], rtol=0, atol=0)


def test_a_first_backward_that_fails_fixes_no_names():
    network, optimizer = made()
    with pytest.raises(ValueError, match=r"losses\['other'\] reaches no parameter"):
        optimizer.backward({"other": nn.Linear(3, 1)(torch.ones(1, 3)).sum()})
    step(network, optimizer, BATCHES[0])


def test_a_parameter_group_between_backward_and_step_is_refused():
    network = make_network()
    optimizer = MTAdam(network[0].named_parameters(prefix="0"), low_memory=True)
    optimizer.backward(three_losses(network, BATCHES[0]))
    head = {"params": list(network[2].named_parameters(prefix="2"))}
    with pytest.raises(ValueError, match=r"added between backward\(\) and step\(\) needs"):
        optimizer.add_param_group(head)
    assert len(optimizer.param_groups) == 1
    optimizer.step()
    optimizer.add_param_group(head)
    step(network, optimizer, BATCHES[1])

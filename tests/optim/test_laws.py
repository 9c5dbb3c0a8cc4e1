"""The laws of MTAdam, in float64 over 200 steps."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mtadam.optim import MTAdam
from tests.combinations import every
from tests.loops import take_step, train

STEPS = 200
BETAS = (0.9, 0.999, 0.9)
every_way = pytest.mark.usefixtures("_every_way")
few = settings(max_examples=settings.default.max_examples // 5, suppress_health_check=[HealthCheck.too_slow])
NORM_INITS = ("first", "unbiased", "one")
DENOMINATORS = ("max", "mean", "own")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches(steps=STEPS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield (
            torch.randn(8, 5, dtype=torch.float64, generator=generator),
            torch.randn(8, 3, dtype=torch.float64, generator=generator),
        )


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def three_terms(output, target):
    return {
        "fit": (output - target).square().mean(),
        "size": output.abs().mean(),
        "sharp": (output - target).pow(4).mean(),
    }


def path_of(losses, *, steps=STEPS, optimizer=None, **options):
    """The network's weights after each step on ``losses(output, target, step)``, [steps, N]."""
    model = network()
    optimizer = MTAdam(model.named_parameters(), **options) if optimizer is None else optimizer(model)
    path = []
    for step, (x, y) in enumerate(batches(steps)):
        take_step(optimizer, losses(model(x), y, step))
        path.append(flat(model))
    return torch.stack(path)


@cache
def adams_path(lr):
    """Plain Adam's, on the loss ``fit``."""
    return path_of(fit, optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=lr))


def fit(output, target, _):
    return {"fit": (output - target).square().mean()}


def difference(a, b):
    return (a - b).abs().max().item()


@every_way
@pytest.mark.parametrize(
    ("norm_init", "denominator", "anchor"), every(3, NORM_INITS, DENOMINATORS, ("first", "mean", "max", "fit", None))
)
def test_one_term_equals_adam(norm_init, denominator, anchor):
    ours = path_of(fit, lr=1e-2, norm_init=norm_init, denominator=denominator, anchor=anchor, update="mean")
    assert difference(ours, adams_path(1e-2)) < 1e-12


@every_way
@pytest.mark.parametrize("layers", ["parameter", "module", "global"])
@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.01}]
)
def test_one_term_equals_adamw_with_its_options(layers, options):
    def one(output, target, _):
        return {"fit": (output - target).tanh().square().mean()}

    options = {"weight_decay": 0.0, **options}
    ours = path_of(one, lr=1e-2, layers=layers, **options)
    adam = path_of(one, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, **options))
    assert difference(ours, adam) < 1e-12


@every_way
def test_one_term_equals_adam_where_gradients_start_at_zero_or_are_missing():
    """A zero gradient ticks Adam's clock, a missing one does not."""

    def losses(w, b, step):
        zero = step < 5 or 50 <= step < 53
        return {"fit": ((0.0 if zero else 1.0) * w - 1).square().sum() + (b.square().sum() if step % 3 else 0.0)}

    def run(make):
        w = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)
        b = torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True)
        optimizer = make([w, b])
        train(optimizer, (losses(w, b, step) for step in range(STEPS)))
        return torch.cat([w, b]).detach()

    assert difference(run(lambda p: MTAdam(p, lr=1e-2)), run(lambda p: torch.optim.Adam(p, lr=1e-2))) < 1e-12


@every_way
@pytest.mark.parametrize("norm_init", NORM_INITS)
@pytest.mark.parametrize("k", [2, 5])
def test_k_identical_terms_equal_adam_at_k_times_the_rate(k, norm_init):
    def copies(output, target, _):
        return {str(i): (output - target).square().mean() for i in range(k)}

    assert difference(path_of(copies, lr=1e-3, norm_init=norm_init), adams_path(k * 1e-3)) < 1e-10
    assert difference(path_of(copies, lr=1e-3, norm_init=norm_init, update="mean"), adams_path(1e-3)) < 1e-10


@every_way
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_terms_other_than_the_anchor_may_be_permuted(denominator):
    def permuted(output, target, _):
        found = three_terms(output, target)
        return {name: found[name] for name in ("fit", "sharp", "size")}

    ours = path_of(lambda o, t, _: three_terms(o, t), denominator=denominator)
    assert difference(ours, path_of(permuted, denominator=denominator)) < 1e-12


@few
@given(
    exponents=st.tuples(st.floats(-6, 6), st.floats(-6, 6)),
    norm_init=st.sampled_from(["first", "unbiased"]),
    denominator=st.sampled_from(["max", "mean", "own"]),
    layers=st.sampled_from(["parameter", "module", "global"]),
)
def test_a_constant_factor_on_a_term_other_than_the_anchor_changes_nothing(exponents, norm_init, denominator, layers):
    def scaled(output, target, _):
        found = three_terms(output, target)
        return {**found, "size": 10 ** exponents[0] * found["size"], "sharp": 10 ** exponents[1] * found["sharp"]}

    options = {"norm_init": norm_init, "denominator": denominator, "layers": layers}
    plain = path_of(lambda o, t, _: three_terms(o, t), **options)
    assert difference(plain, path_of(scaled, **options)) < 1e-9


def test_the_papers_norm_init_is_not_invariant():
    """So that the law above can fail: starting the norms at one, it does not hold."""

    def scaled(output, target, _):
        found = three_terms(output, target)
        return {**found, "size": 1e-6 * found["size"]}

    plain = path_of(lambda o, t, _: three_terms(o, t), norm_init="one")
    assert difference(plain, path_of(scaled, norm_init="one")) > 1e-4


@few
@given(exponent=st.floats(-6, 6), anchor=st.sampled_from(["first", "sharp", "mean", "max", "unit"]))
def test_with_eps_zero_a_factor_on_every_term_changes_nothing(exponent, anchor):
    def scaled(output, target, _):
        return {name: 10**exponent * loss for name, loss in three_terms(output, target).items()}

    plain = path_of(lambda o, t, _: three_terms(o, t), eps=0.0, anchor=anchor)
    assert difference(plain, path_of(scaled, eps=0.0, anchor=anchor)) < 1e-9


@every_way
def test_with_eps_zero_a_factor_on_the_anchor_changes_nothing():
    def scaled(output, target, _):
        found = three_terms(output, target)
        return {**found, "fit": 1e4 * found["fit"]}

    plain = path_of(lambda o, t, _: three_terms(o, t), eps=0.0)
    assert difference(plain, path_of(scaled, eps=0.0)) < 1e-9


@every_way
@pytest.mark.parametrize(
    ("anchor", "denominator", "update"), every(2, ("first", "mean", "max", "unit", None), DENOMINATORS, ("sum", "mean"))
)
def test_a_zero_or_absent_term_is_inert(anchor, denominator, update):
    def without(output, target, _):
        return {name: loss for name, loss in three_terms(output, target).items() if name != "sharp"}

    def zero(output, target, _):
        return {**three_terms(output, target), "sharp": 0.0 * output.sum()}

    options = {"anchor": anchor, "denominator": denominator, "update": update, "steps": 100}
    plain = path_of(without, **options)
    assert difference(plain, path_of(zero, **options)) < 1e-12
    assert difference(plain, path_of(without, terms=("fit", "size", "sharp"), **options)) < 1e-12


@every_way
def test_a_term_that_is_zero_at_first_equals_one_that_is_absent_at_first():
    def zero(output, target, step):
        found = three_terms(output, target)
        return {**found, "sharp": (0.0 if step < 40 else 1.0) * found["sharp"]}

    def absent(output, target, step):
        return {name: loss for name, loss in three_terms(output, target).items() if name != "sharp" or step >= 40}

    terms = ("fit", "size", "sharp")
    assert difference(path_of(zero, terms=terms), path_of(absent, terms=terms)) < 1e-12


@every_way
@pytest.mark.parametrize("anchor", ["first", "second", "mean", "max"])
@pytest.mark.parametrize("late", [0, 20])
def test_a_head_private_to_one_term_equals_adam_on_that_term(anchor, late):
    """Also when the head is reached late: its clock is its own."""

    def run(make):
        torch.manual_seed(0)
        trunk, one, two = (nn.Linear(4, 4).double() for _ in range(3))
        optimizer = make(one, two)
        for step, (x, _) in enumerate(batches(100)):
            x = x[:, :4]
            losses = {"first": one(trunk(x)).square().mean()}
            losses["second"] = 50 * two(x).pow(2).mean() if step >= late else 0.0 * one(x).sum()
            take_step(optimizer, losses)
        return flat(two)

    def mtadam(one, two):
        named = [*one.named_parameters("one"), *two.named_parameters("two")]
        return MTAdam(named, anchor=anchor, lr=1e-2)

    adam = run(lambda one, two: torch.optim.Adam([*one.parameters(), *two.parameters()], lr=1e-2))
    assert difference(run(mtadam), adam) < 1e-12


@few
@given(
    seed=st.integers(0, 1000),
    terms=st.integers(1, 4),
    betas=st.tuples(st.floats(0.0, 0.95), st.floats(0.91, 0.9999)),
    spread=st.floats(0, 8),
)
def test_the_step_is_bounded(seed, terms, betas, spread):
    """|step| <= I lr (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), times what the bias corrections make of it."""
    beta1, beta2 = betas
    generator = np.random.default_rng(seed)
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = MTAdam([w], lr=1.0, betas=(beta1, beta2, 0.9), eps=0.0)
    bound = terms * (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    for step in range(60):
        before = w.detach().clone()
        gradients = {
            str(i): torch.as_tensor(generator.normal(size=6) * 10 ** generator.uniform(-spread, spread))
            for i in range(terms)
        }
        take_step(optimizer, {name: (g * w).sum() for name, g in gradients.items()})
        # M^ / sqrt(v^) is M / sqrt(v) times this, which tends to one.
        fading = (1 - beta2 ** (step + 1)) ** 0.5 / (1 - beta1 ** (step + 1))
        assert difference(w.detach(), before) <= bound * fading * (1 + 1e-9)


@every_way
def test_importance_sets_the_ratio_of_the_balanced_gradients():
    model = network()
    optimizer = MTAdam(model.named_parameters(), importance={"size": 0.25}, betas=(0.9, 0.999, 0.0))
    x, y = next(batches(1))
    losses = three_terms(model(x), y)
    gradients = {n: torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for n, v in losses.items()}
    take_step(optimizer, losses)
    for index, (_, scales) in enumerate(optimizer.scales().items()):
        balanced = [s * gradients[name][index].norm() for s, name in zip(scales, losses, strict=True)]
        assert balanced[1] / balanced[0] == pytest.approx(0.25)
        assert balanced[2] / balanced[0] == pytest.approx(1.0)


def test_max_scale_caps_the_ratio():
    model = network()
    optimizer = MTAdam(model.named_parameters(), max_scale=3.0)
    x, y = next(batches(1))
    losses = three_terms(model(x), y)
    take_step(optimizer, {**losses, "size": 1e-9 * losses["size"]})
    assert all(scales[1].item() == 3.0 for scales in optimizer.scales().values())


def test_a_closure_is_called_first_and_its_loss_returned():
    plain, closed = network(), network()
    optimizers = [MTAdam(m.named_parameters()) for m in (plain, closed)]
    for x, y in batches(5):
        take_step(optimizers[0], three_terms(plain(x), y))

        def closure(x=x, y=y):
            optimizers[1].zero_grad()
            losses = three_terms(closed(x), y)
            optimizers[1].backward(losses)
            return sum(losses.values()).item()

        assert isinstance(optimizers[1].step(closure), float)
    assert torch.equal(flat(plain), flat(closed))


@every_way
def test_gradients_accumulate_over_backward_calls():
    model, batched = network(), network()
    ours, reference = MTAdam(model.named_parameters()), MTAdam(batched.named_parameters())
    stream = list(batches(8))
    for first, second in zip(stream[::2], stream[1::2], strict=True):
        ours.zero_grad()
        for x, y in (first, second):
            ours.backward({n: v / 2 for n, v in three_terms(model(x), y).items()})
        total = {n: v / 2 for n, v in three_terms(batched(first[0]), first[1]).items()}
        other = three_terms(batched(second[0]), second[1])
        reference.zero_grad()
        reference.backward({n: v + other[n] / 2 for n, v in total.items()})
        for p, q in zip(model.parameters(), batched.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
        ours.step()
        reference.step()
    assert difference(flat(model), flat(batched)) < 1e-12


@pytest.mark.parametrize("reset", ["optimizer", "module", "nothing"])
def test_a_step_starts_anew_however_gradients_were_reset(reset):
    """``model.zero_grad()`` goes behind the optimizer's back; ``step`` itself consumes what there is."""
    model, reference = network(), network()
    ours, theirs = MTAdam(model.named_parameters()), MTAdam(reference.named_parameters())
    for step, (x, y) in enumerate(batches(6)):
        if step == 3:  # dropped before it was consumed
            ours.backward(three_terms(model(y @ torch.ones(3, 5, dtype=torch.float64)), y))
            model.zero_grad() if reset == "module" else ours.zero_grad()
        {"optimizer": ours.zero_grad, "module": model.zero_grad, "nothing": lambda: None}[reset]()
        ours.backward(three_terms(model(x), y))
        theirs.zero_grad()
        theirs.backward(three_terms(reference(x), y))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        ours.step()
        theirs.step()
    assert torch.equal(flat(model), flat(reference))

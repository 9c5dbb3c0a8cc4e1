"""Optimizers that evaluate a closure several times: the value belongs to the gradient, and a balancer advances once."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_mtadam import MTAdam, MultiTermLightningModule
from lightning_mtadam.balancers import (
    Balancer,
    FixedWeights,
    GradNorm,
    MetaBalance,
    OutputBalancer,
    UncertaintyWeighting,
)
from tests.balancers.cases import CASES, Balanced
from tests.distributed.ranks import results, run_ranks
from tests.lightning_models import QUIET, fit, make_loader, make_trainer

pytestmark = QUIET
BEST = 0.2892  # of a + 100 b, by LBFGS on that sum; where b is 0 and a at its least


class Quartic(MultiTermLightningModule):
    """Two terms of two numbers, with a balancer."""

    def __init__(self, balancer=None, weights=None):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 3.0]))
        self.balancer, self.weights = balancer, weights or {"a": 1.0, "b": 1.0}
        self.seen = []

    def losses(self):
        w = self.w
        return {"a": (w[0] - 1) ** 2 + w[0] ** 4, "b": (w[0] + w[1] + 1) ** 4}

    def training_step(self, batch, batch_idx):
        return self.losses()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe")

    def value(self):
        with torch.no_grad():
            return float(sum(weight * self.losses()[name] for name, weight in self.weights.items()))


WEIGHTS = {"a": 1.0, "b": 100.0}


def closure_of(balancer, optimizer, model):
    def closure():
        optimizer.zero_grad()
        return balancer.backward(model.losses(), optimizer, model=model)

    return closure


def by_hand(weights, steps=5):
    """LBFGS on the weighted sum itself."""
    model = Quartic(weights=weights)
    optimizer = model.configure_optimizers()

    def closure():
        optimizer.zero_grad()
        loss = sum(weight * model.losses()[name] for name, weight in weights.items())
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model


def test_lbfgs_with_fixed_weights_is_lbfgs_on_the_weighted_sum():
    model, balancer = Quartic(weights=WEIGHTS), FixedWeights(WEIGHTS)
    optimizer = model.configure_optimizers()
    for _ in range(5):
        optimizer.step(closure_of(balancer, optimizer, model))
    expected = by_hand(WEIGHTS)
    assert model.value() == pytest.approx(BEST, abs=1e-3)
    torch.testing.assert_close(model.w, expected.w)


@pytest.mark.parametrize("manual", [False, True])
def test_in_a_trainer_too(manual):
    class Manual(Quartic):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                return self.backward_terms(self.losses(), optimizer)

            optimizer.step(closure)

    module = (Manual if manual else Quartic)(FixedWeights(WEIGHTS), WEIGHTS)
    if manual:
        module.on_train_batch_end = lambda *_: None
    fit(module, make_loader(5), max_epochs=1)
    torch.testing.assert_close(module.w, by_hand(WEIGHTS).w)
    assert module.value() == pytest.approx(BEST, abs=1e-3)


def test_callbacks_see_the_sum_of_the_losses_as_ever():
    module = Quartic(FixedWeights(WEIGHTS), WEIGHTS)
    module.configure_optimizers = lambda: torch.optim.SGD([module.w], lr=0.0)
    fit(module, make_loader(1), max_epochs=1)
    assert module.seen == [pytest.approx(4 + 81 + 7.0**4)]


def test_without_a_balancer_the_plain_sum_is_returned_in_manual_optimization():
    class Manual(Quartic):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.returned = self.backward_terms(self.losses(), self.optimizers())

        def on_train_batch_end(self, *_):
            pass

    module = Manual()
    fit(module, make_loader(1), max_epochs=1)
    assert float(module.returned) == 4 + 81 + 7.0**4


class Pair(nn.Module):
    """A network whose losses depend on all of its six numbers, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()

    def losses(self):
        x = torch.tensor([[0.5, -1.0], [2.0, 1.0], [-0.3, 0.4]], dtype=torch.float64)
        output = self.head(torch.tanh(self.body(x)))
        return {"fit": (output - 1).square().mean(), "size": 30 * output.square().mean(), "pull": output.exp().mean()}


WITH_OBJECTIVE = {
    "fixed": lambda: FixedWeights({"fit": 2.0, "size": 0.3, "pull": 1.0}),
    "gradnorm": lambda: GradNorm("body"),
    "uncertainty": UncertaintyWeighting,
}


def after_two_steps(make):
    """A network and a balancer whose weights have moved, and what evaluates them."""
    model, balancer = Pair(), make()
    if balancer.learned is not None:
        balancer.learned.double()
    parameters = [*model.parameters(), *([] if balancer.learned is None else balancer.learned.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(2):
        closure_of(balancer, optimizer, model)()
        optimizer.step()
    return parameters, optimizer, closure_of(balancer, optimizer, model)


@pytest.mark.parametrize("name", WITH_OBJECTIVE)
def test_the_value_belongs_to_the_gradient(name):
    """Central differences of what backward returns, by every number that is trained: also by log variances."""
    parameters, _, evaluate = after_two_steps(WITH_OBJECTIVE[name])
    evaluate()
    for parameter in parameters:
        for index in range(parameter.numel()):
            gradient, values = float(evaluate() * 0 + parameter.grad.view(-1)[index]), []
            for shift in (1e-5, -2e-5, 1e-5):
                parameter.data.view(-1)[index] += shift
                values.append(float(evaluate()))
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", WITH_OBJECTIVE)
def test_the_value_is_multiplied_as_the_losses_are_but_not_by_a_loss_scale(name):
    model, balancer = Pair(), WITH_OBJECTIVE[name]()
    parameters = [*model.parameters(), *([] if balancer.learned is None else balancer.learned.parameters())]
    optimizer, found = torch.optim.SGD(parameters, lr=0.1), []
    for factor, scale in ((1.0, None), (0.25, None), (2.0, 8.0)):
        given = {"grad_output": torch.tensor(factor), "loss_scale": None if scale is None else torch.tensor(scale)}
        found.append(float(balancer.backward(model.losses(), optimizer, model=model, **given)))
        optimizer.zero_grad()
    assert found[1:] == [pytest.approx(found[0] / 4)] * 2


@pytest.mark.parametrize("name", WITH_OBJECTIVE)
def test_lbfgs_descends_the_objective_and_the_balancer_advances_once_a_step(name):
    model, balancer, evaluations = Pair(), WITH_OBJECTIVE[name](), []
    if balancer.learned is not None:
        balancer.learned.double()
    parameters = [*model.parameters(), *([] if balancer.learned is None else balancer.learned.parameters())]
    optimizer = torch.optim.LBFGS(parameters, max_iter=6, line_search_fn="strong_wolfe")
    evaluate = closure_of(balancer, optimizer, model)

    def closure():
        evaluations.append(float(evaluate()))
        return evaluations[-1]

    for step in range(3):
        evaluations.clear()
        optimizer.step(closure)
        assert step or len(evaluations) > 3
        assert step or min(evaluations) < evaluations[0]
        if name == "gradnorm":
            assert float(balancer.state["steps"]) == step + 1
            assert balancer.state["seen"].tolist() == [step + 1.0] * 3


def state_after_one_evaluation(make):
    model, balancer = Pair(), make()
    balancer.backward(model.losses(), torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    return balancer.state_dict()["state"]


def test_the_first_evaluation_of_a_step_counts():
    """GradNorm's initial losses are those where the first step begins, not those where LBFGS has arrived."""
    model, balancer = Pair(), GradNorm("body")
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    optimizer.step(closure_of(balancer, optimizer, model))
    assert_same(balancer.state, state_after_one_evaluation(lambda: GradNorm("body")))


def assert_same(state, other):
    assert state.keys() == other.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, other[key], msg=key)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, as it is commonly written; ``step`` evaluates the closure once or twice."""

    def __init__(self, params, base, rho=0.05, twice=False, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups, self.twice = self.base.param_groups, twice

    @torch.no_grad()
    def first_step(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        self.moved = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.moved.append((p, p.detach().clone()))
                    p.add_(p.grad, alpha=float(group["rho"] / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, before in self.moved:
            p.copy_(before)
        self.base.step()

    def step(self, closure):
        if self.twice:
            with torch.enable_grad():
                closure()
        self.first_step()
        with torch.enable_grad():
            value = closure()
        self.second_step()
        return value


def sam_steps(balancer, way, steps=3):
    model = Pair()
    optimizer = SAM(model.parameters(), torch.optim.SGD, twice=way == "twice", lr=0.01)
    closure = closure_of(balancer, optimizer, model)
    for _ in range(steps):
        if way == "by hand":
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
            continue
        if way == "once":
            closure()
        optimizer.step(closure)
    return model


@pytest.mark.parametrize("way", ["by hand", "once", "twice"])
def test_sam_is_one_step_whoever_calls_its_parts(way):
    balancer = GradNorm("body")
    sam_steps(balancer, way)
    assert float(balancer.state["steps"]) == 3
    meta = MetaBalance()
    sam_steps(meta, way)
    assert all(counts.tolist() == [3.0] * 3 for _, counts in meta.state.values())


@pytest.mark.parametrize("way", ["by hand", "once", "twice"])
def test_sam_with_fixed_weights_is_sam_on_the_weighted_sum(way):
    weights = {"fit": 2.0, "size": 0.3, "pull": 1.0}
    found = sam_steps(FixedWeights(weights), way)

    class Plain(Balancer):
        def backward(self, losses, optimizer, *, model):
            sum(weights[name] * loss for name, loss in losses.items()).backward()

        def balance(self, batch):
            raise NotImplementedError

    expected = sam_steps(Plain(), way)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_batches_that_are_dropped_before_the_step_do_not_count():
    model, balancer = Pair(), MetaBalance()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    doubled = {name: 2 * loss for name, loss in model.losses().items()}
    balancer.backward(doubled, optimizer, model=model)
    optimizer.zero_grad()
    balancer.backward(model.losses(), optimizer, model=model)
    assert_same(balancer.state, state_after_one_evaluation(MetaBalance))


def test_an_error_within_a_step_leaves_the_next_one_right():
    model, balancer = Pair(), GradNorm("body")
    optimizer = SAM(model.parameters(), torch.optim.SGD, twice=True, lr=0.01)
    evaluate, calls = closure_of(balancer, optimizer, model), []

    def failing():
        calls.append(evaluate())
        if len(calls) == 2:
            raise ArithmeticError("stop")
        return calls[-1]

    with pytest.raises(ArithmeticError):
        optimizer.step(failing)
    optimizer.step(evaluate)
    optimizer.step(evaluate)
    assert float(balancer.state["steps"]) == 2


class Mean(Balancer):
    """One of a user's own."""

    def balance(self, batch):
        return batch.run_weighted([1 / len(batch.losses)] * len(batch.terms)).sum()


class MeanWithValue(Mean):
    has_objective = True


def test_a_balancer_of_ones_own_says_that_it_has_an_objective():
    model = Quartic()
    optimizer = model.configure_optimizers()
    with pytest.raises(ValueError, match="Mean cannot be used with LBFGS"):
        optimizer.step(closure_of(Mean(), optimizer, model))
    assert float(optimizer.step(closure_of(MeanWithValue(), optimizer, model))) == (4 + 81 + 7.0**4) / 2
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    assert Mean().backward(model.losses(), plain, model=model) is None


REFUSED = {name: case for name, case in CASES.items() if not case.make().has_objective}


def test_those_without_an_objective_are_known():
    kinds = {type(case.make()) for case in CASES.values()} - {type(case.make()) for case in REFUSED.values()}
    assert kinds == {FixedWeights, GradNorm, UncertaintyWeighting}
    assert {MetaBalance, OutputBalancer} <= {type(case.make()) for case in REFUSED.values()}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
def test_they_are_refused_with_lbfgs_by_name_and_nothing_is_changed(name, line_search):
    module = Balanced(REFUSED[name])
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), line_search_fn=line_search)
    kind = type(module.balancer).__name__
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=rf"^{kind} cannot be used with LBFGS.* Use FixedWeights, GradNorm or"):
        fit(module, make_loader())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"balance_every": 5}, {"low_memory": True}], ids=str)
def test_mtadam_is_refused_within_a_step_of_lbfgs(options):
    model = Quartic()
    mtadam, optimizer = MTAdam(model.parameters(), **options), model.configure_optimizers()

    def closure():
        optimizer.zero_grad()
        mtadam.backward(model.losses())
        return sum(model.losses().values())

    with pytest.raises(ValueError, match="MTAdam cannot be used with LBFGS"):
        optimizer.step(closure)
    mtadam.backward(model.losses())  # by itself it goes on
    mtadam.step()


def test_mtadam_steps_with_a_closure_of_its_own():
    model, other = Quartic(), Quartic()
    with_closure, without = (MTAdam(one.parameters(), lr=0.01) for one in (model, other))

    def closure():
        with_closure.zero_grad()
        losses = model.losses()
        with_closure.backward(losses)
        return sum(losses.values()).item()

    for _ in range(3):
        expected = sum(other.losses().values()).item()
        without.zero_grad()
        without.backward(other.losses())
        without.step()
        assert with_closure.step(closure) == expected
    assert torch.equal(model.w, other.w)


def test_accumulation_with_lbfgs_is_refused():
    module = Quartic(FixedWeights(WEIGHTS), WEIGHTS)
    with pytest.raises(ValueError, match="accumulate_grad_batches above 1 LBFGS would compare"):
        make_trainer(accumulate_grad_batches=2).fit(module, make_loader(4))


def lbfgs_of_rank(rank, case):
    """Losses of a rank's own; the values that LBFGS compares must be those of all ranks."""
    torch.manual_seed(0)
    network = nn.Linear(3, 1).double()
    model = nn.parallel.DistributedDataParallel(network)
    balancer = case()
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    x = torch.arange(12, dtype=torch.float64).view(4, 3).sin()[2 * rank : 2 * rank + 2]
    values = []

    def closure():
        optimizer.zero_grad()
        output = model(x)
        losses = {"fit": (output - 1).square().mean(), "size": 9 * output.square().mean()}
        values.append(balancer.backward(losses, optimizer, model=model))
        return values[-1]

    for _ in range(3):
        optimizer.step(closure)
    return values, [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("case", [lambda: FixedWeights({"fit": 2.0, "size": 0.5}), lambda: GradNorm("weight")])
def test_ranks_compare_the_mean_of_their_values(case, tmp_path):
    (values, first), (others, second) = results(run_ranks(lbfgs_of_rank, tmp_path, case))
    assert torch.equal(torch.stack(values), torch.stack(others))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert float(values[-1]) < float(values[0])


def test_an_optimizer_does_not_keep_a_balancer_and_a_copy_follows_steps_of_its_own():
    model, balancer = Pair(), GradNorm("body")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closure_of(balancer, optimizer, model)()
    copied = copy.deepcopy(balancer)
    alive = weakref.ref(balancer._steps)
    del balancer
    gc.collect()
    assert alive() is None
    for _ in range(2):
        optimizer.step()
        closure_of(copied, optimizer, model)()
    assert float(copied.state["steps"]) == 3


class Lookahead:
    """A wrapper that is no optimizer of torch, and calls no hooks."""

    def __init__(self, base):
        self.base, self.param_groups = base, base.param_groups

    def zero_grad(self):
        self.base.zero_grad()

    def step(self):
        self.base.step()


def test_the_steps_of_a_wrapper_are_those_of_the_optimizer_within():
    model, balancer = Pair(), GradNorm("body")
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        closure_of(balancer, optimizer, model)()
        optimizer.step()
    assert float(balancer.state["steps"]) == 3

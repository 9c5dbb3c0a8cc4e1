"""Optimizers around MTAdam or a balancer's optimizer: as ``docs/wrappers.md`` shows, or an error that says how."""

import runpy
from collections import OrderedDict, defaultdict

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import FixedWeights, GradNorm, MetaBalance
from lightning_mtadam.callbacks import BalanceWeightMonitor
from tests.lightning_models import (
    QUIET,
    MemoryLogger,
    Regression,
    assert_same,
    fit,
    half_precision,
    largest_difference,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
    total,
)
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "wrappers.md"


class Lookahead(torch.optim.Optimizer):
    """Zhang et al. 2019, as it is commonly copied: without the base class's constructor, with a state of its own."""

    def __init__(self, optimizer, k=3, alpha=0.5):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        self.param_groups = self.optimizer.param_groups
        self.state = defaultdict(dict)
        self.defaults = optimizer.defaults
        for group in self.param_groups:
            group["counter"] = 0

    def update(self, group):
        for fast in group["params"]:
            state = self.state[fast]
            if "slow_param" not in state:
                state["slow_param"] = fast.data.clone()
            slow = state["slow_param"]
            slow += (fast.data - slow) * self.alpha
            fast.data.copy_(slow)

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            if group["counter"] == 0:
                self.update(group)
            group["counter"] = (group["counter"] + 1) % self.k
        return loss


class InItsState(Lookahead):
    """As timm's: what it remembers stands in the state of what it wraps."""

    def __init__(self, optimizer, **options):
        super().__init__(optimizer, **options)
        self.state = optimizer.state


class SAM(torch.optim.Optimizer):
    """Foret et al. 2021, as it is commonly copied."""

    def __init__(self, params, base_optimizer, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group in self.param_groups:
            scale = group["rho"] / (torch.stack(grads).norm() + 1e-12)
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Prepared(torch.optim.Optimizer):
    """As Accelerate's: it loads the optimizer's state into it, and knows nothing of backward."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        optimizer.load_state_dict(optimizer.state_dict())

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    @property
    def defaults(self):
        return self.optimizer.defaults

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def looked_ahead(network, optimizer, k=3, alpha=0.5):
    """The loop without a wrapper: every k-th step goes half of the way."""
    slow = None
    for index, batch in enumerate(list(make_loader()) * 2):
        optimizer.zero_grad()
        optimizer.backward(three_losses(network, batch))
        optimizer.step()
        if index % k == 0:
            with torch.no_grad():
                slow = [p.clone() for p in network.parameters()] if slow is None else slow
                for p, kept in zip(network.parameters(), slow, strict=True):
                    kept += (p - kept) * alpha
                    p.copy_(kept)


MODES = [{}, {"balance_every": 3}, {"low_memory": True}, {"terms": ("fit", "size", "decay")}]
in_every_mode = pytest.mark.parametrize("mode", MODES, ids=str)


@in_every_mode
@pytest.mark.parametrize("wrap", [Lookahead, InItsState])
def test_lookahead_steps_as_a_loop_by_hand(wrap, mode):
    network, other = make_network(), make_network()
    optimizer = make_mtadam(network, **mode)
    wrapper = wrap(optimizer)
    for batch in list(make_loader()) * 2:
        wrapper.zero_grad()
        optimizer.backward(three_losses(network, batch))
        wrapper.step()
    looked_ahead(other, make_mtadam(other, **mode))
    assert_same(network, other)


@in_every_mode
def test_what_is_prepared_steps_as_what_is_not(mode):
    networks = make_network(), make_network()
    for network, wrap in zip(networks, (Prepared, lambda optimizer: optimizer), strict=True):
        optimizer = make_mtadam(network, **mode)
        wrapper = wrap(optimizer)
        for batch in make_loader():
            optimizer.backward(three_losses(network, batch))
            wrapper.step()
            wrapper.zero_grad()
    assert_same(*networks)


@pytest.mark.parametrize("mode", [{}, {"terms": ("fit", "size", "decay")}, {"layers": "module"}], ids=str)
@pytest.mark.parametrize("as_closure", [False, True])
def test_sam_ascends_along_p_grad_and_steps_from_where_it_was(mode, as_closure):
    """Up by rho along the gradient that it found in p.grad; then a step of MTAdam with the gradients from there."""
    network, other = make_network(), make_network()
    sam = SAM(network.named_parameters(), MTAdam, lr=1e-2, **mode) if not mode else None
    if sam is None:
        sam = SAM(network.named_parameters(), lambda groups, **options: MTAdam(groups, **options, **mode), lr=1e-2)
    base, by_hand = sam.base_optimizer, make_mtadam(other, **mode)
    for batch in make_loader():
        base.backward(three_losses(network, batch))
        if as_closure:
            sam.step(lambda batch=batch: base.backward(three_losses(network, batch)))
            sam.zero_grad()
        else:
            sam.first_step(zero_grad=True)
            base.backward(three_losses(network, batch))
            sam.second_step(zero_grad=True)
        by_hand.backward(three_losses(other, batch))
        before = [p.detach().clone() for p in other.parameters()]
        norm = torch.stack([p.grad.norm() for p in other.parameters()]).norm()
        with torch.no_grad():
            for p in other.parameters():
                p += p.grad * (0.05 / (norm + 1e-12))
        by_hand.zero_grad()
        by_hand.backward(three_losses(other, batch))
        with torch.no_grad():
            for p, kept in zip(other.parameters(), before, strict=True):
                p.copy_(kept)
        by_hand.step()
        by_hand.zero_grad()
    assert largest_difference(network, other) < 1e-14
    assert largest_difference(network, make_network()) > 1e-2
    assert all(group["steps"] == 6 for group in base.param_groups)


def scaled(mode=None, accumulate=1, scale=256.0, dtype=torch.float64):
    """Under a scaler, by the documented calls; ``scale=None``: without one."""
    network = make_network(dtype)
    optimizer = make_mtadam(network, **(mode or {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=2, enabled=scale is not None)
    for index, batch in enumerate(make_loader(8, dtype)):
        factor = scaler.scale(torch.ones((), dtype=dtype))
        loss_scale = None if scale is None else factor
        losses = three_losses(network, batch)
        optimizer.backward(losses, grad_output=factor / accumulate, loss_scale=loss_scale)
        if (index + 1) % accumulate == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return network, scaler


@pytest.mark.parametrize("mode", [{}, {"balance_every": 3}, {"denominator": "own"}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_a_scaler_it_steps_as_without(mode, accumulate):
    """Its scale is a power of two, and grows meanwhile."""
    network, scaler = scaled(mode, accumulate)
    assert scaler.get_scale() > 256
    assert largest_difference(network, scaled(mode, accumulate, scale=None)[0]) < 1e-12


def test_a_step_that_a_scaler_skips_changes_nothing():
    network = make_network(torch.float32)
    optimizer, scaler = make_mtadam(network), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scale = scaler.scale(torch.ones(()))
    losses = three_losses(network, next(iter(make_loader(dtype=torch.float32))))
    losses["size"] = losses["size"] * torch.inf
    optimizer.backward(losses, grad_output=scale, loss_scale=scale)
    scaler.step(optimizer)
    scaler.update()
    assert_same(network, make_network(torch.float32))
    assert scaler.get_scale() == 2.0**7


def step_after_plain_backward(wrap):
    network = make_network()
    optimizer = make_mtadam(network)
    total(three_losses(network, next(iter(make_loader())))).backward()
    with pytest.raises(RuntimeError, match="step\\(\\) has nothing to consume") as raised:
        wrap(optimizer).step()
    assert_same(network, make_network())
    return str(raised.value)


@pytest.mark.parametrize("wrap", [Lookahead, Prepared])
def test_a_wrapper_that_steps_in_vain_is_named(wrap):
    message = step_after_plain_backward(wrap)
    assert f"It is wrapped: {wrap.__name__} holds this MTAdam as .optimizer." in message
    assert "wrapper.optimizer.backward({'name': loss, ...}), and then wrapper.step()" in message


def test_so_is_one_around_another():
    message = step_after_plain_backward(lambda optimizer: Lookahead(Prepared(optimizer)))
    assert "Prepared holds this MTAdam as .optimizer" in message


def test_sam_in_vain_is_named():
    sam = SAM(make_network().named_parameters(), MTAdam, lr=1e-2)
    with pytest.raises(RuntimeError, match=r"SAM holds this MTAdam as \.base_optimizer"):
        sam.second_step()


def test_a_scaler_that_steps_in_vain_is_named():
    network = make_network(torch.float32)
    optimizer, scaler = make_mtadam(network), torch.amp.GradScaler("cpu")
    losses = three_losses(network, next(iter(make_loader(dtype=torch.float32))))
    scaler.scale(total(losses)).backward()
    with pytest.raises(RuntimeError, match=r"A GradScaler steps it: .*grad_output=scale, loss_scale=scale\)") as raised:
        scaler.step(optimizer)
    assert str(raised.value).count("GradScaler") == 1


def test_an_optimizer_that_is_not_wrapped_is_not_said_to_be():
    assert "wrapped" not in step_after_plain_backward(lambda optimizer: optimizer)


@QUIET
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}], ids=str)
@pytest.mark.parametrize("wrap", [Lookahead, Prepared, lambda optimizer: Lookahead(Prepared(optimizer))])
def test_the_module_finds_what_is_wrapped(wrap, options):
    """One that does not look ahead within so few steps is as what it wraps."""

    def make(network):
        wrapper = wrap(make_mtadam(network))
        wrapper.alpha = 1.0
        return wrapper

    wrapped, plain = Regression(make), Regression()
    for module in (wrapped, plain):
        fit(module, make_loader(), **options)
    assert_same(wrapped, plain)


@QUIET
def test_the_module_looks_ahead():
    module, other = Regression(lambda network: Lookahead(make_mtadam(network))), make_network()
    fit(module, make_loader())
    looked_ahead(other, make_mtadam(other))
    assert_same(module.network, other)


@QUIET
def test_under_the_trainers_scaler_too():
    wrapped, plain = (
        Regression(make, dtype=torch.float32) for make in (lambda n: Prepared(make_mtadam(n)), make_mtadam)
    )
    for module in (wrapped, plain):
        fit(module, make_loader(dtype=torch.float32), plugins=[half_precision(2.0**8)])
    assert_same(wrapped, plain)


@QUIET
def test_what_is_wrapped_is_logged():
    logger = MemoryLogger()
    module = Regression(lambda network: Lookahead(make_mtadam(network)))
    fit(module, make_loader(), logger=logger, log_every_n_steps=1, callbacks=[BalanceWeightMonitor("step")])
    assert any(name.startswith("balance_weight") for _, row in logger.rows for name in row)


@QUIET
def test_sam_in_manual_optimization():
    class Sharp(Regression):
        def training_step(self, batch, batch_idx):
            sam = self.optimizers()
            self.backward_terms(three_losses(self.network, batch), sam)
            sam.optimizer.first_step(zero_grad=True)
            self.backward_terms(three_losses(self.network, batch), sam)
            sam.optimizer.second_step(zero_grad=True)

    module = Sharp(lambda network: SAM(network.named_parameters(), MTAdam, lr=1e-2))
    module.automatic_optimization = False
    fit(module, make_loader(), max_epochs=1)
    network = make_network()
    sam = SAM(network.named_parameters(), MTAdam, lr=1e-2)
    for batch in make_loader():
        sam.base_optimizer.backward(three_losses(network, batch))
        sam.first_step(zero_grad=True)
        sam.base_optimizer.backward(three_losses(network, batch))
        sam.second_step(zero_grad=True)
    assert_same(module.network, network)


class Both(torch.optim.Optimizer):
    """MTAdam for some parameters and another for the rest: no wrapper of MTAdam."""

    def __init__(self, mtadam, other):
        self.mtadam, self.other = mtadam, other
        self.param_groups = [*mtadam.param_groups, *other.param_groups]
        self.defaults, self.state = {}, defaultdict(dict)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.mtadam.step()
        self.other.step()
        return loss


def both(network):
    return Both(make_mtadam(network[0]), torch.optim.SGD(network[2].parameters(), lr=1e-2))


def test_what_holds_an_mtadam_for_a_part_only_says_how_to_call_it():
    network = make_network()
    optimizer = both(network)
    torch.stack([*three_losses(network, next(iter(make_loader()))).values()]).sum().backward()
    with pytest.raises(RuntimeError, match=r"Both holds this MTAdam as \.mtadam.*wrapper\.mtadam\.backward"):
        optimizer.step()


@QUIET
def test_a_trainer_refuses_what_holds_an_mtadam_for_a_part_only():
    with pytest.raises(MisconfigurationException, match="Both holds an MTAdam that trains only some"):
        fit(Regression(both), make_loader())


@pytest.mark.parametrize("wrap", [Lookahead, Prepared])
@pytest.mark.parametrize(
    "make_balancer", [lambda: FixedWeights({"fit": 1.0, "size": 0.1, "decay": 1.0}), MetaBalance, lambda: GradNorm("0")]
)
def test_a_balancer_takes_the_wrapper(make_balancer, wrap):
    """It is told of the wrapped optimizer's steps: gradients that are left as they are do not accumulate its state."""
    networks = make_network(), make_network()
    for network, around in zip(networks, (wrap, lambda optimizer: optimizer), strict=True):
        optimizer, balancer = around(torch.optim.Adam(network.parameters(), lr=1e-2)), make_balancer()
        optimizer.alpha = 1.0
        for batch in make_loader():
            balancer.backward(three_losses(network, batch), optimizer, model=network)
            optimizer.step()
            for parameter in network.parameters():
                parameter.grad = 0.5 * parameter.grad  # what is left of an earlier step, as with momentum by hand
    assert_same(*networks)


class Accelerated:
    """The program of the page, and what it is held to."""

    def __init__(self):
        (program,) = blocks(PAGE, "py")
        self.program = program

    def run(self, folder, **options):
        path = folder / "train_accelerate.py"
        path.write_text(self.program)
        return runpy.run_path(str(path))["main"](**options)

    def by_hand(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        optimizer = MTAdam(network.named_parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1)).split(4)
        for index, x in enumerate(data):
            error = network(x) - x
            losses = {"sq": error.square().mean(), "ab": 9 * error.abs().mean()}
            optimizer.backward({name: loss / 2 for name, loss in losses.items()})
            if index % 2:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        return network


@pytest.mark.filterwarnings("default")
def test_accelerate_trains_as_a_loop_by_hand(tmp_path):
    pytest.importorskip("accelerate")
    accelerated = Accelerated()
    accelerator, network, optimizer = accelerated.run(tmp_path, cpu=True)
    assert largest_difference(network, accelerated.by_hand()) < 1e-6
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.load_state(str(tmp_path / "state"))
    x = torch.ones(4, 6)
    loss = (network(x) - x).square().mean()
    optimizer.zero_grad()
    accelerator.backward(loss)
    with pytest.raises(RuntimeError, match=r"AcceleratedOptimizer holds this MTAdam as \.optimizer"):
        optimizer.step()

"""What holds for every balancer: the Trainer's flags, several processes, resuming, and the errors."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_mtadam import MTAdam, NonFiniteError
from lightning_mtadam.callbacks import BalanceWeightMonitor
from tests.balancers.cases import CASES, Balanced, balanced_by_hand, fit_from
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank, joined_rounds, rounds
from tests.lightning_models import (
    QUIET,
    StepwiseRegression,
    assert_same,
    fit,
    largest_difference,
    make_loader,
    needs_exact_resume,
)

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*tensorboardX")]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def state_of(balancer):
    return balancer.state_dict()["state"]


def assert_same_balance(first, second):
    assert first.terms == second.terms
    assert state_of(first).keys() == state_of(second).keys()
    for key, value in state_of(first).items():
        assert torch.equal(value, state_of(second)[key]), key


@every_case
@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}], ids=str)
def test_the_trainer_equals_the_hand_written_loop(case, flags):
    module = Balanced(case)
    fit(module, make_loader(), **flags)
    clip = (flags["gradient_clip_val"], "norm") if "gradient_clip_val" in flags else None
    accumulate = flags.get("accumulate_grad_batches", 1)
    by_hand = balanced_by_hand(case, make_loader(), epochs=2, accumulate=accumulate, clip=clip)
    assert_same(module, by_hand)
    assert_same_balance(module.balancer, by_hand.balancer)


@every_case
def test_accumulated_batches_count_as_one(case):
    if not case.joins:
        pytest.skip("this balancer counts every batch by itself, as its documentation says")
    apart = balanced_by_hand(case, make_loader(12), accumulate=2)
    joined = balanced_by_hand(case, joined_rounds(2, 6, torch.float64))
    assert largest_difference(apart, joined) < 1e-10


def rank_of(rank, case):
    module = Balanced(case)
    fit_rank(module, rank, rounds(2, 10, torch.float64))
    return [parameter.detach() for parameter in module.parameters()], module.balancer.state_dict()


@every_case
def test_two_ranks_equal_one_process(case, tmp_path):
    (first, balance), (second, other) = results(run_ranks(rank_of, tmp_path, case))
    alone = balanced_by_hand(case, joined_rounds(2, 10, torch.float64))
    for one, two, expected in zip(first, second, alone.parameters(), strict=True):
        assert torch.equal(one, two)
        assert float((one - expected.detach()).abs().max()) < 1e-6
    for key, value in balance["state"].items():
        assert torch.equal(value, other["state"][key])
        assert torch.allclose(value, state_of(alone.balancer)[key], rtol=1e-6, atol=1e-9), key


class Stepwise(Balanced):
    """Its batches depend on the number of the step only, so that a resumed run sees the same ones."""

    def training_step(self, batch, batch_idx):
        return super().training_step(StepwiseRegression.batches[self.trainer.global_step % 7], batch_idx)


@needs_exact_resume
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@every_case
def test_resume_continues_bitwise(case, tmp_path):
    whole, resumed = Stepwise(case), Stepwise(case)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(whole, make_loader(), enable_checkpointing=True, callbacks=[checkpoint])
    fit_from(resumed, tmp_path / "step=4.ckpt")
    assert_same(resumed, whole)
    assert_same_balance(resumed.balancer, whole.balancer)


@every_case
def test_mixed_precision_stays_near_single_precision(case):
    mixed, single = Balanced(case, torch.float32), Balanced(case, torch.float32)
    fit(mixed, make_loader(dtype=torch.float32), precision="bf16-mixed")
    fit(single, make_loader(dtype=torch.float32))
    assert not torch.equal(mixed.network[0].weight, single.network[0].weight)
    assert largest_difference(mixed, single) < 0.1


class Manual(Balanced):
    def __init__(self, case):
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_terms(self.case.losses(self.network, batch), optimizer)
        optimizer.step()


@every_case
def test_manual_optimization_equals_the_hand_written_loop(case):
    module = Manual(case)
    fit(module, make_loader())
    assert_same(module, balanced_by_hand(case, make_loader(), epochs=2))


@every_case
def test_parameters_get_the_gradient_that_the_balancer_makes_and_no_other(case):
    """What is looked at on the way, at a shared layer for example, must not be added to it."""
    module = balanced_by_hand(case, make_loader())
    batch = next(iter(make_loader(seed=4)))
    found = []
    for _ in range(2):
        other = copy.deepcopy(module)
        balancer, optimizer = other.balancer, other.configure_optimizers()
        balancer.attach(other)
        optimizer.zero_grad()
        balancer.backward(case.losses(other.network, batch), optimizer, model=other)
        found.append([parameter.grad.clone() for parameter in other.network.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def spoiled(case, spoil):
    """A module, its balancer and its optimizer after some steps, and losses of which one is spoiled."""
    module = balanced_by_hand(case, make_loader())
    losses = case.losses(module.network, next(iter(make_loader())))
    return module, module.balancer, module.configure_optimizers(), spoil(losses)


WRONG = {
    "empty": (lambda losses: {}, ValueError, "losses is empty"),
    "vector": (lambda losses: {**losses, "fit": losses["fit"][None]}, ValueError, "must be a scalar tensor"),
    "no graph": (lambda losses: {**losses, "fit": losses["fit"].detach()}, ValueError, "has no graph"),
    "unknown": (lambda losses: {**losses, "fitt": losses["fit"]}, ValueError, "Did you mean 'fit'"),
    "nan": (lambda losses: {**losses, "fit": losses["fit"] * torch.nan}, NonFiniteError, r"losses\['fit'\] is nan"),
}


@every_case
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_losses_raise_and_change_nothing(case, wrong):
    spoil, error, message = WRONG[wrong]
    module, balancer, optimizer, losses = spoiled(case, spoil)
    before, state = copy.deepcopy(module.state_dict()), state_of(balancer)
    with pytest.raises(error, match=message):
        balancer.backward(losses, optimizer, model=module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(torch.equal(value, state[key]) for key, value in state_of(balancer).items())


@every_case
def test_a_term_may_be_absent_in_some_steps(case):
    module, balancer, optimizer, losses = spoiled(case, dict)
    del losses["size"]
    balancer.backward(losses, optimizer, model=module)
    optimizer.step()
    assert all(bool(value.isfinite().all()) for value in state_of(balancer).values())
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@every_case
def test_with_mtadam_it_is_refused(case):
    module = Balanced(case)
    module.configure_optimizers = lambda: MTAdam(module.named_parameters())
    with pytest.raises(Exception, match="MTAdam balances the losses by itself"):
        fit(module, make_loader())


@every_case
def test_a_training_step_must_name_its_losses(case):
    module = Balanced(case)
    module.training_step = lambda batch, batch_idx: module.network(batch[0]).mean()
    with pytest.raises(TypeError, match="Return a dict of named scalar losses"):
        fit(module, make_loader())


@every_case
def test_a_checkpoint_of_another_balancer_is_refused(case, tmp_path):
    module = Balanced(case)
    fit(module, make_loader()).save_checkpoint(tmp_path / "other.ckpt")
    saved = torch.load(tmp_path / "other.ckpt", weights_only=True)
    saved["lightning_mtadam_balancer"]["balancer"] = "Other"
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="holds the state of the balancer Other"):
        fit_from(Balanced(case), tmp_path / "other.ckpt")


@every_case
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_a_scaler_skips_changes_nothing(case, set_to_none):
    """Neither parameters nor the balance: as if the batch that overflows had not been there."""
    batches = list(make_loader(5, torch.float32))
    spoiled = [*batches[:2], [batches[2][0] * torch.inf, batches[2][1]], *batches[2:]]
    found = []
    for given in (batches, spoiled):
        module = Balanced(case, torch.float32)
        balancer, optimizer = module.balancer, module.configure_optimizers()
        balancer.attach(module)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, backoff_factor=0.5, growth_interval=100)
        for batch in given:
            optimizer.zero_grad(set_to_none=set_to_none)
            losses, scale = case.losses(module.network, batch), torch.tensor(scaler.get_scale())
            balancer.backward(losses, optimizer, model=module, grad_output=scale, loss_scale=scale)
            scaler.scale(torch.ones(()))  # it must have been used
            scaler.step(optimizer)
            scaler.update()
        found.append(module)
    for one, two in zip(*(module.parameters() for module in found), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    for key, value in state_of(found[0].balancer).items():
        torch.testing.assert_close(state_of(found[1].balancer)[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_a_checkpoint_of_a_balancer_needs_one(tmp_path):
    case = CASES["gradnorm"]
    fit(Balanced(case), make_loader()).save_checkpoint(tmp_path / "balanced.ckpt")
    plain = Balanced(case)
    plain.configure_balancer = lambda: None
    with pytest.raises(ValueError, match="made with the balancer GradNorm, but the module has none"):
        fit_from(plain, tmp_path / "balanced.ckpt")


def test_a_balancer_says_that_it_starts_anew(tmp_path):
    plain = Balanced(CASES["gradnorm"])
    plain.configure_balancer = lambda: None
    fit(plain, make_loader(), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="GradNorm starts anew"):
        fit_from(Balanced(CASES["gradnorm"]), tmp_path / "plain.ckpt")


def gradients_after(case, prepare):
    """What a second batch makes, of which ``prepare`` has seen parameters and optimizer before."""
    module = balanced_by_hand(case, make_loader())
    balancer, optimizer = module.balancer, module.configure_optimizers()
    for index, batch in enumerate(make_loader(2, seed=4)):
        if index:
            prepare(optimizer)
        else:
            optimizer.zero_grad()
        balancer.backward(case.losses(module.network, batch), optimizer, model=module)
    return [parameter.grad.clone() for parameter in module.network.parameters()]


@every_case
def test_gradients_set_to_zero_do_not_count(case):
    dropped = gradients_after(case, lambda optimizer: optimizer.zero_grad())
    zeroed = gradients_after(case, lambda optimizer: optimizer.zero_grad(set_to_none=False))
    assert all(torch.equal(one, two) for one, two in zip(dropped, zeroed, strict=True))


@every_case
def test_gradients_that_were_there_before_the_step_are_kept(case):
    def penalise(optimizer):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 3.0)

    alone = gradients_after(case, lambda optimizer: (optimizer.step(), optimizer.zero_grad()))
    both = gradients_after(case, lambda optimizer: (optimizer.step(), penalise(optimizer)))
    for one, two in zip(alone, both, strict=True):
        torch.testing.assert_close(two, one + 3.0)


@every_case
def test_weights_load_without_a_trainer(case, tmp_path):
    module = Balanced(case)
    fit(module, make_loader()).save_checkpoint(tmp_path / "whole.ckpt")
    assert_same(Balanced.load_from_checkpoint(tmp_path / "whole.ckpt", case=case), module)


@every_case
def test_weights_are_logged(case, tmp_path):
    module = Balanced(case)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(module, make_loader(), logger=logger, callbacks=[BalanceWeightMonitor()], log_every_n_steps=1)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    if module.balancer.term_weights():
        assert {f"term_weight/{term}" for term in module.balancer.terms} <= set(header)
    if module.balancer.balance_weights():
        assert any(tag.startswith("balance_weight/") for tag in header)


class Doubled(torch.autograd.Function):
    """The loss itself, with twice its gradient."""

    @staticmethod
    def forward(ctx, loss, in_place):
        ctx.in_place = in_place
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(2) if ctx.in_place else 2 * gradient, None


@every_case
def test_a_loss_whose_backward_works_in_place_leaves_the_others_alone(case):
    def with_doubled(in_place):
        def losses(network, batch):
            return {name: Doubled.apply(loss, in_place) for name, loss in case.losses(network, batch).items()}

        return replace(case, losses=losses)

    plain, in_place = (balanced_by_hand(with_doubled(flag), make_loader(), accumulate=2) for flag in (False, True))
    assert_same(in_place, plain)
    assert_same_balance(in_place.balancer, plain.balancer)


class Fused(torch.autograd.Function):
    """A mean of squares that makes its gradient in its forward pass, as fused losses do, and scales it in backward."""

    @staticmethod
    def forward(ctx, error):
        ctx.gradient = 2 * error.detach() / error.numel()
        return error.square().mean()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.gradient.mul_(gradient)


@every_case
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_fused_loss_trains_as_any_other(case, accumulate):
    def with_fit(square_mean):
        def losses(network, batch):
            return {**case.losses(network, batch), "fit": square_mean(network(batch[0]) - batch[1])}

        return replace(case, losses=losses)

    plain, fused = (with_fit(mean) for mean in (lambda error: error.square().mean(), Fused.apply))
    first, second = (balanced_by_hand(each, make_loader(8), accumulate=accumulate) for each in (plain, fused))
    assert largest_difference(first, second) < 1e-12


@every_case
def test_a_retained_graph_is_there_for_another_optimizer(case):
    """The balancer's parameters get what they get alone, and the others what a graph of their own gives."""
    module, alone = Balanced(case), Balanced(case)
    batch = next(iter(make_loader()))
    for each in (module, alone):
        each.balancer.attach(each)
    optimizer = module.configure_optimizers()
    losses = case.losses(module.network, batch)
    module.balancer.backward(losses, optimizer, model=module, retain_graph=True)
    found = [parameter.grad.clone() for parameter in module.network.parameters()]
    again = torch.autograd.grad(losses["fit"], list(module.network.parameters()))
    alone.balancer.backward(case.losses(alone.network, batch), alone.configure_optimizers(), model=alone)
    assert all(
        torch.equal(one, parameter.grad) for one, parameter in zip(found, alone.network.parameters(), strict=True)
    )
    fresh = torch.autograd.grad(case.losses(module.network, batch)["fit"], list(module.network.parameters()))
    assert all(map(torch.equal, again, fresh))


@every_case
def test_without_it_a_second_backward_pass_says_how_to_keep_the_graph_and_changes_nothing(case):
    module = Balanced(case)
    module.balancer.attach(module)
    optimizer, losses = module.configure_optimizers(), case.losses(module.network, next(iter(make_loader())))
    losses.pop("decay", None)  # which has no graph in common with the others
    module.balancer.backward(losses, optimizer, model=module)
    optimizer.zero_grad()
    before = copy.deepcopy(module.balancer.state_dict())
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        module.balancer.backward(losses, optimizer, model=module)
    assert all(torch.equal(value, state_of(module.balancer)[key]) for key, value in before["state"].items())
    assert all(parameter.grad is None for parameter in module.network.parameters())


@every_case
def test_what_is_read_in_inference_mode_does_not_disturb_the_next_step(case):
    seen, other = Balanced(case), Balanced(case)
    for module in (seen, other):
        module.balancer.attach(module)
        optimizer = module.configure_optimizers()
        for batch in make_loader():
            with torch.inference_mode():
                if module is seen:
                    module.network(batch[0])
                    balancer = module.balancer
                    for name in ("balance_weights", "gradient_norms", "scales", "average_weights", "term_weights"):
                        getattr(balancer, name)()
                    balancer.load_state_dict(balancer.state_dict())
            optimizer.zero_grad()
            module.balancer.backward(case.losses(module.network, batch), optimizer, model=module)
            optimizer.step()
    assert_same(seen, other)

"""TorchJD's scalarizers: equal to TorchJD's own loops, with what they remember, learn and refuse."""

import copy

import jsonargparse
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchjd.aggregation import UPGrad
from torchjd.scalarization import (
    COSMOS,
    DWA,
    FAMO,
    IMTLL,
    PBI,
    STCH,
    UW,
    Constant,
    GeometricMean,
    Mean,
    Random,
    Sum,
)

from lightning_mtadam import MultiTermLightningModule, NonFiniteError
from lightning_mtadam.balancers import Balancer, ScalarizerBalancer, TorchJDBalancer, UncertaintyWeighting
from lightning_mtadam.balancers.aggregator_memory import drawing_from
from tests.balancers.cases import TERMS
from tests.balancers.gradients import assert_close, assert_resumed_bitwise, shown
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import assert_equal_to_alone, fit_rank, rounds
from tests.lightning_models import (
    QUIET,
    StepwiseRegression,
    assert_same,
    fit,
    make_loader,
    make_network,
    make_trainer,
    needs_exact_resume,
    sgd,
    three_losses,
)

pytestmark = QUIET
BATCHES = list(make_loader(6))
WEIGHTS = torch.tensor([1.0, 0.01, 3.0], dtype=torch.float64)
MEMORYLESS = {
    "constant": lambda: Constant(WEIGHTS),
    "COSMOS": lambda: COSMOS(0.5, WEIGHTS),
    "geometric mean": GeometricMean,
    "mean": Mean,
    "PBI": lambda: PBI(2.0, WEIGHTS),
    "random": Random,
    "STCH": lambda: STCH(0.3, WEIGHTS),
    "sum": Sum,
}


def stacked(losses):
    return torch.stack(list(losses.values()))


@pytest.mark.parametrize("make", MEMORYLESS.values(), ids=MEMORYLESS)
def test_it_is_what_torchjd_makes_of_the_same_losses(make):
    network, scalarizer = make_network(), make()
    balancer, optimizer = ScalarizerBalancer(make(), seed=5), sgd(network)
    for step, batch in enumerate(BATCHES):
        optimizer.zero_grad()
        with drawing_from(f"5/{step}", torch.device("cpu")):
            scalarizer(stacked(three_losses(network, batch))).backward()
        expected = [parameter.grad for parameter in network.parameters()]
        assert_close(shown(balancer, three_losses(network, batch), network), expected, 1e-12)
        optimizer.step()


@pytest.mark.parametrize("told", ["the same batch", "the next batch"])
def test_famo_equals_torchjds_own_loop(told):
    ours, other = make_network(), make_network()
    balancer, famo = ScalarizerBalancer(FAMO(3, lr=0.1)), FAMO(3, lr=0.1).double()
    optimizer, other_optimizer = sgd(ours), sgd(other)
    for step, batch in enumerate(BATCHES):
        optimizer.zero_grad()
        balancer.backward(three_losses(ours, batch), optimizer, model=ours)
        optimizer.step()
        if told == "the same batch":
            with torch.no_grad():
                balancer.update(three_losses(ours, batch))
        losses = three_losses(other, batch)
        if told == "the next batch" and step > 0:
            famo.update(stacked(losses).detach())
        other_optimizer.zero_grad()
        famo(stacked(losses)).backward()
        other_optimizer.step()
        if told == "the same batch":
            famo.update(stacked(three_losses(other, batch)).detach())
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    torch.testing.assert_close(balancer.state["_w"], famo._w.detach(), rtol=0, atol=1e-12)
    assert float(balancer.state["_w"].abs().max()) > 0.01  # it did learn


class Told(MultiTermLightningModule):
    """Tells FAMO the losses after the step, in the hook that its documentation names."""

    def __init__(self):
        super().__init__()
        self.network = make_network()
        self.balancer = ScalarizerBalancer(FAMO(3))

    def training_step(self, batch, batch_idx):
        return three_losses(self.network, batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.balancer.update(self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return sgd(self.network)


def test_under_a_trainer_famo_is_told_in_a_hook_and_once_a_step():
    module, twice = Told(), Told()
    fit(module, make_loader(), max_epochs=1)
    again = twice.on_train_batch_end
    twice.on_train_batch_end = lambda *given: (again(*given), again(*given))
    fit(twice, make_loader(), max_epochs=1)
    other, famo = make_network(), FAMO(3).double()
    optimizer = sgd(other)
    for batch in make_loader():
        optimizer.zero_grad()
        famo(stacked(three_losses(other, batch))).backward()
        optimizer.step()
        famo.update(stacked(three_losses(other, batch)).detach())
    for found in (module, twice):
        for one, two in zip(found.network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def told_rank(rank):
    module = Told()
    fit_rank(module, rank, rounds(2, 10, torch.float64))
    return [parameter.detach() for parameter in module.parameters()]


def test_what_two_ranks_tell_famo_equals_what_one_process_does(tmp_path):
    assert_equal_to_alone(results(run_ranks(told_rank, tmp_path)), Told(), 10)


def test_what_cannot_be_updated_says_so():
    with pytest.raises(TypeError, match="STCH does not go by the losses after a step"):
        ScalarizerBalancer(STCH(0.5)).update({})


def test_an_update_with_losses_that_famo_cannot_take_changes_nothing():
    network, balancer = make_network(), ScalarizerBalancer(FAMO(3))
    balancer.update({})  # before any step it means nothing
    optimizer = sgd(network)
    losses = three_losses(network, BATCHES[0])
    balancer.backward(losses, optimizer, model=network)
    optimizer.step()
    before = balancer.state_dict()["state"]
    for wrong, error, message in (
        ({"fitt": losses["fit"]}, ValueError, "Did you mean 'fit'"),
        ({"fit": losses["fit"] * torch.nan}, NonFiniteError, "is nan"),
        ({"fit": -losses["fit"]}, ValueError, r"losses\['fit'\] is -.*takes the logarithm"),
    ):
        with pytest.raises(error, match=message):
            balancer.update(wrong)
        assert all(torch.equal(value, before[key]) for key, value in balancer.state_dict()["state"].items())


# Epochs


class ByEpochs(MultiTermLightningModule):
    def __init__(self):
        super().__init__()
        self.network = make_network()

    def training_step(self, batch, batch_idx):
        return three_losses(self.network, StepwiseRegression.batches[self.trainer.global_step % 7])

    def configure_balancer(self):
        return ScalarizerBalancer(DWA(temperature=0.5))

    def configure_optimizers(self):
        return sgd(self.network)


def test_dwa_takes_its_step_at_the_end_of_an_epoch():
    module = ByEpochs()
    fit(module, make_loader(4), max_epochs=5)
    other, dwa = make_network(), DWA(temperature=0.5)
    optimizer = sgd(other)
    for step in range(20):
        optimizer.zero_grad()
        dwa(stacked(three_losses(other, StepwiseRegression.batches[step % 7]))).backward()
        optimizer.step()
        if step % 4 == 3:
            dwa.step()
    for one, two in zip(module.network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    weights = stacked(module.balancer.term_weights())
    assert float(weights.max() - weights.min()) > 1e-3
    assert float(weights.sum()) == pytest.approx(3)


@needs_exact_resume
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("when", "step"),
    [({"every_n_epochs": 3, "save_on_train_epoch_end": True}, 12), ({"every_n_train_steps": 14}, 14)],
    ids=["at the end of an epoch", "within one"],
)
def test_dwa_continues_bitwise(when, step, tmp_path):
    whole, resumed = ByEpochs(), ByEpochs()
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    fit(whole, make_loader(4), max_epochs=6, enable_checkpointing=True, callbacks=[checkpoint])
    make_trainer(max_epochs=6).fit(resumed, make_loader(4), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_same(resumed, whole)
    one, two = resumed.balancer.state_dict()["state"], whole.balancer.state_dict()["state"]
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_dwa_needs_every_term_in_every_step():
    network, balancer = make_network(), ScalarizerBalancer(DWA(), terms=TERMS)
    losses = three_losses(network, BATCHES[0])
    del losses["size"]
    with pytest.raises(ValueError, match=r"DWA compares the mean of every loss.*lack \['size'\]"):
        shown(balancer, losses, network)


# What an optimizer learns


@pytest.mark.parametrize("make", [IMTLL, UW])
def test_what_is_learned_equals_torchjds_own_loop(make):
    ours, other = make_network(), make_network()
    balancer, scalarizer = ScalarizerBalancer(make(3).double()), make(3).double()
    optimizer = torch.optim.Adam([*ours.parameters(), *balancer.learned.parameters()], lr=0.05)
    other_optimizer = torch.optim.Adam([*other.parameters(), *scalarizer.parameters()], lr=0.05)
    for batch in BATCHES:
        optimizer.zero_grad()
        balancer.backward(three_losses(ours, batch), optimizer, model=ours)
        optimizer.step()
        other_optimizer.zero_grad()
        scalarizer(stacked(three_losses(other, batch))).backward()
        other_optimizer.step()
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    for one, two in zip(balancer.learned.parameters(), scalarizer.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), two.detach(), rtol=0, atol=1e-12)


def test_uw_is_uncertainty_weighting():
    found = []
    for balancer in (ScalarizerBalancer(UW(3).double(), terms=TERMS), UncertaintyWeighting(TERMS)):
        network = make_network()
        balancer.learned.double()
        optimizer = torch.optim.Adam([*network.parameters(), *balancer.learned.parameters()], lr=0.05)
        for step, batch in enumerate(BATCHES):
            losses = three_losses(network, batch)
            if step == 3:
                del losses["size"]
            optimizer.zero_grad()
            balancer.backward(losses, optimizer, model=network)
            optimizer.step()
        found.append([*network.parameters(), *balancer.learned.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=1e-12)


def test_an_optimizer_that_does_not_hold_what_is_learned_is_refused():
    network = make_network()
    with pytest.raises(ValueError, match="does not hold what IMTLL learns"):
        shown(ScalarizerBalancer(IMTLL(3)), three_losses(network, BATCHES[0]), network)


# Absent terms


@pytest.mark.parametrize("make", [GeometricMean, lambda: STCH(0.3), lambda: Constant(WEIGHTS), Mean])
def test_an_absent_term_has_no_part_in_a_step(make):
    network = make_network()
    losses = three_losses(network, BATCHES[0])
    del losses["size"]
    alone = make()
    if isinstance(alone, Constant):
        alone = Constant(WEIGHTS[[0, 2]])
    expected = shown(ScalarizerBalancer(alone), dict(losses), network)
    balancer = ScalarizerBalancer(make(), terms=TERMS)
    losses = three_losses(network, BATCHES[0])
    del losses["size"]
    assert_close(shown(balancer, losses, network), expected, 0)
    assert float(balancer.term_weights()["size"]) == 0


def test_what_famo_remembers_of_an_absent_term_stays():
    network, balancer = make_network(), ScalarizerBalancer(FAMO(3, lr=0.1))
    optimizer = sgd(network)
    for step, batch in enumerate(BATCHES):
        before = {key: value.clone() for key, value in balancer.state.items()}
        losses = three_losses(network, batch)
        if step in (3, 4):
            del losses["size"]
        optimizer.zero_grad()
        balancer.backward(losses, optimizer, model=network)
        optimizer.step()
        if step in (3, 4):
            for key in ("_w", "_prev_losses", "_optimizer.0.exp_avg"):
                assert balancer.state[key][1] == before[key][1]
                assert balancer.state[key][0] != before[key][0]
    assert all(bool(value.isfinite().all()) for value in balancer.state.values())


# A step of two batches, and what is drawn


def test_a_step_of_two_batches_is_remembered_as_one():
    found = []
    for apart in (True, False):
        network, balancer = make_network(), ScalarizerBalancer(FAMO(3, lr=0.1))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)  # the weights of the first batch know it alone
        for pair in zip(BATCHES[::2], BATCHES[1::2], strict=True):
            optimizer.zero_grad()
            joined = [[torch.cat(tensors) for tensors in zip(*pair, strict=True)]]
            batches = pair if apart else joined
            for batch in batches:
                share = torch.tensor(1 / len(batches), dtype=torch.float64)
                balancer.backward(three_losses(network, batch), optimizer, model=network, grad_output=share)
            optimizer.step()
        found.append(balancer.state_dict()["state"])
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-10, atol=1e-12, msg=key)


def test_what_is_drawn_depends_on_the_seed_and_the_step_alone():
    network, state = make_network(), torch.get_rng_state()
    expected = shown(ScalarizerBalancer(Random(), seed=1), three_losses(network, BATCHES[0]), network)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert_close(shown(ScalarizerBalancer(Random(), seed=1), three_losses(network, BATCHES[0]), network), expected, 0)
    other = shown(ScalarizerBalancer(Random(), seed=2), three_losses(network, BATCHES[0]), network)
    assert not torch.equal(other[0], expected[0])


def test_a_copy_goes_on_by_itself():
    network, balancer = make_network(), ScalarizerBalancer(FAMO(3, lr=0.1))
    for batch in BATCHES[:3]:
        shown(balancer, three_losses(network, batch), network)
    copied = copy.deepcopy(balancer)
    expected = shown(copied, three_losses(network, BATCHES[3]), network)
    assert_close(shown(balancer, three_losses(network, BATCHES[3]), network), expected, 0)


# Errors


def refuse(balancer, losses, network, error, message):
    before = balancer.state_dict()["state"]
    with pytest.raises(error, match=message):
        shown(balancer, losses, network)
    after = balancer.state_dict()["state"]
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_another_number_of_terms_is_refused():
    network = make_network()
    losses = three_losses(network, BATCHES[0])
    refuse(ScalarizerBalancer(FAMO(2)), losses, network, ValueError, r"FAMO cannot take the losses \{'fit'.*\(2,\)")
    refuse(ScalarizerBalancer(Constant(WEIGHTS[:2])), losses, network, ValueError, "Constant cannot take the losses")


def shifted(losses, name, value):
    return {**losses, name: losses[name] - losses[name].detach() + value}


@pytest.mark.parametrize("value", [0.0, -3.0])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FAMO(3), r"losses\['size'\] is .*, but FAMO takes the logarithm of what it is above 0.0"),
        (GeometricMean, "GeometricMean (has no finite weights for|cannot take) the losses {.*'size'"),
    ],
    ids=["FAMO", "geometric mean"],
)
def test_a_loss_that_has_no_logarithm_is_named(make, message, value):
    network, balancer = make_network(), ScalarizerBalancer(make())
    shown(balancer, three_losses(network, BATCHES[0]), network)
    network.zero_grad()
    refuse(balancer, shifted(three_losses(network, BATCHES[1]), "size", value), network, ValueError, message)


def test_a_lower_bound_lets_famo_take_negative_losses():
    network = make_network()
    bounds = torch.tensor([0.0, -5.0, 0.0], dtype=torch.float64)
    balancer = ScalarizerBalancer(FAMO(3, min_losses=bounds))
    shown(balancer, shifted(three_losses(network, BATCHES[0]), "size", -3.0), network)
    network.zero_grad()
    losses = shifted(three_losses(network, BATCHES[1]), "size", -5.5)
    refuse(balancer, losses, network, ValueError, "of what it is above -5.0")


WRONG = {
    "vector": (lambda values: values * 2, TypeError, r"must make a scalar tensor.* made a tensor of shape \(3,\)"),
    "number": (lambda values: 1.0, TypeError, "must make a scalar tensor of the losses, but made float"),
    "no graph": (lambda values: values.detach().sum(), ValueError, "has no graph"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_scalarizer_returns_is_checked(wrong):
    scalarizer, error, message = WRONG[wrong]
    network = make_network()
    refuse(ScalarizerBalancer(scalarizer), three_losses(network, BATCHES[0]), network, error, message)


def test_scalarizers_and_aggregators_name_the_balancer_that_runs_them():
    with pytest.raises(TypeError, match=r"FAMO is a scalarizer.*ScalarizerBalancer\(FAMO\(\.\.\.\)\)"):
        TorchJDBalancer(FAMO(2))
    with pytest.raises(TypeError, match=r"UPGrad is an aggregator.*TorchJDBalancer\(UPGrad\(\.\.\.\)\)"):
        ScalarizerBalancer(UPGrad())
    with pytest.raises(TypeError, match="a str cannot be called"):
        ScalarizerBalancer("FAMO")


def test_it_is_built_from_a_configuration():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--balancer", type=Balancer)
    config = {
        "class_path": "lightning_mtadam.balancers.ScalarizerBalancer",
        "init_args": {
            "scalarizer": {"class_path": "torchjd.scalarization.FAMO", "init_args": {"shape": 2, "lr": 0.5}},
            "seed": 3,
        },
    }
    built = parser.instantiate_classes(parser.parse_object({"balancer": config})).balancer
    assert isinstance(built.scalarizer, FAMO)
    assert (built.scalarizer.lr, built.seed) == (0.5, 3)


class Counting(nn.Module):
    """A scalarizer of one's own, which keeps numbers, a list and a vector."""

    def __init__(self):
        super().__init__()
        self._calls, self._seen, self._sums = 0, [], None

    def forward(self, values):
        self._calls += 1
        self._seen = [*self._seen, values.detach()][-2:]
        self._sums = values.detach() if self._sums is None else self._sums + values.detach()
        return (values * (self._calls + self._seen[0] / self._sums)).sum()


@pytest.mark.parametrize("make", [Counting, lambda: FAMO(3), DWA])
def test_what_it_remembers_is_resumed_bitwise_in_another_process(make, tmp_path):
    assert_resumed_bitwise(ScalarizerBalancer(make()), ScalarizerBalancer(make()), BATCHES, 4, tmp_path)

"""A constant zero is a term that is absent, whoever takes the losses, and whatever mapping they are."""

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping

import pytest
import torch
from torch import nn

from lightning_mtadam import MTAdam, MultiTermLightningModule
from lightning_mtadam.collect import as_losses
from tests.balancers.cases import CASES, Balanced
from tests.distributed.ranks import results, run_ranks
from tests.distributed.training import fit_rank, joined_rounds, rounds
from tests.lightning_models import (
    QUIET,
    Regression,
    adam,
    assert_same,
    fit,
    make_loader,
    make_mtadam,
    make_network,
    three_losses,
)

pytestmark = QUIET
EVERY = ("fit", "size", "decay")
ZEROS = {
    "zeros": lambda loss: torch.zeros(()),
    "double": lambda loss: torch.zeros((), dtype=torch.float64),
    "negative": lambda loss: torch.tensor(-0.0),
    "detached": lambda loss: (0 * loss).detach(),
    "of its own": lambda loss: loss.detach().new_tensor(0.0, requires_grad=True),
}
MODES = {
    "mtadam": {},
    "mean": {"anchor": "mean"},
    "own": {"denominator": "own"},
    "light": {"balance_every": 3},
    "low memory": {"low_memory": True},
    "unbiased": {"norm_init": "unbiased"},
}
SCHEDULES = {
    "from the first step on": lambda step: "size" if step < 3 else None,
    "the anchor at first": lambda step: "fit" if step < 2 else None,
    "seldom there": lambda step: "size" if step % 4 else None,
    "never there": lambda step: "decay",
    "later": lambda step: "fit" if step in (3, 4) else None,
}


def given(losses, absent, zero):
    """The losses, of which one is absent: a zero, or left out where ``zero`` is ``None``."""
    if absent is None:
        return losses
    if zero is None:
        return {name: loss for name, loss in losses.items() if name != absent}
    return {name: zero(loss) if name == absent else loss for name, loss in losses.items()}


def trained(options, schedule, zero, terms=EVERY):
    network = make_network()
    optimizer = make_mtadam(network, terms=terms, **options)
    for step, batch in enumerate(make_loader(9)):
        optimizer.zero_grad()
        optimizer.backward(given(three_losses(network, batch), schedule(step), zero))
        optimizer.step()
    return network, optimizer


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_constant_zero_is_as_if_left_out(zero, schedule):
    network, _ = trained({}, SCHEDULES[schedule], ZEROS[zero])
    assert_same(network, trained({}, SCHEDULES[schedule], None)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("terms", [EVERY, None])
def test_in_every_mode_with_and_without_names(mode, schedule, terms):
    network, optimizer = trained(MODES[mode], SCHEDULES[schedule], ZEROS["zeros"], terms)
    expected, other = trained(MODES[mode], SCHEDULES[schedule], None)
    assert_same(network, expected)
    assert optimizer.terms == EVERY
    for layer, norms in optimizer.gradient_norms().items():
        torch.testing.assert_close(norms, other.gradient_norms()[layer])


def test_an_absent_term_does_not_make_light_steps_measured():
    _, optimizer = trained({"balance_every": 50}, lambda step: "size", ZEROS["zeros"], None)
    assert [term for term, _ in optimizer.param_groups[0]["measured"]] == ["fit", "decay"]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_over_accumulated_batches_a_term_is_there_in_some(accumulated):
    found = []
    for zero in (None, ZEROS["zeros"]):
        network = make_network()
        optimizer = make_mtadam(network, terms=EVERY)
        for step, batch in enumerate(make_loader(8)):
            if step % accumulated == 0:
                optimizer.zero_grad()
            optimizer.backward(given(three_losses(network, batch), "size" if step % 3 else None, zero))
            if (step + 1) % accumulated == 0:
                optimizer.step()
        found.append(network)
    assert_same(*found)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("zero", ["zeros", "of its own"])
@pytest.mark.parametrize("schedule", ["from the first step on", "seldom there"])
def test_for_every_balancer(case, zero, schedule):
    found = []
    for form in (ZEROS[zero], None):
        module = Balanced(case)
        balancer, optimizer = module.balancer, module.configure_optimizers()
        balancer.attach(module)
        for step, batch in enumerate(make_loader()):
            losses = case.losses(module.network, batch)
            if form is None and not balancer.terms:
                balancer._terms = tuple(losses)  # what it was given ahead
                if balancer.learned is not None:
                    balancer.learned.grow(len(losses))
            absent = {"size": "size", None: None}[SCHEDULES[schedule](step)]
            optimizer.zero_grad()
            balancer.backward(given(losses, absent, form), optimizer, model=module)
            optimizer.step()
        found.append(module)
    assert_same(*found)
    assert found[0].balancer.terms == found[1].balancer.terms
    for key, value in found[1].balancer.state.items():
        torch.testing.assert_close(found[0].balancer.state[key], value, rtol=0, atol=0)


class Coming(Regression):
    """Returns a constant zero for the absent term, or leaves it out."""

    zero = staticmethod(ZEROS["zeros"])
    schedule = staticmethod(SCHEDULES["from the first step on"])

    def training_step(self, batch, batch_idx):
        return given(three_losses(self.network, batch), self.schedule(batch_idx), self.zero)


@pytest.mark.parametrize(
    "make_optimizer", [lambda network: make_mtadam(network, terms=EVERY), adam], ids=["mtadam", "adam"]
)
@pytest.mark.parametrize("zero", ["zeros", "of its own"])
@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_in_the_module_with_mtadam_and_with_plain_adam(make_optimizer, zero, flags):
    with_zeros, without = Coming(make_optimizer), Coming(make_optimizer)
    with_zeros.zero, without.zero = ZEROS[zero], None
    trainer = fit(with_zeros, make_loader(), **flags)
    fit(without, make_loader(), **flags)
    assert_same(with_zeros, without)
    assert float(trainer.callback_metrics["train/size"]) > 0


def test_what_is_logged_of_an_absent_term_is_zero():
    module = Coming(adam)
    module.schedule = lambda step: "size"
    trainer = fit(module, make_loader())
    logged = trainer.callback_metrics
    assert float(logged["train/size"]) == 0
    assert float(logged["train/loss"]) == pytest.approx(float(logged["train/fit"] + logged["train/decay"]))


OTHERS = {
    "one": torch.ones(()),
    "small": torch.tensor(1e-30),
    "nan": torch.tensor(torch.nan),
    "leaf": torch.tensor(2.0, requires_grad=True),
}


@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
@pytest.mark.parametrize("other", OTHERS)
def test_any_other_constant_is_an_error(make_optimizer, other):
    module = Regression(make_optimizer)
    module.training_step = lambda batch, batch_idx: {**three_losses(module.network, batch), "extra": OTHERS[other]}
    with pytest.raises(ValueError, match=r"losses\['extra'\] has no graph.* log it instead"):
        fit(module, make_loader())
    assert_same(module.network, make_network())


@pytest.mark.parametrize("zero", ["zeros", "of its own"])
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_if_all_are_zero_there_is_nothing_to_train_on(zero, make_optimizer):
    module = Regression(make_optimizer)
    module.training_step = lambda batch, batch_idx: {
        name: ZEROS[zero](loss) for name, loss in three_losses(module.network, batch).items()
    }
    with pytest.raises(ValueError, match=r"losses\['fit'\] has no graph, nor .* there is nothing to train on"):
        fit(module, make_loader())


def test_a_loss_that_is_a_parameter_is_trained_also_at_zero():
    weight = nn.Parameter(torch.zeros(()))
    optimizer = MTAdam([weight], lr=0.1)
    optimizer.backward({"itself": weight})
    optimizer.step()
    assert weight.item() == pytest.approx(-0.1)


class OddMapping(MutableMapping):
    """As a TensorDict of no dimensions: no truth value, a length of zero, and no iteration but over keys."""

    def __init__(self, losses):
        self._losses = dict(losses)

    def __getitem__(self, name):
        return self._losses[name]

    def __setitem__(self, name, value):
        raise RuntimeError("locked")

    def __delitem__(self, name):
        raise RuntimeError("locked")

    def __iter__(self):
        raise TypeError("iteration over a 0-d tensordict")

    def __bool__(self):
        raise RuntimeError("Converting a tensordict to boolean value is not permitted")

    def __len__(self):
        return 0

    def __contains__(self, name):
        return name in self._losses

    def keys(self):
        return self._losses.keys()

    def items(self):
        return self._losses.items()

    def values(self):
        return self._losses.values()


class Output(OrderedDict):
    """As transformers' ModelOutput: its entries are attributes as well, and it can be indexed by number."""

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __getattr__(self, name):
        return self[name]

    def update(self, *arguments):
        raise RuntimeError("not allowed")


def model_output(losses):
    return pytest.importorskip("transformers.utils").ModelOutput(losses)


def tensordict(losses):
    return pytest.importorskip("tensordict").TensorDict(losses, batch_size=[])


MAPPINGS = {
    "ordered": OrderedDict,
    "odd": OddMapping,
    "output": Output,
    "model output": model_output,
    "tensordict": tensordict,
}


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("make_optimizer", [make_mtadam, adam])
def test_any_mapping_is_as_good_as_a_dict(kind, make_optimizer):
    make = MAPPINGS[kind]
    module, expected = Regression(make_optimizer), Regression(make_optimizer)
    module.training_step = lambda batch, batch_idx: make(three_losses(module.network, batch))
    fit(module, make_loader())
    fit(expected, make_loader())
    assert_same(module, expected)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_any_mapping_of_any_loop(kind):
    network, expected = make_network(), make_network()
    for one, make in ((network, MAPPINGS[kind]), (expected, dict)):
        optimizer = make_mtadam(one)
        balanced = CASES["fixed"].make()
        for batch in make_loader(2):
            optimizer.zero_grad()
            optimizer.backward(make(three_losses(one, batch)))
            optimizer.step()
            other = adam(one)
            other.zero_grad()
            balanced.backward(make(three_losses(one, batch)), other, model=one)
            other.step()
    assert_same(network, expected)


def test_a_mapping_of_nothing_is_empty():
    with pytest.raises(ValueError, match="losses is empty"):
        make_mtadam(make_network()).backward(OddMapping({}))
    assert as_losses([1.0], adam(make_network())) == [1.0]  # for the check to refuse


# Several processes


class OfRanks(MultiTermLightningModule):
    """A term that is a constant zero on some ranks, or on all of them, in some steps."""

    def __init__(self, rank, options, balancer=None, zero="zeros"):
        super().__init__()
        self.rank, self.options, self.zero = rank, options, ZEROS[zero]
        self.network, self.balancer = make_network(), balancer

    def training_step(self, batch, batch_idx):
        losses = three_losses(self.network, batch)
        absent = "size" if batch_idx < 3 or (batch_idx == 4 and self.rank == 1) else None
        return given(losses, absent, self.zero if self.rank is not None else None)

    def configure_optimizers(self):
        return adam(self) if self.balancer is not None else make_mtadam(self.network, **self.options)


def of_rank(rank, options, zero, make=None):
    module = OfRanks(rank, options, None if make is None else make(), zero)
    fit_rank(module, rank, rounds(2, 5, torch.float64))
    return [parameter.detach() for parameter in module.network.parameters()]


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}, {"low_memory": True}], ids=str)
@pytest.mark.parametrize("zero", ["zeros", "of its own"])
def test_ranks_leave_out_what_is_zero_on_all_of_them_from_the_first_step_on(options, zero, tmp_path):
    """Four steps that one process on the joined batch takes as well, and one where a single rank has the term."""
    first, second = results(run_ranks(of_rank, tmp_path, options, zero))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    network = make_network()
    optimizer = make_mtadam(network, terms=EVERY, **options)
    for step, batch in enumerate(joined_rounds(2, 5, torch.float64)):
        losses = three_losses(network, batch)
        if step < 3:
            del losses["size"]
        elif step == 4:  # of the first rank's half alone, and averaged over two
            half = [part[: len(part) // 2] for part in batch]
            losses["size"] = three_losses(network, half)["size"] / 2
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
    for one, expected in zip(first, network.parameters(), strict=True):
        assert float((one - expected.detach()).abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["fixed", "gradnorm", "uncertainty", "metabalance"])
def test_balancers_of_several_ranks_do_so_too(name, tmp_path):
    first, second = results(run_ranks(of_rank, tmp_path, {}, "zeros", plain_balancer(name)))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(bool(one.isfinite().all()) for one in first)


def plain_balancer(name):
    return CASES[name].make


def light_steps(rank):
    """How many backward passes a never present term costs."""
    network = make_network()
    model = nn.parallel.DistributedDataParallel(network)
    optimizer = make_mtadam(network, balance_every=50)
    light = []
    for batch in [joined for _, joined in zip(range(12), make_loader(12), strict=True)]:
        optimizer.zero_grad()
        optimizer.backward(given(three_losses(network, batch, model), "size", ZEROS["zeros"]), model=model)
        light.append(optimizer._pending.light)
        optimizer.step()
    return light


def test_a_term_that_is_zero_on_all_ranks_does_not_make_every_step_measured(tmp_path):
    measured = (0, 1, 2, 3, 4, 6, 8, 11)
    for light in results(run_ranks(light_steps, tmp_path)):
        assert light == [step not in measured for step in range(12)]


def test_the_losses_are_a_dict_whatever_they_were():
    found = as_losses(OddMapping({"fit": torch.ones(())}), adam(make_network()))
    assert isinstance(found, Mapping)
    assert list(found) == ["fit"]

"""Terms that partition the batch: equal to full backward passes, each row passed once."""

import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from example_projects.mnist.module import CLASSES, class_losses
from example_projects.mnist.module import TERMS as CLASS_TERMS
from example_projects.mnist.network import Net
from lightning_mtadam import MTAdam, MultiTermLightningModule, partitioned_losses
from lightning_mtadam.collect.differentiate import term_gradients
from tests.benchmarks import partition as benchmark
from tests.lightning_models import (
    QUIET,
    assert_same,
    assert_same_state,
    fit,
    largest_difference,
    make_mtadam,
    make_network,
)
from tests.loops import train

TERMS = ("a", "b", "c")
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}


def squared_errors(network, x, y):
    """One loss per row."""
    return (network(x) - y).square().mean(1)


def batch_of(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, 3, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(rows, 2, generator=generator, dtype=torch.float64).to(dtype),
    )


def by_masks(network, batch, term_of_row, terms):
    """The oracle: one graph over the whole batch, a mask for each term."""
    per_row = squared_errors(network, *batch)
    masks = {name: term_of_row == index for index, name in enumerate(terms)}
    return {name: (per_row * mask).sum() / len(per_row) for name, mask in masks.items() if mask.any()}


def differences(first, second):
    first, second = dict(first), dict(second)
    assert list(first) == list(second)
    pairs = [pair for name in first for pair in zip(first[name], second[name], strict=True)]
    return [float((a - b).abs().max()) for a, b in pairs]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_equal_those_of_ten_passes_over_the_whole_batch(dtype):
    torch.manual_seed(0)
    network = Net().to(dtype).eval()
    parameters = list(network.parameters())
    images, target = torch.randn(64, 1, 28, 28, dtype=dtype), torch.randint(CLASSES, (64,))

    def nll(images, target):
        return F.nll_loss(network(images), target, reduction="none")

    ours = term_gradients(partitioned_losses(nll, (images, target), target, CLASS_TERMS), parameters)
    full = class_losses(network(images), target, torch.ones(CLASSES, dtype=dtype))
    theirs = dict(term_gradients(full, parameters))
    assert min(float(gradient.abs().max()) for gradients in theirs.values() for gradient in gradients) > 1e-4
    assert max(differences(ours, theirs)) < ROUNDING[dtype]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_any_partition_equals_masks_and_a_term_without_rows_is_left_out(members):
    terms, term_of_row = ("p", "q", "r", "s", "t"), torch.tensor(members)
    network, batch = make_network(), batch_of(len(members))
    parameters = list(network.parameters())
    losses = partitioned_losses(partial(squared_errors, network), batch, term_of_row, terms)
    expected = by_masks(network, batch, term_of_row, terms)
    assert list(losses) == list(expected) == [name for index, name in enumerate(terms) if index in members]
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=0, atol=1e-12)
    assert max(differences(term_gradients(losses, parameters), term_gradients(expected, parameters))) < 1e-12


def test_the_terms_add_up_to_the_mean_over_the_batch():
    network, batch = make_network(), batch_of(9)
    losses = partitioned_losses(partial(squared_errors, network), batch, torch.arange(9) % 3, TERMS)
    torch.testing.assert_close(sum(losses.values()), squared_errors(network, *batch).mean())


def test_the_function_sees_every_row_once_and_in_order():
    seen = []

    def keep(rows):
        seen.append(rows.tolist())
        return rows.double()

    partitioned_losses(keep, torch.arange(7), torch.tensor([2, 0, 2, 0, 0, 2, 2]), TERMS)
    assert seen == [[1, 3, 4], [0, 2, 5, 6]]


def test_all_terms_together_cost_the_operations_of_one_backward_pass():
    network, batch, term_of_row = make_network(), batch_of(60), torch.arange(60) % 3
    parameters = list(network.parameters())

    def count(losses):
        with FlopCounterMode(display=False) as counter:
            list(term_gradients(losses(), parameters))
        return counter.get_total_flops()

    once = count(lambda: {"mean": squared_errors(network, *batch).mean()})
    assert count(lambda: partitioned_losses(partial(squared_errors, network), batch, term_of_row, TERMS)) == once
    assert count(lambda: by_masks(network, batch, term_of_row, TERMS)) > 1.5 * once


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        waits = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")
        self.count += getattr(func, "__name__", "") in waits
        return func(*args, **(kwargs or {}))


def test_the_host_reads_once():
    with HostReads() as reads:
        partitioned_losses(partial(squared_errors, make_network()), batch_of(6), torch.arange(6) % 3, TERMS)
    assert reads.count == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"y": y, "x": x},
        lambda x, y: torch.cat([x, y], 1),
    ],
    ids=["tuple", "list", "dict", "tensor"],
)
def test_the_batch_may_be_a_sequence_a_mapping_or_a_tensor(make):
    network, (x, y), term_of_row = make_network(), batch_of(6), torch.tensor([1, 0, 1, 2, 2, 2])

    def errors(x, y=None):
        return squared_errors(network, x, y) if y is not None else squared_errors(network, x[:, :3], x[:, 3:])

    losses = partitioned_losses(errors, make(x, y), term_of_row, TERMS)
    for name, loss in by_masks(network, (x, y), term_of_row, TERMS).items():
        torch.testing.assert_close(losses[name], loss)


def test_gradients_flow_into_the_batch():
    x, y = batch_of(6)
    x.requires_grad_()
    sum(
        partitioned_losses(partial(squared_errors, make_network()), (x, y), torch.arange(6) % 3, TERMS).values()
    ).backward()
    expected = torch.autograd.grad(squared_errors(make_network(), x, y).mean(), x)[0]
    torch.testing.assert_close(x.grad, expected)


X, MEMBERS = torch.ones(4, 2), torch.tensor([0, 1, 0, 2])
BAD = {
    "a number": ({"batch": 3.0}, TypeError, "must be a tensor, or a sequence or mapping of tensors, but is a float."),
    "a string in it": ({"batch": (X, "name")}, TypeError, "but 'batch[1]' is a str. Give what is no tensor"),
    "nothing": ({"batch": ()}, ValueError, "batch holds no tensors."),
    "other rows": ({"batch": (X, X[:3])}, ValueError, "'batch[1]' must have the 4 rows of term_of_row, but has shape"),
    "other rows in a dict": ({"batch": {"rows": X[:3]}}, ValueError, "'rows' must have the 4 rows"),
    "no rows": ({"batch": (X, torch.ones(()))}, ValueError, "'batch[1]' must have the 4 rows of term_of_row, but has"),
    "an empty batch": ({"batch": X[:0], "term_of_row": MEMBERS[:0]}, ValueError, "term_of_row is empty"),
    "a list": ({"term_of_row": [0, 1, 0, 2]}, TypeError, "term_of_row must be a tensor of int64, but is a list."),
    "floats": ({"term_of_row": MEMBERS.float()}, TypeError, "has dtype torch.float32. Convert it with .long()."),
    "one-hot": ({"term_of_row": F.one_hot(MEMBERS)}, ValueError, "shape (B,), but has shape (4, 3)."),
    "too few": ({"term_of_row": MEMBERS[:3]}, ValueError, "'batch' must have the 3 rows of term_of_row, but has shape"),
    "below": ({"term_of_row": MEMBERS - 1}, ValueError, "from -1 to 1, but the 3 terms have 0 to 2. Name a term"),
    "above": ({"term_of_row": MEMBERS + 1}, ValueError, "from 1 to 3, but the 3 terms have 0 to 2. Name a term"),
    "names twice": ({"terms": ("a", "b", "a")}, ValueError, "terms must be different from each other"),
    "a name": ({"terms": "abc"}, TypeError, "terms must be a sequence of names"),
    "no names": ({"terms": ()}, ValueError, "terms is empty"),
    "a reduced loss": (
        {"function": lambda x: x.mean()},
        ValueError,
        "for the 2 rows of the term 'a' a tensor of shape (2,), but returned shape (). Leave out the reduction",
    ),
    "an unreduced loss": ({"function": lambda x: x}, ValueError, "but returned shape (2, 2). Leave out"),
    "no tensor": ({"function": lambda x: 0.0}, TypeError, "one loss per row, but returned a float."),
    "integers": ({"function": lambda x: x.long().sum(1)}, TypeError, "but returned dtype torch.int64."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_naming_the_thing_and_the_remedy(name):
    change, error, message = BAD[name]
    good = {"function": lambda x: x.sum(1), "batch": X, "term_of_row": MEMBERS, "terms": TERMS}
    assert partitioned_losses(**good)
    with pytest.raises(error, match=re.escape(message)):
        partitioned_losses(**{**good, **change})


@functorch_config.patch(donated_buffer=False)
def test_a_compiled_network_has_the_gradients_of_the_plain_one():
    torch.compiler.reset()
    network, term_of_row = make_network(), torch.tensor([0, 1, 1, 2, 2, 2, 2, 0, 2, 2])
    compiled, parameters = torch.compile(network, backend="aot_eager", dynamic=True), list(network.parameters())
    for rows in (10, 9):
        batch, of_rows = batch_of(rows), term_of_row[:rows]
        losses = partitioned_losses(partial(squared_errors, compiled), batch, of_rows, TERMS)
        expected = by_masks(network, batch, of_rows, TERMS)
        assert max(differences(term_gradients(losses, parameters), term_gradients(expected, parameters))) < 1e-12


class Partitioned(MultiTermLightningModule):
    """Rows belong to one of three terms, by the sizes of their entries."""

    log_terms = False

    def __init__(self, terms=TERMS):
        super().__init__()
        self.network, self.terms = make_network(), terms

    def per_row(self, x, y):
        return squared_errors(self.network, x, y)

    def training_step(self, batch, batch_idx):
        x, y, term_of_row = batch
        return partitioned_losses(self.per_row, (x, y), term_of_row, TERMS)

    def configure_optimizers(self):
        return make_mtadam(self.network, terms=self.terms)


class Masked(Partitioned):
    """The same without the helper."""

    def training_step(self, batch, batch_idx):
        x, y, term_of_row = batch
        return by_masks(self.network, (x, y), term_of_row, TERMS)


def loader(members):
    x, y = batch_of(len(members))
    return DataLoader(TensorDataset(x, y, torch.tensor(members)), batch_size=4)


MISSING_SOMETIMES = [*(0, 1, 0, 1), *(2, 2, 1, 0), *(1, 1, 1, 1), *(0, 2, 0, 2)] * 5  # in batches of four


@QUIET
def test_training_equals_full_backward_passes_also_where_terms_are_missing():
    ours, plain = Partitioned(), Masked()
    first, second = (fit(module, loader(MISSING_SOMETIMES)).optimizers[0] for module in (ours, plain))
    assert largest_difference(ours.network, plain.network) < 1e-12
    assert largest_difference(ours.network, make_network()) > 0.01
    for norms, expected in zip(first.gradient_norms().values(), second.gradient_norms().values(), strict=True):
        torch.testing.assert_close(norms, expected, rtol=1e-10, atol=0)


@QUIET
def test_a_term_without_rows_counts_as_absent():
    one, other = Partitioned(), Masked()
    members = [0, 1, 0, 1] * 4
    first, second = (fit(module, loader(members), max_epochs=1).optimizers[0] for module in (one, other))
    assert all(float(norms[2]) == 0 for norms in first.gradient_norms().values())
    assert largest_difference(one.network, other.network) < 1e-12
    assert first.terms == second.terms == TERMS


@QUIET
def test_a_term_missing_in_the_first_batch_must_be_named_ahead():
    with pytest.raises(ValueError, match=r"names the term 'c'.*must be named ahead: MTAdam\(\.\.\., terms="):
        fit(Partitioned(terms=None), loader([0, 1, 0, 1, 0, 1, 2, 2]))


@QUIET
def test_another_optimizer_trains_on_the_mean_over_the_batch():
    class WithAdam(Partitioned):
        def configure_optimizers(self):
            return torch.optim.Adam(self.network.parameters())

    class Mean(WithAdam):
        def training_step(self, batch, batch_idx):
            return self.per_row(*batch[:2]).mean()

    ours, plain = WithAdam(), Mean()
    for module in (ours, plain):
        fit(module, loader(MISSING_SOMETIMES))
    assert largest_difference(ours.network, plain.network) < 1e-12


def test_the_same_step_twice_is_the_same_to_the_bit():
    def trained():
        network = make_network()
        optimizer = MTAdam(network.named_parameters(), terms=TERMS)
        errors, terms = partial(squared_errors, network), torch.arange(12) % 3
        train(optimizer, (partitioned_losses(errors, batch_of(12), terms, TERMS) for _ in range(3)))
        return network, optimizer

    (one, first), (other, second) = trained(), trained()
    assert_same(one, other)
    assert_same_state(first, second)


def test_the_engines_of_the_benchmark_find_the_same_gradients():
    run = benchmark.Run()
    run.network.eval()
    run.passes()
    ours = {name: [gradient.clone() for gradient in gradients] for name, gradients in run.kept.items()}
    run.passes_by_rows()
    assert max(differences(ours, run.kept)) < 1e-6
    assert max(differences(ours, term_gradients(run.ten(), run.parameters))) < 1e-6


def test_the_benchmark_prints_its_ratios(monkeypatch, capsys):
    """It is run by hand; here only so that it does not rot."""
    monkeypatch.setattr(benchmark, "BATCH", 20)
    monkeypatch.setattr("sys.argv", ["partition", "--repeats", "2", "--threads", "1"])
    benchmark.main()
    ratios = re.findall(r"^  (\d)\. .*: +(\d+\.\d+) \(", capsys.readouterr().out, re.MULTILINE)
    assert [number for number, _ in ratios] == ["1", "2", "3", "4", "5", "6"]
    assert all(float(ratio) > 0 for _, ratio in ratios)

"""Parameters sharded by ``fully_shard`` over two processes: equal to one process on the joined batch."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_mtadam import MTAdam
from tests.distributed.ranks import results, run_ranks
from tests.distributed.sharded import (
    RANKS,
    TERMS,
    Network,
    batches,
    difference,
    losses_of,
    needs_fsdp2,
    shard,
    train_rows,
    whole,
    whole_state,
    wholes,
)
from tests.lightning_models import make_mtadam

pytestmark = needs_fsdp2


def whole_parameter(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def with_decay(network, batch):
    """After the forward pass ``second`` is cut again, ``gain``, which is the root's, is whole; or both are whole."""
    losses = losses_of(network, batch)
    decay = whole_parameter(network.second.weight).square().sum()
    return {**losses, "decay": decay, "gain": whole_parameter(network.gain).square().sum()}


def decay_first(network, batch):
    return dict(reversed(with_decay(network, batch).items()))


def in_groups(network):
    """The second process has nothing of any parameter of the second group."""
    small = [(name, p) for name, p in network.named_parameters() if name.startswith(("gain", "last"))]
    large = [(name, p) for name, p in network.named_parameters() if not name.startswith(("gain", "last"))]
    return MTAdam([{"params": large}, {"params": small, "lr": 2e-2}], lr=1e-2, weight_decay=0.1)


def frozen(network):
    network.second.requires_grad_(False)
    return make_mtadam(network)


def seldom(network):
    return make_mtadam(network, balance_every=5, anchor="mean")


PLAIN = {"optimizer": make_mtadam, "network": {}, "sharding": {}, "mesh": None, "loop": {}}
CASES = {
    "plain": {},
    "float32": {"network": {"dtype": torch.float32}},
    "accumulation": {"loop": {"accumulate": 3}},
    "no gradient sync": {"loop": {"accumulate": 3, "sync": False}},
    "clip by norm": {"loop": {"clip": (0.05, "norm")}},
    "clip by value": {"loop": {"clip": (0.005, "value"), "accumulate": 3}},
    "amsgrad": {"optimizer": lambda network: make_mtadam(network, amsgrad=True)},
    "own": {"optimizer": lambda network: make_mtadam(network, denominator="own", layers="module")},
    "global": {"optimizer": lambda network: make_mtadam(network, layers="global", anchor="mean", norm_init="unbiased")},
    "balance_every": {"optimizer": seldom, "loop": {"steps": 24}},
    "balance_every, accumulation": {
        "optimizer": seldom,
        "loop": {"steps": 36, "accumulate": 3, "clip": (0.05, "norm")},
    },
    "balance_every, no gradient sync": {"optimizer": seldom, "loop": {"steps": 36, "accumulate": 3, "sync": False}},
    "low memory": {"optimizer": lambda network: make_mtadam(network, low_memory=True)},
    "low memory, sum": {
        "optimizer": lambda network: make_mtadam(
            network, low_memory=True, denominator="sum", anchor="code", layers="module", amsgrad=True
        )
    },
    "an empty group": {"optimizer": in_groups},
    "frozen": {"optimizer": frozen},
    "whole after forward": {"sharding": {"reshard_after_forward": False}},
    "cut after forward": {"sharding": {"reshard_after_forward": True}},
    "activation checkpointing": {"network": {"checkpointed": True}},
    "decay last": {"loop": {"losses": with_decay}},
    "decay first": {"loop": {"losses": decay_first}},
    "decay of whole": {"loop": {"losses": with_decay}, "sharding": {"reshard_after_forward": False}},
    "replicated": {"mesh": (2, 1)},
    "replicated and sharded": {"mesh": (2, 2)},
}


def trained(rank, case):
    """The parameters and the state after training, and the numbers of elements that this process holds."""
    case = {**PLAIN, **case}
    network = Network(**case["network"])
    if rank is not None:
        mesh = case["mesh"] and init_device_mesh("cpu", case["mesh"], mesh_dim_names=("replicate", "shard"))
        shard(network, mesh, **case["sharding"])
    optimizer = case["optimizer"](network)
    train_rows(network, optimizer, rank, **case["loop"])
    return wholes(network), whole_state(optimizer) if case["optimizer"] is not frozen else []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (index % 2)) for index, name in enumerate(CASES)]
)
def test_sharded_ranks_equal_one_process(name, tmp_path):
    case = CASES[name]
    expected, state = trained(None, {**case, "loop": {**case.get("loop", {}), "sync": True}})
    tolerance = 1e-6 if "dtype" in case.get("network", {}) else 1e-12
    start = wholes(Network(**case.get("network", {})))
    assert difference(expected, start) > 0.01, "it has been trained"
    ranks = 4 if case.get("mesh") == (2, 2) else RANKS
    for weights, found in results(run_ranks(trained, tmp_path, case, ranks=ranks)):
        assert difference(weights, expected) < tolerance
        for ours, theirs in zip(found, state, strict=True):
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value, rtol=1e3 * tolerance, atol=1e3 * tolerance, msg=key)


def sizes_of_state(rank):
    network = shard(Network())
    optimizer = make_mtadam(network, terms=TERMS)
    train_rows(network, optimizer, rank, steps=1)
    for parameter in network.parameters():
        part, state = parameter.to_local(), optimizer.state[parameter]
        for key, shape in {"exp_avg": part.shape, "exp_avg_sq": (len(TERMS), *part.shape)}.items():
            assert isinstance(state[key], DTensor)
            assert state[key].to_local().shape == shape
            assert state[key].shape[-parameter.dim() :] == parameter.shape
        assert state["gradient_norm"].shape == (len(TERMS),)
    moments = [state[key].to_local().numel() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return sum(moments), [parameter.to_local().numel() for parameter in network.parameters()]


def test_the_state_is_sharded_as_the_parameters_are(tmp_path):
    (first, held), (second, little) = results(run_ranks(sizes_of_state, tmp_path))
    assert min(little) == 0, "some parameters have no part on the second rank"
    assert first + second == (1 + len(TERMS)) * sum(parameter.numel() for parameter in Network().parameters())
    assert first == (1 + len(TERMS)) * sum(held)


def balance(rank):
    network = Network() if rank is None else shard(Network())
    optimizer = make_mtadam(network)
    train_rows(network, optimizer, rank, steps=3)
    return optimizer.gradient_norms(), optimizer.scales()


def test_norms_are_of_whole_gradients(tmp_path):
    expected = balance(None)
    for found in results(run_ranks(balance, tmp_path)):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for layer, value in theirs.items():
                torch.testing.assert_close(ours[layer], value, rtol=1e-12, atol=0)


def mixed(rank, policy):
    network = shard(Network(dtype=torch.float32), mp_policy=policy)
    train_rows(network, make_mtadam(network), rank)
    return wholes(network)


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_a_mixed_precision_policy_is_close_to_float32(reduce_dtype, tmp_path):
    expected, _ = trained(None, {"network": {"dtype": torch.float32}})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype, output_dtype=torch.float32)
    for weights in results(run_ranks(mixed, tmp_path, policy)):
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        assert 0 < difference(weights, expected) < 3e-3


def hit_by_nan(rank, on_nonfinite):
    """The second process has a finite loss whose gradient is nan: a root of zero."""
    network = shard(Network())
    optimizer = make_mtadam(network, on_nonfinite=on_nonfinite)
    train_rows(network, optimizer, rank, steps=3)
    before = {**wholes(network), **dict(enumerate(whole_state(optimizer)))}
    losses = losses_of(network, next(batches(rank)))
    if rank == 1:
        losses["fit"] = losses["fit"] + (0 * losses["fit"]).sqrt()
    optimizer.backward(losses, model=network)
    error = None
    try:
        with pytest.warns(UserWarning, match="was skipped") if on_nonfinite == "skip" else nullcontext():
            optimizer.step()
    except FloatingPointError as raised:
        error = str(raised)
    return error, before, {**wholes(network), **dict(enumerate(whole_state(optimizer)))}


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_bad_gradient_on_one_process_changes_nothing_on_any(on_nonfinite, tmp_path):
    for error, before, after in results(run_ranks(hit_by_nan, tmp_path, on_nonfinite)):
        assert (error is None) == (on_nonfinite == "skip")
        assert error is None or "The gradient of the term 'fit' at the layer 'gain' is not finite" in error
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def errors(call):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def refused(rank):
    x, y = next(batches(rank))
    found = {}

    network = shard(Network())
    optimizer = make_mtadam(network)
    losses = losses_of(network, (x, y))
    found["no model"] = errors(lambda: optimizer.backward(losses))
    cut = {**losses, "decay": network.second.weight.square().sum()}
    found["cut loss"] = errors(lambda: optimizer.backward(cut, model=network))
    some = {**losses, "fit": torch.zeros((), dtype=torch.float64)} if rank else losses
    found["constant"] = errors(lambda: optimizer.backward(some, model=network))
    assert all(parameter.grad is None for parameter in network.parameters())

    partly = Network()
    before = make_mtadam(partly)
    fully_shard(partly.first)
    after, rest = make_mtadam(partly), make_mtadam(partly.second)
    losses = losses_of(partly, (x, y))
    found["partly"] = errors(lambda: after.backward(losses, model=partly))
    found["before"] = errors(lambda: before.backward(losses, model=partly))
    found["rest"] = errors(lambda: rest.backward(losses, model=partly))

    if rank == 1:
        losses_on_this = losses_of(network, (x, y))
        found["one rank"] = errors(lambda: optimizer.backward({**losses_on_this, "fit": x}, model=network))
    else:
        found["one rank"] = errors(lambda: optimizer.backward(losses_of(network, (x, y)), model=network))
    return found


def test_what_cannot_work_is_refused_on_all_processes(tmp_path):
    first, second = results(run_ranks(refused, tmp_path))
    assert "ValueError: The parameters are sharded. Call optimizer.backward(losses, model=model)" in first["no model"]
    assert "TypeError: losses['decay'] is a DTensor" in first["cut loss"]
    assert ".full_tensor()" in first["cut loss"]
    assert "ValueError: losses['fit'] has no graph on rank 1, but the parameters are sharded" in first["constant"]
    assert "ValueError: Some parameters of the optimizer are sharded and some are not" in first["partly"]
    assert "ValueError: The network is sharded, but the optimizer's parameters are not" in first["before"]
    assert first["rest"] == first["before"]
    assert "RankError: Stopped, because another rank has failed. rank 1: ValueError" in first.pop("one rank")
    assert "ValueError: losses['fit'] must be a scalar tensor, but has shape (4, 5)" in second.pop("one rank")
    assert first == second


class Pair(nn.Module):
    """Two networks in which the first's ``gain`` is the root's, and so whole after the forward pass."""

    def __init__(self, cut):
        super().__init__()
        self.generator, self.judge = Network(), Network()
        if cut:
            shard(self.generator)
            shard(self.judge)


def two_optimizers(rank):
    """As in a GAN; the judge's optimizer holds a gradient of its own when the generator's takes its terms."""
    pair = Pair(cut=rank is not None)
    one, other = (make_mtadam(network) for network in (pair.generator, pair.judge))
    for batch in batches(rank):
        other.backward(losses_of(pair.judge, batch), model=pair)
        held = [whole(parameter.grad).clone() for parameter in other.param_groups[0]["params"]]
        _, output = pair.generator(batch[0])
        _, judged = pair.judge(torch.cat([batch[0][:, 1:], output], 1))
        one.backward({"l1": (output - batch[1]).abs().mean(), "gan": judged.square().mean()}, model=pair)
        now = [whole(parameter.grad) for parameter in other.param_groups[0]["params"]]
        assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()
    return wholes(pair)


def test_another_optimizers_gradients_are_left_alone(tmp_path):
    expected = two_optimizers(None)
    for weights in results(run_ranks(two_optimizers, tmp_path)):
        assert difference(weights, expected) < 1e-12


def trained_in_halves(rank, shared):
    """Two optimizers, each for a part of the network: on one graph, or each on a graph of its own."""
    network = Network()
    if rank is not None:
        shard(network)
    parts = [], []
    for name, parameter in network.named_parameters():
        parts[name.startswith(("last", "gain"))].append((name, parameter))
    optimizers = [MTAdam(part, lr=1e-2) for part in parts]
    for batch in batches(rank):
        losses = losses_of(network, batch)
        del losses["code"]  # which does not reach the second part
        for index, optimizer in enumerate(optimizers):
            found = losses if shared or index == 0 else losses_of(network, batch)
            found = {name: found[name] for name in losses}
            optimizer.backward(found, model=network, retain_graph=shared and index == 0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return wholes(network)


def test_two_optimizers_may_train_parts_of_a_sharded_network_on_one_graph(tmp_path):
    expected = trained_in_halves(None, False)
    assert difference(expected, wholes(Network())) > 0.01, "it has been trained"
    for found in results(run_ranks(trained_in_halves, tmp_path, True)):
        assert difference(found, expected) < 1e-12

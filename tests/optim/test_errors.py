"""Bad input is refused with a message that names it and the remedy, and nothing is changed."""

import copy

import pytest
import torch
from torch import nn

from lightning_mtadam import NonFiniteError
from lightning_mtadam.optim import MTAdam
from tests.loops import take_step
from tests.spoiling import spoilt

X = torch.arange(12.0).reshape(4, 3)


def trained(**options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = MTAdam(model.named_parameters(), **options)
    take_step(optimizer, losses(model))
    return model, optimizer


def losses(model):
    output = model(X)
    return {"fit": (output - 1).square().mean(), "size": output.abs().mean()}


def snapshot(model, optimizer):
    state = optimizer.state_dict()
    tensors = [*model.parameters(), *(value for entry in state["state"].values() for value in entry.values())]
    return [tensor.detach().clone() for tensor in tensors], copy.deepcopy(state["param_groups"])


def assert_unchanged(model, optimizer, before):
    tensors, groups = snapshot(model, optimizer)
    assert groups == before[1]
    assert len(tensors) == len(before[0])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))


BAD_LOSSES = {
    "no mapping": (lambda m: m(X).sum(), TypeError, "must be a mapping"),
    "empty": (lambda m: {}, ValueError, "empty"),
    "vector": (lambda m: {"fit": m(X).mean(1)}, ValueError, r"losses\['fit'\].*shape \(4,\).*\.mean\(\)"),
    "one element": (lambda m: {"fit": m(X).mean().reshape(1)}, ValueError, r"shape \(1,\)"),
    "number": (lambda m: {"fit": 1.0}, TypeError, r"losses\['fit'\].*is a float"),
    "integer": (lambda m: {"fit": torch.tensor(1)}, TypeError, "int64"),
    "complex": (lambda m: {"fit": m(X).sum() * (1 + 1j)}, TypeError, "complex64"),
    "boolean": (lambda m: {"fit": torch.tensor(True)}, TypeError, "bool"),
    "detached": (lambda m: {"fit": m(X).mean().detach()}, ValueError, r"losses\['fit'\] has no graph"),
    "constant": (lambda m: {"fit": torch.tensor(1.0)}, ValueError, r"losses\['fit'\] has no graph"),
    "nan": (lambda m: {"fit": m(X).mean() * torch.nan}, NonFiniteError, r"losses\['fit'\] is nan"),
    "inf": (lambda m: {"fit": m(X).mean() / 0}, NonFiniteError, r"losses\['fit'\] is -?inf"),
    "unknown": (lambda m: {"fitt": m(X).mean()}, ValueError, "'fitt'.*Did you mean 'fit'"),
    "not a string": (lambda m: {1: m(X).mean()}, TypeError, "non-empty string"),
    "elsewhere": (
        lambda m: {"fit": nn.Linear(3, 1)(X).mean()},
        ValueError,
        r"losses\['fit'\] reaches no parameter of the optimizer",
    ),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
@pytest.mark.parametrize("options", [{}, {"terms": ("fit", "size")}])
def test_bad_losses_are_refused_and_change_nothing(case, options):
    make, error, message = BAD_LOSSES[case]
    model, optimizer = trained(**options)
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.backward(make(model))
    assert_unchanged(model, optimizer, before)
    assert all(p.grad is None for p in model.parameters())
    take_step(optimizer, losses(model))


def test_terms_stay_unknown_after_bad_first_losses():
    model = nn.Linear(3, 2)
    optimizer = MTAdam(model.named_parameters())
    with pytest.raises(ValueError, match="no graph"):
        optimizer.backward({"fit": model(X).mean().detach()})
    with pytest.raises(ValueError, match="reaches no parameter"):
        optimizer.backward({"fit": model(X).mean(), "other": nn.Linear(3, 1)(X).mean()})
    assert optimizer.terms == ()
    assert all(p.grad is None for p in model.parameters())
    take_step(optimizer, losses(model))
    assert optimizer.terms == ("fit", "size")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_naming_term_and_layer(bad):
    model, optimizer = trained()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    optimizer.backward(spoilt(losses(model), "size", bad))
    with pytest.raises(FloatingPointError, match="'size' at the layer 'weight' is not finite"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    take_step(optimizer, losses(model))


def test_a_term_that_fails_while_batches_accumulate_drops_what_was_pending():
    model, optimizer = trained()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    optimizer.backward(losses(model))
    with pytest.raises(ValueError, match="reaches no parameter"):
        optimizer.backward({"fit": losses(model)["fit"], "size": nn.Linear(3, 1)(X).mean()})
    with pytest.raises(RuntimeError, match="nothing to consume"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    take_step(optimizer, losses(model))


def test_step_without_backward_is_refused():
    model, optimizer = trained()
    with pytest.raises(RuntimeError, match="nothing to consume"):
        MTAdam(model.named_parameters()).step()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="nothing to consume"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="nothing to consume"):
        optimizer.step(lambda: 1.0)
    assert_unchanged(model, optimizer, before)


def test_step_consumes_the_gradients():
    _, optimizer = trained()
    with pytest.raises(RuntimeError, match="nothing to consume"):
        optimizer.step()


def test_step_after_a_plain_backward_is_refused():
    model, optimizer = trained()
    optimizer.zero_grad()
    sum(losses(model).values()).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"in place of loss\.backward\(\)"):
        optimizer.step()
    assert_unchanged(model, optimizer, before)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = MTAdam(embedding.named_parameters())
    with pytest.raises(TypeError, match="sparse"):
        optimizer.backward({"fit": embedding(torch.tensor([1])).sum()})


def test_nothing_to_train_is_refused():
    model, optimizer = trained()
    model.requires_grad_(False)
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="requires a gradient"):
        optimizer.backward({"fit": model(x).mean()})


BAD_OPTIONS = {
    "lr": ({"lr": -1.0}, ValueError, "lr must be"),
    "lr nan": ({"lr": float("nan")}, ValueError, "lr must be"),
    "lr type": ({"lr": "fast"}, TypeError, "lr must be a number"),
    "eps": ({"eps": -1e-8}, ValueError, "eps must be"),
    "weight_decay": ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
    "two betas": ({"betas": (0.9, 0.999)}, ValueError, "three numbers"),
    "beta": ({"betas": (0.9, 0.999, 1.0)}, ValueError, r"beta3 must be in \[0, 1\)"),
    "terms string": ({"terms": "fit"}, TypeError, r"\('fit',\)"),
    "terms empty": ({"terms": ()}, ValueError, "terms is empty"),
    "terms twice": ({"terms": ("a", "a")}, ValueError, "different"),
    "anchor": ({"terms": ("a", "b"), "anchor": "c"}, ValueError, r"anchor must be one of .*'a', 'b'.*got 'c'"),
    "anchor type": ({"anchor": 3}, TypeError, "anchor must be"),
    "importance": ({"terms": ("a", "b"), "importance": {"bb": 1.0}}, ValueError, "importance names.*'bb'.*'b'"),
    "importance value": ({"importance": {"a": -1.0}}, ValueError, r"importance\['a'\]"),
    "layers": ({"layers": "module_list"}, ValueError, "layers must be one of"),
    "norm_init": ({"norm_init": "zero"}, ValueError, "norm_init must be one of"),
    "denominator": ({"denominator": "min"}, ValueError, "denominator must be one of"),
    "update": ({"update": "max"}, ValueError, "update must be one of"),
    "on_nonfinite": ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be one of"),
    "max_scale": ({"max_scale": 0.0}, ValueError, "max_scale must be"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused(case):
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match=message):
        MTAdam(nn.Linear(3, 2).named_parameters(), **options)


@pytest.mark.parametrize("options", [{"anchor": "sise"}, {"importance": {"sise": 2.0}}])
def test_names_are_checked_at_the_first_losses_if_terms_come_from_them(options):
    model = nn.Linear(3, 2)
    optimizer = MTAdam(model.named_parameters(), **options)
    with pytest.raises(ValueError, match="sise"):
        optimizer.backward(losses(model))
    assert optimizer.terms == ()


def test_group_options_are_checked():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="anchor holds for the whole optimizer"):
        MTAdam([{"params": model.parameters(), "anchor": "mean"}])
    with pytest.raises(ValueError, match="layers holds for the whole optimizer"):
        MTAdam([{"params": model.parameters(), "layers": "global"}])
    optimizer = MTAdam([model.weight])
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": [model.bias], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="complex"):
        MTAdam([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])


def test_layers_that_need_names_say_so():
    model = nn.Linear(3, 2)
    optimizer = MTAdam(model.parameters(), layers="module")
    with pytest.raises(ValueError, match="named_parameters"):
        optimizer.backward(losses(model))
    optimizer.name_parameters(model.named_parameters())
    take_step(optimizer, losses(model))
    assert list(optimizer.balance_weights()) == ["root"]


def test_layers_must_return_names():
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="'weight'"):
        MTAdam(model.named_parameters(), layers=len).backward(losses(model))


def test_two_parameters_of_one_name_are_refused():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = MTAdam([{"params": one.named_parameters()}, {"params": two.named_parameters()}])
    with pytest.raises(ValueError, match="Two parameters are named 'weight'"):
        optimizer.backward({"fit": (one(X) + two(X)).mean()})


@pytest.mark.parametrize(("limit", "algorithm", "message"), [(0.0, "norm", "limit"), (1.0, "max", "algorithm")])
def test_bad_clipping_is_refused(limit, algorithm, message):
    with pytest.raises(ValueError, match=message):
        trained()[1].clip_gradients(limit, algorithm)


def test_a_term_with_the_name_of_the_policy_is_refused():
    with pytest.raises(ValueError, match="a policy and a term of that name"):
        MTAdam(nn.Linear(3, 2).named_parameters(), terms=("x", "mean"), anchor="mean")


def test_terms_of_a_group_are_refused():
    with pytest.raises(ValueError, match="terms holds for the whole optimizer"):
        MTAdam([{"params": nn.Linear(3, 2).parameters(), "terms": "fit"}])


def test_an_empty_group_is_no_obstacle():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    take_step(MTAdam([{"params": []}, {"params": model.parameters()}]), losses(model))
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("first_named", [True, False])
def test_a_group_may_be_added_with_or_without_names_between_backward_and_step(first_named):
    model, head = nn.Linear(3, 2), nn.Linear(2, 2)
    optimizer = MTAdam(model.named_parameters() if first_named else model.parameters())
    optimizer.backward(losses(model))
    optimizer.add_param_group({"params": list(head.parameters()), "lr": 0.1})
    optimizer.step()
    before = head.weight.clone()
    optimizer.name_parameters(nn.ModuleDict({"model": model, "head": head}).named_parameters())
    take_step(optimizer, {"fit": head(model(X)).square().mean(), "size": model(X).abs().mean()})
    assert not torch.equal(before, head.weight)
    assert "head.weight" in optimizer.balance_weights()


def test_scales_stay_finite_where_ratio_times_importance_does_not():
    w = torch.ones(2, requires_grad=True)
    optimizer = MTAdam([w], importance={"b": 4.0})
    take_step(optimizer, {"a": 1e19 * w.sum(), "b": 1e-20 * w.sum()})
    assert optimizer.scales()["parameter_0"].isfinite().all()
    assert w.isfinite().all()

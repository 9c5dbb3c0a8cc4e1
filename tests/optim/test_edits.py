"""What is done to ``p.grad`` between ``backward`` and ``step`` counts, or is refused."""

import copy
import weakref

import pytest
import torch
from torch import nn

from lightning_mtadam.optim import MTAdam
from tests.lightning_models import assert_same_state

X = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class M(nn.Module):
    """Two linear layers, and two losses of which the second is nine times too large."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()

    def losses(self, x=X):
        error = self.head(self.backbone(x)) - x
        return {"sq": error.square().mean(), "ab": 9 * error.abs().mean()}


def noise_like(tensor):
    return 0.3 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(tensor.numel()))


def each(change):
    """An edit of every gradient of some parameters."""

    def edit(parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                change(parameter)

    return edit


def set_to(parameter, gradient):
    parameter.grad = gradient


def zero_entries(parameter):
    parameter.grad[:3] = 0


STOPS = {
    "None": each(lambda p: set_to(p, None)),
    "times zero": each(lambda p: p.grad.mul_(0)),
    "new zeros": each(lambda p: set_to(p, torch.zeros_like(p))),
    "through .data": each(lambda p: p.grad.data.mul_(0)),
    "a module's zero_grad to zeros": each(lambda p: p.grad.zero_()),
}
FACTORS = {
    "half": each(lambda p: p.grad.mul_(0.5)),
    "thrice": each(lambda p: p.grad.mul_(3)),
    "turned": each(lambda p: p.grad.neg_()),
    "replaced": each(lambda p: set_to(p, p.grad * 0.25)),
    "clip_grad_norm_": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05),
}
SHRINKS = {
    "entries": each(zero_entries),
    "clip_grad_value_": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.02),
}
OTHERS = {
    "noise": each(lambda p: p.grad.add_(noise_like(p))),
    "weight decay": each(lambda p: p.grad.add_(p.detach(), alpha=0.1)),
    "another direction": each(lambda p: set_to(p, noise_like(p))),
}
EDITS = {**STOPS, **FACTORS, **SHRINKS, **OTHERS}
MODES = {"default": {}, "mean": {"denominator": "mean"}, "light": {"balance_every": 3}, "amsgrad": {"amsgrad": True}}
MODES["low_memory"] = {"low_memory": True, "denominator": "sum"}


def train(model, optimizer, edit, steps=6, *, when=lambda step: True, pieces=1):
    for step in range(steps):
        optimizer.zero_grad()
        for piece in X.chunk(pieces):
            optimizer.backward(model.losses(piece), grad_output=torch.tensor(1 / pieces))
        if when(step):
            edit(list(model.head.parameters()))
        optimizer.step()


def entries(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("edit", STOPS)
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_stopped_layer_stays_where_it_is_and_the_others_go_on(edit, mode, pieces):
    if pieces > 1 and "low_memory" in MODES[mode]:
        pytest.skip("low_memory has no accumulation")
    model, free = M(), M()
    head = entries(model.head)
    train(model, MTAdam(model.named_parameters(), lr=1e-2, **MODES[mode]), STOPS[edit], 1, pieces=pieces)
    train(free, MTAdam(free.named_parameters(), lr=1e-2, **MODES[mode]), lambda parameters: None, 1, pieces=pieces)
    assert torch.equal(entries(model.head), head)
    assert torch.equal(entries(model.backbone), entries(free.backbone))
    assert float((entries(free.head) - head).abs().min()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_masked_entries_stay_and_the_others_move(mode):
    model = M()
    before = model.head.weight.detach().clone()
    train(model, MTAdam(model.named_parameters(), lr=1e-2, **MODES[mode]), SHRINKS["entries"])
    moved = (model.head.weight - before).abs()
    assert not moved[:3].any()
    assert bool((moved[3:] > 1e-3).all())


@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit != "through .data"])
@pytest.mark.parametrize("options", [{}, {"denominator": "sum"}, {"amsgrad": True}, {"weight_decay": 0.1}], ids=str)
def test_with_one_term_it_is_adam_with_the_same_edit(edit, options):
    ours, theirs = M(), M()
    optimizer = MTAdam(ours.named_parameters(), lr=1e-2, **options)
    kept = {name: value for name, value in options.items() if name != "denominator"}
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-2, **{"weight_decay": 0.0, **kept})
    for step in range(8):
        for model, one in ((ours, optimizer), (theirs, adam)):
            one.zero_grad()
            loss = model.losses()["sq"]
            optimizer.backward({"sq": loss}) if one is optimizer else loss.backward()
            if step % 3 != 1:
                EDITS[edit](list(model.head.parameters()))
            one.step()
        torch.testing.assert_close(entries(ours), entries(theirs), rtol=1e-12, atol=1e-12)


def naive_step(state, gradients, scales, edit, t, lr=1e-2):
    """Of one parameter that all terms reach: the first moment from the edited sum, squares from what makes it up."""
    balanced = [scale * gradient for scale, gradient in zip(scales, gradients, strict=True)]
    whole = sum(balanced)
    edited = edit(whole.clone())
    ratio = torch.where(whole != 0, edited / whole, 1)
    one_factor = bool(torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-12, atol=0))
    if bool(((ratio >= 0) & (ratio <= 1 + 1e-12)).all()) or one_factor:
        balanced = [ratio * one for one in balanced]
    else:
        balanced[0] = balanced[0] + edited - whole
    state["m"] = 0.9 * state["m"] + 0.1 * edited
    state["v"] = [0.999 * v + 0.001 * one.square() for v, one in zip(state["v"], balanced, strict=True)]
    root = torch.stack(state["v"]).amax(0) / (1 - 0.999**t)
    return -lr * state["m"] / (1 - 0.9**t) / (root.sqrt() + 1e-8)


CHANGES = {
    "mask": lambda g: g * (torch.arange(g.numel()).view(g.shape) % 3 > 0),
    "factor": lambda g: 2.5 * g,
    "clamp": lambda g: g.clamp(-0.02, 0.02),
    "noise": lambda g: g + noise_like(g),
}


@pytest.mark.parametrize("change", CHANGES)
def test_moments_follow_the_formula(change):
    model = M()
    parameters, naive = list(model.parameters()), copy.deepcopy(model)
    optimizer = MTAdam(model.named_parameters(), lr=1e-2)
    states = [{"m": torch.zeros_like(p), "v": [torch.zeros_like(p)] * 2} for p in parameters]
    norms = [None] * len(parameters)
    for t in range(1, 8):
        optimizer.zero_grad()
        optimizer.backward(model.losses())
        for parameter in parameters:
            parameter.grad.copy_(CHANGES[change](parameter.grad))
        optimizer.step()
        losses = naive.losses().values()
        found = [torch.autograd.grad(loss, list(naive.parameters()), retain_graph=True) for loss in losses]
        with torch.no_grad():
            for index, parameter in enumerate(naive.parameters()):
                mine = [one[index] for one in found]
                observed = torch.stack([one.norm() for one in mine])
                norms[index] = observed if norms[index] is None else 0.9 * norms[index] + 0.1 * observed
                scales = norms[index][0] / norms[index]
                parameter += naive_step(states[index], mine, scales, CHANGES[change], t)
        torch.testing.assert_close(entries(model), entries(naive), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"denominator": "mean"}, {"anchor": "mean"}, {"layers": "global"}], ids=str)
@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_clipping_by_hand_is_the_optimizers_clipping(options, limit):
    by_hand, by_option = M(), M()
    pairs = [(model, MTAdam(model.named_parameters(), lr=1e-2, **options)) for model in (by_hand, by_option)]
    for _ in range(6):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            optimizer.backward(model.losses())
            if model is by_hand:
                nn.utils.clip_grad_norm_(model.parameters(), limit)
            else:
                optimizer.clip_gradients(limit)
            optimizer.step()
    torch.testing.assert_close(entries(by_hand), entries(by_option), rtol=1e-10, atol=1e-12)
    for one, other in zip(*[optimizer.gradient_norms().values() for _, optimizer in pairs], strict=True):
        torch.testing.assert_close(one, other)  # norms are those of the terms, before clipping


@pytest.mark.parametrize("mode", MODES)
def test_p_grad_is_the_balanced_gradient(mode):
    model = M()
    optimizer = MTAdam(model.named_parameters(), lr=1e-2, **MODES[mode])
    for _ in range(5):
        optimizer.zero_grad()
        parameters = list(model.parameters())
        losses = model.losses()
        found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses.values()]
        optimizer.backward(losses)
        shown = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        scales = list(optimizer.scales().values()) * (len(parameters) if len(optimizer.scales()) == 1 else 1)
        for index, gradient in enumerate(shown):
            whole = sum(float(scale) * one[index] for scale, one in zip(scales[index], found, strict=True))
            torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("options", [{"denominator": "own"}, {"low_memory": True}], ids=str)
def test_what_cannot_count_is_refused_by_name_and_no_parameter_moves(edit, options):
    if edit == "None" and "denominator" in options:
        pytest.skip("it can: the parameter is left alone")
    model = M()
    optimizer = MTAdam(model.named_parameters(), lr=1e-2, **options)
    train(model, optimizer, lambda parameters: None, 2)
    before = entries(model)
    with pytest.raises(RuntimeError, match=r"'head.weight', 'head.bias' was changed .* p.register_hook"):
        train(model, optimizer, EDITS[edit], 1)
    assert torch.equal(entries(model), before)


@pytest.mark.parametrize("options", [{}, {"denominator": "own"}, {"low_memory": True}, {"balance_every": 2}], ids=str)
def test_a_hook_of_the_parameter_changes_the_gradient_of_each_term(options):
    model = M()
    before = model.head.weight.detach().clone()
    model.head.weight.register_hook(lambda gradient: gradient * (torch.arange(6) >= 3)[:, None])
    train(model, MTAdam(model.named_parameters(), lr=1e-2, **options), lambda parameters: None)
    moved = (model.head.weight - before).abs()
    assert not moved[:3].any()
    assert bool((moved[3:] > 1e-3).all())


@pytest.mark.parametrize("options", [*MODES.values(), {"denominator": "own"}], ids=str)
def test_nothing_is_left_to_consume_after_a_reset(options):
    model = M()
    optimizer = MTAdam(model.named_parameters(), lr=1e-2, **options)
    train(model, optimizer, lambda parameters: None, 2)
    before = entries(model)
    for reset in (model.zero_grad, optimizer.zero_grad):
        optimizer.backward(model.losses())
        reset()
        with pytest.raises(RuntimeError, match="nothing to consume"):
            optimizer.step()

    def closure():
        optimizer.backward(model.losses())
        model.zero_grad()  # as in a hook that skips a step
        return 1.0

    assert optimizer.step(closure) == 1.0
    assert torch.equal(entries(model), before)


@pytest.mark.parametrize("options", [{}, {"balance_every": 3}, {"denominator": "own"}], ids=str)
def test_a_parameter_without_a_gradient_is_left_alone_with_all_its_state(options):
    model = M()
    optimizer = MTAdam(model.named_parameters(), lr=1e-2, weight_decay=0.1, **options)
    train(model, optimizer, lambda parameters: None, 4)
    before = entries(model.head)
    states = [copy.deepcopy(optimizer.state[parameter]) for parameter in model.head.parameters()]
    train(model, optimizer, STOPS["None"], 3)
    assert torch.equal(entries(model.head), before)
    for parameter, state in zip(model.head.parameters(), states, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], state[key]), key


@pytest.mark.parametrize("scale", [2.0**10, 3.0])
@pytest.mark.parametrize("edit", [None, *EDITS])
@pytest.mark.parametrize("before", [True, False])
def test_under_a_gradient_scaler_an_edit_counts_before_and_after_it_divides(scale, edit, before):
    """Before, the gradients are times the loss scale: what is added then must be, too. A scaler has 1 / 3 in fp32."""
    plain, scaled = M(), M()
    change = (lambda parameters: None) if edit is None else EDITS[edit]
    if before and edit in (*OTHERS, "clip_grad_value_", "clip_grad_norm_"):
        return
    expected, optimizer = (MTAdam(model.named_parameters(), lr=1e-2) for model in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    scaler.scale(torch.zeros(()))
    train(plain, expected, change, 5)
    for _ in range(5):
        optimizer.zero_grad()
        factor = torch.tensor(scale, dtype=torch.float64)
        optimizer.backward(scaled.losses(), grad_output=factor, loss_scale=factor)
        if before:
            change(list(scaled.head.parameters()))
        scaler.unscale_(optimizer)
        if not before:
            change(list(scaled.head.parameters()))
        scaler.step(optimizer)
        scaler.update()
    close = {"rtol": 1e-4, "atol": 1e-7} if scale == 3.0 else {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(entries(scaled), entries(plain), **close)


@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_a_step_that_no_scaler_has_divided_for_divides_itself(clip):
    plain, scaled = M(), M()
    pairs = [(model, MTAdam(model.named_parameters(), lr=1e-2)) for model in (plain, scaled)]
    for _ in range(4):
        for model, optimizer in pairs:
            factor = torch.tensor(1024.0 if model is scaled else 1.0, dtype=torch.float64)
            optimizer.zero_grad()
            optimizer.backward(model.losses(), grad_output=factor, loss_scale=factor if model is scaled else None)
            if clip is not None:
                optimizer.clip_gradients(0.05, clip)
            optimizer.step()
    torch.testing.assert_close(entries(scaled), entries(plain), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["default", "light", "mean"])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_accumulated_batches_count_as_for_adam(mode, edit):
    """With one term, whose scale is one."""
    ours, theirs = M(), M()
    optimizer = MTAdam(ours.named_parameters(), lr=1e-2, **MODES[mode])
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    if edit == "through .data":
        return
    for _ in range(5):
        for model, one in ((ours, optimizer), (theirs, adam)):
            one.zero_grad()
            for piece in X.chunk(2):
                loss = model.losses(piece)["sq"] / 2
                optimizer.backward({"sq": loss}) if one is optimizer else loss.backward()
                EDITS[edit](list(model.head.parameters()))
            one.step()
        torch.testing.assert_close(entries(ours), entries(theirs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", [{}, {"denominator": "sum"}, {"balance_every": 2}], ids=str)
def test_a_gradient_from_elsewhere_counts_before_and_after(first, options):
    """With one term it is Adam on the sum of both losses."""
    ours, theirs = M(), M()
    optimizer = MTAdam(ours.named_parameters(), lr=1e-2, **options)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        adam.zero_grad()
        extra = ours.losses()["ab"]
        if first:
            extra.backward()
        optimizer.backward({"sq": ours.losses()["sq"]})
        if not first:
            extra.backward()
        optimizer.step()
        sum(theirs.losses().values()).backward()
        adam.step()
        torch.testing.assert_close(entries(ours), entries(theirs), rtol=1e-11, atol=1e-12)


def test_what_a_step_has_used_up_does_not_count_again():
    ours, theirs = M(), M()
    optimizer, reset = (MTAdam(model.named_parameters(), lr=1e-2) for model in (ours, theirs))
    for _ in range(3):
        optimizer.backward(ours.losses())
        optimizer.step()  # and no zero_grad
        reset.zero_grad()
        reset.backward(theirs.losses())
        reset.step()
    assert torch.equal(entries(ours), entries(theirs))


@pytest.mark.parametrize("early", [True, False])
def test_a_gradient_where_no_term_has_one_is_refused(early):
    model, other = M(), nn.Linear(3, 1).double()
    named = [*model.named_parameters(), *((f"other.{name}", p) for name, p in other.named_parameters())]
    optimizer = MTAdam(named, lr=1e-2)
    extra = other(torch.ones(2, 3, dtype=torch.float64)).sum()
    if early:
        extra.backward()
    optimizer.backward(model.losses())
    if not early:
        extra.backward()
    before = entries(model)
    with pytest.raises(RuntimeError, match=r"'other.weight', 'other.bias' holds a gradient, but no loss"):
        optimizer.step()
    assert torch.equal(entries(model), before)


def test_noise_where_the_gradients_are_zero_is_refused_as_nothing_would_bound_the_step():
    model = M()
    optimizer = MTAdam(model.named_parameters(), lr=1e-2)
    before = entries(model)
    for edit in (STOPS["times zero"], OTHERS["noise"]):
        optimizer.zero_grad()
        optimizer.backward({name: loss + 0 * model.head.weight.sum() for name, loss in _of_the_backbone(model).items()})
        edit([model.head.weight])
        if edit is STOPS["times zero"]:
            optimizer.step()
            assert not torch.equal(entries(model.backbone), before[: 6 * 8 + 8])
            continue
        before = entries(model)
        with pytest.raises(
            RuntimeError, match=r"'head.weight' was changed, but the gradient of every term is zero there"
        ):
            optimizer.step()
        assert torch.equal(entries(model), before)


def _of_the_backbone(model):
    output = model.backbone(X)
    return {"sq": output.square().mean(), "ab": 9 * output.abs().mean()}


def test_hooks_that_wait_for_the_gradient_are_called_once_and_their_edits_count():
    model, called = M(), []
    before = entries(model.head)
    for parameter in model.head.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: (called.append(p), p.grad.zero_()))
    train(model, MTAdam(model.named_parameters(), lr=1e-2), lambda parameters: None, 3)
    assert torch.equal(entries(model.head), before)
    assert len(called) == 3 * 2
    assert called[:2] == list(model.head.parameters())


def test_an_edit_changes_nothing_of_the_next_step():
    model, again = M(), M()
    optimizer = MTAdam(model.named_parameters(), lr=1e-2)
    train(model, optimizer, FACTORS["half"], 4, when=lambda step: step == 1)
    expected = MTAdam(again.named_parameters(), lr=1e-2)
    train(again, expected, FACTORS["half"], 2, when=lambda step: step == 1)
    loaded = MTAdam(again.named_parameters(), lr=1e-2)
    loaded.load_state_dict(copy.deepcopy(expected.state_dict()))
    train(again, loaded, lambda parameters: None, 2)
    assert torch.equal(entries(model), entries(again))
    assert_same_state(optimizer, loaded)


P = nn.Parameter


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_after_a_scaler_has_divided_is_that_without_one(clip):
    found = []
    for scale in (None, 1024.0):
        p = P(torch.ones(4))
        optimizer, factor = MTAdam([p], lr=0.1), None if scale is None else torch.tensor(scale)
        optimizer.backward({"a": (p * torch.tensor([1.0, 2, 3, 4])).sum()}, grad_output=factor, loss_scale=factor)
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(torch.ones(()))
            scaler.unscale_(optimizer)
        optimizer.clip_gradients(2.5, clip)
        optimizer.step()
        found.append(optimizer.state[p])
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(found[0][key], found[1][key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [True, False])
def test_masks_and_clipping_together_are_told_apart_from_noise(dtype, first):
    """Also at entries where the terms nearly cancel."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4000, generator=generator), 3 * torch.randn(4000, generator=generator)
    p = P(torch.ones(4000, dtype=dtype))
    optimizer = MTAdam([p])
    optimizer.backward({"a": (p * x.to(dtype)).sum(), "b": (p * y.to(dtype)).sum()})
    if first:
        optimizer.clip_gradients(1.0)
    p.grad[:2000] = 0
    optimizer.step()
    squares = optimizer.state[p]["exp_avg_sq"]
    assert not squares[:, :2000].any()
    assert bool((squares[:, 2000:] > 0).any())


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_leaves_out_what_was_set_to_none(clip):
    a, b = P(torch.ones(2)), P(torch.ones(2))
    optimizer = MTAdam([a, b])
    optimizer.backward({"t": 3 * a.sum() + 1000 * b.sum()})
    b.grad = None
    optimizer.clip_gradients(1.0, clip)
    torch.testing.assert_close(a.grad, torch.full((2,), 0.5**0.5 if clip == "norm" else 1.0))
    optimizer.step()
    assert torch.equal(b, torch.ones(2))
    assert not torch.equal(a, torch.ones(2))


@pytest.mark.parametrize("options", [{}, {"denominator": "own"}, {"low_memory": True}], ids=str)
@pytest.mark.parametrize("who", ["optimizer", "model"])
def test_resetting_to_zeros_before_a_batch_is_no_edit(options, who):
    plain, zeroed = M(), M()
    for model in (plain, zeroed):
        optimizer = MTAdam(model.named_parameters(), lr=1e-2, **options)
        for _ in range(3):
            (model if who == "model" else optimizer).zero_grad(set_to_none=model is plain)
            optimizer.backward(model.losses())
            optimizer.step()
    assert torch.equal(entries(plain), entries(zeroed))


def test_what_was_skipped_loaded_or_dropped_does_not_come_back():
    def after(between):
        p = P(torch.ones(4))
        optimizer = MTAdam([p], lr=0.1, terms=("a", "b"))
        for _ in range(2):
            optimizer.backward({"a": p.square().sum(), "b": p.sum()})
            optimizer.step()
            between(optimizer, p)
        return p.detach()

    def skips(optimizer, p):
        optimizer.backward({"a": (7 * p).sum()})
        optimizer.skip_step()
        optimizer.step()

    def fails(optimizer, p):
        optimizer.backward({"a": (7 * p).sum()})
        elsewhere = P(torch.ones(2)).sum()
        with pytest.raises(ValueError, match="reaches no parameter"):
            optimizer.backward({"a": (7 * p).sum(), "b": elsewhere})

    plain = after(lambda optimizer, p: None)
    loaded = after(lambda optimizer, p: optimizer.load_state_dict(optimizer.state_dict()))
    for found in (loaded, after(skips), after(fails)):
        assert torch.equal(found, plain)


def test_gradients_from_elsewhere_between_accumulated_batches_count():
    a, b = P(torch.ones(2)), P(torch.ones(2))
    optimizer = MTAdam([a, b])
    optimizer.backward({"t": a.sum()})
    (3 * b).sum().backward()
    optimizer.backward({"t": a.sum() + b.sum()})
    assert b.grad.tolist() == [4, 4]
    assert a.grad.tolist() == [2, 2]


def test_what_is_frozen_between_accumulated_batches_keeps_what_it_has():
    a, b = P(torch.ones(2)), P(torch.ones(2))
    optimizer = MTAdam([a, b], lr=0.1)
    optimizer.backward({"t": a.sum() + b.sum()})
    b.requires_grad_(False)
    optimizer.backward({"t": a.sum()})
    optimizer.step()
    torch.testing.assert_close(b.detach(), torch.full((2,), 0.9))


def test_clipping_between_accumulated_batches_shortens_what_was_there():
    p = P(torch.ones(4))
    optimizer = MTAdam([p])
    for clip in (True, False):
        optimizer.backward({"a": (p * torch.tensor([1.0, 2, 3, 4])).sum()})
        if clip:
            optimizer.clip_gradients(1e-3)
    torch.testing.assert_close(p.grad, torch.tensor([1.0, 2, 3, 4]) * (1 + 1e-3 / 30**0.5))


def test_a_group_that_comes_after_an_edit_changes_no_scale():
    def scales(add):
        p = P(torch.ones(4))
        optimizer = MTAdam([p], lr=0.1)
        one, other = torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, -3, 2, 2])
        optimizer.backward({"a": (p * one).sum(), "b": (p * other).sum()})
        p.grad[:2] = 0
        if add:
            optimizer.add_param_group({"params": [P(torch.ones(2))]})
        optimizer.step()
        return [
            optimizer.scales()["parameter_0"],
            *(optimizer.state[p][key] for key in ("exp_avg_sq", "gradient_norm")),
        ]

    for one, other in zip(scales(False), scales(True), strict=True):
        assert torch.equal(one, other)


def test_a_backward_pass_that_is_refused_leaves_the_loss_scale_where_it_was():
    p, scale = P(torch.ones(4)), torch.tensor(1024.0)
    optimizer = MTAdam([p], lr=0.1, terms=("a",))
    optimizer.backward({"a": p.sum()}, grad_output=scale, loss_scale=scale)
    with pytest.raises(ValueError, match="typo"):
        optimizer.backward({"typo": p.sum()}, grad_output=scale, loss_scale=scale)
    assert p.grad.tolist() == [1024] * 4
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((4,), 0.1))


def test_after_a_refusal_what_was_set_to_none_stays_alone():
    a, b = P(torch.ones(2)), P(torch.ones(2))
    optimizer = MTAdam([a, b], lr=0.1, low_memory=True)
    optimizer.backward({"t": a.sum() + b.sum()})
    b.grad = None
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'parameter_1' was changed"):
            optimizer.step()
    assert torch.equal(b, torch.ones(2))


def test_a_cleared_state_after_an_edit_begins_anew():
    p = P(torch.ones(4))
    optimizer = MTAdam([p], lr=0.1)
    optimizer.backward({"a": p.sum()})
    p.grad.mul_(0.5)
    optimizer.state.clear()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((4,), 0.05))


def test_the_balanced_gradient_is_let_go_with_p_grad():
    model = M()
    optimizer = MTAdam(model.named_parameters())
    optimizer.backward(model.losses())
    memory = weakref.ref(optimizer._pending.shown.memory)
    optimizer.step()
    optimizer.zero_grad()
    assert memory() is None

"""A term for each class, weighted as the paper or its code weights them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from example_projects.mnist import __main__ as command
from example_projects.mnist.module import CLASSES, TERMS, class_losses


def random_batch(classes=range(CLASSES), size=12):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(size, CLASSES, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.tensor([list(classes)[index % len(classes)] for index in range(size)])
    return logits, target


def test_a_class_loss_is_its_weight_times_the_sum_of_its_samples_over_the_batch_size():
    logits, target = random_batch()
    weights = torch.linspace(1, 1000, CLASSES, dtype=torch.float64)
    losses = class_losses(logits.log_softmax(1), target, weights)
    probabilities = np.exp(logits.detach().numpy())
    probabilities /= probabilities.sum(1, keepdims=True)
    assert tuple(losses) == TERMS
    for index, loss in enumerate(losses.values()):
        nll = [-np.log(probabilities[row, index]) for row in range(12) if target[row] == index]
        assert loss.shape == ()
        assert loss.item() == pytest.approx(weights[index].item() * sum(nll) / 12, rel=1e-12)


def test_an_absent_class_has_loss_zero_and_gradient_zero():
    logits, target = random_batch(classes=(0, 4, 9))
    losses = class_losses(logits.log_softmax(1), target, torch.full((CLASSES,), 1e3, dtype=torch.float64))
    for index, loss in enumerate(losses.values()):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        present = index in (0, 4, 9)
        assert (loss.item() > 0) == present
        assert (gradient.abs().sum().item() > 0) == present
        assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [range(CLASSES), (2, 7)])
def test_with_weights_of_one_the_losses_sum_to_the_mean_nll(classes):
    logits, target = random_batch(classes)
    losses = class_losses(logits.log_softmax(1), target, torch.ones(CLASSES, dtype=torch.float64))
    torch.testing.assert_close(sum(losses.values()), F.nll_loss(logits.log_softmax(1), target), rtol=1e-12, atol=0)


def test_code_weights_are_one_and_nine_uniform_up_to_1000():
    for seed in range(5):
        weights = command.class_weights("code", seed)
        expected = 1000 * np.random.RandomState(seed).rand(CLASSES)
        assert weights[0] == 1
        assert ((weights[1:] > 0) & (weights[1:] < 1000)).all()
        np.testing.assert_array_equal(weights[1:].numpy(), expected[1:].astype(np.float32))
    assert not torch.equal(command.class_weights("code", 0), command.class_weights("code", 1))


def test_paper_weights_are_uniform_from_1_to_1000():
    weights = torch.stack([command.class_weights("paper", seed) for seed in range(200)])
    expected = [1 + 999 * np.random.RandomState(seed).rand(CLASSES) for seed in range(200)]
    np.testing.assert_array_equal(weights.numpy(), np.array(expected, dtype=np.float32))
    assert 1 <= weights.min() < 10
    assert 990 < weights.max() <= 1000


def test_equal_weights_are_one():
    assert torch.equal(command.class_weights("equal", 5), torch.ones(CLASSES))

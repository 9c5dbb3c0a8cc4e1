"""The normalised mean squared error, against numpy and over processes."""

import numpy as np
import pytest
import torch

from lightning_mtadam.metrics import NormalizedMeanSquaredError, normalized_squared_errors
from tests.distributed.ranks import results, run_ranks


def random_images(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(count, 3, 6, 5, generator=generator)
    return truth + 0.3 * torch.randn(truth.shape, generator=generator), truth


def by_numpy(prediction, truth):
    pairs = zip(prediction.double().numpy(), truth.double().numpy(), strict=True)
    return [np.linalg.norm((x - y).ravel()) ** 2 / np.linalg.norm(y.ravel()) ** 2 for x, y in pairs]


def test_an_image_has_its_squared_error_over_the_squares_of_its_truth():
    prediction, truth = random_images()
    found = normalized_squared_errors(prediction, truth)
    np.testing.assert_allclose(found.numpy(), by_numpy(prediction, truth), rtol=1e-12)


def test_each_image_counts_once_whatever_the_batches():
    prediction, truth = random_images()
    metric = NormalizedMeanSquaredError()
    for rows in (slice(0, 1), slice(1, 3), slice(3, 7)):
        metric.update(prediction[rows], truth[rows])
    assert metric.compute().item() == pytest.approx(np.mean(by_numpy(prediction, truth)), rel=1e-12)


def test_a_common_factor_changes_nothing_and_an_offset_does():
    prediction, truth = random_images()
    before = normalized_squared_errors(prediction, truth)
    torch.testing.assert_close(normalized_squared_errors(255 * prediction, 255 * truth), before, rtol=1e-5, atol=0)
    assert (normalized_squared_errors(prediction + 1, truth + 1) < before / 2).all()


def test_a_truth_of_zeros_gives_inf_or_nan():
    found = normalized_squared_errors(torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1))
    assert found[0] == torch.inf
    assert found[1].isnan()


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (1, 3)), ((2,), (2,))])
def test_shapes_that_do_not_fit_raise_and_are_named(shapes):
    prediction, truth = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=r"the same shape, \(B, \.\.\.\), but have shapes") as raised:
        NormalizedMeanSquaredError().update(prediction, truth)
    assert str(shapes[0]) in str(raised.value)


def of_a_share(rank):
    prediction, truth = random_images()
    metric = NormalizedMeanSquaredError()
    metric.update(*((prediction[:2], truth[:2]) if rank == 0 else (prediction[2:], truth[2:])))
    return metric.compute()


def test_two_ranks_equal_one_process(tmp_path):
    alone = np.mean(by_numpy(*random_images()))
    for found in results(run_ranks(of_a_share, tmp_path)):
        assert found.item() == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_of_complex_numbers_the_magnitudes_count(dtype):
    truth = torch.tensor([[1.0, 0.0], [3.0, 4.0j]], dtype=dtype)
    prediction = truth + torch.tensor([[2.0j, 0.0], [0.0, 5.0]], dtype=dtype)
    assert normalized_squared_errors(prediction, truth).tolist() == [4.0, 1.0]
    metric = NormalizedMeanSquaredError()
    metric.update(prediction[:1], truth[:1])
    assert metric.compute().item() == 4


def test_a_real_truth_may_have_a_complex_prediction_and_the_other_way_round():
    real, imaginary = torch.ones(1, 2), torch.full((1, 2), 1j)
    assert normalized_squared_errors(imaginary, real).tolist() == [2.0]
    assert normalized_squared_errors(real, imaginary).tolist() == [2.0]


@pytest.mark.parametrize("size", [1e200, 1.5e308, 1e-200, 1e-310])
def test_squares_neither_overflow_nor_vanish(size):
    truth = torch.tensor([[1.0, 0.0], [3.0, 4.0]], dtype=torch.float64) * (size / 4)
    prediction = torch.tensor([[-1.0, 0.0], [3.0, 3.0]], dtype=torch.float64) * (size / 4)
    found = normalized_squared_errors(prediction, truth)
    torch.testing.assert_close(found, torch.tensor([4.0, 0.04], dtype=torch.float64), rtol=1e-10, atol=0)


def test_the_gradient_of_the_error_is_that_of_its_formula():
    prediction, truth = (images.double() for images in random_images(2))
    prediction.requires_grad_()
    (gradient,) = torch.autograd.grad(normalized_squared_errors(prediction, truth).sum(), prediction)
    squares = truth.square().flatten(1).sum(1).view(2, 1, 1, 1)
    torch.testing.assert_close(gradient, (2 * (prediction - truth) / squares).detach())
    exact = truth.clone().requires_grad_()
    assert not torch.autograd.grad(normalized_squared_errors(exact, truth).sum(), exact)[0].any()


def test_what_is_not_finite_stays_so():
    truth = torch.ones(2, 2)
    found = normalized_squared_errors(torch.tensor([[torch.inf, 0.0], [torch.nan, 0.0]]), truth)
    assert found[0] == torch.inf
    assert found[1].isnan()


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_of_no_images_there_is_no_mean(update):
    metric = NormalizedMeanSquaredError()
    if update:
        metric.update(torch.zeros(0, 3, 2), torch.zeros(0, 3, 2))
    with pytest.raises(RuntimeError, match=r"no images.*update\(prediction, truth\)"):
        metric.compute()
    metric.update(torch.zeros(1, 2), torch.ones(1, 2))
    assert metric.compute() == 1


def test_images_without_entries_are_refused():
    with pytest.raises(ValueError, match=r"must have entries.*\(2, 0\)"):
        normalized_squared_errors(torch.zeros(2, 0), torch.zeros(2, 0))


def of_an_empty_share(rank):
    prediction, truth = random_images()
    metric = NormalizedMeanSquaredError()
    if rank == 0:
        metric.update(prediction, truth)
    else:
        metric.update(prediction[:0], truth[:0])
    return metric.compute()


def test_a_rank_may_have_no_images_if_another_has(tmp_path):
    for found in results(run_ranks(of_an_empty_share, tmp_path)):
        assert found.item() == pytest.approx(np.mean(by_numpy(*random_images())), rel=1e-12)

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

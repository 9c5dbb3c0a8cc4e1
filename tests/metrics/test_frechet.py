"""Frechet distances, on a small network: laws, rounding, what holds the metric, several processes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mtadam.metrics import FrechetDistance
from lightning_mtadam.metrics.features import FeatureNetwork
from lightning_mtadam.metrics.gaussians import Gaussian, fit, frechet_distance
from tests.distributed.ranks import results, run_ranks


class SmallFeatures(FeatureNetwork):
    """A network that is another one in training mode and in half precision."""

    num_features = 16

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        )

    def extract(self, images):
        return self.network(images)


def random_images(count, seed, brightness=1.0):
    generator = torch.Generator().manual_seed(seed)
    return brightness * torch.rand(count, 3, 9, 8, generator=generator) ** 2


REAL, MADE = random_images(40, 0), random_images(50, 1, 0.9)


def measure(metric, real=REAL, made=MADE):
    metric.update(real, real=True)
    metric.update(made, real=False)
    return metric.compute().item()


def by_numpy(real, made):
    """From features [N, D], with the eigenvalues of the product of the covariances."""
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real, made))
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    return np.sum((m1 - m2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * root


def features_of_files(images):
    """What the network makes of the images after a file has rounded them."""
    levels = np.floor(images.numpy() * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    with torch.no_grad():
        return SmallFeatures().network(torch.from_numpy(levels) / 255).double().numpy()


EXPECTED = by_numpy(features_of_files(REAL), features_of_files(MADE))


# Value


def test_the_distance_is_that_of_the_features_of_the_files():
    assert EXPECTED > 1e-3
    assert measure(FrechetDistance(SmallFeatures())) == pytest.approx(EXPECTED, rel=1e-9)


def test_batches_and_their_order_change_nothing():
    metric = FrechetDistance(SmallFeatures())
    for made in MADE.split(7):
        metric.update(made, real=False)
    for real in reversed(REAL.split(11)):
        metric.update(real, real=True)
    assert metric.compute().item() == pytest.approx(EXPECTED, rel=1e-7)  # the network is in single precision


def test_floating_point_images_count_as_their_files():
    as_bytes = [(images * 255 + 0.5).to(torch.uint8) for images in (REAL, MADE)]
    assert measure(FrechetDistance(SmallFeatures()), *as_bytes) == measure(FrechetDistance(SmallFeatures()))
    with torch.no_grad():
        unrounded = [SmallFeatures().network(images).double().numpy() for images in (REAL, MADE)]
    assert by_numpy(*unrounded) != pytest.approx(EXPECTED, rel=1e-6)


def test_the_distance_is_symmetric_and_zero_between_equal_sets():
    assert measure(FrechetDistance(SmallFeatures()), MADE, REAL) == pytest.approx(EXPECTED, rel=1e-9)
    assert measure(FrechetDistance(SmallFeatures()), REAL, REAL) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("count", "size"), [(300, 16), (16, 16), (40, 64), (5, 64), (2, 64), (30, 300)])
def test_the_distance_is_exact_whatever_the_rank(count, size):
    """With fewer vectors than features, the nuclear norm of the small product of the vectors is the trace."""
    rng = np.random.default_rng(count)
    first, second = rng.normal(1, 1, (count, size)), rng.normal(1.2, 2, (count, size)) * rng.uniform(0, 1, size)
    roots = [(x - x.mean(0)) / np.sqrt(count - 1) for x in (first, second)]
    expected = np.sum((first.mean(0) - second.mean(0)) ** 2) + sum(np.sum(root**2) for root in roots)
    expected -= 2 * np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    vectors = [torch.from_numpy(x) for x in (first, second)]
    found = frechet_distance(*(fit(x.sum(0), x.T @ x, count) for x in vectors))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_of_diagonal_covariances_the_distance_is_that_of_their_roots():
    variances = torch.tensor([[4.0, 0.0, 9.0], [1.0, 25.0, 9.0]], dtype=torch.float64)
    gaussians = [Gaussian(torch.zeros(3).double(), variance.diag(), 3) for variance in variances]
    assert frechet_distance(*gaussians).item() == pytest.approx((2 - 1) ** 2 + 5**2, rel=1e-12)


def test_images_that_are_all_the_same_have_no_spread():
    real = REAL[:1].expand(3, -1, -1, -1)
    made = MADE[:1].expand(4, -1, -1, -1)
    expected = np.sum((features_of_files(real)[0] - features_of_files(made)[0]) ** 2)
    assert measure(FrechetDistance(SmallFeatures()), real, made) == pytest.approx(expected, rel=1e-6)


def test_n_is_the_smaller_number_of_images():
    metric = FrechetDistance(SmallFeatures())
    assert metric.n == 0
    measure(metric)
    assert metric.n == 40


def test_the_true_images_can_be_kept():
    metric = FrechetDistance(SmallFeatures(), reset_real_features=False)
    measure(metric, REAL, REAL)
    metric.reset()
    metric.update(MADE, real=False)
    assert metric.compute().item() == pytest.approx(EXPECTED, rel=1e-9)


def test_what_is_not_finite_gives_nan():
    made = MADE.clone()
    made[3, 0, 2, 2] = torch.nan
    assert np.isnan(measure(FrechetDistance(SmallFeatures()), made=made))


# Errors


def test_one_image_is_too_few():
    with pytest.raises(RuntimeError, match="at least two images of each set, but got 40 real ones and 1 others"):
        measure(FrechetDistance(SmallFeatures()), made=MADE[:1])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8), ValueError, r"shape \(B, 3, H, W\), but have \(2, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), ValueError, r"shape \(B, 3, H, W\), but have \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), TypeError, "have dtype torch.int64"),
        (torch.linspace(-1, 1, 384).view(2, 3, 8, 8), ValueError, r"in \[0, 1\], but go from -1 to 1\. Scale them"),
        (torch.linspace(0, 255, 384).view(2, 3, 8, 8), ValueError, r"in \[0, 1\], but go from 0 to 255\."),
    ],
)
def test_images_of_another_kind_raise_and_say_what_is_needed(images, error, message):
    with pytest.raises(error, match=message):
        FrechetDistance(SmallFeatures()).update(images, real=True)


# What holds the metric


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.distance = FrechetDistance(SmallFeatures())


def test_the_network_is_no_part_of_what_holds_the_metric():
    holder = Holder()
    assert {name.partition(".")[0] for name in holder.state_dict()} == {"own"}
    assert [name for name, _ in holder.named_parameters()] == ["own.weight", "own.bias"]
    assert list(holder.buffers()) == []
    assert not any(isinstance(module, nn.Conv2d) for module in holder.modules())


@pytest.mark.parametrize(
    "treat",
    [
        lambda holder: holder.train(),
        lambda holder: holder.half(),
        lambda holder: holder.to(torch.bfloat16),
        lambda holder: holder.requires_grad_(True),
        copy.deepcopy,
        lambda holder: pickle.loads(pickle.dumps(holder)),
    ],
    ids=["train", "half", "bfloat16", "requires_grad", "copied", "pickled"],
)
def test_what_is_done_to_the_holder_changes_nothing(treat):
    treated = treat(Holder())
    for _ in range(2):  # the second time, batch normalisation in training mode would have moved its averages
        treated.distance.reset()
        assert measure(treated.distance) == pytest.approx(EXPECTED, rel=1e-9)
    assert not any(parameter.requires_grad for parameter in treated.distance.inception.network.parameters())


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        assert measure(FrechetDistance(SmallFeatures())) == pytest.approx(EXPECTED, rel=1e-9)


def test_the_holder_takes_the_network_to_another_device():
    holder = Holder().to("meta")
    assert {parameter.device.type for parameter in holder.distance.inception.network.parameters()} == {"meta"}
    assert holder.distance.real_features_sum.device.type == "meta"


# Several processes


def of_a_share(rank):
    metric = FrechetDistance(SmallFeatures())
    found = measure(metric, REAL[:15] if rank == 0 else REAL[15:], MADE[:30] if rank == 0 else MADE[30:])
    return found, metric.n


def of_the_first_rank_alone(rank):
    metric = FrechetDistance(SmallFeatures())
    return (measure(metric) if rank == 0 else metric.compute().item()), metric.n


@pytest.mark.filterwarnings("ignore:.*was called before the ``update``")
@pytest.mark.parametrize("measured", [of_a_share, of_the_first_rank_alone])
def test_two_ranks_equal_one_process(measured, tmp_path):
    for found, n in results(run_ranks(measured, tmp_path)):
        assert found == pytest.approx(EXPECTED, rel=1e-7)
        assert n == 40

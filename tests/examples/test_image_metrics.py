"""The image metrics of the example projects: units, rounding, the luma, the distance, several processes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from example_projects.common.image_metrics import ImageMetrics, make_distance, y_channel_metrics
from lightning_mtadam.metrics import FrechetInceptionDistance, FrechetVGG16Distance
from tests.distributed.ranks import results, run_ranks

NAMES = ["L1", "L2", "NMSE", "PSNR", "SSIM"]


def random_images(count=5, size=24, seed=0):
    """Predictions and truths in [-1, 1], the predictions also beyond; the second ones much nearer than the others."""
    generator = torch.Generator().manual_seed(seed)
    truth = nn.functional.interpolate(torch.rand(count, 3, 6, 6, generator=generator), size, mode="bilinear") * 2 - 1
    noise = torch.tensor([0.5, 0.01, 0.3, 0.2, 0.1])[:count].view(-1, 1, 1, 1)
    return truth + noise * torch.randn(truth.shape, generator=generator), truth


def to_pixels(images):
    """What a PNG file holds, float64 [B, H, W, 3] in 0..255."""
    return np.clip(np.round((images.numpy() + 1) * np.float32(127.5)), 0, 255).astype(float).transpose(0, 2, 3, 1)


def measure(prediction, truth, **options):
    metrics = ImageMetrics(**options)
    metrics.update(prediction, truth)
    return metrics.compute()


def gaussian_means(image):
    """Of [H, W], weighted by a Gaussian of 11 x 11 pixels and sigma 1.5, mirrored at the edges."""
    offsets = np.arange(-5, 6)
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    padded = np.pad(image, 5, mode="reflect")
    return np.einsum("hwij,ij->hw", np.lib.stride_tricks.sliding_window_view(padded, (11, 11)), kernel)


def ssim_of_a_channel(x, y):
    """Wang et al. 2004, with the range 255."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = gaussian_means(x), gaussian_means(y)
    vx, vy = gaussian_means(x * x) - mx**2, gaussian_means(y * y) - my**2
    cov = gaussian_means(x * y) - mx * my
    return np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


def by_numpy(prediction, truth):
    rows = []
    for x, y in zip(to_pixels(prediction), to_pixels(truth), strict=True):
        mse = np.mean((x - y) ** 2)
        rows.append(
            {
                "L1": np.mean(abs(x - y)),
                "L2": mse,
                "NMSE": np.sum((x - y) ** 2) / np.sum(y**2),
                "PSNR": 10 * np.log10(255**2 / mse),
                "SSIM": np.mean([ssim_of_a_channel(x[..., c], y[..., c]) for c in range(3)]),
            }
        )
    return {name: np.mean([row[name] for row in rows]) for name in NAMES}


def test_metrics_are_the_means_over_the_images_of_what_their_files_would_hold():
    prediction, truth = random_images()
    metrics = ImageMetrics()
    for rows in (slice(0, 2), slice(2, 5)):
        metrics.update(prediction[rows], truth[rows])
    found = metrics.compute()
    assert list(found) == NAMES
    for name, expected in by_numpy(prediction, truth).items():
        assert found[name] == pytest.approx(expected, rel=2e-5), name


def test_l1_and_l2_are_in_0_to_255():
    truth = torch.full((1, 3, 8, 8), -1.0)
    prediction = truth.clone()
    prediction[..., :4, :] = 1.0
    found = measure(prediction, truth)
    assert found["L1"] == pytest.approx(127.5)
    assert found["L2"] == pytest.approx(255**2 / 2)


def test_differences_below_half_a_level_are_none():
    levels = torch.arange(192, dtype=torch.float32).view(1, 3, 8, 8)
    truth = levels / 127.5 - 1
    found = measure((levels + 0.4) / 127.5 - 1, truth)
    assert (found["L1"], found["NMSE"], found["PSNR"]) == (0, 0, math.inf)
    assert measure((levels + 0.6) / 127.5 - 1, truth)["L1"] == pytest.approx(1)


def test_reset_forgets_all_images():
    metrics = ImageMetrics()
    metrics.update(*random_images(seed=1))
    metrics.compute()
    metrics.reset()
    metrics.update(*random_images())
    assert metrics.compute() == measure(*random_images())


def test_what_is_not_finite_shows():
    prediction, truth = random_images()
    prediction[2, 0, 12, 12] = math.nan
    assert all(math.isnan(value) for value in measure(prediction, truth, y_border=4).values())


@pytest.mark.parametrize("shapes", [((2, 3, 8, 8), (2, 3, 8, 9)), ((2, 1, 8, 8), (2, 1, 8, 8)), ((3, 8, 8), (3, 8, 8))])
@pytest.mark.parametrize("measured", [measure, y_channel_metrics])
def test_shapes_that_do_not_fit_raise_and_are_named(shapes, measured):
    with pytest.raises(ValueError, match=r"the same shape, \(B, 3, H, W\), but have shapes") as raised:
        measured(*map(torch.zeros, shapes))
    assert f"{shapes[0]} and {shapes[1]}" in str(raised.value)


# Luma


def luma(pixels):
    """rgb2ycbcr's, of [H, W, 3] in 0..255, without its four outer pixels."""
    return (16 + pixels @ np.array([65.481, 128.553, 24.966]) / 255)[4:-4, 4:-4]


def test_the_luma_is_compared_without_its_border():
    prediction, truth = random_images()
    pairs = [
        (luma(x), luma(y)) for x, y in zip(to_pixels(prediction), to_pixels(truth), strict=True)
    ]  # 16 x 16 pixels are left
    expected = {
        "PSNR-Y": np.mean([10 * np.log10(255**2 / np.mean((x - y) ** 2)) for x, y in pairs]),
        "SSIM-Y": np.mean([ssim_of_a_channel(x, y) for x, y in pairs]),
    }
    assert y_channel_metrics(prediction, truth) == pytest.approx(expected, rel=2e-5)
    found = measure(prediction, truth, y_border=4)
    assert list(found) == [*NAMES, *expected]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)


def test_the_border_and_colours_of_one_luma_do_not_count():
    _, truth = random_images()
    prediction = truth.clone()
    prediction[..., :4, :] = 1
    prediction[..., -4:] = -1
    assert y_channel_metrics(prediction, truth)["PSNR-Y"] == math.inf
    assert y_channel_metrics(prediction, truth, border=3)["PSNR-Y"] < 30


def test_black_and_white_have_the_lumas_16_and_235():
    black, white = -torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert y_channel_metrics(white, black)["PSNR-Y"] == pytest.approx(20 * math.log10(255 / (235 - 16)), rel=1e-5)


def test_an_image_that_is_all_border_raises():
    with pytest.raises(ValueError, match="24 x 24 pixels is nothing but its borders of 12 pixels"):
        y_channel_metrics(*random_images(), border=12)


# The Frechet distance


def test_the_distance_is_reported_by_its_label_with_the_number_of_images(random_vgg16):
    prediction, truth = random_images()
    found = measure(prediction, truth, distance=make_distance("vgg16", random_vgg16))
    assert list(found) == [*NAMES, "FD-VGG16", "n"]
    assert found["n"] == 5
    distance = FrechetVGG16Distance(random_vgg16)
    for images, real in ((prediction, False), (truth, True)):
        pixels = torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2).to(torch.uint8)
        distance.update(pixels, real=real)
    assert found["FD-VGG16"] == pytest.approx(distance.compute().item(), rel=1e-5)
    assert found["FD-VGG16"] > 0.01


def test_reset_forgets_the_images_of_the_distance(random_vgg16):
    metrics = ImageMetrics(make_distance("vgg16", random_vgg16))
    metrics.update(*random_images(count=2, seed=1))
    metrics.reset()
    metrics.update(*random_images(count=3))
    assert metrics.compute()["n"] == 3


def test_a_diverged_network_has_no_distance(random_vgg16):
    prediction, truth = random_images()
    found = measure(prediction * math.nan, truth, distance=make_distance("vgg16", random_vgg16))
    assert math.isnan(found["FD-VGG16"])


def test_metrics_move_with_their_distance(random_vgg16):
    distance = make_distance("vgg16", random_vgg16)
    ImageMetrics(distance).to("meta")
    assert distance.device.type == next(distance.inception.network.parameters()).device.type == "meta"


def test_the_distance_is_chosen_by_name(random_vgg16, random_inception):
    assert make_distance("none", None) is None
    assert isinstance(make_distance("vgg16", random_vgg16), FrechetVGG16Distance)
    assert isinstance(make_distance("inception", random_inception), FrechetInceptionDistance)


@pytest.mark.parametrize(
    ("extractor", "weights", "message"),
    [
        ("vgg16", None, "--feature-extractor vgg16 needs --weights"),
        ("none", "vgg16.pth", "--weights is given, but --feature-extractor is none"),
        ("vgg19", None, "must be one of .*inception.*, but is 'vgg19'"),
    ],
)
def test_a_choice_that_makes_no_sense_raises_and_says_what_to_give(extractor, weights, message):
    with pytest.raises(ValueError, match=message):
        make_distance(extractor, weights)


# Several processes


def of_a_share(rank, weights):
    prediction, truth = random_images()
    share = slice(0, 1) if rank == 0 else slice(1, 5)
    return measure(prediction[share], truth[share], y_border=2, distance=make_distance("vgg16", weights))


def test_two_ranks_equal_one_process(random_vgg16, tmp_path):
    alone = measure(*random_images(), y_border=2, distance=make_distance("vgg16", random_vgg16))
    for found in results(run_ranks(of_a_share, tmp_path, random_vgg16)):
        assert found == pytest.approx(alone, rel=1e-5)

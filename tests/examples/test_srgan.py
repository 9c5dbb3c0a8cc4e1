"""The SRGAN project: its networks, losses and data, and the command itself."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import VGG19_Weights, vgg16

from example_projects.common.image_data import Kept
from example_projects.common.images import from_bytes, to_bytes, to_image, to_tensor
from example_projects.srgan.data import Crops, make_data, random_position, reduced
from example_projects.srgan.module import LAMBDAS, SRGAN, bicubic, discriminator_losses, generator_losses
from example_projects.srgan.networks import Discriminator, Generator
from example_projects.srgan.perceptual import (
    DEVIATION,
    MEAN,
    RANDOM,
    PerceptualLoss,
    empty_features,
    make_perceptual_loss,
    random_vgg,
    read_vgg,
)
from example_projects.srgan.procedural import dead_leaves

SIZE = 32


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def random_image(seed, height, width):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Halved(PerceptualLoss):
    """A perceptual network that is quick and known: it halves its input."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1, bias=False), "halving")
        self.features.weight.data = 0.5 * torch.eye(3)[:, :, None, None]


# Networks


def test_parameter_counts_are_those_of_srresnet_and_of_the_discriminator_for_96_pixels():
    with torch.device("meta"):
        assert count(Generator()) == 1_549_462
        assert count(Discriminator()) == 23_565_505


def test_the_counts_are_those_of_the_layers_of_the_papers_figure():
    def convolution(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + outputs

    with torch.device("meta"):
        generator, discriminator = Generator(width=8, blocks=3), Discriminator(image_size=48, width=4)
    block = 2 * (convolution(8, 8, 3) + 2 * 8) + 1
    ends = convolution(3, 8, 9) + 1 + convolution(8, 8, 3) + 2 * 8 + convolution(8, 3, 9)
    assert count(generator) == 3 * block + ends + 2 * (convolution(8, 32, 3) + 1)
    channels = [4, 4, 8, 8, 16, 16, 32, 32]
    normalised = sum(convolution(a, b, 3) + 2 * b for a, b in zip(channels, channels[1:], strict=False))
    assert count(discriminator) == convolution(3, 4, 3) + normalised + (32 * 9 + 1) * 64 + 64 + 1


def test_the_generator_makes_images_of_any_size_four_times_larger():
    generator = Generator(width=2, blocks=1).eval()
    assert generator(torch.zeros(2, 3, 5, 7)).shape == (2, 3, 20, 28)


@pytest.mark.parametrize("size", [32, 48, 96])
def test_the_discriminator_takes_crops_of_the_size_it_was_made_for(size):
    assert Discriminator(size, width=2)(torch.zeros(2, 3, size, size)).shape == (2, 1)


@pytest.mark.parametrize("size", [0, 16, 40, 100])
def test_a_size_that_the_discriminator_cannot_shrink_is_refused(size):
    with pytest.raises(ValueError, match=f"image_size must be 32 or a larger multiple of 16.*but is {size}"):
        Discriminator(size)


# Losses


def test_losses_equal_those_computed_by_hand():
    generator = torch.Generator().manual_seed(0)
    made, truth = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64, generator=generator) * 2 - 1

    def discriminator(images):
        return images.mean((1, 2, 3), keepdim=True)[:, :, 0, 0]

    losses = generator_losses(made, truth, discriminator, Halved())
    difference = (made - truth).numpy()
    verdicts = 1 / (1 + np.exp(-made.numpy().mean((1, 2, 3))))
    spread = np.array(DEVIATION)[:, None, None]
    assert tuple(losses) == tuple(LAMBDAS["balanced"]) == tuple(LAMBDAS["unbalanced"])
    assert losses["mse"].item() == pytest.approx((difference**2).mean(), rel=1e-12)
    assert losses["gan"].item() == pytest.approx(-np.log(verdicts).mean(), rel=1e-12)
    assert losses["perceptual"].item() == pytest.approx(((difference / 2 / spread / 2) ** 2).mean(), rel=1e-5)

    losses = discriminator_losses(made, truth, discriminator)
    real = 1 / (1 + np.exp(-truth.numpy().mean((1, 2, 3))))
    assert losses["d_real"].item() == pytest.approx(-np.log(real).mean(), rel=1e-12)
    assert losses["d_fake"].item() == pytest.approx(-np.log(1 - verdicts).mean(), rel=1e-12)


def test_losses_stay_finite_when_the_discriminator_is_certain():
    images = torch.zeros(1, 3, 4, 4)
    for verdict in (-1e4, 1e4):
        discriminator = lambda images, verdict=verdict: torch.full((1, 1), verdict)  # noqa: E731
        losses = generator_losses(images, images, discriminator, Halved())
        losses |= discriminator_losses(images, images, discriminator)
        assert all(loss.isfinite() for loss in losses.values())


def test_only_the_adversarial_term_passes_through_the_discriminator():
    made, truth = torch.rand(2, 1, 3, SIZE, SIZE, requires_grad=True)
    discriminator = Discriminator(SIZE, width=2)
    losses = generator_losses(made, truth, discriminator, Halved())
    for name, loss in losses.items():
        reached = torch.autograd.grad(loss, list(discriminator.parameters()), retain_graph=True, allow_unused=True)
        assert all((gradient is not None) == (name == "gan") for gradient in reached), name


def test_the_prescribed_perceptual_weight_is_the_papers_scale_of_features_squared():
    assert LAMBDAS["balanced"] == {"mse": 1, "gan": 0.001, "perceptual": pytest.approx(12.75**-2, rel=0.03)}
    assert set(LAMBDAS["unbalanced"].values()) == {1}


# The perceptual network


def save_vgg16(path, prefix="features.", drop=()):
    layers, _ = empty_features(13)
    layers = layers.to_empty(device="cpu")
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.05)
    state = {prefix + name: value.half() for name, value in layers.state_dict().items() if name not in drop}
    torch.save(state, path)
    return layers


def test_weights_of_a_file_are_those_that_torchvisions_network_computes_with(tmp_path):
    layers = save_vgg16(tmp_path / "vgg16.pth").half().float()
    loss = read_vgg(tmp_path / "vgg16.pth")
    made, truth = torch.rand(2, 1, 3, SIZE, SIZE) * 2 - 1
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    ours, theirs = (layers(((images + 1) / 2 - mean) / deviation) for images in (made, truth))
    assert loss.name == "VGG16"
    with torch.device("meta"):
        assert str(loss.features) == str(vgg16().features[:30])
    torch.testing.assert_close(loss(made, truth), (ours - theirs).square().mean(), rtol=1e-6, atol=0)
    assert loss(truth, truth) == 0


def test_features_end_with_the_rectified_last_convolution():
    for convolutions, width, last in ((13, 30, 28), (16, 36, 34)):
        layers, _ = empty_features(convolutions)
        assert len(layers) == width
        assert isinstance(layers[last], nn.Conv2d)
        assert isinstance(layers[-1], nn.ReLU)
        assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == convolutions


def test_random_weights_are_the_same_each_time_and_take_no_random_numbers():
    before = torch.get_rng_state()
    first, second = random_vgg(), random_vgg()
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(first.features.parameters(), second.features.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    features = first.features(torch.randn(1, 3, SIZE, SIZE))
    assert 0.1 < features.std() < 10


@pytest.mark.parametrize(
    ("prefix", "drop", "message"),
    [
        ("layers.", (), "has 0 convolutions; VGG16 has 13, VGG19 has 16"),
        ("features.", ("28.weight",), "has 12 convolutions"),
        ("features.", ("0.bias",), "does not hold the convolutions of VGG16.*0.bias"),
    ],
)
def test_a_file_of_another_network_is_refused_by_name(tmp_path, prefix, drop, message):
    save_vgg16(tmp_path / "vgg.pth", prefix, drop)
    with pytest.raises(ValueError, match=f"(?s)vgg.pth {message}.*--perceptual-weights"):
        read_vgg(tmp_path / "vgg.pth")


def test_a_missing_and_a_damaged_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.pth.*--perceptual-weights"):
        read_vgg(tmp_path / "none.pth")
    for content in (b"", b"<html>", torch.save):
        path = tmp_path / "damaged.pth"
        if callable(content):
            save_vgg16(path)
            path.write_bytes(path.read_bytes()[:1000])
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.pth cannot be read as weights.*--perceptual-weights"):
            read_vgg(path)


@pytest.fixture
def offline(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(type(VGG19_Weights.IMAGENET1K_V1), "get_state_dict", fail)


@pytest.mark.usefixtures("offline")
def test_without_weights_a_trial_says_that_they_are_random():
    loss, announcement = make_perceptual_loss(None, for_trial=True)
    assert loss.name == "random VGG19"
    assert "no route to host" in announcement
    assert "RANDOM weights" in announcement
    assert VGG19_Weights.IMAGENET1K_V1.url in announcement


@pytest.mark.usefixtures("offline")
def test_without_weights_real_images_are_refused_with_the_remedy():
    with pytest.raises(RuntimeError, match="vgg19.*no route to host.*--perceptual-weights"):
        make_perceptual_loss(None, for_trial=False)
    loss, announcement = make_perceptual_loss(RANDOM, for_trial=False)
    assert loss.name == "random VGG19"
    assert "RANDOM weights, as asked" in announcement


# Data


@pytest.fixture
def folders(tmp_path):
    """Three photographs, one of them grey, and a benchmark of two pairs of different sizes."""
    train, test = tmp_path / "train", tmp_path / "test"
    train.mkdir()
    test.mkdir()
    for seed, (height, width) in enumerate([(40, 50), (64, 33)]):
        random_image(seed, height, width).save(train / f"{seed}.png")
    random_image(2, 40, 40).convert("L").save(train / "2.jpg")
    for seed, (height, width) in enumerate([(32, 40), (48, 36)]):
        high = random_image(seed, height, width)
        high.save(test / f"img_{seed}_SRF_4_HR.png")
        high.reduce(4).save(test / f"img_{seed}_SRF_4_LR.png")
    return train, test


def data(train, test, **options):
    return make_data(train, test, **{"image_size": SIZE, "crops_per_image": 2, "batch_size": 2, "seed": 0} | options)


def coordinates(height, width):
    """An image whose pixels tell where they are, uint8 [3, H, W]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)


def test_crops_are_parts_of_the_photographs_in_any_of_eight_positions():
    whole = coordinates(40, 50)
    crops = Crops(Kept(lambda index: whole, 1), SIZE, 2)
    places, positions = set(), set()
    for seed in range(200):
        _, high = crops[(0, seed)]
        pixels = to_bytes(to_image(high))
        for position in range(8):
            undone = (pixels.flip(2) if position >= 4 else pixels).rot90(-(position % 4), (1, 2))
            top, left = undone[:2, 0, 0].tolist()
            if torch.equal(undone, whole[:, top : top + SIZE, left : left + SIZE]):
                places.add((top, left))
                positions.add(position)
    assert positions == set(range(8))
    assert {top for top, _ in places} == set(range(40 - SIZE + 1))
    assert {left for _, left in places} == set(range(50 - SIZE + 1))


def test_an_epoch_has_as_many_crops_of_each_photograph_as_asked_for(folders):
    train = data(*folders, crops_per_image=3).train
    assert len(train) == 3 * 3
    seen = []
    train.images.make = lambda index: seen.append(index) or torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    train.images.memory = 0
    for index in range(9):
        assert [part.shape[-1] for part in train[(index, 0)]] == [SIZE // 4, SIZE]
    assert sorted(seen) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_crop_depends_on_its_draw_alone(folders):
    first, second = data(*folders).train, data(*folders).train
    for draw in ((0, 5), (4, 6)):
        assert all(torch.equal(a, b) for a, b in zip(first[draw], second[draw], strict=True))
    assert not torch.equal(first[(0, 5)][1], first[(0, 6)][1])


def test_a_reduction_is_the_bicubic_one_that_benchmarks_are_made_with():
    # The cubic kernel with a = -0.5, stretched by the factor: written out for one pixel in the middle of an image.
    def kernel(x):
        x = abs(x)
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0

    high = to_bytes(random_image(0, 40, 40))
    weights = np.array([kernel((at + 0.5) / 4 - 5.5) for at in range(40)])  # of the pixel with index 5
    weights /= weights.sum()
    wanted = np.einsum("chw,h,w->c", high.numpy().astype(float), weights, weights)
    np.testing.assert_allclose(reduced(high)[:, 5, 5].numpy(), wanted.clip(0, 255), atol=1.01)


def test_bicubic_enlargement_is_pillows():
    low = to_bytes(random_image(0, 12, 9)) // 2 + 64  # Pillow clamps in between, too
    pillow = to_image(from_bytes(low)).resize((36, 48), Image.Resampling.BICUBIC)
    torch.testing.assert_close(bicubic(from_bytes(low)[None])[0], from_bytes(to_bytes(pillow)), rtol=0, atol=2 / 127.5)


def test_a_benchmark_is_read_in_its_pairs(folders):
    test = data(*folders).test
    assert len(test) == 2
    for seed, (low, high) in enumerate(test[index] for index in range(2)):
        assert torch.equal(high, to_tensor(random_image(seed, *high.shape[1:])))
        assert torch.equal(low, to_tensor(random_image(seed, *high.shape[1:]).reduce(4)))


def test_photographs_to_test_on_are_cut_to_a_multiple_of_four_and_reduced(folders):
    train, _ = folders
    lows, highs = zip(*(data(train, train).test[index] for index in range(3)), strict=True)
    assert [tuple(high.shape) for high in highs] == [(3, 40, 48), (3, 64, 32), (3, 40, 40)]
    assert [tuple(low.shape) for low in lows] == [(3, 10, 12), (3, 16, 8), (3, 10, 10)]
    assert torch.equal(highs[0], to_tensor(random_image(0, 40, 50))[:, :40, :48])
    assert torch.equal(lows[0], from_bytes(reduced(to_bytes(to_image(highs[0])))))


def test_a_grey_image_becomes_one_of_three_equal_channels(folders):
    train, _ = folders
    _, high = data(train, train).test[2]
    assert high.std() > 0
    assert torch.equal(high, high[:1].expand(3, -1, -1))


def test_half_a_pair_and_a_pair_for_another_factor_are_named(folders):
    train, test = folders
    random_image(0, 16, 20).save(test / "img_0_SRF_4_LR.png")
    with pytest.raises(
        ValueError, match=r"img_0_SRF_4_HR\.png is 40x32, which is not 4 times the 20x16 of img_0_SRF_4_LR"
    ):
        data(train, test).test[0]
    (test / "img_1_SRF_4_LR.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"img_1_SRF_4_HR\.png has no img_1_SRF_4_LR\.png beside it"):
        data(train, test)


def test_a_photograph_that_is_smaller_than_the_crops_is_named(folders):
    train = data(*folders, image_size=64).train
    with pytest.raises(ValueError, match=r"0\.png is 50x40, too small for crops of 64x64.*--image-size"):
        train[(0, 0)]


def test_an_unreadable_photograph_and_a_folder_without_any_are_named(folders, tmp_path):
    train, test = folders
    (train / "0.png").write_bytes((train / "0.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"0\.png is not a whole image"):
        data(train, test).train[(0, 0)]
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(FileNotFoundError, match=f"{folder}.*--data-dir"):
            data(tmp_path / folder, test)


@pytest.mark.parametrize(("given", "missing"), [(0, "--test-dir"), (1, "--data-dir")])
def test_one_folder_without_the_other_is_refused(folders, given, missing):
    chosen = [folder if index == given else None for index, folder in enumerate(folders)]
    with pytest.raises(ValueError, match=f"is given without {missing}"):
        data(*chosen)


def test_without_folders_images_are_generated_and_it_says_so(folders):
    made = data(None, None)
    assert re.search(
        "No --data-dir: images of 160x160 pixels are generated.* 16 to train on, 4 to test", made.announcement
    )
    assert str(folders[0]) in data(*folders).announcement
    larger = data(None, None, image_size=192).train
    assert larger[(0, 0)][1].shape == (3, 192, 192)


def test_generated_images_differ_are_repeatable_and_have_the_spectrum_of_photographs():
    images = [np.asarray(dead_leaves(128, seed), dtype=float) for seed in range(6)]
    assert np.array_equal(images[0], np.asarray(dead_leaves(128, 0)))
    assert all(not np.array_equal(images[0], other) for other in images[1:])
    power = np.mean([np.abs(np.fft.fft2(image.mean(2) - image.mean())) ** 2 for image in images], 0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    middle = (frequency > 0.03) & (frequency < 0.3)
    slope, _ = np.polyfit(np.log(frequency[middle]), np.log(power[middle]), 1)
    assert -3 < slope < -1.5  # photographs have about -2

"""The perceptual loss of the SRGAN project: the network, its weights, and what is said where there are none."""

import pytest
import torch
from torch import nn
from torchvision.models import VGG19_Weights, vgg16

from example_projects.srgan.perceptual import (
    RANDOM,
    empty_features,
    make_perceptual_loss,
    random_vgg,
    read_vgg,
)
from lightning_mtadam.metrics.features import IMAGENET_MEAN, IMAGENET_STD

SIZE = 32


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
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
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
    with pytest.raises(OSError, match=r"vgg19.*no route to host.*--perceptual-weights"):
        make_perceptual_loss(None, for_trial=False)
    loss, announcement = make_perceptual_loss(RANDOM, for_trial=False)
    assert loss.name == "random VGG19"
    assert "RANDOM weights, as asked" in announcement

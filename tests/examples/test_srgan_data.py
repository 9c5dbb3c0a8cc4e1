"""The images of the SRGAN project: crops, reductions, benchmarks, and generated ones."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from example_projects.common.image_data import Kept
from example_projects.common.image_metrics import ImageMetrics
from example_projects.common.images import from_bytes, to_bytes, to_image, to_tensor
from example_projects.srgan.data import Crops, make_data, reduced
from example_projects.srgan.module import bicubic
from example_projects.srgan.procedural import dead_leaves

SIZE = 32


def random_image(seed, height, width):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


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
    return make_data(
        train,
        [test] if test else [],
        **{"image_size": SIZE, "crops_per_image": 2, "batch_size": 2, "seed": 0} | options,
    )


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


@pytest.mark.parametrize("given", [True, False])
def test_data_can_be_sent_to_workers(folders, given):
    chosen = data(*folders) if given else data(None, None)
    for dataset, index in ((chosen.train, (3, 4)), (chosen.test, 1)):
        copy = pickle.loads(pickle.dumps(dataset))
        assert all(torch.equal(a, b) for a, b in zip(copy[index], dataset[index], strict=True))


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


@pytest.mark.parametrize("size", [(3, 3), (12, 12), (40, 15)])
@pytest.mark.parametrize("name", ["small.png", "img_9_SRF_4_HR.png"])
def test_an_image_that_is_too_small_to_be_measured_is_named_before_training(folders, size, name):
    train, test = folders
    random_image(0, *size[::-1]).save((test if "HR" in name else train) / name)
    random_image(0, 4, 4).save(test / "img_9_SRF_4_LR.png")
    chosen = data(train, test if "HR" in name else train, image_size=1)
    said = rf"{name} is {size[0]}x{size[1]}, too small to be measured: 16x16 is the least\. Take it out of the folder"
    with pytest.raises(ValueError, match=said):
        chosen.check()


@pytest.mark.parametrize("size", [(16, 16), (19, 17)])
def test_the_least_size_is_measured(folders, size):
    train, _ = folders
    random_image(0, *size[::-1]).save(train / "3.png")
    low, high = data(train, train).test[3]
    metrics = ImageMetrics(y_border=4)
    metrics.update(bicubic(low[None]), high[None])
    assert all(math.isfinite(value) for value in metrics.compute().values())


def test_an_unreadable_photograph_and_a_folder_without_any_are_named(folders, tmp_path):
    train, test = folders
    (train / "0.png").write_bytes((train / "0.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"0\.png is not a whole image"):
        data(train, test).train[(0, 0)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image in .*empty"):
        data(tmp_path / "empty", test)


@pytest.mark.parametrize(("missing", "option"), [(0, "--data-dir a folder of"), (1, "--test-dir a folder of")])
def test_a_folder_that_is_missing_is_named_with_its_option(folders, tmp_path, missing, option):
    chosen = [tmp_path / "none" if index == missing else folder for index, folder in enumerate(folders)]
    with pytest.raises(FileNotFoundError, match=rf"no folder .*none\. Give {option}"):
        data(*chosen)


@pytest.mark.parametrize(("given", "missing"), [(0, "--test-dir"), (1, "--data-dir")])
def test_one_folder_without_the_other_is_refused(folders, given, missing):
    chosen = [folder if index == given else None for index, folder in enumerate(folders)]
    with pytest.raises(ValueError, match=f"is given without {missing}"):
        data(*chosen)


def test_without_folders_images_are_generated_and_it_says_so(folders):
    made = data(None, None)
    assert "No --data-dir: images of 160x160 pixels are generated" in made.announcement
    assert "16 to train on, 4 to test on" in made.announcement
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

"""What the image projects share: files and tensors, data, methods, evaluation, samples, curves, a full disk."""

import argparse

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.optim import SGD, Adam, RMSprop

from example_projects.common import curves, evaluation
from example_projects.common.augmentation import DrawSampler, generator_of, random_crop, random_flip
from example_projects.common.command import keep_quiet
from example_projects.common.curves import draw_curves
from example_projects.common.disk import naming_a_full_disk
from example_projects.common.evaluation import Evaluation
from example_projects.common.exact_resume import EpochSampler
from example_projects.common.image_data import ImageData, Kept
from example_projects.common.image_module import ImageModule, Images
from example_projects.common.images import (
    CELL,
    GAP,
    from_bytes,
    grid,
    list_images,
    read_image,
    save_grid,
    to_bytes,
    to_image,
    to_tensor,
)
from example_projects.common.methods import IMAGE_METHODS, Method
from example_projects.common.report import summarise, write_csv
from example_projects.common.samples import Samples
from example_projects.common.values import positive
from example_projects.mnist.methods import METHODS as MNIST_METHODS
from lightning_mtadam import MTAdam
from tests.examples.running import QUIET, EndedError, read_rows

pytestmark = QUIET


def colours(height=4, width=6, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)


# Options


@pytest.mark.parametrize("text", ["0", "-3"])
def test_a_number_that_must_be_positive_is_refused_otherwise(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be 1 or more, but is {text}"):
        positive(text)


# Files


def test_images_are_listed_by_name_and_other_files_left_out(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "c.jpeg"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.png", "c.jpeg"]


def test_a_missing_and_an_empty_folder_are_named_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train\. Give --data-dir the folder that holds 'train'"):
        list_images(tmp_path / "train")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no image in .*: no file there ends in one of \.bmp, \.jpeg"):
        list_images(tmp_path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1", "CMYK"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (5, 3)).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert image.size == (5, 3)


def test_a_grey_image_has_three_equal_channels(tmp_path):
    Image.fromarray(colours()[:, :, 0]).save(tmp_path / "grey.png")
    read = to_bytes(read_image(tmp_path / "grey.png")).numpy()
    for channel in read:
        np.testing.assert_array_equal(channel, colours()[:, :, 0])


@pytest.mark.parametrize("content", [b"", b"<html>", "cut"], ids=["empty", "no image", "cut short"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_unreadable_image_is_named_with_a_remedy(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    if content == "cut":
        Image.fromarray(colours(64, 64)).save(path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\{suffix} is not a whole image .*Get it again, or take it out"):
        read_image(path)


def test_a_missing_image_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


# Tensors


def test_every_level_survives_the_way_to_a_tensor_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    tensor = to_tensor(Image.fromarray(levels))
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    np.testing.assert_array_equal(np.array(to_image(tensor)), levels)


def test_height_width_and_channels_are_where_they_belong():
    pixels = colours(2, 5)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 2, 5)
    assert tensor[2, 1, 4].item() == pytest.approx(pixels[1, 4, 2] / 127.5 - 1)
    assert torch.equal(from_bytes(to_bytes(Image.fromarray(pixels))), tensor)


def test_values_out_of_range_are_clamped():
    assert np.array(to_image(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1))).tolist() == [[[0, 128, 255]]]


def test_a_grid_puts_rows_below_each_other_and_enlarges_smaller_images(tmp_path):
    large, small, grey = torch.full((3, 8, 8), -1.0), torch.full((3, 3, 4), 0.5), torch.full((3, 3, 4), 0.0)
    rows = [[large, small], [grey]]
    sheet = grid(rows)
    assert sheet.shape == (3, 2 * 8 + GAP, 2 * 8 + GAP)
    assert not sheet[:, :8, :8].any()
    assert (sheet[:, :6, 8 + GAP :] == 191).all(), "it is not enlarged to the size of the largest beside it"
    second = sheet[:, 8 + GAP :]
    assert (second[:, :3, :4] == 128).all()
    assert (second[:, 3:] == 255).all(), "it is enlarged to the size of another row"
    save_grid(rows, tmp_path / "new" / "grid.png")
    assert torch.equal(to_bytes(read_image(tmp_path / "new" / "grid.png")), sheet)


def test_a_grid_of_large_images_shows_the_same_middle_of_all_in_a_row():
    """Every pixel of the small one tells where it is; a row of other images is as wide as it."""
    small = from_bytes(torch.stack([*torch.meshgrid(torch.arange(75), torch.arange(100), indexing="ij"),
                                    torch.zeros(75, 100, dtype=torch.long)]))  # fmt: skip
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    sheet = grid([[small, large], [torch.zeros(3, 900, 20)]])
    assert sheet.shape == (3, 2 * CELL + GAP, 2 * CELL + GAP)
    shown = sheet[:, :CELL, :CELL]
    assert torch.equal(shown, sheet[:, :CELL, CELL + GAP :])
    assert torch.equal(from_bytes(shown), large[:, 22 : 22 + CELL, 72 : 72 + CELL])


# Data


def test_images_are_made_once_as_long_as_there_is_room():
    made = []

    def make(index):
        made.append(index)
        return torch.full((3, 2, 2), index, dtype=torch.uint8)

    kept = Kept(make, 3, memory=24)
    for _ in range(2):
        assert [kept[index][0, 0, 0].item() for index in range(3)] == [0, 1, 2]
    assert made == [0, 1, 2, 2]


class FakeTrainer:
    current_epoch, global_rank, world_size = 0, 0, 1

    class fit_loop:  # noqa: N801
        class epoch_loop:  # noqa: N801
            class batch_progress:  # noqa: N801
                class current:  # noqa: N801
                    ready = 0


def drawn(epoch=0, seed=0, rank=0, ranks=1):
    trainer = FakeTrainer()
    trainer.current_epoch, trainer.global_rank, trainer.world_size = epoch, rank, ranks
    return list(DrawSampler(EpochSampler(6, 1, seed, trainer)))


def test_draws_depend_on_seed_epoch_and_index_and_on_nothing_else():
    whole = drawn()
    assert sorted(index for index, _ in whole) == list(range(6))
    assert drawn() == whole
    assert sorted(drawn(rank=0, ranks=2) + drawn(rank=1, ranks=2)) == sorted(whole)
    seeds = {seed for draws in (whole, drawn(epoch=1), drawn(seed=1)) for _, seed in draws}
    assert len(seeds) == 18
    assert all(generator_of(seed).initial_seed() == seed for seed in seeds)


def test_crops_and_flips_cover_all_cases():
    image = torch.arange(3 * 5 * 6).view(3, 5, 6)
    crops = {tuple(random_crop(image, 4, generator_of(seed))[0, 0, :1].tolist()) for seed in range(100)}
    assert crops == {(6 * top + left,) for top in range(2) for left in range(3)}
    flips = [random_flip(image, generator_of(seed)) for seed in range(100)]
    assert 30 < sum(torch.equal(flipped, image) for flipped in flips) < 70
    assert all(torch.equal(flipped, image) or torch.equal(flipped, image.flip(2)) for flipped in flips)


# Methods


def test_betas_go_to_the_methods_that_have_them():
    parameters = [("weight", nn.Parameter(torch.ones(2)))]
    groups = {name: method.configure(parameters, 1e-2, (0.5, 0.9)).param_groups[0]
              for name, method in IMAGE_METHODS.items()}  # fmt: skip
    assert all(group["lr"] == 1e-2 for group in groups.values())
    assert groups["mtadam"]["betas"] == (0.5, 0.9, 0.9)
    assert groups["adam"]["betas"] == groups["balanced-adam"]["betas"] == (0.5, 0.9)
    assert "betas" not in groups["rmsprop"]
    assert groups["sgd"]["momentum"] == 0.9


def test_the_methods_are_the_papers_and_its_five_ablations():
    kinds = {"mtadam": MTAdam, "adam": Adam, "balanced-adam": Adam, "rmsprop": RMSprop, "sgd": SGD}
    parameters = [("weight", nn.Parameter(torch.ones(2)))]
    for name, kind in kinds.items():
        assert type(IMAGE_METHODS[name].configure(parameters, 1.0)) is kind
    assert [name for name, method in IMAGE_METHODS.items() if method.balanced] == ["balanced-adam"]
    settings = [name.split("-")[1] for name in IMAGE_METHODS if name.startswith("mtadam-")]
    assert settings == ["every", "norms", "gan", "i", "ii", "iii", "iv", "v"]


@pytest.mark.parametrize(
    ("terms", "importance"),
    [(("l1", "gan"), {"gan": 0.1}), (("cycle_A", "gan_A", "gan_B"), {"gan_A": 0.1, "gan_B": 0.1})],
    ids=["pix2pix and srgan", "cyclegan"],
)
def test_the_gan_losses_of_every_project_can_be_given_a_tenth_of_the_say(terms, importance):
    parameters = [("weight", nn.Parameter(torch.ones(2)))]
    optimizer = IMAGE_METHODS["mtadam-gan-0.1"].on(terms).configure(parameters, 1.0)
    assert optimizer.param_groups[0]["importance"] == importance


def test_images_are_anchored_at_the_first_term_and_classes_at_their_mean():
    for name in ("mtadam", "mtadam-ii-not-per-layer", "mtadam-iv-own-second-moment", "mtadam-v-mean-second-moment"):
        assert IMAGE_METHODS[name].options.get("anchor", "first") == "first"
        assert MNIST_METHODS[name].options["anchor"] == "mean"


# Evaluation, samples and curves


class Constant(ImageModule):
    """Makes grey images, and logs nothing."""

    def __init__(self):
        super().__init__(Method(Adam), {"l1": 1.0}, 1e-3)
        self.weight = nn.Parameter(torch.zeros(()))

    def generate(self, batch):
        return Images(batch, torch.zeros_like(batch) + self.weight, batch)

    def training_step(self, batch, batch_idx):
        self.update(self.weighted({"l1": (batch - self.weight).abs().mean()}), self.optimizers())

    def configure_optimizers(self):
        return self.method.configure(self.named_parameters(), self.lr)


class Mean:
    """A metric with a network, which must not be trained or saved."""

    def __init__(self):
        self.network = nn.Linear(100, 100)
        self.values = []

    def to(self, device):
        self.network.to(device)

    def update(self, prediction, truth):
        self.values += (prediction - truth).abs().mean((1, 2, 3)).tolist()

    def compute(self):
        return {"error": sum(self.values) / len(self.values), "n": len(self.values)}

    def reset(self):
        self.values = []


class Numbers(torch.utils.data.Dataset):
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, key):
        index = key[0] if isinstance(key, tuple) else key
        return torch.full((3, 4, 4), self.values[index])


def fit(folder, epochs=2, **options):
    keep_quiet()
    callbacks = [Evaluation(folder, Mean()), Samples(folder, count=2)]
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=epochs, callbacks=callbacks, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, enable_checkpointing=False,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    data = ImageData(Numbers([1.0] * 4), Numbers([0.5, -0.5, 0.25]), batch_size=2, seed=0, announcement="", workers=0)
    module = Constant()
    trainer.fit(module, data)
    return trainer, module, data


def test_the_hold_out_set_is_measured_after_every_epoch_and_at_the_end(tmp_path):
    trainer, module, data = fit(tmp_path)
    rows = read_rows(tmp_path / "curve.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {row["n"] for row in rows} == {"3.0"} or {row["n"] for row in rows} == {"3"}
    expected = np.abs(np.array([0.5, -0.5, 0.25]) - module.weight.item()).mean()
    assert float(rows[-1]["error"]) == pytest.approx(expected, rel=1e-5)
    trainer.test(module, data, verbose=False)
    assert trainer.callback_metrics["test/error"].item() == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "curves.png").exists()


def test_curves_are_drawn_once_at_the_end_and_at_an_interruption_but_not_at_every_validation(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "draw_curves", lambda histories, path: drawn.append((len(histories[""]), path)))
    fit(tmp_path, epochs=3)
    assert drawn == [(3, tmp_path / "curves.png")]

    def interrupted(self, batch, batch_idx):
        if self.current_epoch == 2:
            raise EndedError

    monkeypatch.setattr(Constant, "training_step", interrupted)
    with pytest.raises(EndedError):
        fit(tmp_path, epochs=3)
    assert [length for length, _ in drawn[1:]] == [2]
    monkeypatch.setattr(evaluation, "BETWEEN_DRAWINGS", 0)
    with pytest.raises(EndedError):
        fit(tmp_path, epochs=3)
    assert [length for length, _ in drawn[2:]] == [1, 2, 2]


def test_the_metrics_network_is_neither_trained_nor_saved(tmp_path):
    trainer, module, _ = fit(tmp_path, epochs=1)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size < 20_000


def test_samples_are_the_first_images_of_the_hold_out_set(tmp_path):
    trainer, module, data = fit(tmp_path, epochs=2, check_val_every_n_epoch=2)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["epoch_0002.png"]
    trainer.test(module, data, verbose=False)
    names = sorted(path.name for path in (tmp_path / "final").iterdir())
    assert names == [f"{index}_{kind}.png" for index in range(2) for kind in ("input", "output", "truth")]
    for index, value in enumerate((0.5, -0.5)):
        shown = to_tensor(read_image(tmp_path / "final" / f"{index}_truth.png"))
        torch.testing.assert_close(shown, torch.full((3, 4, 4), value), rtol=0, atol=1 / 127.5)


def test_curves_have_a_panel_per_metric_and_per_method_a_colour_a_mean_and_a_band_of_all_seeds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(curves, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    history = [{"epoch": 1, "L1": 3.0, "FID": 10.0, "n": 5}, {"epoch": 2, "L1": 2.0, "FID": 11.0, "n": 5}]
    other = [{"epoch": 1, "L1": 5.0, "FID": 12.0, "n": 5}, {"epoch": 2, "L1": 1.0, "FID": 13.0, "n": 5}]
    seeds = {"adam, lr 0.1, seed 0": history, "adam, lr 0.1, seed 1": other, "mtadam, lr 0.1, seed 0": history}
    draw_curves(seeds, tmp_path / "curves.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["L1", "FID, n = 5"]
    axes = figures[0].axes[0]
    mean, alone = axes.lines
    assert mean.get_xdata().tolist() == [1, 2]
    assert mean.get_ydata().tolist() == [4.0, 1.5]
    assert alone.get_ydata().tolist() == [3.0, 2.0]
    assert mean.get_color() != alone.get_color()
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 3), (1, 5), (2, 1), (2, 2)}
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["adam, lr 0.1", "mtadam, lr 0.1"]


# Reports


def test_what_only_some_rows_have_is_left_empty_in_the_others(tmp_path):
    rows = [{"method": "bicubic", "L1": 3.0}, {"method": "adam", "L1": 2.0, "seed": 0}]
    summary = summarise(rows, "method", ["L1", "seed"])
    assert [row["seed"] for row in summary] == ["", "0.00"]
    write_csv(tmp_path / "results.csv", rows)
    assert (tmp_path / "results.csv").read_text().splitlines() == ["method,L1,seed", "bicubic,3.0,", "adam,2.0,0"]


def test_the_number_of_images_of_a_distance_is_a_whole_number():
    rows = [{"method": "adam", "FID": 90.0, "n": 20.0}, {"method": "adam", "FID": 92.0, "n": 20.0}]
    assert summarise(rows, "method", ["FID", "n"]) == [
        {"method": "adam", "runs": "2", "FID": "91.00 +- 1.41", "n": "20"}
    ]


# A full disk


def test_other_errors_than_a_full_disk_pass(tmp_path):
    with pytest.raises(FileNotFoundError), naming_a_full_disk(tmp_path):
        (tmp_path / "none").read_bytes()
    with pytest.raises(KeyError), naming_a_full_disk(tmp_path):
        raise KeyError("x")

"""The pix2pix project: its networks and losses against the originals, its data, runs that resume, and the command."""

import json
import math
import pickle
import resource
import subprocess
import sys
from functools import partial

import numpy as np
import optuna
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from example_projects.common import image_command, image_project
from example_projects.common.image_module import linear_decay
from example_projects.common.images import read_image
from example_projects.common.methods import IMAGE_METHODS
from example_projects.common.patchgan import PatchGAN, initialise
from example_projects.common.saving import NotEndedError
from example_projects.pix2pix import __main__ as command
from example_projects.pix2pix import module as pix2pix_module
from example_projects.pix2pix import networks
from example_projects.pix2pix.data import TEST_FACADES, TRAIN_FACADES, halves, make_data
from example_projects.pix2pix.module import Pix2Pix
from example_projects.pix2pix.networks import BatchStatistics, UNet
from example_projects.pix2pix.procedural import LABELS, draw_facade
from tests.distributed.ranks import results, run_ranks
from tests.examples.running import (
    QUIET,
    CtrlCAt,
    EndedError,
    InterruptAt,
    assert_same_weights,
    count_parameters,
    load_checkpoint,
    output_of,
    read_results,
    stopped_by_ctrl_c,
)
from tests.lightning_models import needs_exact_resume

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True")]

call = partial(output_of, command.main)

SIZE, WIDTH = 32, 2
TRAIN, TEST = 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small pairs of generated facades as JPEG files, in train/ and val/, as maps has them."""
    folder = tmp_path_factory.mktemp("facades")
    for split, indices in (("train", range(TRAIN)), ("val", range(TRAIN, TRAIN + TEST))):
        (folder / split).mkdir()
        for index in indices:
            draw_facade(index).resize((2 * SIZE, SIZE)).save(folder / split / f"{index}.jpg")
    return folder


def arguments(output, *more):
    return [str(part) for part in (
        "--image-size", SIZE, "--width", WIDTH, "--limit-train-batches", 2, "--max-epochs", 1, "--samples", 2,
        "--no-progress-bar", "--log-every", 1, "--accelerator", "cpu", "--output-dir", output, *more,
    )]  # fmt: skip


def make_module(method="mtadam", lambdas=None, size=SIZE):
    torch.manual_seed(0)
    lambdas = lambdas or {"l1": 100.0, "gan": 1.0}
    return Pix2Pix(IMAGE_METHODS[method], lambdas, 2e-4, epochs=2, size=size, width=WIDTH)


def make_batch(batch_size=1, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(batch_size, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))


# Networks


def test_the_networks_have_as_many_parameters_as_the_originals():
    with torch.device("meta"):
        generator, discriminator = UNet(), PatchGAN(6, norm=BatchStatistics)
    assert count_parameters(generator) == 54_413_955  # "54.414 M" of the authors' PyTorch code
    assert count_parameters(discriminator) == 2_768_705  # "2.769 M"


@pytest.mark.parametrize("size", [32, 64])
def test_the_generator_keeps_the_size_of_images_and_their_range(size):
    images = torch.rand(2, 3, size, size)
    made = UNet(size, WIDTH)(images)
    assert made.shape == images.shape
    assert made.abs().max() <= 1


def test_dropout_is_in_the_layers_of_the_original():
    with torch.device("meta"):
        assert [up.dropout for up in UNet(256).ups] == [True, True, True, False, False, False]
        assert [up.dropout for up in UNet(128).ups] == [True, True, False, False, False]


@pytest.mark.parametrize("size", [0, 16, 48, 100])
def test_a_size_that_cannot_be_halved_down_to_one_pixel_is_refused(size):
    with pytest.raises(ValueError, match=rf"must be 32, 64, 128, \.\.\., but is {size}\. Give another --image-size"):
        UNet(size)


def test_a_patch_of_the_discriminator_has_70_pixels():
    network = PatchGAN(6, WIDTH, norm=lambda channels: nn.Identity())
    images = torch.randn(1, 6, 160, 160, requires_grad=True)
    logits = network(images)
    assert logits.shape[1] == 1
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    reached = images.grad[0].abs().sum(0) > 0
    assert reached.any(0).sum() == 70
    assert reached.any(1).sum() == 70


def test_weights_are_drawn_as_in_the_original():
    torch.manual_seed(0)
    network = UNet(64, 32)
    initialise(network)
    assert network.downs[3].convolution.weight.std().item() == pytest.approx(0.02, rel=0.02)
    scales = torch.cat([layer.weight for layer in network.modules() if isinstance(layer, BatchStatistics)])
    assert scales.mean().item() == pytest.approx(1, abs=2e-3)
    assert scales.std().item() == pytest.approx(0.02, rel=0.1)
    assert not network.last.bias.any()


def test_evaluation_uses_the_statistics_of_the_batch_and_no_others_are_kept():
    module, batch = make_module(), make_batch()
    assert not list(module.buffers())
    trained = module.generate(batch).outputs
    torch.testing.assert_close(module.eval().generate(batch).outputs, trained, rtol=0, atol=0)


def test_samples_have_the_same_noise_every_time_and_take_no_random_numbers_from_training():
    module, batch = make_module(size=64), make_batch(size=64)
    state = torch.get_rng_state()
    first, second = module.generate(batch), module.generate(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.outputs, second.outputs)
    assert torch.equal(first.inputs, batch[0])
    assert torch.equal(first.truths, batch[1])
    assert not torch.equal(module.generator(batch[0]), module.generator(batch[0])), "there is no noise"


# Losses


@pytest.mark.parametrize("logit", [-1.5, 0.0, 2.0])
def test_losses_are_those_of_the_paper(logit, monkeypatch):
    module, (source, target) = make_module(), make_batch(2)
    made = target + torch.tensor([0.5, -0.25]).view(2, 1, 1, 1)
    monkeypatch.setattr(module, "score", lambda source, target: torch.full((2, 1, 3, 3), logit))
    generator = module.generator_losses(source, target, made)
    assert list(generator) == ["l1", "gan"]
    assert generator["l1"].item() == pytest.approx(0.375, rel=1e-5)
    assert generator["gan"].item() == pytest.approx(math.log(1 + math.exp(-logit)), rel=1e-5)
    discriminator = module.discriminator_losses(source, target, made)
    assert discriminator["d_real"].item() == pytest.approx(0.5 * math.log(1 + math.exp(-logit)), rel=1e-5)
    assert discriminator["d_fake"].item() == pytest.approx(0.5 * math.log(1 + math.exp(logit)), rel=1e-5)


def test_the_discriminator_sees_the_source_beside_the_image():
    module, (source, target) = make_module(), make_batch()
    logits = module.score(source, target)
    torch.testing.assert_close(module.discriminator(torch.cat([source, target], 1)), logits)
    assert not torch.equal(module.score(target, target), logits)


class Recorder:
    """Stands in for an optimizer."""

    def zero_grad(self):
        pass

    def step(self):
        pass


def test_a_step_takes_the_discriminator_first_and_weights_the_generators_raw_terms(monkeypatch):
    module, batch = make_module(lambdas={"l1": 7.0, "gan": 3.0}), make_batch()
    optimizers, seen = (Recorder(), Recorder()), []
    monkeypatch.setattr(module, "optimizers", lambda: optimizers)
    monkeypatch.setattr(module, "backward_terms", lambda losses, optimizer: seen.append((losses, optimizer)))
    torch.manual_seed(5)
    module.training_step(batch, 0)
    assert [optimizer for _, optimizer in seen] == [optimizers[1], optimizers[0]]
    torch.manual_seed(5)
    raw = module.generator_losses(*batch, module.generator(batch[0]))
    assert list(seen[1][0]) == ["l1", "gan"]
    assert seen[1][0]["l1"].item() == pytest.approx(7 * raw["l1"].item())
    assert seen[1][0]["gan"].item() == pytest.approx(3 * raw["gan"].item())
    weights = list(module.generator.parameters())
    total = sum(seen[0][0].values())
    assert torch.autograd.grad(total, weights, allow_unused=True) == (None,) * len(weights), "made is not detached"


@pytest.mark.parametrize(
    ("setting", "name", "expected"),
    [
        ("unbalanced", "mtadam", {"l1": 1, "gan": 1}),
        ("unbalanced", "adam", {"l1": 1, "gan": 1}),
        ("unbalanced", "balanced-adam", {"l1": 100, "gan": 1}),
        ("balanced", "mtadam", {"l1": 100, "gan": 1}),
        ("balanced", "sgd", {"l1": 100, "gan": 1}),
    ],
)
def test_lambdas_are_those_of_the_setting(setting, name, expected):
    options = image_command.parser_of(command.PROJECT).parse_args(["--setting", setting, "--method", name])
    (job,) = image_command.jobs_of(command.PROJECT, options)
    assert job.lambdas == expected
    assert list(job.lambdas) == ["l1", "gan"], "the anchor is not the first"


def test_defaults_are_the_originals():
    options = image_command.parser_of(command.PROJECT).parse_args([])
    assert (options.lr, options.batch_size, options.max_epochs) == ([2e-4], 1, 200)
    assert (options.image_size, options.width, options.direction, options.setting) == (256, 64, "BtoA", "unbalanced")


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_the_method_is_the_generators_and_the_discriminator_has_the_originals_adam(name):
    (generator, discriminator), schedulers = make_module(name).configure_optimizers()
    assert isinstance(generator, type(IMAGE_METHODS[name].configure([("w", nn.Parameter(torch.ones(1)))], 1.0)))
    assert type(discriminator) is torch.optim.Adam
    assert len(schedulers) == 2
    for optimizer in (generator, discriminator):
        group = optimizer.param_groups[0]
        assert group["lr"] == 2e-4
        assert group.get("betas", (0.5, 0.999))[:2] == (0.5, 0.999)


def test_the_learning_rate_falls_in_the_second_half_as_in_the_original():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, rates = linear_decay(optimizer, 200), []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [1.0 - max(0, epoch + 1 - 100) / 101 for epoch in range(200)]
    np.testing.assert_allclose(rates, expected)


def test_the_learning_rate_of_a_single_epoch_does_not_fall():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    linear_decay(optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 1.0


# Data


def test_halves_are_source_and_target_in_the_order_of_the_direction():
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    image.paste((0, 0, 255), (4, 0, 8, 4))
    red, blue = (torch.tensor(colour).view(3, 1, 1).expand(3, 6, 6) for colour in ([255, 0, 0], [0, 0, 255]))
    assert torch.equal(halves(image, 6, "AtoB"), torch.cat([red, blue]))
    assert torch.equal(halves(image, 6, "BtoA"), torch.cat([blue, red]))


def data_of(folder, **options):
    given = {"size": SIZE, "direction": "BtoA", "batch_size": 1, "seed": 0, **options}
    return make_data(folder, **given)


def test_source_and_target_are_cropped_and_mirrored_alike(tmp_path):
    """Both halves are the same image, of which every pixel is another colour."""
    pixels = np.stack(np.meshgrid(np.arange(36) * 7, np.arange(36) * 7, [50]), -1)[:, :, 0].astype(np.uint8)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.fromarray(np.concatenate([pixels, pixels], 1)).save(tmp_path / split / "1.png")
    train = data_of(tmp_path).train
    found = [train[(0, seed)] for seed in range(64)]
    whole = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    corners = set()
    for source, target in found:
        assert torch.equal(source, target)
        assert source.shape == (3, SIZE, SIZE)
        top, left = (round(((source[channel].min().item() + 1) * 127.5) / 7) for channel in (1, 0))
        mirrored = bool(source[0, 0, 0] > source[0, 0, -1])
        crop = whole[:, top : top + SIZE, left : left + SIZE]
        torch.testing.assert_close(source, crop.flip(2) if mirrored else crop)
        corners.add((top, left, mirrored))
    assert {top for top, _, _ in corners} == {left for _, left, _ in corners} == set(range(5))
    assert {mirrored for _, _, mirrored in corners} == {False, True}
    assert torch.equal(train[(0, 3)][0], found[3][0]), "the same draw gives another crop"


@pytest.mark.parametrize(("size", "larger"), [(256, 286), (64, 72), (32, 36)])
def test_images_are_enlarged_before_cropping_in_the_proportion_of_the_original(size, larger):
    assert data_of(None, size=size).train.pairs[0].shape == (6, larger, larger)


def test_the_hold_out_set_is_whole_and_not_augmented(folder):
    test = data_of(folder).test
    assert len(test) == TEST
    file = sorted((folder / "val").iterdir())[1]
    pixels = torch.from_numpy(np.array(read_image(file))).permute(2, 0, 1) / 127.5 - 1
    target, source = pixels.chunk(2, dim=2)
    torch.testing.assert_close(test[1][0], source)
    torch.testing.assert_close(test[1][1], target)


@pytest.mark.parametrize("generated", [False, True])
def test_workers_load_the_same_samples(folder, generated):
    """Also where processes are spawned, which get the data pickled."""
    data = data_of(None if generated else folder)
    copy = pickle.loads(pickle.dumps(data.train))
    for ours, theirs in zip(data.train[(1, 7)], copy[(1, 7)], strict=True):
        assert torch.equal(ours, theirs)


def test_the_announcement_says_where_images_are_from_and_how_many(folder):
    assert data_of(folder).announcement == f"Pairs from {folder}: 6 to train on, 3 held out, BtoA."
    said = data_of(None, direction="AtoB").announcement
    assert said.startswith("Generated facades and their label maps, since there is no --data-dir: ")
    assert said.endswith(f"{TRAIN_FACADES} to train on, {TEST_FACADES} held out, AtoB.")


def test_a_folder_without_a_hold_out_set_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / "train" / "1.png")
    with pytest.raises(FileNotFoundError, match=r"neither .*test nor .*val\. Give --data-dir a folder with train/"):
        data_of(tmp_path)


@pytest.mark.parametrize(("size", "pair"), [((64, 64), False), ((90, 60), False), ((64, 32), True), ((63, 32), True)])
def test_an_image_that_is_not_two_side_by_side_is_named(tmp_path, size, pair):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", size).save(tmp_path / split / "1.png")
    if pair:
        data_of(tmp_path).check()
        return
    said = rf"2 images cannot be used\. .*train/1\.png is {size[0]}x{size[1]}, so it is not a pair.*test/1\.png is"
    with pytest.raises(ValueError, match=said):
        data_of(tmp_path).check()


def test_images_that_are_held_back_are_whole_and_not_trained_on(folder):
    data = data_of(folder, validation=2)
    assert (len(data.train), len(data.validation), len(data.test)) == (TRAIN - 2, 2, TEST)
    assert "4 to train on, 2 to validate on, 3 held out" in data.announcement
    files = sorted((folder / "train").iterdir())
    for place, index in enumerate((0, 3)):
        pixels = torch.from_numpy(np.array(read_image(files[index]))).permute(2, 0, 1) / 127.5 - 1
        target, source = pixels.chunk(2, dim=2)
        torch.testing.assert_close(data.validation[place], (source, target))
    pairs = data_of(folder).train.pairs
    assert all(torch.equal(data.train.pairs[place], pairs[index]) for place, index in enumerate((1, 2, 4, 5)))
    with pytest.raises(ValueError, match="--validation 6 leaves none of 6 training images to train on"):
        data_of(folder, validation=TRAIN)


def test_a_facade_is_the_same_every_time_and_its_labels_say_what_is_where():
    pixels = np.array(draw_facade(5))
    assert pixels.shape == (256, 512, 3)
    assert np.array_equal(np.array(draw_facade(5)), pixels)
    assert not np.array_equal(np.array(draw_facade(6)), pixels)
    photo, labels = pixels[:, :256].astype(float), pixels[:, 256:]
    assert {tuple(colour) for colour in labels.reshape(-1, 3).tolist()} <= set(LABELS.values())
    inside = {name: (labels == colour).all(-1) for name, colour in LABELS.items()}
    assert all(inside[name].sum() > 1000 for name in ("sky", "wall", "window", "cornice"))
    rows = photo[inside["sky"].all(1)].mean((1, 2))
    assert rows[0] > rows[-1], "the sky is of one colour"
    assert photo[:, 120:136][inside["wall"][:, 120:136]].std() > 8, "the wall has no bricks"


def test_held_out_facades_are_others_than_those_trained_on():
    data = data_of(None)
    trained = {data.train.pairs.make(index).numpy().tobytes() for index in range(3)}
    other = make_data(None, size=36, direction="BtoA", batch_size=1, seed=0).test.pairs
    assert not trained & {other.make(index).numpy().tobytes() for index in range(3)}


# The command


@pytest.fixture(scope="module")
def all_methods(folder, tmp_path_factory):
    """One call with every method: the folder and what was printed."""
    output = tmp_path_factory.mktemp("all")
    return output, call(*arguments(output, "--data-dir", folder, "--method", *IMAGE_METHODS))


def test_every_method_runs_and_has_a_row(all_methods, folder):
    output, printed = all_methods
    assert printed.startswith(f"Pairs from {folder}")
    found = read_results(output)
    assert [row["method"] for row in found] == list(IMAGE_METHODS)
    for row in found:
        assert row["steps"] == "2"
        assert row["seed"] == "0"
        assert 0 < float(row["L1"]) ** 2 <= float(row["L2"]) < 255**2
        assert float(row["NMSE"]) > 0
        assert (output / row["folder"] / "checkpoints" / "last.ckpt").exists()
    header = (output / "table.md").read_text().splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "method", "runs", "L1", "L2", "NMSE", "PSNR", "SSIM", "seconds_per_step",
    ]  # fmt: skip
    assert (output / "table.md").read_text() in printed + "\n"


def test_all_methods_differ(all_methods):
    found = {row["L1"] for row in read_results(all_methods[0])}
    assert len(found) == len(IMAGE_METHODS)


def test_samples_curves_and_the_balance_are_in_tensorboard_and_beside_it(all_methods):
    run = all_methods[0] / "unbalanced-lr0.0002" / "mtadam-seed0"
    tags = [EventAccumulator(str(file)).Reload().Tags() for file in run.glob("events*")]
    scalars = {tag for tag_set in tags for tag in tag_set["scalars"]}
    assert {"val/L1", "val/PSNR", "test/L1", "balance_weight/gan.median"} <= scalars
    assert any("samples" in tag_set["images"] for tag_set in tags)
    assert (run / "curves.png").exists()
    assert read_image(run / "samples" / "epoch_0001.png").size == (3 * (SIZE + 4) - 4, 2 * (SIZE + 4) - 4)
    shown = sorted(path.name for path in (run / "final").iterdir())
    assert shown == [f"{index}_{kind}.png" for index in range(2) for kind in ("input", "output", "truth")]


def test_final_images_are_those_that_were_measured(all_methods):
    output, _ = all_methods
    final = output / "unbalanced-lr0.0002" / "adam-seed0" / "final"
    made, truth = (np.array(read_image(final / f"1_{kind}.png")).astype(float) for kind in ("output", "truth"))
    assert np.abs(made - truth).mean() == pytest.approx(float(read_results(output)[1]["L1"]), rel=0.5)


def test_a_checkpoint_has_the_two_networks_and_their_optimizers_and_nothing_else(all_methods):
    checkpoint = load_checkpoint(all_methods[0] / "unbalanced-lr0.0002" / "adam-seed0")
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"generator", "discriminator"}
    sizes = [len(optimizer["state"]) for optimizer in checkpoint["optimizer_states"]]
    module = make_module()
    assert sizes == [len(list(network.parameters())) for network in (module.generator, module.discriminator)]


def test_half_precision_trains_and_measures(folder, tmp_path):
    call(*arguments(tmp_path, "--data-dir", folder, "--method", "mtadam", "--precision", "bf16-mixed"))
    assert 0 < float(read_results(tmp_path)[0]["L1"]) < 255


def test_several_learning_rates_are_rows_of_their_own(folder, tmp_path):
    call(*arguments(tmp_path, "--data-dir", folder, "--method", "adam", "--lr", 1e-4, 1e-3, "--setting", "balanced"))
    found = read_results(tmp_path)
    assert [(row["method"], row["folder"]) for row in found] == [
        ("adam, lr 0.0001", "balanced-lr0.0001/adam-seed0"),
        ("adam, lr 0.001", "balanced-lr0.001/adam-seed0"),
    ]


def test_hyperband_searches_and_trains_with_what_it_found(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.number == 1)
    call(*arguments(tmp_path, "--data-dir", folder, "--method", "hyperband", "--trials", 3, "--devices", 1))
    (row,) = read_results(tmp_path)
    run = tmp_path / row["folder"]
    trials = [run.parent / "hyperband-search" / f"trial{index}" for index in range(3)]
    assert [(trial / "result.json").exists() for trial in trials] == [True, False, True]
    errors = {index: json.loads((trials[index] / "result.json").read_text())["L1"] for index in (0, 2)}
    best = trials[min(errors, key=errors.get)]
    lambdas, found = (json.loads((path / "settings.json").read_text())["lambdas"] for path in (best, run))
    assert found == lambdas
    assert (row["method"], row["steps"]) == ("hyperband", "2")


# Resume

EPOCHS, BATCHES = 2, 3


def run_facades(output, folder, watch, *more, every=100, resume=False):
    """A run of 6 batches in 2 epochs. Returns the final weights, the result and the curve."""
    given = arguments(output, "--data-dir", folder, "--max-epochs", EPOCHS, "--limit-train-batches", BATCHES,
                      "--checkpoint-every", every, "--method", "mtadam", *more)  # fmt: skip
    options = image_command.parser_of(command.PROJECT).parse_args(given)
    options.resume = resume
    (job,) = image_command.jobs_of(command.PROJECT, options)
    result = image_project.train(command.PROJECT, options, job, callbacks=[watch])
    run = job.folder(options)
    weights = load_checkpoint(run)["state_dict"]
    return weights, {**result, "seconds_per_step": 0}, (run / "curve.csv").read_text()


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    return run_facades(tmp_path_factory.mktemp("whole"), folder, InterruptAt())


def assert_same(found, expected):
    assert_same_weights(found[0], expected[0])
    assert found[1:] == expected[1:]


@needs_exact_resume
@pytest.mark.parametrize(
    ("every", "at"),
    [
        pytest.param(2, 2, id="within the first epoch"),
        pytest.param(3, 4, id="from the first epoch's end"),
        pytest.param(5, 5, id="within the second epoch"),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, folder, uninterrupted, every, at):
    with pytest.raises(EndedError):
        run_facades(tmp_path, folder, InterruptAt(at), every=every)
    count = InterruptAt()
    assert_same(run_facades(tmp_path, folder, count, resume=True, every=100), uninterrupted)
    assert len(count.seen) == EPOCHS * BATCHES - at // every * every


@needs_exact_resume
@pytest.mark.parametrize("at", [1, 2], ids=["within an epoch", "in the last batch of an epoch"])
def test_ctrl_c_loses_nothing(tmp_path, folder, uninterrupted, at, capsys):
    with stopped_by_ctrl_c(capsys, step=at + 1):
        run_facades(tmp_path, folder, CtrlCAt(at))
    count = InterruptAt()
    assert_same(run_facades(tmp_path, folder, count, resume=True), uninterrupted)
    assert len(count.seen) == EPOCHS * BATCHES - at - 1


@needs_exact_resume
def test_a_run_in_pieces_ends_as_an_uninterrupted_one(tmp_path, folder, uninterrupted):
    """Time is up after every batch, the last of an epoch too; what was trained to its end is measured all the same."""
    for _ in range(EPOCHS * BATCHES - 1):
        with pytest.raises(NotEndedError, match="mtadam-seed0 has not ended"):
            run_facades(tmp_path, folder, InterruptAt(), "--max-minutes", 1e-9, resume=True)
    assert_same(run_facades(tmp_path, folder, InterruptAt(), "--max-minutes", 1e-9, resume=True), uninterrupted)


def test_the_same_command_goes_on_when_its_time_was_up(tmp_path, folder):
    given = arguments(tmp_path, "--data-dir", folder, "--method", "adam", "--max-minutes", 1e-9)
    with pytest.raises(NotEndedError):
        call(*given)
    call(*given)
    assert read_results(tmp_path)[0]["steps"] == "2"


def test_resume_skips_what_has_ended(tmp_path, folder, monkeypatch):
    given = arguments(tmp_path, "--data-dir", folder, "--method", "adam")
    call(*given)
    monkeypatch.setattr(Pix2Pix, "training_step", lambda *args: pytest.fail("it was trained again"))
    before = read_results(tmp_path)
    call(*given, "--resume")
    assert read_results(tmp_path) == before
    with pytest.raises(ValueError, match=r"width was 2 and is 4\. Give the options it was made with"):
        call(*given, "--resume", "--width", 4)
    settings = json.loads((tmp_path / "unbalanced-lr0.0002" / "adam-seed0" / "settings.json").read_text())
    assert settings["lambdas"] == {"l1": 1.0, "gan": 1.0}


def test_a_full_disk_is_named_with_a_remedy(tmp_path, folder):
    """A limit on the size of files stands in for the disk: checkpoints are the first to reach it."""

    given = arguments(tmp_path, "--data-dir", folder, "--method", "adam")
    ended = subprocess.run(
        [sys.executable, "-m", "example_projects.pix2pix", *given],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    run = tmp_path / "unbalanced-lr0.0002" / "adam-seed0"
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert f"There is no room to write to {run}" in said
    assert said.endswith("free some space and give the same command with --resume")
    assert not list(run.rglob("last.ckpt"))


# Several processes


def test_two_ranks_end_as_one_process_with_the_doubled_batch(folder, tmp_path, monkeypatch):
    """With each image normalised by itself and without noise, which depend on the batch of a process."""

    class OwnStatistics(nn.InstanceNorm2d):
        def __init__(self, channels):
            super().__init__(channels, affine=True)

    monkeypatch.setattr(networks, "BatchStatistics", OwnStatistics)
    monkeypatch.setattr(pix2pix_module, "BatchStatistics", OwnStatistics)
    monkeypatch.setattr(F, "dropout", lambda x, *args, **options: x)
    monkeypatch.setattr(TensorBoardLogger, "save", lambda self: None)
    given = ["--data-dir", folder, "--method", "mtadam"]
    call(*arguments(tmp_path / "one", *given, "--batch-size", 2))
    ddp = arguments(tmp_path / "two", *given, "--strategy", "ddp_find_unused_parameters_true", "--devices", 2)
    (tmp_path / "processes").mkdir()
    results(run_ranks(lambda rank: call(*ddp) and None, tmp_path / "processes"))
    one, two = (read_results(tmp_path / kind)[0] for kind in ("one", "two"))
    weights, others = (load_checkpoint(tmp_path / kind / one["folder"])["state_dict"] for kind in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-5)
    for name in ("L1", "L2", "NMSE", "PSNR", "SSIM"):
        assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3), name

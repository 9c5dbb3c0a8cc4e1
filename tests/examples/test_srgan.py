"""The SRGAN project: its networks and losses, its training, and the command itself."""

import copy
import itertools
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from example_projects.common.image_metrics import ImageMetrics
from example_projects.common.methods import IMAGE_METHODS
from example_projects.srgan import __main__ as command
from example_projects.srgan import networks
from example_projects.srgan.data import make_data
from example_projects.srgan.module import LAMBDAS, SRGAN, bicubic, discriminator_losses, generator_losses
from example_projects.srgan.networks import Discriminator, Generator
from example_projects.srgan.perceptual import PerceptualLoss
from example_projects.srgan.pretraining import Pretraining
from lightning_mtadam import MTAdam
from lightning_mtadam.metrics.features import IMAGENET_STD
from tests.distributed.ranks import results, run_ranks
from tests.examples.running import (
    QUIET,
    EndedError,
    assert_same_weights,
    count_parameters,
    load_checkpoint,
    output_of,
    read_results,
    untimed,
)
from tests.lightning_models import needs_exact_resume

pytestmark = QUIET

SIZE = 32


class Halved(PerceptualLoss):
    """A perceptual network that is quick and known: it halves its input."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1, bias=False), "halving")
        self.features.weight.data = 0.5 * torch.eye(3)[:, :, None, None]


# Networks


def test_parameter_counts_are_those_of_srresnet_and_of_the_discriminator_for_96_pixels():
    with torch.device("meta"):
        assert count_parameters(Generator()) == 1_549_462
        assert count_parameters(Discriminator()) == 23_565_505


def test_the_counts_are_those_of_the_layers_of_the_papers_figure():
    def convolution(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + outputs

    with torch.device("meta"):
        generator, discriminator = Generator(width=8, blocks=3), Discriminator(image_size=48, width=4)
    block = 2 * (convolution(8, 8, 3) + 2 * 8) + 1
    ends = convolution(3, 8, 9) + 1 + convolution(8, 8, 3) + 2 * 8 + convolution(8, 3, 9)
    assert count_parameters(generator) == 3 * block + ends + 2 * (convolution(8, 32, 3) + 1)
    channels = [4, 4, 8, 8, 16, 16, 32, 32]
    normalised = sum(convolution(a, b, 3) + 2 * b for a, b in itertools.pairwise(channels))
    assert count_parameters(discriminator) == convolution(3, 4, 3) + normalised + (32 * 9 + 1) * 64 + 64 + 1


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
    spread = np.array(IMAGENET_STD)[:, None, None]
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


# Training


@pytest.fixture
def unnormalised(monkeypatch):
    """Networks without batch normalisation: its statistics are of each rank's own images, and a bias before it has a
    gradient of nothing but rounding errors, which Adam makes steps of."""
    monkeypatch.setattr(networks.nn, "BatchNorm2d", lambda width: nn.Identity())


def make_module(method="adam", **options):
    torch.manual_seed(0)
    small = {"epochs": 2, "image_size": SIZE, "width": 2, "blocks": 1}
    return SRGAN(IMAGE_METHODS[method], LAMBDAS["unbalanced"], 1e-2, Halved(), **small | options)


def batches(number, size=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    highs = torch.rand(number * size, 3, SIZE, SIZE, generator=generator, dtype=dtype) * 2 - 1
    return [(F.avg_pool2d(high, 4), high) for high in highs]


def fit(module, number, epochs):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(number, dtype=next(module.parameters()).dtype), 2))
    return module


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.usefixtures("unnormalised")
def test_training_equals_a_hand_written_loop():
    """The discriminator's step before the generator's; lr / 10 in the end. In float64, for Adam enlarges rounding."""
    ours, theirs = fit(make_module().double(), 3, 2), make_module().double()
    generator, discriminator = theirs.generator, theirs.discriminator
    options = {"lr": 1e-2, "betas": (0.9, 0.999)}
    own = torch.optim.Adam(generator.parameters(), **options)
    rival = torch.optim.Adam(discriminator.parameters(), **options)

    def step(loss, optimizer):
        generator.zero_grad()
        discriminator.zero_grad()
        loss.backward()
        optimizer.step()

    for epoch in range(2):
        for optimizer in (own, rival):
            optimizer.param_groups[0]["lr"] = 1e-3 if epoch == 1 else 1e-2
        for low, high in DataLoader(batches(3, dtype=torch.float64), 2):
            made = generator(low)
            judged = F.logsigmoid(discriminator(high)) + F.logsigmoid(-discriminator(made.detach()))
            step(-judged.mean(), rival)
            features = ((made - high) / 4 / torch.tensor(IMAGENET_STD)[:, None, None]).square().mean()
            step(F.mse_loss(made, high) - F.logsigmoid(discriminator(made)).mean() + features, own)
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, msg=lambda found, name=name: f"{name}: {found}")


def test_each_optimizer_has_the_parameters_of_its_network_alone():
    module = make_module("mtadam")
    (generator, discriminator), _ = module.configure_optimizers()
    assert isinstance(generator, MTAdam)
    for optimizer, network in ((generator, module.generator), (discriminator, module.discriminator)):
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert {id(parameter) for parameter in held} == {id(parameter) for parameter in network.parameters()}


def test_what_is_generated_is_an_image():
    module = make_module().eval()
    module.generator.tail[-1].bias.data += 5
    low, high = (part[None] for part in batches(1)[0])
    images = module.generate((low, high))
    assert images.inputs is low
    assert images.truths is high
    assert (images.outputs == 1).all()


# The command


TINY = [
    "--width", 2, "--blocks", 1, "--image-size", SIZE, "--batch-size", 2, "--samples", 1, "--limit-test-batches", 1,
    "--metrics-every", 9, "--accelerator", "cpu", "--no-progress-bar",
]  # fmt: skip


def call(*arguments, perceptual_loss=lambda *_: Halved()):
    """Run the command and return what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "perceptual_loss", perceptual_loss)
        return output_of(command.main, *TINY, *arguments)


def test_every_method_runs_offline_and_has_a_row_below_that_of_bicubic(tmp_path):
    methods = list(IMAGE_METHODS)
    printed = call("--method", *methods, "--max-epochs", 1, "--limit-train-batches", 2, "--output-dir", tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    columns = ["PSNR-Y", "SSIM-Y", "PSNR", "SSIM", "L1", "L2", "NMSE", "seconds_per_step"]
    assert rows[0] == ["method", "runs", *columns]
    assert [row[0] for row in rows[2:]] == ["bicubic", *methods]
    assert "No --data-dir: images of 160x160 pixels are generated" in printed
    results = read_results(tmp_path)
    assert all(np.isfinite(float(row["PSNR"])) for row in results)
    assert [row["steps"] for row in results] == ["", *["2"] * len(methods)]
    balanced = [line for line in printed.splitlines() if line.startswith("balanced-adam, seed 0")]
    assert balanced == ["balanced-adam, seed 0, lr 0.0001, 1 mse, 0.001 gan, 0.006 perceptual"]

    low, high = make_data(None, [], image_size=SIZE, crops_per_image=1, batch_size=1, seed=0).test[0]
    metrics = ImageMetrics(y_border=4)
    metrics.update(bicubic(low[None]), high[None])
    for name, value in metrics.compute().items():
        assert float(results[0][name]) == pytest.approx(value, rel=1e-6)


def test_half_precision_trains_and_measures(tmp_path):
    options = ["--max-epochs", 1, "--pretrain-epochs", 1, "--limit-train-batches", 1, "--precision", "bf16-mixed"]
    call("--method", "mtadam", *options, "--output-dir", tmp_path)
    assert all(float(row["PSNR-Y"]) > 0 for row in read_results(tmp_path))


def test_hyperband_searches_by_the_luma_and_trains_with_what_it_found(tmp_path):
    search = ["--method", "hyperband", "--trials", 2, "--search-metric", "PSNR-Y", "--metrics-every", 1, "--devices", 1]
    printed = call(*search, "--max-epochs", 1, "--limit-train-batches", 2, "--output-dir", tmp_path)
    _, row = read_results(tmp_path)
    assert (row["method"], row["steps"]) == ("hyperband", "2")
    assert "hyperband: 2 trials" in printed
    assert "hyperband, seed 0, lr 0.0001, 1 mse, 1 gan" not in printed


def test_the_real_perceptual_network_is_announced_once_and_in_no_checkpoint(tmp_path):
    command.perceptual_loss.cache_clear()
    options = ["--max-epochs", 1, "--limit-train-batches", 1, "--metrics-every", 1, "--output-dir", tmp_path]
    methods = ["--method", "mtadam", "adam", "--perceptual-weights", "random"]
    printed = call(*methods, *options, perceptual_loss=command.perceptual_loss)
    assert printed.count("The perceptual loss is of a VGG19 with RANDOM weights, as asked: for trials only.") == 1

    checkpoint, expected = load_checkpoint(tmp_path / "unbalanced-lr0.0001" / "mtadam-seed0"), make_module()
    assert list(checkpoint["state_dict"]) == list(expected.state_dict())
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"generator", "discriminator"}
    held = [sum(len(group["params"]) for group in state["param_groups"]) for state in checkpoint["optimizer_states"]]
    assert held == [len(list(network.parameters())) for network in (expected.generator, expected.discriminator)]


def test_weights_that_are_missing_are_missed_before_anything_is_written(tmp_path):
    output = tmp_path / "runs"
    with pytest.raises(FileNotFoundError, match=r"no file none\.pth.*--perceptual-weights"):
        call("--perceptual-weights", "none.pth", "--output-dir", output, perceptual_loss=command.perceptual_loss)
    assert not output.exists()


@pytest.fixture
def photographs(tmp_path):
    """Four photographs to train on and three to test on."""
    for folder, sizes in (
        ("train", [(40, 50), (64, 33), (48, 48), (32, 32)]),
        ("test", [(48, 40), (40, 48), (32, 32)]),
    ):
        (tmp_path / folder).mkdir()
        for seed, (height, width) in enumerate(sizes):
            pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{seed}.png")
    return ["--data-dir", tmp_path / "train", "--test-dir", tmp_path / "test", "--crops-per-image", 2]


@needs_exact_resume
def test_a_resumed_run_ends_as_an_uninterrupted_one(photographs, tmp_path, monkeypatch):
    """Four batches in an epoch of pretraining and in two of training; ended in the first and in the last."""
    options = [*photographs, "--method", "mtadam", "--max-epochs", 2, "--pretrain-epochs", 1, "--checkpoint-every", 1]
    call(*options, "--output-dir", tmp_path / "whole")
    steps, done = {module: module.training_step for module in (Pretraining, SRGAN)}, []

    def interrupted(self, batch, batch_idx):
        done.append(type(self))
        if len(done) in (3, 12):
            raise EndedError
        return steps[type(self)](self, batch, batch_idx)

    for module in steps:
        monkeypatch.setattr(module, "training_step", interrupted)
    with pytest.raises(EndedError):
        call(*options, "--output-dir", tmp_path / "parts")
    with pytest.raises(EndedError):
        call(*options, "--output-dir", tmp_path / "parts", "--resume")
    call(*options, "--output-dir", tmp_path / "parts", "--resume")
    assert done == [Pretraining] * (4 + 1) + [SRGAN] * (8 + 1)
    whole, parts = (
        load_checkpoint(tmp_path / kind / "unbalanced-lr0.0001" / "mtadam-seed0") for kind in ("whole", "parts")
    )
    assert_same_weights(parts["state_dict"], whole["state_dict"])
    assert untimed(read_results(tmp_path / "parts")) == untimed(read_results(tmp_path / "whole"))


# Pretraining


def test_all_runs_begin_with_the_generator_that_was_pretrained_once(photographs, tmp_path, monkeypatch):
    steps, began, batch_of, start = [], [], Pretraining.training_step, SRGAN.on_fit_start
    monkeypatch.setattr(Pretraining, "training_step", lambda *given: (steps.append(1), batch_of(*given))[1])
    monkeypatch.setattr(
        SRGAN, "on_fit_start", lambda self: (began.append(copy.deepcopy(self.generator.state_dict())), start(self))[1]
    )
    options = [*photographs, "--pretrain-epochs", 3, "--pretrain-lr", 1e-2, "--max-epochs", 1, "--output-dir", tmp_path]
    call(*options, "--method", "adam", "mtadam", "--seeds", 0, 1)
    assert len(steps) == 3 * 4, "four photographs of two crops, in batches of two, three times"
    assert len(began) == 4
    kept = load_checkpoint(tmp_path / "pretrained")["state_dict"]
    for weights in began:
        assert_same_weights({f"generator.{name}": weight for name, weight in weights.items()}, kept)
    rows = read_results(tmp_path)
    assert [row["method"] for row in rows] == ["bicubic", "pretrained", *["adam", "mtadam"] * 2]
    assert rows[1]["steps"] == "12"
    assert float(rows[1]["PSNR-Y"]) > 0


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.usefixtures("unnormalised")
def test_pretraining_equals_adam_on_the_squared_error_with_a_rate_that_falls():
    torch.manual_seed(0)
    module = Pretraining(1e-2, epochs=2, width=2, blocks=1)
    generator = copy.deepcopy(module.generator)
    fit(module, 3, 2)
    optimizer = torch.optim.Adam(generator.parameters())
    for lr in (1e-2, 0.5e-2):
        optimizer.param_groups[0]["lr"] = lr
        for low, high in DataLoader(batches(3), 2):
            optimizer.zero_grad()
            F.mse_loss(generator(low), high).backward()
            optimizer.step()
    for mine, theirs in zip(module.generator.parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


# Test sets


def test_each_of_several_test_sets_is_measured_by_itself(photographs, tmp_path):
    """The figures of a set are those that it has alone; of several sets the luma's are shown."""
    train, tests = photographs[1], [photographs[3], photographs[1]]
    options = ["--data-dir", train, "--method", "adam", "--max-epochs", 1, "--limit-train-batches", 1]
    many = ["--limit-test-batches", 9]
    call(*options, *many, "--test-dir", *tests, "--output-dir", tmp_path / "both")
    both = read_results(tmp_path / "both")
    assert [name for name in both[0] if "Y" in name] == [
        "test PSNR-Y", "test SSIM-Y", "train PSNR-Y", "train SSIM-Y",
    ]  # fmt: skip
    for folder in tests:
        call(*options, *many, "--test-dir", folder, "--output-dir", tmp_path / f"only {folder.name}")
        for row, alone in zip(both, read_results(tmp_path / f"only {folder.name}"), strict=True):
            for metric in ("PSNR-Y", "SSIM-Y"):
                assert float(row[f"{folder.name} {metric}"]) == pytest.approx(float(alone[metric]), rel=1e-6)
    header = (tmp_path / "both" / "table.md").read_text().splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")][2:-1] == [
        "test PSNR-Y", "train PSNR-Y", "test SSIM-Y", "train SSIM-Y",
    ]  # fmt: skip


def test_two_test_sets_of_one_name_are_refused(photographs, tmp_path):
    with pytest.raises(ValueError, match="must have different names, but are called test, test"):
        call("--data-dir", photographs[1], "--test-dir", photographs[3], photographs[3], "--output-dir", tmp_path)


# Several processes


@pytest.mark.usefixtures("unnormalised")
@pytest.mark.parametrize("method", ["mtadam", "adam"])
def test_two_ranks_end_as_one_process_with_the_doubled_batch(photographs, tmp_path, method):
    options = [*photographs, "--method", method, "--max-epochs", 1, "--limit-test-batches", 3]
    call(*options, "--batch-size", 4, "--output-dir", tmp_path / "one")
    ddp = [*options, "--strategy", "ddp_find_unused_parameters_true", "--devices", 2, "--output-dir", tmp_path / "two"]
    (tmp_path / "processes").mkdir()
    results(run_ranks(lambda rank: call(*ddp) and None, tmp_path / "processes"))
    last = Path("unbalanced-lr0.0001", f"{method}-seed0")
    one, two = (load_checkpoint(tmp_path / kind / last)["state_dict"] for kind in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)
    for ours, theirs in zip(read_results(tmp_path / "one"), read_results(tmp_path / "two"), strict=True):
        for name in ("PSNR", "PSNR-Y", "SSIM", "L1"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3), name

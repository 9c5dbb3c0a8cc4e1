"""CycleGAN: its networks, six terms, image pool, data, training step, and the command with its runs."""

import pickle
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch import nn

from example_projects.common import evaluation, image_command
from example_projects.common.image_data import Kept
from example_projects.common.image_metrics import ImageMetrics
from example_projects.common.methods import IMAGE_METHODS
from example_projects.cyclegan import __main__ as command
from example_projects.cyclegan.data import TEST_SCENES, TRAINING_SCENES, Unpaired, has_truth, make_data
from example_projects.cyclegan.evaluation import RoundTripEvaluation, RoundTripMetrics
from example_projects.cyclegan.image_pool import ImagePool
from example_projects.cyclegan.losses import (
    DOMAINS,
    OTHER_READINGS,
    SETTINGS,
    discriminator_loss,
    generator_losses,
    lambdas,
)
from example_projects.cyclegan.module import CycleGAN
from example_projects.cyclegan.networks import Generator, check_size, discriminator
from example_projects.cyclegan.textures import scene
from tests.distributed.ranks import results, run_ranks
from tests.examples import running
from tests.examples.running import (
    QUIET,
    EndedError,
    assert_same_weights,
    count_parameters,
    load_checkpoint,
    output_of,
    untimed,
)
from tests.lightning_models import needs_exact_resume

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`")]

TINY = {"width": 4, "blocks": 1}


def random_images(number=1, size=24, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, size, size, generator=generator, dtype=dtype) * 2 - 1


# Networks


@pytest.mark.parametrize(("blocks", "parameters"), [(9, 11_378_179), (6, 7_837_699)])
def test_a_generator_has_as_many_parameters_as_the_original(blocks, parameters):
    with torch.device("meta"):
        assert count_parameters(Generator(blocks=blocks)) == parameters


def test_a_discriminator_has_as_many_parameters_as_the_original():
    with torch.device("meta"):
        assert count_parameters(discriminator()) == 2_764_737


@pytest.mark.parametrize("shape", [(24, 24), (32, 40)])
def test_a_generator_keeps_the_size_and_stays_within_the_range(shape):
    made = Generator(**TINY)(100 * torch.randn(2, 3, *shape))
    assert made.shape == (2, 3, *shape)
    assert made.abs().max() <= 1


def test_a_score_is_that_of_a_patch_of_70_by_70():
    network = discriminator(width=2)
    for index, layer in enumerate(network):
        if isinstance(layer, nn.InstanceNorm2d):
            network[index] = nn.Identity()  # it looks at the whole image
    images = torch.randn(1, 3, 256, 256, requires_grad=True)
    scores = network(images)
    assert scores.shape == (1, 1, 30, 30)
    (gradient,) = torch.autograd.grad(scores[0, 0, 15, 15], images)
    seen = gradient.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


def test_an_image_is_translated_alike_alone_and_in_a_batch():
    torch.manual_seed(0)
    network, images = Generator(**TINY).double(), random_images(3, dtype=torch.float64)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, rtol=0, atol=1e-12)


def test_weights_are_drawn_from_a_normal_distribution_of_deviation_0_02_and_biases_are_zero():
    torch.manual_seed(0)
    for network in (Generator(width=16, blocks=2), discriminator(width=16)):
        weights = torch.cat([p.flatten() for name, p in network.named_parameters() if name.endswith("weight")])
        assert weights.mean().abs() < 1e-3
        assert weights.std().item() == pytest.approx(0.02, rel=0.02)
        assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))


def test_a_size_that_the_networks_do_not_take_is_refused():
    for size in (24, 28, 256):
        check_size(size)
        assert discriminator(width=1)(Generator(width=1, blocks=1)(torch.zeros(1, 3, size, size))).isfinite().all()
    for size in (20, 30):
        with pytest.raises(ValueError, match=rf"must be 24, 28, 32, ..., but is {size}\. Give another --image-size"):
            check_size(size)


# Losses


def test_the_six_terms_are_those_of_the_paper():
    def constant(a, b):
        return {"A": torch.full((2, 3, 4, 4), a), "B": torch.full((2, 3, 4, 4), b)}

    losses = generator_losses(
        real=constant(0.0, 0.5), cycled=constant(0.3, 0.25), kept=constant(-0.2, 0.6), scores=constant(0.4, 3.0)
    )
    expected = {
        "cycle_A": 0.3, "cycle_B": 0.25, "identity_A": 0.2, "identity_B": 0.1, "gan_A": 0.36, "gan_B": 4.0,
    }  # fmt: skip
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)


def test_a_discriminator_pays_half_for_real_and_half_for_made_images():
    assert discriminator_loss(torch.tensor([0.5, 2.0]), torch.tensor([0.2])).item() == pytest.approx(
        ((0.25 + 1) / 2 + 0.04) / 2
    )


def test_the_lambdas_are_1_10_and_half_of_the_cycles_and_unbalanced_the_cycle_has_1000():
    assert list(SETTINGS["balanced"].values()) == [10, 10, 1, 1, 5, 5]
    assert list(SETTINGS["unbalanced"].values()) == [1000, 1000, 1, 1, 500, 500]
    assert list(OTHER_READINGS["balanced-text"].values()) == [10, 10, 1, 1, 0.5, 0.5]
    assert list(OTHER_READINGS["unbalanced-text"].values()) == [1000, 1000, 1, 1, 0.5, 0.5]
    assert list(OTHER_READINGS["unbalanced-cycle"].values()) == [1000, 1000, 1, 1, 5, 5]
    assert list(lambdas(identity=0)) == [f"{kind}_{domain}" for kind in ("cycle", "gan", "identity") for domain in "AB"]


# The training step


class Step(pl.Callback):
    """Keeps what the module hands to its optimizers."""

    def on_train_start(self, trainer, module):
        self.reached, self.left = {}, []
        update = module.update

        def watched(losses, optimizer):
            generators = dict(module.generators.named_parameters())
            for name, loss in losses.items():
                found = torch.autograd.grad(loss, generators.values(), retain_graph=True, allow_unused=True)
                self.reached[name] = {
                    key[0] for key, gradient in zip(generators, found, strict=True) if gradient is not None
                }
            update(losses, optimizer)
            self.left.append([p.grad is None for p in module.discriminators.parameters()])

        module.update = watched


def make_module(method, setting="unbalanced", *, lr=2e-4, epochs=None, pool_size=50):
    torch.manual_seed(0)
    return CycleGAN(IMAGE_METHODS[method], SETTINGS[setting], lr, epochs=epochs, pool_size=pool_size, **TINY)


def fit(module, batches, *, callbacks=(), epochs=1):
    """Train on batches as they are, in float64."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        use_distributed_sampler=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, None))
    return trainer


def pairs(count=3, size=24):
    return [
        (random_images(1, size, 2 * index, torch.float64), random_images(1, size, 2 * index + 1, torch.float64))
        for index in range(count)
    ]


@pytest.mark.parametrize("method", ["mtadam", "adam"])
def test_a_term_reaches_the_generators_it_passes_through_and_no_discriminator(method):
    step = Step()
    fit(make_module(method), pairs(1), callbacks=[step])
    assert step.reached == {
        **{f"cycle_{domain}": {"A", "B"} for domain in DOMAINS},
        **{f"{kind}_{domain}": {domain} for kind in ("gan", "identity") for domain in DOMAINS},
        **{f"discriminator_{domain}": set() for domain in DOMAINS},
    }
    assert all(step.left[0]), "the generators' step left gradients on the discriminators"
    assert not any(step.left[1])


def original(module, batches, weights):
    """Train by the procedure of the original's code, with Adam and without a history of images."""
    g_ab, g_ba = module.generators["B"], module.generators["A"]
    d_a, d_b = module.discriminators["A"], module.discriminators["B"]
    generator = torch.optim.Adam([*g_ab.parameters(), *g_ba.parameters()], lr=2e-4, betas=(0.5, 0.999))
    discriminators = torch.optim.Adam([*d_a.parameters(), *d_b.parameters()], lr=2e-4, betas=(0.5, 0.999))
    lambda_gan, lambda_cycle, lambda_identity = weights
    for a, b in batches:
        fake_b, fake_a = g_ab(a), g_ba(b)
        score_a, score_b = d_a(fake_a), d_b(fake_b)
        loss = lambda_gan * ((score_a - 1).square().mean() + (score_b - 1).square().mean())
        loss = loss + lambda_cycle * ((g_ba(fake_b) - a).abs().mean() + (g_ab(fake_a) - b).abs().mean())
        identity = (g_ba(a) - a).abs().mean() + (g_ab(b) - b).abs().mean()
        generator.zero_grad()
        (loss + lambda_cycle * lambda_identity * identity).backward()
        generator.step()
        discriminators.zero_grad()
        for network, real, fake in ((d_a, a, fake_a.detach()), (d_b, b, fake_b.detach())):
            (0.5 * ((network(real) - 1).square().mean() + network(fake).square().mean())).backward()
        discriminators.step()


@pytest.mark.parametrize(("setting", "weights"), [("balanced", (1, 10, 0.5)), ("unbalanced", (1, 1000, 0.5))])
def test_with_adam_the_training_is_that_of_the_original(setting, weights):
    ours, theirs = (make_module("adam", setting, pool_size=0) for _ in range(2))
    fit(ours, pairs())
    original(theirs.double(), pairs(), weights)
    for (name, weight), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_with_mtadam_the_lambdas_change_nothing():
    outputs = []
    for setting in SETTINGS:
        module = make_module("mtadam", setting, pool_size=0)
        fit(module, pairs())
        outputs.append(module.generators["B"](random_images(dtype=torch.float64)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_the_learning_rates_fall_in_the_second_half_of_the_epochs():
    rates = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    fit(make_module("mtadam", lr=1.0, epochs=4), pairs(1), callbacks=[Watch()], epochs=4)
    assert rates == [[pytest.approx(factor)] * 2 for factor in (1, 1, 2 / 3, 1 / 3)]
    rates.clear()
    fit(make_module("adam", lr=0.5, epochs=None), pairs(1), callbacks=[Watch()], epochs=3)
    assert rates == [[0.5, 0.5]] * 3


def test_a_translation_is_shown_beside_its_source_and_the_other_domain():
    module, a, b = make_module("adam"), random_images(seed=1), random_images(seed=2)
    inputs, outputs, truths = module.generate((a, b))
    assert torch.equal(inputs, a)
    assert torch.equal(outputs, module.generators["B"](a))
    assert torch.equal(truths, b)
    assert torch.equal(module.bring_back(outputs), module.generators["A"](outputs))


# What is measured


class Distance:
    label, n = "FD-none", 2

    def __getattr__(self, name):  # to, update, reset
        return lambda *args, **kwargs: None

    def compute(self):
        return torch.tensor(7.0)


def round_trip(truth):
    """Measured: of A's images translations off by 51 and ways back by 102, of B's by 10 and 20."""
    there = {side: ImageMetrics(Distance()) for side in "AB"}
    metrics = RoundTripMetrics(there, {side: ImageMetrics() for side in "AB"}, truth=truth)
    metrics.to(torch.device("cpu"))
    metrics.update(torch.full((1, 3, 16, 16), 1.0), torch.ones(1, 3, 16, 16), "A")
    metrics.reset()
    black = torch.full((1, 3, 16, 16), -1.0)
    for side, error in (("A", 51), ("B", 10)):
        metrics.update(black + error / 127.5, black, side)
        metrics.update_cycle(black + 2 * error / 127.5, black, side)
    return metrics.compute()


def test_with_a_truth_both_translations_and_ways_back_are_measured_and_without_one_the_ways_back():
    measured, unknown = round_trip(truth=True), round_trip(truth=False)
    names = [*command.PIXELS, "FD-none", *(f"cycle_{name}" for name in command.PIXELS)]
    assert [name for name in measured if name != "n"] == [f"{name}-{side}" for side in "AB" for name in names]
    for name, expected in {"L1-A": 51, "cycle_L1-A": 102, "L1-B": 10, "cycle_L1-B": 20, "L2-A": 51**2}.items():
        assert measured[name] == pytest.approx(expected)
    translations = [f"{name}-{side}" for side in "AB" for name in command.PIXELS]
    assert unknown == {name: value for name, value in measured.items() if name not in translations}
    assert (unknown["FD-none-A"], unknown["n"]) == (7, 2)


def both_ways(options):
    """What a callback measures of one batch: by side the pairs of translation and truth, and of way back and start."""
    seen = {}

    class Kept:
        def __init__(self, kind):
            self.kind = kind

        def update(self, one, other):
            seen[self.kind] = one, other

    metrics = command.metrics_of(image_command.parser_of(command.PROJECT).parse_args(options))
    metrics.there = {side: Kept(f"there {side}") for side in metrics.there}
    metrics.back = {side: Kept(f"back {side}") for side in metrics.back}
    module, here, there = make_module("adam"), random_images(seed=1), random_images(seed=2)
    watching = RoundTripEvaluation(Path("none"), metrics)
    watching.on_validation_batch_end(None, module, module.generate((here, there)))
    return module.generators, here, there, seen


@pytest.mark.parametrize(("direction", "shown", "other"), [("AtoB", "A", "B"), ("BtoA", "B", "A")])
def test_both_translations_are_measured_whichever_is_shown(direction, shown, other):
    generators, here, there, seen = both_ways(["--direction", direction])
    made, made_of_there = generators["B"](here), generators["A"](there)
    expected = {
        f"there {shown}": (made, there),
        f"back {shown}": (generators["A"](made), here),
        f"there {other}": (made_of_there, here),
        f"back {other}": (generators["B"](made_of_there), there),
    }
    assert seen.keys() == expected.keys()
    for name, pair in expected.items():
        assert all(map(torch.equal, seen[name], pair)), name


# The image pool


def numbered(first, count):
    """Images that are told apart by their value."""
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def values(images):
    return [] if images is None else images[:, 0, 0, 0].tolist()


def test_an_empty_pool_lets_every_image_through():
    pool, images = ImagePool(0), random_images(5)
    assert torch.equal(pool.swap(images), images)
    assert pool.images is None


def test_a_pool_gives_what_it_takes_until_it_is_full():
    pool = ImagePool(5)
    assert values(pool.swap(numbered(0, 3))) == [0, 1, 2]
    assert values(pool.swap(numbered(3, 2))) == [3, 4]
    assert values(pool.images) == [0, 1, 2, 3, 4]


def test_a_full_pool_swaps_every_second_image_and_loses_none():
    torch.manual_seed(0)
    pool = ImagePool(50)
    pool.swap(numbered(0, 50))
    given = values(pool.swap(numbered(50, 2000)))
    assert sorted(given + values(pool.images)) == list(range(2050))
    old = sum(value != new for value, new in zip(given, range(50, 2050), strict=True))
    assert 900 < old < 1100
    assert len(pool.images) == 50


def test_what_a_pool_gave_does_not_change_afterwards():
    torch.manual_seed(0)
    pool = ImagePool(1)
    given = [pool.swap(numbered(index, 1)) for index in range(20)]
    assert sorted([value for images in given for value in values(images)][1:] + values(pool.images)) == list(range(20))


# Data


def test_a_scene_is_the_same_in_both_domains_but_for_the_texture_of_its_objects():
    for number in range(5):
        a, b = scene("A", number, 64).int(), scene("B", number, 64).int()
        changed = (a != b).any(0)
        assert 0.02 < changed.float().mean() < 0.6
        assert (a - b).abs().amax(0)[changed].float().mean() > 30
    assert not torch.equal(scene("A", 0, 64), scene("A", 1, 64))


def data_of(folder=None, size=24, direction="AtoB"):
    return make_data(folder, size=size, direction=direction, batch_size=1, seed=0)


def test_domains_share_no_scene_in_training_and_all_in_testing():
    data = data_of()
    total = 2 * TRAINING_SCENES + TEST_SCENES
    assert len({tuple(scene("A", number, 12).flatten().tolist()) for number in range(total)}) == total
    assert len(data.train.a) == len(data.train.b) == len(data.train) == TRAINING_SCENES
    assert torch.equal(data.train.a[3], scene("A", 3, 27))
    assert torch.equal(data.train.b[3], scene("B", TRAINING_SCENES + 3, 27))
    assert len(data.test) == TEST_SCENES
    for index in (0, TEST_SCENES - 1):
        for image, domain in zip(data.test[index], DOMAINS, strict=True):
            torch.testing.assert_close(image, scene(domain, 2 * TRAINING_SCENES + index, 24) / 127.5 - 1)
    assert has_truth(None)
    assert "Procedural textures" in data.announcement
    assert "no --data-dir" in data.announcement


def labelled(count, size=4):
    """Images whose value is their index."""
    return Kept(lambda index: torch.full((3, size, size), index, dtype=torch.uint8), count)


def index_of(image):
    return round((image.mean().item() + 1) * 127.5)


@pytest.mark.parametrize(("a", "b"), [(7, 3), (3, 7)])
def test_every_image_of_the_larger_domain_comes_once_with_random_company(a, b):
    data = Unpaired(labelled(a), labelled(b), 4)
    assert len(data) == 7
    epochs = [[data[index, 100 * epoch + index] for index in range(7)] for epoch in range(10)]
    for epoch in epochs:
        assert [index_of(image) for image, _ in epoch] == [index % a for index in range(7)]
    company = [[index_of(image) for _, image in epoch] for epoch in epochs]
    assert len({tuple(epoch) for epoch in company}) == 10
    assert {index for epoch in company for index in epoch} == set(range(b))


def test_a_sample_is_a_crop_that_may_be_mirrored_and_depends_on_its_seed_alone():
    ramp = (torch.arange(5)[:, None] * 40 + torch.arange(5) * 8).to(torch.uint8).expand(3, 5, 5)
    data = Unpaired(*[Kept(lambda index: ramp, 1)] * 2, 4)
    crops = [ramp[:, top : top + 4, left : left + 4] for top in range(2) for left in range(2)]
    possible = [(crop.flip(2) if mirrored else crop) / 127.5 - 1 for crop in crops for mirrored in (False, True)]
    samples = [data[0, seed] for seed in range(60)]
    seen = {next(k for k, crop in enumerate(possible) if torch.allclose(image, crop)) for image, _ in samples}
    assert seen == set(range(8))
    assert all(torch.equal(one, two) for one, two in zip(data[0, 5], data[0, 5], strict=True))
    assert any(not torch.equal(a, b) for a, b in samples), "both domains get the same crop"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six red A and four blue B to train on, three and two to test on, of several sizes, one of them grey."""
    root = tmp_path_factory.mktemp("two domains")
    for name, number, colour in (
        ("trainA", 6, "red"),
        ("trainB", 4, "blue"),
        ("testA", 3, "red"),
        ("testB", 2, "blue"),
    ):
        (root / name).mkdir()
        for index in range(number):
            Image.new("RGB", (40 + index, 30), colour).save(root / name / f"{name}_{index}.png")
    Image.new("L", (33, 44), 255).save(root / "testA" / "testA_0.png")
    return root


RED, BLUE, WHITE = [1, -1, -1], [-1, -1, 1], [1, 1, 1]


def colour_of(image):
    assert image.shape == (3, 24, 24)
    assert (image == image[:, :1, :1]).all()
    return image[:, 0, 0].tolist()


def test_folders_are_read_resized_and_grey_images_converted(folder):
    data = data_of(folder)
    assert not has_truth(folder)
    assert (len(data.train), len(data.test)) == (6, 2)
    assert data.train.a[0].shape == (3, 27, 27)
    assert [colour_of(image) for image in data.train[0, 0]] == [RED, BLUE]
    assert [[colour_of(image) for image in data.test[index]] for index in range(2)] == [[WHITE, BLUE], [RED, BLUE]]
    assert data.announcement == (
        f"Images from {folder}: 6 A and 4 B to train on, 2 of each held out, without a truth, AtoB."
    )


def test_the_other_direction_exchanges_the_domains(folder):
    data = data_of(folder, direction="BtoA")
    assert [colour_of(image) for image in data.train[0, 0]] == [BLUE, RED]
    assert [colour_of(image) for image in data.test[1]] == [BLUE, RED]
    assert "4 B and 6 A to train on, 2 of each held out, without a truth, BtoA" in data.announcement


def test_a_missing_domain_is_named(folder, tmp_path):
    (tmp_path / "trainA").symlink_to(folder / "trainA")
    with pytest.raises(FileNotFoundError, match=r"no folder .*trainB"):
        data_of(tmp_path)


def test_pairs_are_taken_apart_in_training_and_kept_together_in_testing(tmp_path):
    """Image k of either side has a shade of its own: red on the left, blue on the right."""
    for split, number in (("train", 8), ("val", 3)):
        (tmp_path / split).mkdir()
        for index in range(number):
            pair = Image.new("RGB", (60, 30), (20 * index, 0, 0))
            pair.paste((0, 0, 20 * index), (30, 0, 60, 30))
            pair.save(tmp_path / split / f"{index}.png")

    def shades(pair):
        a, b = (((image + 1) * 127.5 / 20).round().amax((1, 2)).tolist() for image in pair)
        assert a[1:] == b[:2] == [0, 0]
        return a[0], b[2]

    assert has_truth(tmp_path)
    data = data_of(tmp_path)
    assert [shades(data.test[index]) for index in range(3)] == [(0, 0), (1, 1), (2, 2)]
    company = [shades(data.train[index, seed]) for seed in range(5) for index in range(8)]
    assert [a for a, _ in company] == list(range(8)) * 5
    assert sum(a == b for a, b in company) < 20
    assert torch.equal(data.test[1][1], data_of(tmp_path, direction="BtoA").test[1][0])
    assert "taken apart" in data.announcement


@pytest.mark.parametrize("kind", ["generated", "domains", "pairs"])
def test_workers_load_the_same_samples(folder, tmp_path, kind):
    """Also where processes are spawned, which get the data pickled."""
    if kind == "pairs":
        for split in ("train", "test"):
            (tmp_path / split).mkdir()
            Image.new("RGB", (60, 30), "red").save(tmp_path / split / "1.png")
    data = data_of({"generated": None, "domains": folder, "pairs": tmp_path}[kind])
    copy = pickle.loads(pickle.dumps(data.train))
    for ours, theirs in zip(data.train[0, 7], copy[0, 7], strict=True):
        assert torch.equal(ours, theirs)


# The command


COMMAND_LINE = [
    "--image-size=24", "--width=4", "--blocks=1", "--limit-train-batches=2", "--limit-test-batches=2",
    "--max-epochs=1", "--accelerator=cpu", "--no-progress-bar",
]  # fmt: skip
call = partial(output_of, command.main, *COMMAND_LINE)


@pytest.fixture
def no_curves(monkeypatch):
    """Drawing them takes longer than everything else."""
    monkeypatch.setattr(evaluation, "draw_curves", lambda *_: None)


def read_results(folder):
    """The rows of the runs; the first, of what generators that change nothing would give, is left out."""
    untranslated, *runs = running.read_results(folder)
    assert untranslated["method"] == "no translation"
    return runs


@pytest.mark.usefixtures("no_curves")
def test_every_method_runs_and_has_a_row(tmp_path):
    printed = call("--method", *IMAGE_METHODS, "--output-dir", tmp_path)
    rows = read_results(tmp_path)
    assert [row["method"] for row in rows] == list(IMAGE_METHODS)
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    header = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert header[2:-1] == [name for name in command.COLUMNS if not name.startswith("F")]
    for row in rows:
        assert row["steps"] == "2"
        assert all(0 < float(row[name]) < 255 for name in ("L1-A", "L1-B", "cycle_L1-A", "cycle_L1-B"))
    weights = [f"{cycle} cycle_A, {cycle} cycle_B, 1 gan_A, 1 gan_B, {cycle // 2} identity_A" for cycle in (1000, 10)]
    assert [printed.count(line) for line in weights] == [len(IMAGE_METHODS) - 1, 1]


def test_hyperband_searches_by_the_way_back_and_trains_with_what_it_found(tmp_path):
    search = ["--method", "hyperband", "--trials", 2, "--search-metric", "cycle_SSIM-A", "--devices", 1]
    printed = call(*search, "--output-dir", tmp_path)
    (row,) = read_results(tmp_path)
    assert (row["method"], row["steps"]) == ("hyperband", "2")
    assert "hyperband: 2 trials" in printed
    assert "1 cycle_A" in printed
    assert "1000 cycle_A" not in printed


def test_the_images_as_they_are_stand_in_the_table_for_generators_that_change_nothing():
    options = image_command.parser_of(command.PROJECT).parse_args(COMMAND_LINE)
    (row,) = command.untranslated(options)
    pairs_of_test = [data_of().test[index] for index in range(2)]
    expected = sum((a - b).abs().mean() for a, b in pairs_of_test) / 2 * 127.5
    assert row["L1-A"] == row["L1-B"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["cycle_L1-A"] == row["cycle_L1-B"] == 0
    assert row["cycle_SSIM-B"] == pytest.approx(1)


def test_without_a_truth_no_metric_of_the_translation_is_shown(folder, tmp_path):
    call("--method", "adam", "--data-dir", folder, "--output-dir", tmp_path)
    (row,) = read_results(tmp_path)
    assert not {f"{name}-{side}" for name in command.PIXELS for side in "AB"} & set(row)
    assert {f"cycle_{name}-{side}" for name in command.PIXELS for side in "AB"} < set(row)
    assert (tmp_path / "unbalanced-lr0.0002" / "adam-seed0" / "curves.png").exists()


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train_and_measure(tmp_path, precision):
    call("--method", "mtadam", "--precision", precision, "--output-dir", tmp_path)
    (row,) = read_results(tmp_path)
    assert 0 < float(row["cycle_L1-B"]) < 255


def state_of(folder, method="mtadam"):
    return load_checkpoint(folder / "unbalanced-lr0.0002" / f"{method}-seed0")


@needs_exact_resume
@pytest.mark.usefixtures("no_curves")
def test_a_resumed_run_ends_with_the_weights_and_the_pools_of_an_uninterrupted_one(tmp_path, monkeypatch):
    arguments = [
        "--method", "mtadam", "--pool-size", 2, "--limit-train-batches", 5, "--max-epochs", 2, "--checkpoint-every", 1,
    ]  # fmt: skip
    call(*arguments, "--output-dir", tmp_path / "whole")
    step, seen = CycleGAN.training_step, []

    def interrupted(self, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == 8:
            raise EndedError
        step(self, batch, batch_idx)

    monkeypatch.setattr(CycleGAN, "training_step", interrupted)
    with pytest.raises(EndedError):
        call(*arguments, "--output-dir", tmp_path / "parts")
    call(*arguments, "--output-dir", tmp_path / "parts", "--resume")
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2, 2, 3, 4]
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert_same_weights(parts["state_dict"], whole["state_dict"])
    for domain in DOMAINS:
        assert whole["pools"][domain].shape == (2, 3, 24, 24)
        assert torch.equal(parts["pools"][domain], whole["pools"][domain])
    assert untimed(read_results(tmp_path / "parts")) == untimed(read_results(tmp_path / "whole"))


@pytest.mark.usefixtures("no_curves")
def test_a_checkpoint_has_the_networks_and_nothing_that_measures(tmp_path):
    call("--method", "adam", "--checkpoint-every", 1, "--output-dir", tmp_path)
    assert {name.split(".")[0] for name in state_of(tmp_path, "adam")["state_dict"]} == {"generators", "discriminators"}


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("method", ["mtadam", "adam"])
def test_two_ranks_end_as_one_process_with_the_doubled_batch(tmp_path, method):
    """In float64, for a bias in front of a normalisation has no gradient but rounding errors, which Adam enlarges."""
    arguments = ["--method", method, "--pool-size", 0, "--checkpoint-every", 1, "--precision", "64-true"]
    call(*arguments, "--batch-size", 2, "--limit-test-batches", 4, "--output-dir", tmp_path / "one")
    ddp = [*arguments, "--batch-size", 1, "--strategy", "ddp_find_unused_parameters_true", "--devices", 2]
    (tmp_path / "processes").mkdir()

    def call_on(rank):
        call(*ddp, "--output-dir", tmp_path / "two")

    results(run_ranks(call_on, tmp_path / "processes"))
    one, two = (state_of(tmp_path / kind, method)["state_dict"] for kind in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    one, two = (read_results(tmp_path / kind)[0] for kind in ("one", "two"))
    for name in ("L1-A", "cycle_L1-B", "steps"):
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-3)

"""The MNIST project: its losses, its data, its runs that resume exactly, and the command itself."""

import contextlib
import gzip
import itertools
import json
import signal
from functools import partial
from pathlib import Path
from urllib.error import URLError

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from example_projects.common import report, runs
from example_projects.common.exact_resume import EpochSampler
from example_projects.mnist import __main__ as command
from example_projects.mnist import data as mnist_data
from example_projects.mnist import module as mnist_module
from example_projects.mnist.data import FILES, SUBSET, MNISTData, find_data, read_idx, read_split
from example_projects.mnist.make_subset import choose, write_idx
from example_projects.mnist.methods import METHODS
from example_projects.mnist.module import CLASSES, TERMS, ClassTerms, class_losses
from tests.distributed.ranks import results, run_ranks
from tests.examples.running import (
    QUIET,
    CtrlCAt,
    EndedError,
    InterruptAt,
    assert_same_weights,
    digest,
    load_checkpoint,
    output_of,
    read_results,
    read_rows,
    untimed,
)
from tests.lightning_models import needs_exact_resume

pytestmark = QUIET

call = partial(output_of, command.main)

BATCH, EPOCH = 16, 4  # samples a batch, batches an epoch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """64 training and 20 test images of noise, every class among them, as MNIST's four idx files."""
    folder = tmp_path_factory.mktemp("tiny")
    generator = torch.Generator().manual_seed(0)
    for split, size in (("train", BATCH * EPOCH), ("test", 20)):
        images, labels = FILES[split]
        pixels = torch.randint(256, (size, 28, 28), dtype=torch.uint8, generator=generator)
        write_idx(folder / f"{images}.gz", pixels)
        write_idx(folder / f"{labels}.gz", torch.arange(size, dtype=torch.uint8) % CLASSES)
    return folder


# Losses


def random_batch(classes=range(CLASSES), size=12):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(size, CLASSES, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.tensor([list(classes)[index % len(classes)] for index in range(size)])
    return logits, target


def test_a_class_loss_is_its_weight_times_the_sum_of_its_samples_over_the_batch_size():
    logits, target = random_batch()
    weights = torch.linspace(1, 1000, CLASSES, dtype=torch.float64)
    losses = class_losses(logits.log_softmax(1), target, weights)
    probabilities = np.exp(logits.detach().numpy())
    probabilities /= probabilities.sum(1, keepdims=True)
    assert tuple(losses) == TERMS
    for index, loss in enumerate(losses.values()):
        nll = [-np.log(probabilities[row, index]) for row in range(12) if target[row] == index]
        assert loss.shape == ()
        assert loss.item() == pytest.approx(weights[index].item() * sum(nll) / 12, rel=1e-12)


def test_an_absent_class_has_loss_zero_and_gradient_zero():
    logits, target = random_batch(classes=(0, 4, 9))
    losses = class_losses(logits.log_softmax(1), target, torch.full((CLASSES,), 1e3, dtype=torch.float64))
    for index, loss in enumerate(losses.values()):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        present = index in (0, 4, 9)
        assert (loss.item() > 0) == present
        assert (gradient.abs().sum().item() > 0) == present
        assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [range(CLASSES), (2, 7)])
def test_with_weights_of_one_the_losses_sum_to_the_mean_nll(classes):
    logits, target = random_batch(classes)
    losses = class_losses(logits.log_softmax(1), target, torch.ones(CLASSES, dtype=torch.float64))
    torch.testing.assert_close(sum(losses.values()), F.nll_loss(logits.log_softmax(1), target), rtol=1e-12, atol=0)


def test_code_weights_are_one_and_nine_uniform_up_to_1000():
    for seed in range(5):
        weights = command.class_weights("code", seed)
        expected = 1000 * np.random.RandomState(seed).rand(CLASSES)
        assert weights[0] == 1
        assert ((weights[1:] > 0) & (weights[1:] < 1000)).all()
        np.testing.assert_array_equal(weights[1:].numpy(), expected[1:].astype(np.float32))
    assert not torch.equal(command.class_weights("code", 0), command.class_weights("code", 1))


def test_paper_weights_are_uniform_from_1_to_1000():
    weights = torch.stack([command.class_weights("paper", seed) for seed in range(200)])
    expected = [1 + 999 * np.random.RandomState(seed).rand(CLASSES) for seed in range(200)]
    np.testing.assert_array_equal(weights.numpy(), np.array(expected, dtype=np.float32))
    assert 1 <= weights.min() < 10
    assert 990 < weights.max() <= 1000


def test_equal_weights_are_one():
    assert torch.equal(command.class_weights("equal", 5), torch.ones(CLASSES))


# Data


def test_a_plain_and_a_gzipped_file_read_the_same(tmp_path):
    values = torch.randint(256, (3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_idx(tmp_path / "packed.gz", values)
    (tmp_path / "plain").write_bytes(gzip.decompress((tmp_path / "packed.gz").read_bytes()))
    assert (tmp_path / "plain").read_bytes()[:16] == bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5])
    for name in ("plain", "packed.gz"):
        assert read_idx(tmp_path / name).dtype == torch.uint8
        assert torch.equal(read_idx(tmp_path / name), values)


@pytest.mark.parametrize("kept", [0, 2, 3, 4, 10, 15, 16, 19])
def test_a_file_cut_anywhere_raises_and_names_the_file(tmp_path, kept):
    path = tmp_path / "train-labels-idx1-ubyte"
    whole = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2]) + bytes(4)
    path.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.*Download it again"):
        read_idx(path)


def test_a_file_that_is_too_long_raises_and_names_the_file(tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes(3))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte has 3 bytes of data.*\(2,\)"):
        read_idx(path)


@pytest.mark.parametrize("magic", [b"\x00\x00\x0d\x01", b"\x01\x00\x08\x01", b"<htm"])
def test_a_wrong_magic_number_raises_and_names_the_file(tmp_path, magic):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(magic + bytes([0, 0, 0, 2, 0, 0]))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is not an idx file of unsigned bytes"):
        read_idx(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: b"<html>not found</html>",
        lambda packed: b"",
        lambda packed: packed[:-9],
        lambda packed: packed[:5],
        lambda packed: packed[:-8] + bytes(4) + packed[-4:],
        lambda packed: packed[:10] + bytes([0xFF] * 8) + packed[18:],
    ],
    ids=["no gzip", "empty", "cut short", "cut in the header", "wrong checksum", "broken stream"],
)
def test_a_damaged_gzip_file_raises_and_names_the_file(tmp_path, damage):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, torch.arange(200, dtype=torch.uint8).view(2, 10, 10))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not"):
        read_idx(path)


@pytest.mark.parametrize("inside", ["", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_split_is_found_in_the_folder_or_where_torchvision_puts_it(tiny, tmp_path, inside, packed):
    place = tmp_path / inside
    place.mkdir(parents=True, exist_ok=True)
    for name in itertools.chain(*FILES.values()):
        content = (tiny / f"{name}.gz").read_bytes()
        (place / (f"{name}.gz" if packed else name)).write_bytes(content if packed else gzip.decompress(content))
    for split, size in (("train", BATCH * EPOCH), ("test", 20)):
        images, labels = read_split(tmp_path, split).tensors
        raw = read_idx(tiny / f"{FILES[split][0]}.gz")
        assert images.shape == (size, 1, 28, 28)
        torch.testing.assert_close(images[:, 0], (raw / 255 - 0.1307) / 0.3081)
        assert labels.dtype == torch.int64
        assert labels.tolist() == [index % CLASSES for index in range(size)]


@pytest.mark.parametrize("name", [name for names in FILES.values() for name in names])
def test_a_missing_file_raises_and_says_which_and_what_to_do(tiny, tmp_path, name):
    for path in tiny.iterdir():
        if path.stem != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    split = next(split for split, names in FILES.items() if name in names)
    with pytest.raises(FileNotFoundError, match=rf"^{name} .*or {name}\.gz.*Give --data-dir") as raised:
        read_split(tmp_path, split)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_the_shipped_subset_is_stratified(split, per_class):
    images, labels = read_split(SUBSET, split).tensors
    assert images.shape == (CLASSES * per_class, 1, 28, 28)
    assert labels.bincount().tolist() == [per_class] * CLASSES
    assert images.flatten(1).std(1).min() > 0, "an image is empty"
    assert len({digest([image]) for image in images}) > 0.99 * len(images), "images are repeated"


def test_a_subset_keeps_the_first_of_every_class_in_order():
    labels = torch.tensor([1, 0, 1, 1, 0, 2, 0, 2, 2])
    assert choose(labels, 2).tolist() == [0, 1, 2, 4, 5, 7]


def test_the_same_values_give_the_same_file(tmp_path):
    for name in ("one.gz", "two.gz"):
        write_idx(tmp_path / name, torch.arange(9, dtype=torch.uint8))
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), RuntimeError("Error downloading\nfrom all mirrors"), TimeoutError()]
)
def test_offline_the_shipped_subset_is_used_and_it_says_so(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(mnist_data, "MNIST", download)
    folder, said = find_data(None)
    assert folder == SUBSET
    assert "could not be downloaded" in said
    assert "subset" in said
    assert "10,000 training and 2,000 test" in said
    assert "--data-dir" in said
    assert "\n" not in said


def test_a_given_folder_is_used_without_a_download(monkeypatch, tmp_path):
    def download(*args, **kwargs):
        raise AssertionError("downloads though a folder is given")

    monkeypatch.setattr(mnist_data, "MNIST", download)
    folder, said = find_data(tmp_path)
    assert folder == tmp_path
    assert str(tmp_path) in said


# The command


@pytest.fixture(scope="module")
def all_methods(tiny, tmp_path_factory):
    """One call with every method: the folder, what was printed, and what each method started from and saw."""
    output = tmp_path_factory.mktemp("all")
    starts, seen = [], []
    original = ClassTerms.training_step

    def watched(self, batch, batch_idx):
        if batch_idx == 0:
            starts.append((self.weights.tolist(), digest(self.network.parameters())))
            seen.append([])
        seen[-1].append(digest(batch))
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassTerms, "training_step", watched)
        printed = call(
            "--method", *METHODS, "--data-dir", tiny, "--output-dir", output, "--batch-size", BATCH,
            "--limit-train-batches", 2, "--accelerator", "cpu",
        )  # fmt: skip
    return output, printed, dict(zip(METHODS, starts, strict=True)), dict(zip(METHODS, seen, strict=True))


def test_every_method_runs_and_has_a_row(all_methods):
    output, printed, _, _ = all_methods
    table = (output / "table.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["method", "runs", *command.COLUMNS]
    assert [row[:2] for row in rows[2:]] == [[method, "1"] for method in METHODS]
    assert table in printed
    results = read_results(output)
    assert [row["method"] for row in results] == list(METHODS)
    for row, shown in zip(results, rows[2:], strict=True):
        assert row["seed"] == "0"
        assert row["steps"] == "2"
        assert 0 <= float(row["worst_class"]) <= float(row["test_accuracy"]) <= 100
        assert float(row["seconds_per_step"]) > 0
        assert float(shown[2]) == pytest.approx(float(row["test_accuracy"]), abs=0.01)


def test_it_says_where_the_data_is_and_how_to_open_tensorboard(all_methods, tiny):
    output, printed, _, _ = all_methods
    assert f"tensorboard --logdir {output}" in printed
    assert str(tiny) in printed
    assert all(f"\n{method}, seed 0" in printed for method in METHODS)


def test_all_methods_of_a_seed_start_from_the_same_weights(all_methods):
    starts = all_methods[2]
    assert len({start for _, start in starts.values()}) == 1
    for method, (weights, _) in starts.items():
        assert weights == command.class_weights("equal" if METHODS[method].balanced else "code", 0).tolist()


def test_all_methods_of_a_seed_see_the_same_batches_in_the_same_order(all_methods):
    seen = all_methods[3]
    assert {tuple(batches) for batches in seen.values()} == {tuple(seen["mtadam"])}
    assert len(set(seen["mtadam"])) == 2


def test_mtadam_methods_log_their_balance_for_tensorboard(all_methods):
    for method in METHODS:
        folder = all_methods[0] / "code-lr0.001" / f"{method}-seed0"
        assert list(folder.glob("events.out.tfevents.*")), method
        assert (folder / "csv" / "metrics.csv").exists(), method


def test_the_options_are_kept_beside_the_table(all_methods):
    options = json.loads((all_methods[0] / "options.json").read_text())
    assert options["method"] == list(METHODS)
    assert options["batch_size"] == BATCH


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--method", "adamw"])
    assert "mtadam-ii-not-per-layer" in capsys.readouterr().err


class Small(nn.Module):
    """Stands in for the network where only the run matters; random numbers are used as there."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(dropout), nn.Linear(8, CLASSES))

    def forward(self, images):
        return self.layers(images).log_softmax(1)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(mnist_module, "Net", Small)


@pytest.mark.usefixtures("small")
def test_another_seed_is_another_run_with_its_own_row(tiny, tmp_path):
    call("--method", "adam", "--seeds", 3, 4, "--data-dir", tiny, "--output-dir", tmp_path, "--batch-size", BATCH,
         "--accelerator", "cpu")  # fmt: skip
    assert [(row["method"], row["seed"]) for row in read_results(tmp_path)] == [("adam", "3"), ("adam", "4")]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 3
    assert table[2].startswith("| adam   | 2 ")
    assert table[2].count("+-") == 3


@pytest.mark.usefixtures("small")
def test_resume_skips_what_has_ended_and_runs_what_has_not(tiny, tmp_path, monkeypatch):
    arguments = ["--method", "mtadam", "adam", "--data-dir", tiny, "--batch-size", BATCH, "--accelerator", "cpu"]
    call(*arguments, "--output-dir", tmp_path / "whole")
    trained = []
    original = ClassTerms.training_step

    def interrupted(self, batch, batch_idx):
        trained.append(self.method)
        if len(trained) == EPOCH + 2:
            raise EndedError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ClassTerms, "training_step", interrupted)
    with pytest.raises(EndedError):
        call(*arguments, "--output-dir", tmp_path / "parts")
    ended = tmp_path / "parts" / "code-lr0.001" / "mtadam-seed0" / "result.json"
    before = ended.read_bytes(), ended.stat().st_mtime_ns
    assert not (tmp_path / "parts" / "table.md").exists()
    call(*arguments, "--output-dir", tmp_path / "parts", "--resume")
    assert (ended.read_bytes(), ended.stat().st_mtime_ns) == before
    assert METHODS["mtadam"] not in trained[EPOCH + 2 :]
    assert len(trained) == EPOCH + 2 + EPOCH

    whole, parts = read_results(tmp_path / "whole"), read_results(tmp_path / "parts")
    assert [row["method"] for row in parts] == ["mtadam", "adam"]
    assert untimed(parts) == untimed(whole)


def test_two_ranks_end_as_one_process_with_the_doubled_batch(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_module, "Net", lambda: Small(dropout=0))
    arguments = ["--method", "mtadam", "--data-dir", tiny, "--accelerator", "cpu"]
    call(*arguments, "--batch-size", BATCH, "--output-dir", tmp_path / "one")
    ddp = [*arguments, "--batch-size", BATCH // 2, "--strategy", "ddp", "--devices", 2]
    (tmp_path / "processes").mkdir()
    results(run_ranks(lambda rank: call(*ddp, "--output-dir", tmp_path / "two") and None, tmp_path / "processes"))
    run = Path("code-lr0.001", "mtadam-seed0")
    weights, others = (load_checkpoint(tmp_path / kind / run)["state_dict"] for kind in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-6)
    one, two = (read_results(tmp_path / kind)[0] for kind in ("one", "two"))
    for name in ("steps", "test_accuracy", "worst_class"):
        assert one[name] == two[name]


@pytest.mark.usefixtures("small")
def test_without_resume_a_run_starts_over(tiny, tmp_path):
    arguments = ["--method", "adam", "--data-dir", tiny, "--output-dir", tmp_path, "--accelerator", "cpu"]
    call(*arguments)
    folder = tmp_path / "code-lr0.001" / "adam-seed0"
    (folder / "leftover").touch()
    (folder / "result.json").write_text("{}")
    call(*arguments)
    assert not (folder / "leftover").exists()
    assert json.loads((folder / "result.json").read_text())["steps"] == 1


# Exact resume


def train(folder, data, *, resume=False, interrupt_at=None, seed=0, method="mtadam", every=3, epochs=2):
    """A run of 8 steps in 2 epochs. Returns its module, its result and what it was trained on."""
    pl.seed_everything(seed, verbose=False)
    module = ClassTerms(METHODS[method], command.class_weights("code", 0), 1e-2)
    watch = InterruptAt(interrupt_at)
    result = None
    with contextlib.suppress(EndedError):
        result = runs.run(
            folder,
            module,
            MNISTData(data, BATCH, 0),
            lambda trainer: {"test_accuracy": float(trainer.callback_metrics["test/accuracy"])},
            settings={},
            resume=resume,
            checkpoint_every=every,
            callbacks=[watch],
            max_epochs=epochs,
            accelerator="cpu",
            enable_progress_bar=False,
            log_every_n_steps=1,
        )
    assert (result is None) == (interrupt_at is not None)
    return module, result, watch.seen


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_module, "Net", Small)
        return {method: train(tmp_path_factory.mktemp(method), tiny, method=method) for method in ("mtadam", "rmsprop")}


@needs_exact_resume
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("every", "interrupt_at", "method"),
    [
        pytest.param(3, 3, "mtadam", id="just after a checkpoint in the first epoch"),
        pytest.param(1, 2, "mtadam", id="in the first epoch"),
        pytest.param(3, 5, "mtadam", id="in the second epoch, from a checkpoint in the first"),
        pytest.param(4, 5, "mtadam", id="in the second epoch, from a checkpoint between the epochs"),
        pytest.param(5, 7, "mtadam", id="in the second epoch"),
        pytest.param(7, 7, "mtadam", id="before the last batch"),
        pytest.param(3, 2, "mtadam", id="before any checkpoint"),
        pytest.param(5, 7, "rmsprop", id="another optimizer"),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tiny, tmp_path, uninterrupted, every, interrupt_at, method
):
    expected, expected_result, expected_batches = uninterrupted[method]
    _, _, before = train(tmp_path, tiny, every=every, interrupt_at=interrupt_at, method=method)
    assert before == expected_batches[:interrupt_at]
    resumed_from = max([runs._step_of(last) for last in tmp_path.rglob("last.ckpt")], default=0)
    assert interrupt_at // every * every <= resumed_from <= interrupt_at  # Lightning 2.5 saves as an epoch ends, too
    module, result, after = train(tmp_path, tiny, every=every, resume=True, seed=123, method=method)
    if resumed_from:  # else it starts over, and from another seed
        assert after == expected_batches[resumed_from:]
        assert_same_weights(module.state_dict(), expected.state_dict())
        assert {**result, "seconds_per_step": 0} == {**expected_result, "seconds_per_step": 0}
    else:
        assert after == expected_batches


@needs_exact_resume
@pytest.mark.usefixtures("small")
def test_a_run_may_be_interrupted_twice(tiny, tmp_path, uninterrupted):
    expected, _, expected_batches = uninterrupted["mtadam"]
    train(tmp_path, tiny, every=2, interrupt_at=3)
    _, _, middle = train(tmp_path, tiny, every=2, interrupt_at=3, resume=True, seed=7)
    assert middle == expected_batches[2:5]
    module, _, last = train(tmp_path, tiny, every=2, resume=True, seed=8)
    assert last == expected_batches[4:]
    assert_same_weights(module.state_dict(), expected.state_dict())


@needs_exact_resume
@pytest.mark.usefixtures("small")
def test_a_run_interrupted_in_testing_is_not_trained_again(tiny, tmp_path, uninterrupted, monkeypatch):
    expected, expected_result, _ = uninterrupted["mtadam"]

    def interrupted(self, batch, batch_idx):
        raise EndedError

    with monkeypatch.context() as patch:
        patch.setattr(ClassTerms, "test_step", interrupted)
        with pytest.raises(AssertionError):  # of train: there is no result
            train(tmp_path, tiny, every=4)
    module, result, seen = train(tmp_path, tiny, every=4, resume=True, seed=123)
    assert seen == []
    assert result["test_accuracy"] == expected_result["test_accuracy"]
    assert_same_weights(module.state_dict(), expected.state_dict())


@pytest.mark.usefixtures("small")
def test_a_run_that_has_ended_is_read_and_not_repeated(tiny, tmp_path):
    _, result, _ = train(tmp_path, tiny, epochs=1)
    file = tmp_path / "result.json"
    before = file.read_bytes(), file.stat().st_mtime_ns
    _, again, seen = train(tmp_path, tiny, epochs=1, resume=True)
    assert again == result
    assert seen == []
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


@needs_exact_resume
def test_the_real_network_resumes_in_the_middle_of_an_epoch_bit_for_bit(tiny, tmp_path):
    expected, _, _ = train(tmp_path / "whole", tiny, epochs=1)
    train(tmp_path / "parts", tiny, epochs=1, every=2, interrupt_at=3)
    module, _, seen = train(tmp_path / "parts", tiny, epochs=1, every=2, resume=True, seed=123)
    assert [step for step, _ in seen] == [2, 3]
    assert_same_weights(module.state_dict(), expected.state_dict())


class Progress:
    """What of a trainer the sampler looks at."""

    def __init__(self, epoch, done, rank=0, ranks=1):
        self.current_epoch = epoch
        self.global_rank, self.world_size = rank, ranks
        self.fit_loop = self.epoch_loop = self.batch_progress = self.current = self
        self.ready = done


def test_the_order_depends_on_the_seed_and_the_epoch_alone_and_skips_what_is_done():
    def order(seed, epoch, done=0):
        return list(EpochSampler(20, 4, seed, Progress(epoch, done)))

    torch.manual_seed(0)
    first = order(0, 0)
    torch.manual_seed(1)
    assert order(0, 0) == first
    assert sorted(first) == list(range(20))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0, done=3) == first[12:]


@pytest.mark.parametrize("done", [0, 2])
def test_two_ranks_see_together_what_one_process_with_the_doubled_batch_sees(done):
    ranks = [list(EpochSampler(24, 4, 0, Progress(1, done, rank, 2))) for rank in range(2)]
    one = list(EpochSampler(24, 8, 0, Progress(1, done)))
    for start in range(0, 4 * (3 - done), 4):
        together = [index for rank in ranks for index in rank[start : start + 4]]
        assert sorted(together) == sorted(one[2 * start : 2 * start + 8])


# Reports


def test_mean_and_spread_are_those_of_numpy():
    values = [97.12, 98.34, 96.5, 99.01]
    assert report.mean_and_spread(values) == f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}"
    assert report.mean_and_spread([97.128]) == "97.13"


def test_small_values_have_four_digits():
    assert report.mean_and_spread([0.0123, 0.0125]) == "0.0124 +- 0.0001"
    assert report.mean_and_spread([0.01239]) == "0.0124"


def test_a_summary_has_a_row_per_value_in_the_order_of_appearance():
    results = [
        {"method": "b", "seed": 0, "accuracy": 90.0, "loss": 1},
        {"method": "a", "seed": 0, "accuracy": 80.0, "loss": 5},
        {"method": "b", "seed": 1, "accuracy": 92.0, "loss": 3},
    ]
    assert report.summarise(results, "method", ["accuracy", "loss"]) == [
        {"method": "b", "runs": "2", "accuracy": "91.00 +- 1.41", "loss": "2.00 +- 1.41"},
        {"method": "a", "runs": "1", "accuracy": "80.00", "loss": "5.00"},
    ]


def test_a_markdown_table_has_aligned_columns_and_every_value():
    rows = [{"method": "mtadam", "n": 3}, {"method": "sgd", "n": 1000}]
    assert report.markdown(rows).splitlines() == [
        "| method | n    |",
        "| ------ | ---- |",
        "| mtadam | 3    |",
        "| sgd    | 1000 |",
    ]


def test_csv_keeps_every_value(tmp_path):
    rows = [{"method": "a, b", "accuracy": 0.1 + 0.2}, {"method": 'c "d"', "accuracy": 1e-12}]
    path = Path(tmp_path / "results.csv")
    report.write_csv(path, rows)
    assert [(row["method"], float(row["accuracy"])) for row in read_rows(path)] == [
        (r["method"], r["accuracy"]) for r in rows
    ]
    assert len(path.read_text().splitlines()) == 3


def test_a_run_made_with_other_settings_is_not_resumed(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"max_epochs": 1, "batch_size": 64}))
    with pytest.raises(ValueError, match=r"max_epochs was 1 and is 3\. Give the options it was made with"):
        runs.check_settings(tmp_path / "settings.json", {"max_epochs": 3, "batch_size": 64})
    runs.check_settings(tmp_path / "settings.json", {"max_epochs": 1, "batch_size": 64})
    runs.check_settings(tmp_path / "missing.json", {"max_epochs": 3})


@needs_exact_resume
@pytest.mark.usefixtures("small")
def test_ctrl_c_loses_nothing(tiny, tmp_path, uninterrupted, monkeypatch, capsys):
    expected, _, expected_batches = uninterrupted["mtadam"]
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "TrainingClock", lambda: CtrlCAt(5))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(tmp_path, tiny, every=100, interrupt_at=100)
    signal.signal(signal.SIGINT, before)
    assert "Stopped after step 6. The same command with --resume" in capsys.readouterr().out
    module, result, after = train(tmp_path, tiny, every=100, resume=True, seed=7)
    assert after == expected_batches[6:]
    assert result["steps"] == 8
    assert_same_weights(module.state_dict(), expected.state_dict())

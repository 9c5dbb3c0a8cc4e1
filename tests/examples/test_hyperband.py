"""The search over the lambdas: what is tried, what is ended early, and that an interrupted search goes on."""

import math
from pathlib import Path

import optuna
import pytest
from torch.optim import Adam

from example_projects.common import hyperband, image_command
from example_projects.common.hyperband import HIGHEST, LOWEST, Prune, draws, search
from example_projects.common.image_project import ImageProject
from example_projects.cyclegan.__main__ import PROJECT as CYCLEGAN
from tests.examples.running import EndedError

TERMS = {"l1": 100.0, "gan": 1.0, "perceptual": 0.1}


def make_project():
    return ImageProject(
        name="fake", description="", lambdas={"unbalanced": TERMS, "balanced": TERMS}, columns=("L1", "PSNR"),
        defaults={"lr": [1e-3], "batch_size": 1, "max_epochs": 9, "image_size": 8, "width": 1},
        make_data=None, make_module=None,
    )  # fmt: skip


def make_options(folder, *more):
    given = ["--method", "hyperband", "--output-dir", str(folder), "--devices", "1", *map(str, more)]
    return image_command.parser_of(make_project()).parse_args(given)


class FakeTrainer:
    def __init__(self, metrics, epoch=0):
        self.callback_metrics, self.current_epoch = metrics, epoch


class Value(float):
    def item(self):
        return float(self)


def error_of(lambdas):
    """Least at lambdas of 1 and 10: a training without noise, that gets nearer with every epoch."""
    return abs(math.log10(lambdas["gan"])) + abs(math.log10(lambdas["perceptual"]) - 1)


@pytest.fixture
def trained(monkeypatch):
    """The jobs that were trained, by a fake training that reports after every of its epochs, and their epochs."""
    seen = []

    def pretend(project, options, job, *, folder, callbacks):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        seen.append([job, folder, 0])
        for epoch in range(options.max_epochs):
            seen[-1][2] += 1
            value = Value(error_of(job.lambdas) + 1 / (epoch + 1))
            for callback in callbacks:
                found = {"L1": value, "PSNR": Value(-value), "cycle_SSIM-A": Value(-value)}
                metrics = {f"val/{name}": one for name, one in found.items()}
                callback.on_validation_end(FakeTrainer(metrics, epoch), None)
        return {name: float(one) for name, one in found.items()}

    monkeypatch.setattr(hyperband, "train", pretend)
    return seen


def test_lambdas_are_drawn_over_the_papers_eight_decades_and_the_first_term_is_the_unit():
    found = draws(list(TERMS), 300, seed=0)
    assert all(list(lambdas) == ["gan", "perceptual"] for lambdas in found)
    exponents = sorted(math.log10(lambdas["gan"]) for lambdas in found)
    assert (LOWEST, HIGHEST) == (1e-4, 1e4)
    assert -4 <= exponents[0] < -3.7
    assert 3.7 < exponents[-1] <= 4
    assert exponents[150] == pytest.approx(0, abs=0.5)
    assert draws(list(TERMS), 10, seed=0) == found[:10]
    assert draws(list(TERMS), 10, seed=1) != found[:10]


@pytest.mark.parametrize("metric", ["L1", "PSNR", "cycle_SSIM-A"])
def test_the_best_of_the_trials_is_found_and_bad_ones_are_ended_early(tmp_path, trained, metric):
    found = search(make_project(), make_options(tmp_path, "--search-metric", metric, "--trials", 40), 1e-3)
    assert found["l1"] == 1
    jobs = [job for job, _, _ in trained]
    assert len(jobs) == 40
    assert found == min((job.lambdas for job in jobs), key=error_of)
    assert all(job.method.optimizer is Adam for job in jobs)
    epochs = [count for _, _, count in trained]
    assert max(epochs) == 9
    assert sum(epochs) < 0.7 * 40 * 9, "hardly any trial was ended early"


def test_networks_of_trials_are_not_kept(tmp_path, trained):
    """Nor those of trials that were ended early."""
    search(make_project(), make_options(tmp_path, "--trials", 9), 1e-3)
    assert len({count for _, _, count in trained}) > 1
    assert all(folder.exists() and not (folder / "checkpoints").exists() for _, folder, _ in trained)


@pytest.mark.parametrize("error", [EndedError, KeyboardInterrupt])
def test_an_interrupted_search_goes_on_with_the_trial_it_was_at(tmp_path, trained, monkeypatch, error):
    whole = search(make_project(), make_options(tmp_path / "whole", "--trials", 6), 1e-3)
    expected = [job.lambdas for job, _, _ in trained]
    trained.clear()
    train = hyperband.train

    def interrupted(*arguments, **options):
        if len(trained) == 3:
            raise error
        return train(*arguments, **options)

    options = make_options(tmp_path / "parts", "--trials", 6)
    with monkeypatch.context() as patch:
        patch.setattr(hyperband, "train", interrupted)
        with pytest.raises(error):
            search(make_project(), options, 1e-3)
    options.resume = True
    found = search(make_project(), options, 1e-3)
    tried = [job.lambdas for job, _, _ in trained]
    assert sorted(tried, key=str) == sorted(expected, key=str)
    assert found == whole
    trained.clear()
    assert search(make_project(), options, 1e-3) == whole
    assert not trained, "what had ended was tried again"


def test_a_search_that_was_killed_tries_its_last_trial_again(tmp_path, trained):
    options = make_options(tmp_path, "--trials", 4)
    search(make_project(), options, 1e-3)
    folder = tmp_path / "unbalanced-lr0.001" / "hyperband-search"
    lines = (folder / "trials.log").read_text().splitlines(keepends=True)
    started = [index for index, line in enumerate(lines) if '"op_code":6' in line and '"state":0' in line]
    (folder / "trials.log").write_text("".join(lines[: started[-1] + 1]))
    before = [job.lambdas for job, _, _ in trained]
    trained.clear()
    options.resume = True
    search(make_project(), options, 1e-3)
    assert [job.lambdas for job, _, _ in trained] == before[-1:]


def test_more_trials_are_added_to_those_that_were(tmp_path, trained):
    options = make_options(tmp_path, "--trials", 3)
    search(make_project(), options, 1e-3)
    options.resume, options.trials = True, 5
    search(make_project(), options, 1e-3)
    assert len({str(job.lambdas) for job, _, _ in trained}) == len(trained) == 5


def test_another_metric_is_another_search(tmp_path, trained):
    options = make_options(tmp_path, "--trials", 2)
    search(make_project(), options, 1e-3)
    options.resume, options.search_metric = True, "PSNR"
    with pytest.raises(ValueError, match="metric was 'L1' and is 'PSNR'"):
        search(make_project(), options, 1e-3)
    options.resume = False
    search(make_project(), options, 1e-3)
    assert len(trained) == 4


def test_a_search_that_never_began_is_begun_with_other_settings(tmp_path, trained, monkeypatch):
    """As after a mistyped option, which the first trial refuses."""
    options = make_options(tmp_path, "--trials", 2, "--precision", "foo")
    options.resume = True
    with monkeypatch.context() as patch:
        patch.setattr(hyperband, "train", lambda *given, **more: (_ for _ in ()).throw(ValueError("no precision")))
        with pytest.raises(ValueError, match="no precision"):
            search(make_project(), options, 1e-3)
    options.precision = "32-true"
    hyperband.check_stored_search(make_project(), options, 1e-3)
    search(make_project(), options, 1e-3)
    assert len(trained) == 2
    options.precision = "16-mixed"
    with pytest.raises(ValueError, match="precision was '32-true' and is '16-mixed'"):
        hyperband.check_stored_search(make_project(), options, 1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_trial_whose_metric_is_not_finite_is_ended(value):
    trial = optuna.create_study().ask()
    with pytest.raises(optuna.TrialPruned):
        Prune(trial, "L1").on_validation_end(FakeTrainer({"val/L1": Value(value)}), None)


def test_what_was_reported_before_an_interruption_is_reported_again():
    """A trial that goes on is a new one for Optuna, which ends it by all that it has shown."""
    before, after = (Prune(optuna.create_study().ask(), "L1") for _ in range(2))
    for epoch in range(2):
        before.on_validation_end(FakeTrainer({"val/L1": Value(3 - epoch)}, epoch), None)
    after.load_state_dict(before.state_dict())
    (trial,) = after.trial.study.get_trials()
    assert trial.intermediate_values == {1: 3.0, 2: 2.0}


def test_a_metric_that_is_not_measured_is_named_before_anything_is_trained(tmp_path):
    options = make_options(tmp_path, "--search-metric", "FID")
    with pytest.raises(
        ValueError, match=r"'FID' is not measured\. Give --search-metric one of L1, L2, NMSE, PSNR, SSIM"
    ):
        image_command.train_all(make_project(), options)


def test_several_processes_are_refused_before_anything_is_trained(tmp_path):
    for more in (["--strategy", "ddp"], ["--devices", "2"]):
        with pytest.raises(ValueError, match="one process: give --devices 1, without --strategy"):
            image_command.train_all(make_project(), make_options(tmp_path, "--method", "adam", "hyperband", *more))


def test_all_seeds_are_trained_with_what_one_search_found(tmp_path, monkeypatch):
    searches = []

    def fake_search(project, options, lr):
        searches.append(lr)
        return {"l1": 1.0, "gan": lr}

    monkeypatch.setattr(hyperband, "search", fake_search)
    options = make_options(tmp_path, "--seeds", 0, 1, "--lr", 1e-3, 1e-2)
    jobs = list(image_command.jobs_of(make_project(), options))
    assert searches == [1e-3, 1e-2]
    assert [(job.seed, job.lr, job.lambdas["gan"]) for job in jobs] == [
        (0, 1e-3, 1e-3), (0, 1e-2, 1e-2), (1, 1e-3, 1e-3), (1, 1e-2, 1e-2),
    ]  # fmt: skip
    assert jobs[0].folder(options) == Path(tmp_path) / "unbalanced-lr0.001" / "hyperband-seed0"


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(image_command, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install optuna"):
        image_command.train_all(make_project(), make_options(tmp_path))


def test_it_is_off_unless_asked_for(tmp_path):
    options = image_command.parser_of(make_project()).parse_args([])
    assert "hyperband" not in options.method
    assert options.trials == 40
    assert options.search_metric == "L1"


@pytest.mark.parametrize(
    ("given", "metric"),
    [
        ([], "L1-A"),
        (["--feature-extractor", "vgg16"], "FD-VGG16-A"),
        (["--feature-extractor", "inception"], "FID-A"),
        (["--search-metric", "L1-A", "--feature-extractor", "inception"], "L1-A"),
    ],
)
def test_it_searches_by_the_frechet_distance_where_there_is_one(given, metric):
    assert image_command.parser_of(CYCLEGAN).parse_args(given).search_metric == metric

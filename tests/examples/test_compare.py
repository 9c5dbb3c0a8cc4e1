"""The comparison of methods: what is trained and skipped, and the report."""

import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim import RMSprop

from example_projects import compare
from example_projects.common import image_command
from example_projects.common.choosing import best_rates, of_these_rates
from example_projects.common.comparison import beside, on_rates, write_comparison
from example_projects.common.image_command import columns_of, parser_of
from example_projects.common.images import CELL, GAP, read_image, to_bytes
from example_projects.common.methods import IMAGE_METHODS, Method
from example_projects.common.samples import save_final
from example_projects.common.sheet import draw_samples, labelled
from example_projects.pix2pix import __main__ as pix2pix
from example_projects.pix2pix.__main__ import PROJECT
from example_projects.pix2pix.module import Pix2Pix
from tests.examples.running import QUIET, output_of, read_results, read_rows, untimed

pytestmark = QUIET


def call(output, *more):
    given = [
        "pix2pix", "--image-size", 32, "--width", 2, "--limit-train-batches", 1, "--max-epochs", 2,
        "--limit-test-batches", 2, "--no-progress-bar", "--accelerator", "cpu", "--output-dir", output,
    ]  # fmt: skip
    return output_of(compare.main, *given, *more)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison that was enlarged by a method: the folder, and how many steps the second call trained."""
    output = tmp_path_factory.mktemp("compared")
    call(output, "--method", "mtadam", "--seeds", 0, 1)
    trained = []
    original = Pix2Pix.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pix2Pix, "training_step", lambda self, *args: (trained.append(1), original(self, *args))[1])
        printed = call(output, "--method", "mtadam", "adam", "--seeds", 0, 1)
    return output, len(trained), printed


def test_what_has_ended_is_skipped(compared):
    assert compared[1] == 2 * 2


def test_runs_side_by_side_end_as_one_after_the_other(compared, tmp_path):
    call(tmp_path, "--method", "mtadam", "adam", "--parallel", 2)
    alone = [row for row in read_results(compared[0]) if row["seed"] == "0"]
    assert untimed(read_results(tmp_path)) == untimed(alone)


@pytest.mark.parametrize("more", [["--devices", "2"], ["--strategy", "ddp"]])
def test_runs_of_several_processes_are_not_trained_side_by_side(tmp_path, more):
    with pytest.raises(ValueError, match=r"--parallel trains several runs on one device: give --devices 1"):
        call(tmp_path, "--parallel", 2, *more)


@pytest.fixture
def pretended(monkeypatch):
    """What was trained, by a fake training: 0.1 is adam's best learning rate on what was held back, 0.2 mtadam's."""
    seen = []

    def pretend(project, options, job):
        seen.append((job.name, job.lr, job.seed))
        error = abs(job.lr - {"adam": 0.1, "mtadam": 0.2}[job.name])
        return {
            "method": f"{job.name}, lr {job.lr:g}",
            "lr": job.lr,
            "seed": job.seed,
            "L1": 1.0,
            "validation/L1": error,
        }

    monkeypatch.setattr(image_command, "train_announced", pretend)
    return seen


SMALL = ["--image-size", "32", "--width", "2"]
RATES = ["--method", "adam", "mtadam", "--lr", "0.1", "0.2", "--seeds", "3", "4", "5", *SMALL]


def test_all_seeds_but_the_first_are_trained_with_the_rate_that_was_best_for_it(pretended):
    options = parser_of(PROJECT).parse_args([*RATES, "--validation", "2", "--devices", "1"])
    results = image_command.train_all(PROJECT, options)
    first = [(name, lr, 3) for lr in (0.1, 0.2) for name in ("adam", "mtadam")]
    assert pretended == [*first, ("adam", 0.1, 4), ("mtadam", 0.2, 4), ("adam", 0.1, 5), ("mtadam", 0.2, 5)]
    said = on_rates(options, [result for result in results if result["seed"] == 3], "L1")
    assert "chosen by L1 of the 2 images that were held back from training, with seed 3" in said
    assert [line.split() for line in said.splitlines() if "adam" in line] == [
        ["|", "adam", "|", "0.00", "|", "0.100", "|"], ["|", "mtadam", "|", "0.100", "|", "0.00", "|"],
    ]  # fmt: skip


def test_without_images_held_back_all_seeds_are_trained_with_all_rates(pretended):
    image_command.train_all(PROJECT, parser_of(PROJECT).parse_args([*RATES, "--devices", "1"]))
    assert len(set(pretended)) == 3 * 2 * 2


@pytest.mark.parametrize(("metric", "best"), [("L1", 0.2), ("PSNR", 0.1), ("set14 PSNR-Y", 0.1)])
def test_the_best_rate_is_the_lowest_error_or_the_highest_ratio_and_never_one_that_diverged(metric, best):
    runs = [{"method": "m", "lr": lr, metric: value} for lr, value in ((0.1, 3.0), (0.2, 2.0), (0.3, math.nan))]
    assert best_rates(runs, metric) == {"m": best}
    assert [run["lr"] for run in of_these_rates([{"method": "bicubic"}, *runs], {"m": best}) if "lr" in run] == [best]


def test_a_metric_that_is_not_measured_is_refused_whenever_it_is_given(pretended):
    given = [*RATES, "--search-metric", "FIDD", "--devices", "1"]
    for some in (given, ["--method", "adam", *given[3:]]):
        with pytest.raises(ValueError, match=r"'FIDD' is not measured\. Give --search-metric one of L1, L2"):
            image_command.train_all(PROJECT, parser_of(PROJECT).parse_args(some))
    assert not pretended


def test_a_mistyped_option_does_not_block_the_command_with_the_right_one(tmp_path):
    with pytest.raises(ValueError, match="'foo' is invalid"):
        call(tmp_path, "--method", "sgd", "--precision", "foo")
    assert not list(tmp_path.rglob("settings.json"))
    call(tmp_path, "--method", "sgd")
    assert len(read_results(tmp_path)) == 1


def test_a_mistake_leaves_what_was_there(tmp_path):
    """Also without --resume, when a run would begin anew in an empty folder."""
    given = [
        "--image-size", 32, "--width", 2, "--max-epochs", 1, "--limit-train-batches", 1, "--limit-test-batches", 1,
        "--method", "sgd", "--no-progress-bar", "--accelerator", "cpu", "--output-dir", tmp_path,
    ]  # fmt: skip
    output_of(pix2pix.main, *given)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="'foo' is invalid"):
        output_of(pix2pix.main, *given, "--precision", "foo")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--anchor", "typo"], "--anchor must be one of first, mean, max, unit, l1, gan, but is 'typo'"),
        (["--width", "3"], r"adam-seed0: width was 2 and is 3\..*or remove that folder to start over"),
    ],
)
def test_no_run_is_trained_if_another_one_cannot_be(tmp_path, monkeypatch, more, said):
    """The first would be: it has no anchor, and nothing is stored of it."""
    call(tmp_path, "--method", "adam")
    monkeypatch.setattr(image_command, "train_announced", lambda *given: pytest.fail("a run was trained"))
    with pytest.raises(ValueError, match=said):
        call(tmp_path, "--method", "sgd", "adam", "mtadam", *more)


def test_optimizers_are_made_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(image_command, "train_announced", lambda *given: pytest.fail("a run was trained"))
    monkeypatch.setitem(IMAGE_METHODS, "rmsprop", Method(partial(RMSprop, alpha=-1.0)))
    with pytest.raises(ValueError, match="alpha"):
        call(tmp_path, "--method", "sgd", "rmsprop")


def test_what_is_held_back_must_be_measured_at_the_end(tmp_path):
    with pytest.raises(ValueError, match=r"--max-epochs must be a multiple of --metrics-every.*are 2 and 3"):
        call(tmp_path, "--validation", 1, "--metrics-every", 3)


def test_the_report_has_a_table_curves_and_samples(compared):
    output, _, printed = compared
    report = (output / "comparison.md").read_text()
    assert report.startswith("# pix2pix, unbalanced\n")
    lines = [line for line in report.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["method", "------", "mtadam", "adam"]
    assert all(f"{line}\n" in printed for line in lines)
    said = "The paper's numbers for these images are not known here"
    assert [text.count(said) for text in (report, printed, (output / "table.md").read_text())] == [1, 1, 1]
    for name in ("curves.png", "samples.png"):
        assert f"]({name})" in report
        assert read_image(output / name).width > 200
    assert [(row["method"], row["runs"]) for row in read_rows(output / "table.csv")] == [("mtadam", "2"), ("adam", "2")]
    assert len(read_results(output)) == 4


def test_the_report_has_the_papers_numbers_where_they_are_known():
    rows = [{"method": "mtadam", "L1": "31", "PSNR": "20"}, {"method": "sgd", "L1": "45", "PSNR": "15"}]
    assert beside(rows, {}) == rows
    assert beside(rows, {"mtadam": {"L1": 30.5}}) == [
        {"method": "mtadam", "L1": "31", "L1 (paper)": "30.5", "PSNR": "20"},
        {"method": "sgd", "L1": "45", "L1 (paper)": "", "PSNR": "15"},
    ]


def save_shades(folder, shades):
    """Samples of two grey images for each method."""
    for name, shade in shades.items():
        images = (torch.zeros(3, 16, 16), torch.full((3, 32, 32), shade), torch.full((3, 32, 32), 0.5))
        save_final([images, images], folder / name)
    return {name: folder / name for name in shades}


@pytest.mark.parametrize("count", [2, 5])
def test_a_sheet_shows_input_methods_and_truth_of_every_sample_at_most_four_beside_each_other(tmp_path, count):
    shades = {f"method {index}": index / 5 for index in range(count)}
    draw_samples(save_shades(tmp_path, shades), tmp_path / "samples.png")
    sheet = to_bytes(read_image(tmp_path / "samples.png"))[0]
    columns = {2: 4, 5: 4}[count]
    lines = -(-(count + 2) // columns)
    width, height = CELL + GAP, (sheet.shape[0] + GAP) // (2 * lines)
    assert sheet.shape[1] == columns * width - GAP
    expected = [round((shade + 1) * 127.5) for shade in (0.0, *shades.values(), 0.5)]
    for sample in range(2):
        places = [divmod(place, columns) for place in range(count + 2)]
        middles = [sheet[(sample * lines + line) * height + height // 2, column * width + CELL // 2].item()
                   for line, column in places]  # fmt: skip
        assert middles == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("label", ["adam", "mtadam-iv-own-second-moment, lr 0.002"])
def test_a_label_stands_above_its_image_and_within_its_width(label):
    image = Image.new("RGB", (CELL, 20), (255, 0, 0))
    pixels = np.array(labelled(image, label))
    assert pixels.shape[1] == CELL
    assert (pixels[-20:] == (255, 0, 0)).all()
    header = pixels[:-20].mean(-1) < 128
    assert header.any()
    assert not header[:, -2:].any()
    assert not header[:1].any()


def test_rows_that_were_not_trained_are_in_the_table_only(compared, tmp_path):
    folder = tmp_path / "compared"
    shutil.copytree(compared[0], folder)
    options = parser_of(PROJECT).parse_args(["--output-dir", str(folder)])
    results = [{"method": "bicubic", "L1": 3.0}, *read_results(compared[0])[:1]]
    assert columns_of(PROJECT, results) == ["L1", "L2", "NMSE", "PSNR", "SSIM", "seconds_per_step"]
    table = write_comparison(PROJECT, options, results)
    bicubic = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
    assert bicubic == ["bicubic", "1", "3.00", "", "", "", "", ""]


def test_the_reader_is_told_that_hyperband_saw_the_hold_out_set(compared, tmp_path, capsys):
    folder = tmp_path / "compared"
    shutil.copytree(compared[0], folder)
    results = read_results(folder)
    said = "best of 7 trials by L1 on the hold-out set, the same that is measured here"
    for methods, times in ((["adam"], 0), (["adam", "hyperband"], 1)):
        given = ["--output-dir", str(folder), "--trials", "7", "--method", *methods]
        compare.write(PROJECT, parser_of(PROJECT).parse_args(given), results)
        assert capsys.readouterr().out.count(said) == times
        assert (folder / "comparison.md").read_text().count(said) == times


def test_runs_that_were_measured_at_their_end_only_have_no_curves(compared, tmp_path):
    folder = tmp_path / "compared"
    shutil.copytree(compared[0], folder)
    for file in (*folder.rglob("curve.csv"), folder / "curves.png"):
        file.unlink()
    table = write_comparison(
        PROJECT, parser_of(PROJECT).parse_args(["--output-dir", str(folder)]), read_results(folder)
    )
    report = (folder / "comparison.md").read_text()
    assert table in report
    assert "](samples.png)" in report
    assert "curves.png" not in report
    assert not (folder / "curves.png").exists()


def test_the_options_are_those_of_the_project():
    project, options = compare.parse(["pix2pix", "--method", "adam", "--direction", "AtoB"])
    assert project is PROJECT
    assert (options.method, options.direction, options.resume) == (["adam"], "AtoB", True)


def test_an_unknown_project_is_refused(capsys):
    with pytest.raises(SystemExit):
        compare.parse(["mnist"])
    assert "pix2pix" in capsys.readouterr().err

"""The comparison of methods: what is trained and skipped, and the report."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from example_projects import compare
from example_projects.common.comparison import beside, draw_samples, label_columns, write_comparison
from example_projects.common.image_command import columns_of, parser_of
from example_projects.common.images import GAP, read_image, to_bytes
from example_projects.common.samples import save_final
from example_projects.pix2pix.__main__ import PROJECT
from example_projects.pix2pix.module import Pix2Pix
from tests.examples.running import QUIET, output_of, read_results, read_rows

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


def test_the_report_has_a_table_curves_and_samples(compared):
    output, _, printed = compared
    report = (output / "comparison.md").read_text()
    assert report.startswith("# pix2pix, unbalanced\n")
    lines = [line for line in report.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["method", "------", "mtadam", "adam"]
    assert all(f"{line}\n" in printed for line in lines)
    assert "The paper's numbers for these images are not known here" in report
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


def test_samples_have_a_column_per_method_between_input_and_truth(tmp_path):
    shades = {"a": -1.0, "b": 1.0}
    for name, shade in shades.items():
        images = (torch.zeros(3, 16, 16), torch.full((3, 32, 32), shade), torch.full((3, 32, 32), 0.5))
        save_final([images, images], tmp_path / name)
    draw_samples({name: tmp_path / name for name in shades}, tmp_path / "samples.png")
    sheet = to_bytes(read_image(tmp_path / "samples.png"))
    cell = 128
    assert sheet.shape[2] == 4 * (cell + GAP) - GAP
    header = sheet.shape[1] - (2 * (cell + GAP) - GAP)
    for row in range(2):
        middles = [sheet[0, header + row * (cell + GAP) + cell // 2, column * (cell + GAP) + cell // 2].item()
                   for column in range(4)]  # fmt: skip
        assert middles == [128, 0, 255, 191]


def test_labels_stand_above_their_columns():
    sheet = Image.new("RGB", (2 * 128 + GAP, 20), (255, 0, 0))
    pixels = np.array(label_columns(sheet, ["adam", "mtadam-iv-own-second-moment"]))
    header = pixels[:-20]
    assert (pixels[-20:] == (255, 0, 0)).all()
    dark = (header.mean(-1) < 128).any(0)
    assert dark[:60].any()
    assert not dark[60:128].any()
    assert dark[130:].any()


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

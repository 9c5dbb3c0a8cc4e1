"""The paper's figures: what the projects carry, and which of them stand beside which rows."""

import argparse
import csv
from pathlib import Path

import pytest

from example_projects import compare
from example_projects.common import paper as common_paper
from example_projects.common.comparison import beside
from example_projects.common.full_size import departures, note_on, numbers_for
from example_projects.common.methods import IMAGE_METHODS
from example_projects.cyclegan.__main__ import PROJECT as CYCLEGAN
from example_projects.mnist.methods import IN_THE_PAPER, PAPER
from example_projects.pix2pix.__main__ import PROJECT as PIX2PIX
from example_projects.srgan.__main__ import PROJECT as SRGAN

FIGURES = list(csv.DictReader(Path(common_paper.__file__).with_name("paper.csv").read_text().splitlines()))
CARRIED = {
    "1": {"mnist": PAPER},
    "2": PIX2PIX.paper,
    "3": CYCLEGAN.paper,
    "4": SRGAN.paper,
    "5": {"facades": PIX2PIX.paper["facades"], "horse2zebra": CYCLEGAN.paper["horse2zebra"]},
}
LAST_DIGIT = {"130.4": 0.05}  # Table 5 rounds one figure of Table 2


def method_here(figure):
    """The key of a method: ablations are called by their number in the paper and by what they change here."""
    if figure["table"] != "5" or figure["method"] == "mtadam":
        return figure["method"]
    (name,) = (name for name in IMAGE_METHODS if name.startswith(f"mtadam-{figure['method']}-"))
    return name


@pytest.mark.parametrize("table", CARRIED)
def test_the_projects_carry_every_figure_of_the_papers_tables(table):
    figures = [figure for figure in FIGURES if figure["table"] == table]
    for figure in figures:
        found = CARRIED[table][figure["setting"]][method_here(figure)][figure["metric"]]
        assert found == pytest.approx(float(figure["value"]), rel=0, abs=LAST_DIGIT.get(figure["value"], 0)), figure


def test_the_projects_carry_no_other_figures():
    carried = sum(
        len(metrics)
        for data_sets in ({"mnist": PAPER}, PIX2PIX.paper, CYCLEGAN.paper, SRGAN.paper)
        for methods in data_sets.values()
        for metrics in methods.values()
    )
    twice = [figure for figure in FIGURES if figure["table"] == "5" and figure["method"] == "mtadam"]
    assert carried == len(FIGURES) - len(twice)


@pytest.mark.parametrize(
    ("table", "count", "figure"),
    [
        ("1", 5, ("mnist", "mtadam", "accuracy", "97.9", "0.07")),
        ("2", 48, ("facades", "mtadam", "L2", "3822", "")),
        ("3", 96, ("maps", "balanced-adam", "FID-B", "46.8", "")),
        ("4", 35, ("bsd100", "hyperband", "SSIM", "0.6554", "")),
        ("5", 48, ("facades", "v", "FID", "156.8", "")),
    ],
)
def test_the_figures_are_those_of_the_paper(table, count, figure):
    rows = [tuple(row.values()) for row in FIGURES if row["table"] == table]
    assert len(rows) == count
    assert (table, *figure) in rows


def options_of(*arguments):
    return compare.parse([str(argument) for argument in arguments])


def note_of_generated_images(project, options, paper):
    """The note on a data set that is not here."""
    return note_on(project, argparse.Namespace(**{**vars(options), "data_dir": None}), paper)


def test_figures_stand_beside_their_methods_at_every_learning_rate():
    project, options = options_of("pix2pix", "--data-dir", "datasets/facades")
    rows = [{"method": name, "L1": "50"} for name in ("mtadam, lr 0.002", "adam, lr 2e-05", "mtadam-every-50", "sgd")]
    found = beside(rows, numbers_for(project, options))
    assert [row["L1 (paper)"] for row in found] == ["46.5", "54.92", "", ""]


def test_the_papers_sgd_stands_beside_its_own_lambdas_alone():
    """A common factor of 100 makes SGD's steps 100 times as large, and hardly changes those of the others."""
    given = ["pix2pix", "--data-dir", "facades", "--method", "sgd", "adam", "--setting"]
    own, ours = (numbers_for(*options_of(*given, name)) for name in ("unbalanced-100", "unbalanced"))
    assert own["sgd"] == {"L1": 120.12, "L2": 18308.0, "NMSE": 1.132, "FID": 339.4}
    assert ours == {method: figures for method, figures in own.items() if method != "sgd"}
    said = "beside --setting unbalanced-100 alone"
    assert said in note_of_generated_images(*options_of(*given, "unbalanced"), ours)
    assert said not in note_of_generated_images(*options_of(*given, "unbalanced-100"), own)
    assert said not in note_of_generated_images(*options_of("pix2pix", "--method", "adam"), ours)
    assert "sgd" in numbers_for(*options_of("cyclegan", "--data-dir", "maps"))


def test_figures_of_one_data_set_or_direction_do_not_stand_beside_another():
    for given in (
        ["pix2pix"],
        ["pix2pix", "--data-dir", "other"],
        ["pix2pix", "--data-dir", "facades", "--direction", "AtoB"],
        ["srgan", "--data-dir", "set14", "--test-dir", "other"],
    ):
        project, options = options_of(*given)
        assert numbers_for(project, options) == {}
        assert note_on(project, options, {}).startswith("The paper's numbers for these images are not known here")
    facades, maps = (numbers_for(*options_of("pix2pix", "--data-dir", name)) for name in ("facades", "maps"))
    assert (facades["mtadam"]["L1"], maps["mtadam"]["L1"]) == (46.5, 33.6)


def test_on_balanced_losses_the_paper_has_adam_alone():
    project, options = options_of("cyclegan", "--data-dir", "maps", "--setting", "balanced-text")
    found = numbers_for(project, options)
    assert set(found) == {"adam", "balanced-adam"}
    assert found["adam"]["L1-A"] == 8.5


def test_the_papers_super_resolution_is_measured_on_the_luma():
    found = numbers_for(*options_of("srgan", "--data-dir", "train", "--test-dir", "Set14"))
    assert found["mtadam"] == {"PSNR-Y": 25.97, "SSIM-Y": 0.7219, "FID": 66.03}


def test_a_distance_of_another_network_has_no_figure():
    found = beside([{"method": "adam", "FD-VGG16": "9", "FID": "8"}], PIX2PIX.paper["facades"])
    assert found == [{"method": "adam", "FD-VGG16": "9", "FID": "8", "FID (paper)": "133.55"}]


def test_what_is_smaller_than_in_the_paper_is_said():
    project, options = options_of("pix2pix", "--image-size", 64, "--limit-train-batches", 9)
    assert departures(project, options) == [
        "image size 64 in place of 256",
        "limit train batches 9 in place of all",
    ]
    said = note_on(project, options, PIX2PIX.paper["facades"])
    assert "These runs differ in: image size 64 in place of 256; limit train batches 9 in place of all." in said
    assert said.endswith("100 to train on, 20 held out, BtoA.")


@pytest.mark.parametrize(
    ("given", "differing"),
    [
        (["pix2pix"], []),
        (["pix2pix", "--lr", "1e-4"], ["lr 0.0001 in place of 0.0002"]),
        (["pix2pix", "--lr", "1e-4", "2e-4"], ["lr 0.0001, 0.0002 in place of 0.0002"]),
        (
            ["pix2pix", "--anchor", "gan", "--beta1", "0.9"],
            ["anchor gan in place of first", "beta1 0.9 in place of 0.5"],
        ),
        (["pix2pix", "--validation", "4"], ["validation 4 in place of 0"]),
        (["pix2pix", "--precision", "bf16-mixed"], ["precision bf16-mixed in place of 32-true"]),
        (
            ["cyclegan", "--constant-lr", "--pool-size", "0"],
            ["pool size 0 in place of 50", "constant lr True in place of False"],
        ),
        (["srgan", "--max-epochs", "250", "--pretrain-epochs", "1250"], []),
        (["srgan"], ["max epochs 100 in place of 250", "pretrain epochs 0 in place of 1250"]),
        (
            ["srgan", "--max-epochs", "250", "--pretrain-epochs", "1250", "--perceptual-weights", "random"],
            ["perceptual weights random in place of torchvision's VGG19"],
        ),
        # What changes no training.
        (
            ["pix2pix", "--data-dir", "facades", "--metrics-every", "10", "--seeds", "1", "2", "--method", "sgd",
             "--output-dir", "x", "--devices", "1", "--parallel", "2", "--max-minutes", "8", "--search-metric", "L1"],
            [],
        ),
    ],
)  # fmt: skip
def test_every_option_that_changes_a_run_is_said_where_it_is_not_the_papers(given, differing):
    project, options = options_of(*given)
    assert departures(project, options) == differing
    said = note_of_generated_images(project, options, {"adam": {}})
    assert (f"These runs differ in: {'; '.join(differing)}." in said) is bool(differing)
    assert ("These runs have the same options." in said) is (not differing)
    assert ("With 800 photographs, 1250 epochs" in said) is (given[0] == "srgan")


def test_the_command_of_mnist_prints_the_papers_accuracies():
    assert IN_THE_PAPER.endswith("sgd 85.4, rmsprop 87.2, adam 88.8, mtadam 97.9, balanced-adam 98.3")

"""What the commands of all projects have in common: the list of them, mistakes in one line, and exit statuses."""

import argparse
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from example_projects import __main__ as listing
from example_projects import compare
from example_projects.common import cost_figure
from example_projects.common.command import run_command
from example_projects.common.saving import NotEndedError
from example_projects.common.values import devices, rate
from example_projects.cyclegan import __main__ as cyclegan
from example_projects.evidence import __main__ as evidence
from example_projects.mnist import __main__ as mnist
from example_projects.pinn import __main__ as pinn
from example_projects.pix2pix import __main__ as pix2pix
from example_projects.srgan import __main__ as srgan
from tests.examples.running import QUIET, output_of

pytestmark = QUIET

ROOT = Path(listing.__file__).parent
COMMANDS = {
    "mnist": mnist, "pinn": pinn, "pix2pix": pix2pix, "cyclegan": cyclegan, "srgan": srgan, "evidence": evidence,
    "compare": compare,
}  # fmt: skip
COMMAND_LINES = [path for path in ROOT.rglob("*.py") if "argparse.ArgumentParser(" in path.read_text()]


# The list


def test_every_project_is_listed_with_a_command_that_is_understood_and_its_time():
    packages = {path.parent.name for path in ROOT.glob("*/__main__.py")}
    assert packages < set(listing.BEGINNINGS) == set(COMMANDS)
    printed = output_of(listing.main)
    for name, (options, minutes, how) in listing.BEGINNINGS.items():
        assert f"{name}: " in printed
        assert how in ("measured", "estimated")
        assert f" {minutes:g} minutes, {how}.\n    python -m example_projects.{name} {options}" in printed
        assert minutes > 0
        if name in ("pix2pix", "cyclegan", "srgan"):
            compare.parse([name, *options.split()])
        else:
            assert COMMANDS[name].parse(options.split())


# Mistakes


def said_by(main, *arguments):
    """The line that a command ends with, and its exit status, as the interpreter would have it."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main([str(argument) for argument in arguments]))
    assert isinstance(ended.value.code, str), "it did not end with a message"
    assert "\n" not in ended.value.code
    assert ended.value.code.startswith("error: ")
    return ended.value.code


@pytest.mark.parametrize("path", COMMAND_LINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_tells_mistakes_in_one_line(path):
    source = path.read_text()
    if "if __name__" in source and path != ROOT / "__main__.py":
        assert source.endswith('if __name__ == "__main__":\n    run_command(main)\n')


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("mnist", ["--data-dir", "none"], "neither in none nor in none/MNIST/raw. Give --data-dir the folder"),
        ("mnist", ["--accelerator", "wheel", "--data-dir", "none"], "accelerator"),
        ("pinn", ["--accelerator", "wheel"], "accelerator"),
        ("pix2pix", ["--data-dir", "none"], "There is no folder none/train. Give --data-dir"),
        ("pix2pix", ["--image-size", "48"], "but is 48. Give another --image-size"),
        ("pix2pix", ["--precision", "3"], "Precision '3' is invalid"),
        ("pix2pix", ["--method", "hyperband", "--search-metric", "FID", "--devices", "1"], "'FID' is not measured"),
        ("pix2pix", ["--feature-extractor", "vgg16", "--weights", "none"], "none"),
        ("cyclegan", ["--data-dir", "none"], "There is no folder none/trainA"),
        ("srgan", ["--data-dir", "none"], "--data-dir is given without --test-dir"),
        ("srgan", ["--perceptual-weights", "none.pth"], "There is no file none.pth"),
        ("srgan", ["--perceptual-weights", "random", "--image-size", "40", "--pretrain-epochs", "1"], "but is 40."),
        ("pix2pix", ["--output-dir", __file__], "test_commands.py is a file, and no folder can be there. Give another"),
        ("pinn", ["--output-dir", __file__ + "/runs"], "test_commands.py is a file, and no folder can be there"),
        ("pix2pix", ["--feature-extractor", "inception", "--weights", "none"], "give it as --weights or in the env"),
        ("compare", ["srgan", "--data-dir", "none", "--test-dir", "none"], "There is no folder none"),
        ("evidence", ["run", "--problems", "burgers", "--data-dir", "none"], "The data of burgers are missing"),
        ("evidence", ["tables", "--runs", "none.csv"], "There is no file none.csv"),
    ],
)
def test_what_a_user_can_mend_is_told_in_one_line(tmp_path, monkeypatch, command, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in said_by(COMMANDS[command].main, *arguments)


def test_a_device_that_is_not_there_comes_with_a_remedy():
    for said in ("No supported gpu backend found!", "X can not run here since the accelerator is not available."):

        def refused(_, said=said):
            raise MisconfigurationException(said)

        assert said_by(refused) == f"error: {said} Give --accelerator cpu."


def test_results_without_runs_are_told_in_one_line(tmp_path):
    (tmp_path / "results.csv").write_text("method,error\n")
    panel = ["--panel", tmp_path / "results.csv", "error", "--output", tmp_path / "figure.png"]
    assert "There is no run in" in said_by(cost_figure.main, *panel)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


@pytest.mark.parametrize(("error", "status"), [(NotEndedError("a run has not ended"), 75), (KeyboardInterrupt(), 130)])
def test_a_command_that_has_not_ended_says_so_by_its_exit_status(error, status, capsys):
    def stopped():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(stopped)
    assert ended.value.code == status
    assert ("The same command goes on" in capsys.readouterr().out) == (status == 75)


@pytest.mark.parametrize("command", ["mnist", "pix2pix", "cyclegan", "srgan"])
@pytest.mark.parametrize("option", [["--devices", "abc"], ["--lr", "-1"], ["--max-minutes", "0"], ["--methods", "x"]])
def test_a_bad_option_is_refused_before_anything_else(command, option, capsys):
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command].main(option)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m example_projects.{command}: error: ")


@pytest.mark.parametrize("command", ["mnist", "pinn", "pix2pix", "cyclegan", "srgan"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seeds", "0", "1", "0"], "argument --seeds: 0 is given more than once"),
        (["--method", "adam", "mtadam", "adam"], "argument --method: adam is given more than once"),
        (["--seeds", "-1"], "argument --seeds: must be from 0 to 4294967295, but is -1"),
        (["--seeds", "4294967296"], "argument --seeds: must be from 0 to 4294967295, but is 4294967296"),
    ],
)
def test_seeds_and_methods_are_given_once_and_can_be_had(command, given, said, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[command].main(given)
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_rate_is_given_once_however_it_is_written(capsys):
    with pytest.raises(SystemExit):
        pix2pix.main(["--lr", "1e-4", "0.0001"])
    assert "argument --lr: 0.0001 is given more than once" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["pix2pix", "cyclegan"])
@pytest.mark.parametrize("text", ["1.5", "1", "-0.1", "nan"])
def test_beta1_is_from_0_to_less_than_1(command, text, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[command].main([f"--beta1={text}"])
    assert f"argument --beta1: must be 0 or more and less than 1, but is {text}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_a_rate_is_more_than_zero_and_finite(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be more than 0, but is {text}"):
        rate(text)


@pytest.mark.parametrize(("text", "right"), [("auto", True), ("2", True), ("0,", True), ("0,1", True), ("-1", True),
                                             ("0", False), ("a", False), ("", False), (",", False)])  # fmt: skip
def test_devices_are_auto_a_number_or_a_list(text, right):
    if right:
        assert devices(text) == text
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="must be 'auto', how many"):
            devices(text)


# Images


def save(folder, name, size=(32, 32)):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(folder / name)


def spoil(folder, name):
    save(folder, name)
    (folder / name).write_bytes((folder / name).read_bytes()[:60])


def bad_images(root):
    """A folder of each kind with two bad files, in training and in testing: their project, options and names."""
    for split in ("train", "test"):
        save(root / "pairs" / split, "good.png", (64, 32))
        spoil(root / "pairs" / split, f"{split}_cut.png")
    for domain in "AB":
        for split in ("train", "test"):
            save(root / "domains" / f"{split}{domain}", "good.png")
    spoil(root / "domains" / "trainB", "b_cut.png")
    spoil(root / "domains" / "testA", "a_cut.png")
    save(root / "photos", "small.png", (20, 20))
    save(root / "bench", "1_HR.png")
    save(root / "bench", "1_LR.png", (9, 8))
    pairs, domains = ["--data-dir", root / "pairs"], ["--data-dir", root / "domains"]
    return [
        ("pix2pix", pairs, ["train_cut.png", "test_cut.png"]),
        ("cyclegan", pairs, ["train_cut.png", "test_cut.png"]),
        ("cyclegan", domains, ["b_cut.png", "a_cut.png"]),
        ("srgan", ["--data-dir", root / "photos", "--test-dir", root / "bench"], ["small.png", "1_HR.png"]),
    ]


@pytest.mark.parametrize("case", range(4))
def test_all_bad_images_of_all_folders_are_named_before_anything_is_trained(tmp_path, case):
    command, options, names = bad_images(tmp_path)[case]
    output = tmp_path / "runs"
    sizes = ["--image-size", 32, "--output-dir", output, "--perceptual-weights", "random"]
    said = said_by(COMMANDS[command].main, *options, *sizes[: None if command == "srgan" else -2])
    assert said.startswith("error: 2 images cannot be used. ")
    assert all(said.count(f"{name} is ") == 1 for name in names)
    assert not output.exists()


@pytest.mark.parametrize("command", ["pix2pix", "srgan"])
def test_of_many_bad_images_the_first_three_are_named_and_how_many_there_are(tmp_path, command):
    for index in range(40):
        save(tmp_path / "train", f"{index:02}.png", (20, 20))
    save(tmp_path / "test", "good.png", (64, 32))
    photographs = ["--data-dir", tmp_path / "train", "--test-dir", tmp_path / "test"]
    said = said_by(COMMANDS[command].main, *(photographs if command == "srgan" else ["--data-dir", tmp_path]))
    assert said.startswith("error: 40 images cannot be used. The first 3 are these. ")
    assert [f"{index:02}.png" in said for index in range(40)] == [True] * 3 + [False] * 37


def test_a_link_that_leads_nowhere_is_named_with_a_remedy(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split, "good.png", (64, 32))
    (tmp_path / "train" / "lost.png").symlink_to(tmp_path / "gone.png")
    said = said_by(pix2pix.main, "--data-dir", tmp_path)
    assert f"lost.png leads to {tmp_path / 'gone.png'}, which is not there. Put the image there, or take" in said

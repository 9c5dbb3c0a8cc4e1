"""Every snippet and command in README and docs runs, from the file it stands in; recipes in ``tests/recipes``."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from example_projects import compare
from example_projects.common import balance_figure, cost_figure, image_command
from example_projects.evidence import __main__ as evidence
from example_projects.mnist import __main__ as mnist
from example_projects.pinn import __main__ as pinn
from tests.benchmarks import importance
from tests.lightning_models import QUIET
from tests.recipes import __main__ as recipes
from tests.recipes.programs import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(set((ROOT / "docs").rglob("*.md")) - set((ROOT / "docs" / "generated").rglob("*.md"))),
    *sorted((ROOT / "example_projects").glob("*/README.md")),
]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(module):
    """The arguments of every documented ``python -m module``."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    calls = [f"{line} ".partition(f"python -m {module} ")[2] for line in lines if f"python -m {module} " in f"{line} "]
    return [shlex.split(call.partition(" && ")[0], comments=True) for call in calls]


SNIPPETS = [page for page in PAGES if blocks(page, "python") and page.parent != RECIPES]


@QUIET
@pytest.mark.filterwarnings("ignore:.*litlogger", "ignore:.*GPU available")
@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    """The snippets of a page build on each other."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippet"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("arguments", commands("example_projects.mnist"), ids=" ".join)
def test_commands_of_the_mnist_project_are_understood(arguments):
    assert mnist.parse(arguments)


@pytest.mark.parametrize("arguments", commands("example_projects.pinn"), ids=" ".join)
def test_commands_of_the_pinn_project_are_understood(arguments):
    assert pinn.parse(arguments)


@pytest.mark.parametrize("arguments", commands("example_projects.evidence"), ids=" ".join)
def test_commands_of_the_evidence_project_are_understood(arguments):
    assert evidence.parse(arguments)


@pytest.mark.parametrize("arguments", commands("tests.benchmarks.importance"), ids=" ".join)
def test_commands_of_the_importance_page_are_understood(arguments):
    assert importance.parse(arguments)


@pytest.mark.parametrize("arguments", commands("tests.recipes"), ids=" ".join)
def test_commands_of_the_recipes_are_understood(arguments):
    assert recipes.parse(arguments)


@pytest.mark.parametrize("arguments", commands("example_projects.common.cost_figure"), ids=" ".join)
def test_commands_that_draw_a_figure_are_understood(arguments):
    assert cost_figure.parse(arguments)


@pytest.mark.parametrize("arguments", commands("example_projects.common.balance_figure"), ids=" ".join)
def test_commands_that_draw_a_balance_are_understood(arguments):
    assert balance_figure.parse(arguments)


IMAGE_COMMANDS = [(project, call) for project in compare.PROJECTS for call in commands(f"example_projects.{project}")]


@pytest.mark.parametrize(("project", "arguments"), IMAGE_COMMANDS, ids=str)
def test_commands_of_the_image_projects_are_understood(project, arguments):
    assert image_command.parser_of(compare.project_of(project)).parse_args(arguments)


@pytest.mark.parametrize("arguments", commands("example_projects.compare"), ids=" ".join)
def test_commands_that_compare_are_understood(arguments):
    assert compare.parse(arguments)


def cli_commands():
    lines = [line for block in blocks(ROOT / "docs" / "cli.md", "bash") for line in block.splitlines()]
    return [line.partition("python train.py ")[2] for line in lines]


@QUIET
@pytest.mark.filterwarnings("ignore:.*litlogger", "ignore:.*GPU available", "ignore:No seed found")
@pytest.mark.filterwarnings("ignore:(?s).*(JSONARGPARSE_DEPRECATION_WARNINGS|deprecated in v4)")
@pytest.mark.parametrize("arguments", cli_commands())
def test_commands_of_the_command_line_page_run(arguments, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("\n".join(blocks(ROOT / "docs" / "cli.md", "python")))
    monkeypatch.chdir(tmp_path)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # the command sets them: they are put back afterwards
        monkeypatch.setenv(variable, "0")
    monkeypatch.setattr("sys.argv", ["train.py", *shlex.split(arguments)])
    runpy.run_path("train.py", run_name="__main__")
    (config,) = tmp_path.rglob("config.yaml")
    assert "MTAdam" in config.read_text() or "torch.optim.Adam" in arguments


def test_there_are_commands_and_snippets():
    assert len(commands("example_projects.mnist")) >= 3
    assert commands("example_projects.pinn")
    assert commands("example_projects.evidence")
    assert commands("example_projects.common.cost_figure")
    assert commands("example_projects.common.balance_figure")
    assert commands("example_projects.compare")
    assert {project for project, _ in IMAGE_COMMANDS} == set(compare.PROJECTS)
    assert len(cli_commands()) == 4
    assert blocks(ROOT / "README.md", "python")


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_on_the_package_index_the_readme_has_no_link_that_leads_nowhere():
    command = [sys.executable, "-m", "hatch_fancy_pypi_readme"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\]\((?!https?:)", shown)
    assert "![" not in shown
    assert "are in the folder `docs`" in shown


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120

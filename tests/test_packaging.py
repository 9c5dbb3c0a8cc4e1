"""What a stranger installs: the wheel, and what importing it drags in."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lightning_mtadam"}
    assert "lightning_mtadam/py.typed" in names
    assert "lightning_mtadam/optim/mtadam.py" in names


def test_the_wheel_imports_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "empty", with_pip=True)
    python = next((tmp_path / "empty").glob("[bS]*/python*"))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    code = "import lightning_mtadam; print(lightning_mtadam.__version__, dir(lightning_mtadam))"
    assert "MTAdam" in run(python, "-c", code, cwd=tmp_path)


@pytest.mark.parametrize(
    "module", ["", ".optim", ".export", ".collect", ".balancers", ".partition", ".metrics", ".pytorch_lightning"]
)
def test_what_needs_no_lightning_does_not_import_it(module):
    code = f"import sys, lightning_mtadam{module}; print(*sys.modules)"
    loaded = run(sys.executable, "-c", code, cwd=ROOT).split()
    assert f"lightning_mtadam{module}" in loaded
    assert not {"lightning", "pytorch_lightning"} & set(loaded)


def test_public_names_are_where_they_are_documented():
    import lightning_mtadam

    assert lightning_mtadam.MTAdam.__name__ == "MTAdam"
    assert lightning_mtadam.MultiTermLightningModule.__name__ == "MultiTermLightningModule"
    assert lightning_mtadam.NonFiniteError.__name__ == "NonFiniteError"
    assert lightning_mtadam.export_weights.__name__ == "export_weights"
    assert lightning_mtadam.partitioned_losses.__name__ == "partitioned_losses"
    with pytest.raises(AttributeError, match="no attribute 'MTAdamW'"):
        lightning_mtadam.MTAdamW  # noqa: B018


def test_the_version_is_the_same_wherever_it_stands():
    import lightning_mtadam

    assert f'version = "{lightning_mtadam.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {lightning_mtadam.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {lightning_mtadam.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_source_distribution_is_small_and_makes_the_same_wheel(wheel, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    (source,) = tmp_path.glob("*.tar.gz")
    assert source.stat().st_size < 2_000_000
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    package = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lightning_mtadam/")}
    assert package < held
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= held


@pytest.mark.slow
def test_a_release_can_be_rehearsed():
    run(ROOT / ".ci" / "release_rehearsal", env={**os.environ, "QUICK": "1", "PATH": PATH})


def test_no_documented_command_needs_an_index_that_has_the_package():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("example_projects/**/*.md")]
    sources = [*ROOT.glob("lightning_mtadam/**/*.py"), *ROOT.glob("example_projects/**/*.py")]
    asks = re.compile(r"pip install [^`\n]*(?<![\w/])[\"']?lightning[_-]mtadam\b")
    assert asks.search("pip install 'lightning_mtadam[cli]'"), "the test can fail"
    assert not [path.name for path in (*pages, *sources) if asks.search(path.read_text())]

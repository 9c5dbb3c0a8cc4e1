"""Examples in docstrings and pages run as at a user's who has Inception's weights: here they are random."""

import pytest

INCEPTION = ("lightning_mtadam.metrics.frechet.FrechetInceptionDistance", "test_snippets_run[metrics.md]")
VGG16 = ("lightning_mtadam.metrics.frechet.FrechetVGG16Distance",)


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory):
    """Random weights in the file that pytorch-fid expects. A distance with them is not FID."""
    from tests.metrics.random_weights import write_inception

    path = write_inception(tmp_path_factory.mktemp("weights") / "random.pth")
    yield path
    path.unlink()  # 96 MB


@pytest.fixture(scope="session")
def random_vgg16(tmp_path_factory):
    """The same for torchvision's VGG16."""
    from tests.metrics.random_weights import write_vgg16

    path = write_vgg16(tmp_path_factory.mktemp("weights") / "vgg16.pth")
    yield path
    path.unlink()  # 29 MB


@pytest.fixture(autouse=True)
def _weights_for_examples(request, monkeypatch):
    if request.node.name in INCEPTION:
        weights = request.getfixturevalue("random_inception")
        monkeypatch.setenv("LIGHTNING_MTADAM_INCEPTION_WEIGHTS", str(weights))
    if request.node.name in VGG16:
        monkeypatch.chdir(request.getfixturevalue("random_vgg16").parent)

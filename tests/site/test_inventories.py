"""Names of other packages: what may be mentioned without a link, and lists that cannot be had."""

from types import SimpleNamespace

import pytest

from docs._ext.inventories import exists, fetch, keep_what_is_there, meanings


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("torch.Tensor", True),
        ("torch.optim.optimizer.Optimizer", True),
        ("collections.abc.Mapping", True),
        ("lightning.pytorch.Trainer", True),
        ("int", True),
        ("torch.Tenser", False),
        ("lightning.pytorch.Trainor", False),
        ("lightning_mtadam.MTAdamW", False),
        ("pytest.fixture", False),
        ("nothing", False),
    ],
)
def test_a_name_may_be_mentioned_if_it_exists(name, there):
    assert exists(name) == there


def test_a_short_name_is_looked_up_where_it_stands():
    assert any(map(exists, meanings("TermOptimizer", "lightning_mtadam", "MTAdam"))), "in a file of the module"
    assert any(map(exists, meanings("set_importance", "lightning_mtadam", "MTAdam"))), "in the class"
    assert not any(map(exists, meanings("TermOptimiser", "lightning_mtadam", "MTAdam")))


def test_a_list_of_names_is_taken_as_it_is(tmp_path):
    (tmp_path / "objects.inv").write_bytes(b"# Sphinx inventory version 2\nmore")
    assert fetch(tmp_path.as_uri(), 1) == b"# Sphinx inventory version 2\nmore"


def test_what_answers_with_something_else_has_no_list(tmp_path):
    (tmp_path / "objects.inv").write_text("<html>Please sign in.</html>")
    assert fetch(tmp_path.as_uri(), 1) is None
    assert fetch((tmp_path / "missing").as_uri(), 1) is None
    assert fetch("nonsense", 1) is None


def test_lists_that_can_be_had_are_kept_and_others_left_out(tmp_path):
    (tmp_path / "objects.inv").write_bytes(b"# Sphinx inventory version 2\n")
    mapping = {"here": (tmp_path.as_uri(), None), "gone": ((tmp_path / "gone").as_uri(), None)}
    config = SimpleNamespace(intersphinx_mapping=mapping, intersphinx_timeout=1)
    keep_what_is_there(SimpleNamespace(doctreedir=tmp_path / "trees"), config)
    assert config.intersphinx_mapping == {"here": (tmp_path.as_uri(), str(tmp_path / "trees" / "here.inv"))}

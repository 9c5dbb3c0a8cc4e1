"""What the reference says of every public name, and that the build notices where it says nothing."""

from dataclasses import dataclass

import pytest
from torch import Tensor

from docs._ext import completeness
from docs._ext.completeness import all_missing, missing
from docs._ext.reference import Public, public_modules, public_names


def test_every_public_name_argument_error_and_shape_is_explained():
    assert not all_missing()


def test_the_build_warns_of_each_finding(monkeypatch):
    warned = []
    monkeypatch.setattr(completeness.LOGGER, "warning", lambda text, type: warned.append(text))
    monkeypatch.setattr(completeness, "all_missing", lambda: ["a", "b"])
    completeness.warn(None)
    assert warned == ["a", "b"], "with -W the first one ends the build"


def test_the_reference_has_all_that_users_import():
    named = {one.full for one in public_names()}
    assert {"lightning_mtadam.MTAdam", "lightning_mtadam.MultiTermLightningModule"} <= named
    assert {"lightning_mtadam.balancers.GradNorm", "lightning_mtadam.callbacks.BalanceWeightMonitor"} <= named
    assert {"lightning_mtadam.metrics.FrechetInceptionDistance", "lightning_mtadam.export.ExportedWeights"} <= named
    assert "lightning_mtadam.collect" not in public_modules()


def test_a_name_that_two_modules_offer_has_one_page():
    assert [one.full for one in public_names() if one.name == "MTAdam"] == ["lightning_mtadam.MTAdam"]


def without_a_docstring(x):
    return x


def explained(rows: Tensor, by: float = 1.0) -> Tensor:
    """Scale.

    Args:
        rows: [B].
        by: a number.

    Returns:
        [B].

    Raises:
        ValueError: by is 0.

    Example:
        ``explained(torch.ones(2))``
    """
    if not by:
        raise ValueError("by is 0.")
    return rows * by


@dataclass
class Pair:
    """Two numbers.

    Attributes:
        one: the first.

    Example:
        ``Pair(1, 2)``
    """

    one: int
    two: int


class Silent:
    """It has a method.

    Example:
        ``Silent()``
    """

    def method(self, x):
        """Do it."""


for thing in (Silent, Silent.method):
    thing.__module__ = "lightning_mtadam.somewhere"


def findings(value):
    return missing(Public("module", "name", value), {value} if isinstance(value, type) else set())


def changed(old, new):
    """The function above with another docstring."""

    def function(rows: Tensor, by: float = 1.0) -> Tensor:
        if not by:
            raise ValueError("by is 0.")
        return rows * by

    function.__doc__ = explained.__doc__.replace(old, new)
    return function


@pytest.mark.parametrize(
    ("value", "finding"),
    [
        (without_a_docstring, "module.name has no docstring."),
        (changed("by: a number.", ""), "module.name says nothing of the parameter 'by': add it to Args."),
        (changed("rows: [B]", "rows: numbers"), "says nothing of the shape of 'rows'"),
        (changed("Raises:\n        ValueError: by is 0.", ""), "says nothing of the errors that it raises"),
        (changed("Example:", "Note:"), "has no section Example"),
        (changed("[B]", "numbers"), "says nothing of the shape of what it returns"),
        (Pair, "says nothing of the parameter 'two'"),
        (Silent, "method() says nothing of the parameter 'x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_explained_is_found(value, finding):
    assert any(finding in found for found in findings(value)), findings(value)


def test_what_is_explained_is_not_found():
    assert not findings(explained)

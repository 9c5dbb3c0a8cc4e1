"""The report: what it says, and in which forms."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from lightning_mtadam.diagnosis.advice import Course, advise
from lightning_mtadam.diagnosis.diagnosis import Diagnosis, reasons
from tests.diagnosis.test_advice import OPPOSED, T, course_of

COSTS = {"MTAdam at every step": 1.9, "MTAdam with balance_every=50": 1.02}


def diagnosis_of(course: Course, costs=COSTS) -> Diagnosis:
    return Diagnosis(course, advise(course), costs, "Adam")


OFF = diagnosis_of(course_of([[1, 1e4]] * T))


def test_the_advice_comes_first_with_the_line_to_write():
    head, todo = OFF.to_markdown().split("\n\n")[:2]
    assert head == "# Diagnosis: reweight"
    assert "constants" in todo
    assert 'FixedWeights({"a": 1, "b": 0.0001})' in OFF.to_markdown()
    assert str(OFF) == OFF.to_markdown()


def test_it_says_why_in_numbers():
    text = " ".join(reasons(OFF))
    assert "the largest gradient is 10,000 times the smallest" in text
    assert "MTAdam at every step 1.90" in text
    conflict = " ".join(reasons(diagnosis_of(course_of([[1, 1]] * T, OPPOSED))))
    assert "'a' and 'b' pull against each other: the median cosine of their gradients is -0.80" in conflict
    satisfied = " ".join(reasons(diagnosis_of(course_of([[1, 1], [1, 0.1], *[[1, 1e-4]] * (T - 2)]), costs={})))
    assert "'b' is soon satisfied" in satisfied
    assert "was not measured" in satisfied
    assert "'b' never has a gradient" in " ".join(reasons(diagnosis_of(course_of([[1, 0, 1]] * T))))


def test_as_data_it_is_json_and_holds_all_that_was_measured():
    found = json.loads(json.dumps(diagnosis_of(course_of([[1, 0, 2]] * T)).to_dict(), allow_nan=False))
    assert found["recommendation"] == "leave"
    assert found["norms"] == [[1, 0, 2]] * T
    assert found["dead"] == ["b"]
    assert found["weights"] == {"a": 1, "b": 1, "c": 1}
    assert set(found) >= {
        "ratio",
        "change",
        "satisfied",
        "conflicts",
        "costs",
        "optimizer",
        "terms",
        "steps",
        "losses",
        "cosines",
    }


def test_its_picture_names_each_term_at_its_line_and_writes_each_cosine():
    norms, cosines = diagnosis_of(course_of([[1, 1.01, 1e4]] * T)).plot().axes
    assert {text.get_text() for text in norms.texts} == {"a", "b", "c"}
    heights = sorted(text.xy[1] for text in norms.texts)
    assert min(high - low for low, high in pairwise(heights)) > 0.05, "labels lie on each other"
    assert len(cosines.texts) == 9


def test_without_matplotlib_the_picture_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib.*to_markdown"):
        OFF.plot()


def test_a_cosine_that_was_never_there_is_left_empty():
    course = course_of([[1, 0]] * T, torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]]).expand(T, 2, 2))
    assert "| b |      |" in diagnosis_of(course).to_markdown()
    assert diagnosis_of(course).plot() is not None

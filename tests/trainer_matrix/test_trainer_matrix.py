"""Every row of the matrix, one test each; the support table is made from the same rows."""

import pytest

from tests.lightning_models import QUIET
from tests.support_table import PAGE, support_table, with_table
from tests.trainer_matrix.table import ROWS, Row


def parameter(row: Row):
    ignored = [f"ignore:{start}" for start in (".*litlogger", *row.ignored)]
    return pytest.param(row, id=row.name, marks=[QUIET, pytest.mark.filterwarnings(*ignored)])


@pytest.mark.parametrize("row", [parameter(row) for row in ROWS])
def test_the_row_is_true(row, tmp_path):
    row(tmp_path)


def test_the_support_table_is_made_of_the_rows():
    text = PAGE.read_text()
    assert with_table(text) == text, "run python -m tests.support_table"
    assert len(support_table().splitlines()) <= 14


def test_a_text_without_markers_is_refused():
    with pytest.raises(ValueError, match="There must be a line '<!-- support table"):
        with_table("# A text\n")


def test_the_names_of_rows_differ_but_not_from_run_to_run():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert not any(" at 0x" in row.name for row in ROWS)

"""The balancers that ``docs/balancers/your_own.md`` writes, from the page, under the laws of the built-in ones."""

import pytest
import torch

from lightning_mtadam import balancers
from tests.balancers import test_in_common as laws
from tests.balancers.cases import Case, balanced_by_hand
from tests.lightning_models import QUIET, make_loader, needs_exact_resume
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "balancers" / "your_own.md"


def balancers_of_the_page():
    """The classes of the page, without the training around them."""
    namespace = {"__name__": "your_own"}
    for block in blocks(PAGE, "python"):
        if "Trainer" not in block:
            exec(compile(block, str(PAGE), "exec"), namespace)
    kinds = [kind for kind in namespace.values() if isinstance(kind, type) and kind.__module__ == "your_own"]
    return {kind.__name__: kind for kind in kinds}


OWN = balancers_of_the_page()
CASES = {name: Case(kind) for name, kind in OWN.items()}
pytestmark = QUIET
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_the_page_has_one_of_each_kind():
    assert {kind.__mro__[1] for kind in OWN.values()} >= {balancers.Balancer, balancers.GradientBalancer}


@every_case
@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}], ids=str)
def test_the_trainer_equals_the_hand_written_loop(case, flags):
    laws.test_the_trainer_equals_the_hand_written_loop(case, flags)


@every_case
def test_accumulated_batches_count_as_one(case):
    laws.test_accumulated_batches_count_as_one(case)


@every_case
def test_two_ranks_equal_one_process(case, tmp_path):
    laws.test_two_ranks_equal_one_process(case, tmp_path)


@needs_exact_resume
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@every_case
def test_resume_continues_bitwise(case, tmp_path):
    laws.test_resume_continues_bitwise(case, tmp_path)


@every_case
def test_a_term_may_be_absent_in_some_steps(case):
    laws.test_a_term_may_be_absent_in_some_steps(case)


@every_case
def test_a_step_that_a_scaler_skips_changes_nothing(case):
    laws.test_a_step_that_a_scaler_skips_changes_nothing(case, set_to_none=True)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@every_case
def test_a_factor_on_a_loss_does_not_count(case, factor):
    """But in the first step, where InverseLoss has no average yet."""
    plain, multiplied = (balanced_by_hand(scaled(case, by), make_loader()).balancer for by in (1, factor))
    ratio = plain.term_weights()["size"] / multiplied.term_weights()["size"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, factor), rtol=0.05, atol=0)


def scaled(case, factor):
    def losses(network, batch):
        found = case.losses(network, batch)
        return {**found, "size": factor * found["size"]}

    return Case(case.make, losses)

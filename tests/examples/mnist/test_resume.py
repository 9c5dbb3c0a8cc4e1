"""A run that was interrupted anywhere goes on as if it had not been."""

import contextlib

import lightning.pytorch as pl
import pytest

from example_projects.common import runs
from example_projects.mnist import __main__ as command
from example_projects.mnist import module as mnist_module
from example_projects.mnist.data import MNISTData
from example_projects.mnist.methods import METHODS
from example_projects.mnist.module import ClassTerms
from tests.examples.mnist.tiny import BATCH, EPOCH, Small, call
from tests.examples.running import (
    QUIET,
    CtrlCAt,
    EndedError,
    InterruptAt,
    assert_same_weights,
    read_results,
    run_quietly,
    stopped_by_ctrl_c,
    untimed,
)
from tests.lightning_models import needs_exact_resume

pytestmark = QUIET


def run_classes(folder, data, *, resume=False, interrupt_at=None, seed=0, method="mtadam", every=3, epochs=2):
    """A run of 8 steps in 2 epochs. Returns its module, its result and what it was trained on."""
    pl.seed_everything(seed, verbose=False)
    module = ClassTerms(METHODS[method], command.class_weights("code", 0), 1e-2)
    watch = InterruptAt(interrupt_at)
    result = None
    with contextlib.suppress(EndedError):
        result = run_quietly(
            folder,
            module,
            MNISTData(data, BATCH, 0),
            "accuracy",
            settings={},
            resume=resume,
            checkpoint_every=every,
            callbacks=[watch],
            max_epochs=epochs,
        )
    assert (result is None) == (interrupt_at is not None)
    return module, result, watch.seen


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_module, "Net", Small)
        return {
            method: run_classes(tmp_path_factory.mktemp(method), tiny, method=method)
            for method in ("mtadam", "rmsprop")
        }


@needs_exact_resume
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("every", "interrupt_at", "method"),
    [
        pytest.param(3, 3, "mtadam", id="just after a checkpoint in the first epoch"),
        pytest.param(1, 2, "mtadam", id="in the first epoch"),
        pytest.param(3, 5, "mtadam", id="in the second epoch, from a checkpoint in the first"),
        pytest.param(4, 5, "mtadam", id="in the second epoch, from a checkpoint between the epochs"),
        pytest.param(5, 7, "mtadam", id="in the second epoch"),
        pytest.param(7, 7, "mtadam", id="before the last batch"),
        pytest.param(3, 2, "mtadam", id="before any checkpoint"),
        pytest.param(5, 7, "rmsprop", id="another optimizer"),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tiny, tmp_path, uninterrupted, every, interrupt_at, method
):
    expected, expected_result, expected_batches = uninterrupted[method]
    _, _, before = run_classes(tmp_path, tiny, every=every, interrupt_at=interrupt_at, method=method)
    assert before == expected_batches[:interrupt_at]
    resumed_from = max([runs._step_of(last) for last in tmp_path.rglob("last.ckpt")], default=0)
    assert interrupt_at // every * every <= resumed_from <= interrupt_at  # Lightning 2.5 saves as an epoch ends, too
    module, result, after = run_classes(tmp_path, tiny, every=every, resume=True, seed=123, method=method)
    if resumed_from:  # else it starts over, and from another seed
        assert after == expected_batches[resumed_from:]
        assert_same_weights(module.state_dict(), expected.state_dict())
        assert {**result, "seconds_per_step": 0} == {**expected_result, "seconds_per_step": 0}
    else:
        assert after == expected_batches


@needs_exact_resume
@pytest.mark.usefixtures("small")
def test_a_run_may_be_interrupted_twice(tiny, tmp_path, uninterrupted):
    expected, _, expected_batches = uninterrupted["mtadam"]
    run_classes(tmp_path, tiny, every=2, interrupt_at=3)
    _, _, middle = run_classes(tmp_path, tiny, every=2, interrupt_at=3, resume=True, seed=7)
    assert middle == expected_batches[2:5]
    module, _, last = run_classes(tmp_path, tiny, every=2, resume=True, seed=8)
    assert last == expected_batches[4:]
    assert_same_weights(module.state_dict(), expected.state_dict())


@needs_exact_resume
@pytest.mark.usefixtures("small")
def test_a_run_interrupted_in_testing_is_not_trained_again(tiny, tmp_path, uninterrupted, monkeypatch):
    expected, expected_result, _ = uninterrupted["mtadam"]

    def interrupted(self, batch, batch_idx):
        raise EndedError

    with monkeypatch.context() as patch:
        patch.setattr(ClassTerms, "test_step", interrupted)
        with pytest.raises(AssertionError):  # of run_classes: there is no result
            run_classes(tmp_path, tiny, every=4)
    module, result, seen = run_classes(tmp_path, tiny, every=4, resume=True, seed=123)
    assert seen == []
    assert result["accuracy"] == expected_result["accuracy"]
    assert_same_weights(module.state_dict(), expected.state_dict())


@pytest.mark.usefixtures("small")
def test_a_run_that_has_ended_is_read_and_not_repeated(tiny, tmp_path):
    _, result, _ = run_classes(tmp_path, tiny, epochs=1)
    file = tmp_path / "result.json"
    before = file.read_bytes(), file.stat().st_mtime_ns
    _, again, seen = run_classes(tmp_path, tiny, epochs=1, resume=True)
    assert again == result
    assert seen == []
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


@needs_exact_resume
def test_the_real_network_resumes_in_the_middle_of_an_epoch_bit_for_bit(tiny, tmp_path):
    expected, _, _ = run_classes(tmp_path / "whole", tiny, epochs=1)
    run_classes(tmp_path / "parts", tiny, epochs=1, every=2, interrupt_at=3)
    module, _, seen = run_classes(tmp_path / "parts", tiny, epochs=1, every=2, resume=True, seed=123)
    assert [step for step, _ in seen] == [2, 3]
    assert_same_weights(module.state_dict(), expected.state_dict())


@needs_exact_resume
@pytest.mark.usefixtures("small")
def test_ctrl_c_loses_nothing(tiny, tmp_path, uninterrupted, monkeypatch, capsys):
    expected, _, expected_batches = uninterrupted["mtadam"]
    with monkeypatch.context() as patch, stopped_by_ctrl_c(capsys, step=6):
        patch.setattr(runs, "TrainingClock", lambda: CtrlCAt(5))
        run_classes(tmp_path, tiny, every=100, interrupt_at=100)
    module, result, after = run_classes(tmp_path, tiny, every=100, resume=True, seed=7)
    assert after == expected_batches[6:]
    assert result["steps"] == 8
    assert_same_weights(module.state_dict(), expected.state_dict())


@pytest.mark.usefixtures("small")
def test_resume_skips_what_has_ended_and_runs_what_has_not(tiny, tmp_path, monkeypatch):
    arguments = ["--method", "mtadam", "adam", "--data-dir", tiny, "--batch-size", BATCH, "--accelerator", "cpu"]
    call(*arguments, "--output-dir", tmp_path / "whole")
    trained = []
    original = ClassTerms.training_step

    def interrupted(self, batch, batch_idx):
        trained.append(self.method)
        if len(trained) == EPOCH + 2:
            raise EndedError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(ClassTerms, "training_step", interrupted)
    with pytest.raises(EndedError):
        call(*arguments, "--output-dir", tmp_path / "parts")
    ended = tmp_path / "parts" / "code-lr0.001" / "mtadam-seed0" / "result.json"
    before = ended.read_bytes(), ended.stat().st_mtime_ns
    assert not (tmp_path / "parts" / "table.md").exists()
    call(*arguments, "--output-dir", tmp_path / "parts", "--resume")
    assert (ended.read_bytes(), ended.stat().st_mtime_ns) == before
    assert METHODS["mtadam"] not in trained[EPOCH + 2 :]
    assert len(trained) == EPOCH + 2 + EPOCH

    whole, parts = read_results(tmp_path / "whole"), read_results(tmp_path / "parts")
    assert [row["method"] for row in parts] == ["mtadam", "adam"]
    assert untimed(parts) == untimed(whole)

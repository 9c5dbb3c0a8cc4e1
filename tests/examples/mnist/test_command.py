"""The command: a row for every method, a run for every seed, and what it says."""

import json
from pathlib import Path

import pytest
import torch

from example_projects.mnist import __main__ as command
from example_projects.mnist import module as mnist_module
from example_projects.mnist.methods import IN_THE_PAPER, METHODS
from example_projects.mnist.module import ClassTerms
from tests.distributed.ranks import results, run_ranks
from tests.examples.mnist.tiny import BATCH, Small, call
from tests.examples.running import QUIET, assert_row_of_each, digest, load_checkpoint, read_results

pytestmark = QUIET


@pytest.fixture(scope="module")
def all_methods(tiny, tmp_path_factory):
    """One call with every method: the folder, what was printed, and what each method started from and saw."""
    output = tmp_path_factory.mktemp("all")
    starts, seen = [], []
    original = ClassTerms.training_step

    def watched(self, batch, batch_idx):
        if batch_idx == 0:
            starts.append((self.weights.tolist(), digest(self.network.parameters())))
            seen.append([])
        seen[-1].append(digest(batch))
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassTerms, "training_step", watched)
        printed = call(
            "--method", *METHODS, "--data-dir", tiny, "--output-dir", output, "--batch-size", BATCH,
            "--limit-train-batches", 2, "--accelerator", "cpu",
        )  # fmt: skip
    return output, printed, dict(zip(METHODS, starts, strict=True)), dict(zip(METHODS, seen, strict=True))


def test_every_method_runs_and_has_a_row(all_methods):
    output, printed, _, _ = all_methods
    for row, shown in assert_row_of_each(METHODS, command.COLUMNS, output, printed):
        assert row["seed"] == "0"
        assert row["steps"] == "2"
        assert 0 <= float(row["worst_class"]) <= float(row["test_accuracy"]) <= 100
        assert float(row["seconds_per_step"]) > 0
        assert float(shown[2]) == pytest.approx(float(row["test_accuracy"]), abs=0.01)


def test_it_says_where_the_data_is_and_how_to_open_tensorboard(all_methods, tiny):
    output, printed, _, _ = all_methods
    assert f"tensorboard --logdir {output}" in printed
    assert str(tiny) in printed
    assert all(f"\n{method}, seed 0" in printed for method in METHODS)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("weights", ["code", "paper", "equal"])
def test_the_papers_accuracies_stand_beside_unbalanced_weights_alone(tiny, tmp_path, weights):
    printed = call("--method", "adam", "--weights", weights, "--data-dir", tiny, "--output-dir", tmp_path,
                   "--accelerator", "cpu")  # fmt: skip
    assert (IN_THE_PAPER in printed) is (weights != "equal")


def test_all_methods_of_a_seed_start_from_the_same_weights(all_methods):
    starts = all_methods[2]
    assert len({start for _, start in starts.values()}) == 1
    for method, (weights, _) in starts.items():
        assert weights == command.class_weights("equal" if METHODS[method].balanced else "code", 0).tolist()


def test_all_methods_of_a_seed_see_the_same_batches_in_the_same_order(all_methods):
    seen = all_methods[3]
    assert {tuple(batches) for batches in seen.values()} == {tuple(seen["mtadam"])}
    assert len(set(seen["mtadam"])) == 2


def test_mtadam_methods_log_their_balance_for_tensorboard(all_methods):
    for method in METHODS:
        folder = all_methods[0] / "code-lr0.001" / f"{method}-seed0"
        assert list(folder.glob("events.out.tfevents.*")), method
        assert (folder / "csv" / "metrics.csv").exists(), method


def test_the_options_are_kept_beside_the_table(all_methods):
    options = json.loads((all_methods[0] / "options.json").read_text())
    assert options["method"] == list(METHODS)
    assert options["batch_size"] == BATCH


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--method", "adamw"])
    assert "mtadam-ii-not-per-layer" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_another_seed_is_another_run_with_its_own_row(tiny, tmp_path):
    call("--method", "adam", "--seeds", 3, 4, "--data-dir", tiny, "--output-dir", tmp_path, "--batch-size", BATCH,
         "--accelerator", "cpu")  # fmt: skip
    assert [(row["method"], row["seed"]) for row in read_results(tmp_path)] == [("adam", "3"), ("adam", "4")]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 3
    assert table[2].startswith("| adam   | 2 ")
    assert table[2].count("+-") == 3


def test_two_ranks_end_as_one_process_with_the_doubled_batch(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_module, "Net", lambda: Small(dropout=0))
    arguments = ["--method", "mtadam", "--data-dir", tiny, "--accelerator", "cpu"]
    call(*arguments, "--batch-size", BATCH, "--output-dir", tmp_path / "one")
    ddp = [*arguments, "--batch-size", BATCH // 2, "--strategy", "ddp", "--devices", 2]
    (tmp_path / "processes").mkdir()
    results(run_ranks(lambda rank: call(*ddp, "--output-dir", tmp_path / "two") and None, tmp_path / "processes"))
    run = Path("code-lr0.001", "mtadam-seed0")
    weights, others = (load_checkpoint(tmp_path / kind / run)["state_dict"] for kind in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-6)
    one, two = (read_results(tmp_path / kind)[0] for kind in ("one", "two"))
    for name in ("steps", "test_accuracy", "worst_class"):
        assert one[name] == two[name]


@pytest.mark.usefixtures("small")
def test_without_resume_a_run_starts_over(tiny, tmp_path):
    arguments = ["--method", "adam", "--data-dir", tiny, "--output-dir", tmp_path, "--accelerator", "cpu"]
    call(*arguments)
    folder = tmp_path / "code-lr0.001" / "adam-seed0"
    (folder / "leftover").touch()
    (folder / "result.json").write_text("{}")
    call(*arguments)
    assert not (folder / "leftover").exists()
    assert json.loads((folder / "result.json").read_text())["steps"] == 1

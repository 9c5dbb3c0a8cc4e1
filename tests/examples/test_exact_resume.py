"""What the runs of all projects resume by: the order of the samples, and the settings that must not change."""

import json

import pytest
import torch

from example_projects.common import runs
from example_projects.common.exact_resume import EpochSampler


class Progress:
    """What of a trainer the sampler looks at."""

    def __init__(self, epoch, done, rank=0, ranks=1):
        self.current_epoch = epoch
        self.global_rank, self.world_size = rank, ranks
        self.fit_loop = self.epoch_loop = self.batch_progress = self.current = self
        self.ready = done


def test_the_order_depends_on_the_seed_and_the_epoch_alone_and_skips_what_is_done():
    def order(seed, epoch, done=0):
        return list(EpochSampler(20, 4, seed, Progress(epoch, done)))

    torch.manual_seed(0)
    first = order(0, 0)
    torch.manual_seed(1)
    assert order(0, 0) == first
    assert sorted(first) == list(range(20))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0, done=3) == first[12:]


@pytest.mark.parametrize("done", [0, 2])
def test_two_ranks_see_together_what_one_process_with_the_doubled_batch_sees(done):
    ranks = [list(EpochSampler(24, 4, 0, Progress(1, done, rank, 2))) for rank in range(2)]
    one = list(EpochSampler(24, 8, 0, Progress(1, done)))
    for start in range(0, 4 * (3 - done), 4):
        together = [index for rank in ranks for index in rank[start : start + 4]]
        assert sorted(together) == sorted(one[2 * start : 2 * start + 8])


def test_a_run_made_with_other_settings_is_not_resumed(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"max_epochs": 1, "batch_size": 64}))
    with pytest.raises(ValueError, match=r"max_epochs was 1 and is 3\. Give the options it was made with"):
        runs.check_settings(tmp_path / "settings.json", {"max_epochs": 3, "batch_size": 64})
    runs.check_settings(tmp_path / "settings.json", {"max_epochs": 1, "batch_size": 64})
    runs.check_settings(tmp_path / "missing.json", {"max_epochs": 3})


@pytest.mark.parametrize("kept", ["result.json", "checkpoints/last.ckpt"])
def test_settings_count_only_where_there_is_something_to_resume(tmp_path, kept):
    (tmp_path / "settings.json").write_text(json.dumps({"max_epochs": 1}))
    runs.check_stored(tmp_path, {"max_epochs": 3})
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).touch()
    with pytest.raises(ValueError, match=r"max_epochs was 1 and is 3\..*or remove that folder to start over"):
        runs.check_stored(tmp_path, {"max_epochs": 3})

"""Each recipe's program runs from its page, prints what the page shows, and does what the page says of it."""

import importlib.util
import re

import pytest
import torch

from tests.lightning_models import QUIET
from tests.recipes.programs import NAMES, RECIPES, block, page, run

pytestmark = [QUIET, pytest.mark.filterwarnings("ignore:.*GPU available", "ignore:.*litlogger", "ignore:.*litmodels")]


def shape_of(text):
    """Its lines, with every number replaced by a sign, so that other digits are the same."""
    numberless = re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text)
    return [re.sub(r"\s+", " ", line).strip() for line in numberless.strip().splitlines()]


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Runs a recipe, in an empty folder, and gives its global names."""
    monkeypatch.chdir(tmp_path)

    def follow(name):
        found, printed = run(name)
        assert shape_of(printed) == shape_of(block(name, "text")), "the page shows another output"
        return found

    return follow


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_one_short_program_and_what_to_expect_of_it(name):
    text = page(name)
    assert len(block(name, "python").splitlines()) <= 80
    assert f"python -m tests.recipes {name}\n" in block(name, "bash")
    for heading in ("What to expect", "For your own case", "Pitfalls"):
        assert f"\n## {heading}\n" in text


def test_the_index_names_every_recipe_once():
    index = (RECIPES / "index.md").read_text()
    assert sorted(re.findall(r"\]\((\w+)\.md\)", index)) == NAMES


def test_other_digits_are_the_same_output_and_other_words_are_not():
    assert shape_of("error 0.12\nKL -3e-05 ") == shape_of("error   7\nKL 1.0")
    assert shape_of("error 0.12") != shape_of("errors 0.12")


def test_the_code_of_the_vae_is_alive(follow):
    results = follow("vae")["results"]
    alive = results.pop("importance 0.1, warm-up")
    for dead in results.values():
        assert dead["kl"] < 1
        assert dead["units"] <= 1
        assert dead["reconstruction"] > 2 * alive["reconstruction"]
    assert alive["kl"] > 10
    assert alive["units"] == 16
    assert alive["bound"] < min(dead["bound"] for dead in results.values()) - 30


def test_the_weight_of_the_vqgan_follows_its_discriminator(follow):
    found = follow("vqgan")
    history, start = found["history"], found["START"]
    before, last = history[start - 1], history[-1]
    assert all(epoch["weight"] == pytest.approx(0.4) for epoch in history[:start])
    assert all(0 < epoch["weight"] < 0.4 for epoch in history[start:])
    assert last["sharpness"] > before["sharpness"] + 0.05
    assert last["error"] < before["error"]
    assert last["codes"] > 16


def test_the_gan_sharpens_what_the_pixel_loss_blurs(follow):
    found = follow("gan")
    before, last = found["history"][found["START"] - 1], found["history"][-1]
    assert last["sharpness"] > before["sharpness"] + 0.05
    assert last["error"] < 1.1 * before["error"]
    scales = found["trainer"].optimizers[0].scales()["global"]
    assert scales[0] == 1
    assert scales[1] > 0


def test_lbfgs_goes_on_where_mtadam_ends(follow):
    errors = follow("pinn")["errors"]
    assert errors["MTAdam"] < 0.2
    assert errors["then LBFGS, exported weights"] < 1e-2
    assert errors["then LBFGS, exported weights"] < errors["MTAdam"] / 10


def test_no_task_drowns_where_labels_are_missing(follow):
    results = follow("multi_task")["results"]
    balanced, summed = results["MTAdam"], results["Adam on the sum"]
    assert balanced["species (accuracy)"] > summed["species (accuracy)"] + 0.2
    assert balanced["toxic (AUROC)"] > 0.9
    assert balanced["count (R2)"] > 0.5


def test_every_mode_of_the_combined_loader_gives_its_batches(follow):
    results = follow("several_datasets")["results"]
    whole = {"photo": 200, "scan": 100, "sketch": 25}
    assert results["min_size"]["batches"] == dict.fromkeys(whole, 25)
    assert results["max_size"]["batches"] == whole
    assert results["max_size_cycle"]["batches"] == dict.fromkeys(whole, 200)
    assert results["sequential"]["batches"] == whole
    assert [found["steps"] for found in results.values()] == [25, 200, 200, 325]
    assert all(right > 0.75 for found in results.values() for right in found["right"].values())


def test_the_detector_finds_most_objects(follow):
    found = follow("detection")
    assert set(found["scales"]) == {"classification", "bbox_regression", "bbox_ctrness"}
    assert all(scale > 0 for scale in found["scales"].values())
    assert found["found"]["recall"] > 0.5
    assert found["found"]["precision"] > 0.3


def test_the_lazy_penalty_was_measured_and_acts(follow):
    found = follow("stylegan")
    results, discriminator = found["results"], found["trainer"].optimizers[1]
    assert results["without R1"]["scale"] == 0
    assert results["R1 every 16 steps"]["scale"] > 0
    assert torch.isfinite(discriminator.balance_weights()["global"]).all()
    assert results["R1 every 16 steps"]["r1"] < results["without R1"]["r1"] / 2
    assert results["R1 every 16 steps"]["modes"] >= 7


def test_the_teacher_teaches_and_stays_as_it_was(follow):
    found = follow("distillation")
    results = found["results"]
    assert results["student, distilled"] > results["student, labels alone"] + 0.05
    assert results["student, distilled"] < results["teacher, all labels"] + 0.03
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in found["teacher"].parameters())


def test_the_unit_of_the_energy_does_not_matter_to_mtadam(follow):
    results = follow("forces")["results"]
    balanced, summed = results["MTAdam"], results["Adam on the sum"]
    assert balanced["forces"] < 200
    assert balanced["forces"] < 0.7 * summed["forces"]
    assert balanced["energy"] < 30


def test_unfreezing_adds_a_group_and_helps(follow):
    found = follow("finetuning")
    history, at = found["history"], found["UNFREEZE_AT"]
    assert [epoch["groups"] for epoch in history] == [1] * at + [2] * (len(history) - at)
    assert history[-1]["right"] > history[at - 1]["right"] + 0.15
    assert history[-1]["ink"] < history[at - 1]["ink"]


def test_a_mixin_balances_a_module_that_is_not_changed(follow):
    found = follow("mixin")
    results = found["results"]
    assert results["balanced"]["error"] < 0.7 * results["theirs"]["error"]
    assert results["balanced"]["size"] > results["theirs"]["size"]
    loaded = found["Balanced"].load_from_checkpoint("balanced.ckpt")
    assert dict(loaded.hparams) == {"code": 4, "sparsity": 100.0, "lr": 1e-3}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is there from torch 2.9 on")
def test_a_balancer_before_muon_keeps_the_small_term(follow):
    results = follow("muon")["results"]
    assert results["balanced"]["label"] < 0.5 * results["plain sum"]["label"]
    assert results["balanced"]["rebuild"] < 1000


def test_with_fabric_it_learns_and_resumes_bit_for_bit(follow):
    found = follow("fabric")
    assert found["right"] > 0.8
    assert found["same"]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate, of the extra recipes")
@pytest.mark.filterwarnings("ignore::UserWarning:accelerate", "ignore::FutureWarning:accelerate")
def test_with_accelerate_it_learns_and_loads_its_state(follow):
    found = follow("accelerate")
    assert found["found"][-1] > 0.8
    assert found["same"]

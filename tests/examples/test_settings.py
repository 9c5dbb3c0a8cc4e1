"""Where the paper's text, its authors' code and the originals differ, both can be chosen; and the paper's ablations."""

from inspect import signature

import pytest
import torch
from torch import nn

from example_projects.common import image_command
from example_projects.common.methods import IMAGE_METHODS, ablations
from example_projects.cyclegan.__main__ import PROJECT as CYCLEGAN
from example_projects.mnist import __main__ as mnist
from example_projects.mnist.methods import METHODS as MNIST_METHODS
from example_projects.mnist.module import ClassTerms, class_losses
from example_projects.pix2pix.__main__ import PROJECT as PIX2PIX
from lightning_mtadam import MTAdam


def test_ablations_change_one_thing_each_in_the_papers_algorithm():
    """Table 5 by the lines of Algorithm 1: 6-8 left out, 8 for all layers at once, 8 by 1 / n_i, two other line 14s."""
    defaults = {name: parameter.default for name, parameter in signature(MTAdam).parameters.items()}
    changed = {
        name.split("-")[1]: {key: value for key, value in method.options.items() if value != defaults[key]}
        for name, method in ablations().items()
    }
    assert changed == {
        "i": {"anchor": None},
        "ii": {"layers": "global"},
        "iii": {"anchor": "unit"},
        "iv": {"denominator": "own"},
        "v": {"denominator": "mean"},
    }


def test_another_anchor_goes_to_the_methods_that_have_the_first_term_for_one():
    found = {name: method.anchored("gan").options.get("anchor") for name, method in IMAGE_METHODS.items()}
    assert {name for name, anchor in found.items() if anchor == "gan"} == {
        name for name in IMAGE_METHODS if name.startswith("mtadam") and "-i-" not in name and "-iii-" not in name
    }
    parse = image_command.parser_of(PIX2PIX).parse_args
    jobs = list(image_command.jobs_of(PIX2PIX, parse(["--anchor", "gan", "--method", "mtadam", "adam"])))
    assert [job.method.options for job in jobs] == [{"anchor": "gan"}, {}]


@pytest.mark.parametrize(
    ("setting", "prescribed"),
    [
        ("unbalanced", "balanced"),
        ("balanced", "balanced"),
        ("unbalanced-text", "balanced-text"),
        ("unbalanced-cycle", "balanced"),
    ],
)
def test_balanced_adam_has_the_weights_that_its_setting_prescribes(setting, prescribed):
    options = image_command.parser_of(CYCLEGAN).parse_args(["--setting", setting, "--method", "adam", "balanced-adam"])
    jobs = list(image_command.jobs_of(CYCLEGAN, options))
    assert [job.lambdas for job in jobs] == [CYCLEGAN.lambdas[setting], CYCLEGAN.lambdas[prescribed]]


def test_an_unbalanced_cycle_changes_nothing_but_the_cycles():
    unbalanced, balanced = CYCLEGAN.lambdas["unbalanced-cycle"], CYCLEGAN.lambdas["balanced"]
    changed = {term: factor for term, factor in unbalanced.items() if factor != balanced[term]}
    assert changed == {"cycle_A": 1000.0, "cycle_B": 1000.0}


def test_mnist_has_both_readings_of_the_norms_before_the_first_step():
    code, paper = (MNIST_METHODS[name] for name in ("mtadam-first-anchor", "mtadam-norms-from-one"))
    assert code.optimizer is paper.optimizer is MTAdam
    assert (code.options, paper.options) == ({}, {"norm_init": "one"})


def test_pix2pix_with_hundred_to_hundred_has_the_balanced_weights_of_hundred_to_one():
    options = image_command.parser_of(PIX2PIX).parse_args(["--setting", "unbalanced-100", "--method", "balanced-adam"])
    (job,) = image_command.jobs_of(PIX2PIX, options)
    assert job.lambdas == {"l1": 100.0, "gan": 1.0}


def test_beta1_is_that_of_the_generator_alone():
    for project in (PIX2PIX, CYCLEGAN):
        options = image_command.parser_of(project).parse_args(["--beta1", "0.9", "--width", "2", "--image-size", "32"])
        module = project.make_module(options, IMAGE_METHODS["mtadam"], project.lambdas["unbalanced"], 1e-3)
        generator, discriminator = module.configure_optimizers()[0]
        assert generator.param_groups[0]["betas"] == (0.9, 0.999, 0.9)
        assert discriminator.param_groups[0]["betas"] == (0.5, 0.999)


@pytest.mark.parametrize("whole_channels", [False, True])
def test_mnist_drops_pixels_or_whole_channels(whole_channels):
    network = ClassTerms(MNIST_METHODS["adam"], torch.ones(10), 1e-3, whole_channels=whole_channels).network
    kinds = [type(layer) for layer in (network.dropout1, network.dropout2)]
    assert kinds == [nn.Dropout2d if whole_channels else nn.Dropout, nn.Dropout]
    assert network.dropout1.p == 0.25
    assert mnist.parse(["--dropout2d"] if whole_channels else []).dropout2d is whole_channels


def test_ten_passes_over_the_rows_of_a_class_have_the_losses_and_gradients_of_one_over_all():
    module = ClassTerms(MNIST_METHODS["mtadam"], torch.linspace(1, 1000, 10), 1e-3).double().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(20, 1, 28, 28, dtype=torch.float64, generator=generator)
    target = torch.arange(20) % 9  # the last class has no rows
    found = module.training_step((images, target), 0)
    expected = class_losses(module.network(images), target, module.weights)
    assert "class_9" not in found
    assert expected.pop("class_9") == 0
    parameters = list(module.network.parameters())
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-12, atol=0)
        gradients, others = (torch.autograd.grad(one, parameters, retain_graph=True) for one in (found[name], loss))
        torch.testing.assert_close(gradients, others, rtol=1e-9, atol=1e-12)

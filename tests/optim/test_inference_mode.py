"""What is read, made or loaded in inference mode is used by the next step as if it were not."""

import copy

import pytest
import torch

from lightning_mtadam import MTAdam
from tests.lightning_models import assert_same, assert_same_state, make_loader, make_network, three_losses
from tests.loops import take_step

MODES = [
    {},
    {"terms": ("fit", "size", "decay")},
    {"balance_every": 3},
    {"low_memory": True},
    {"denominator": "own", "norm_init": "unbiased"},
    {"layers": "module"},
]
CALLS = {
    "balance_weights": MTAdam.balance_weights,
    "gradient_norms": MTAdam.gradient_norms,
    "scales": MTAdam.scales,
    "average_weights": MTAdam.average_weights,
    "layer_sizes": MTAdam.layer_sizes,
    "state_dict": MTAdam.state_dict,
    "synchronize": MTAdam.synchronize,
    "zero_grad": MTAdam.zero_grad,
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "another group": lambda optimizer: optimizer.add_param_group(
        {"params": [("late", torch.nn.Parameter(torch.ones(2)))]}
    ),
    "all": lambda optimizer: [call(optimizer) for name, call in CALLS.items() if name not in ("all", "another group")],
}


def betas_change(optimizer):
    """What the tables hold is then made anew."""
    optimizer.param_groups[0]["betas"] = (0.8, 0.98, 0.7)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("change", [None, betas_change])
def test_a_call_in_inference_mode_and_then_a_step(mode, call, change):
    trained = []
    for inference in (True, False):
        network = make_network()
        optimizer = MTAdam(network.named_parameters(), lr=1e-2, **mode)
        for index, batch in enumerate(make_loader()):
            if index in (1, 4):
                if change is not None:
                    change(optimizer)
                if call is not CALLS["another group"] or index == 4:
                    with torch.inference_mode(inference), torch.no_grad():
                        network(batch[0])
                        call(optimizer)
            take_step(optimizer, three_losses(network, batch))
        trained.append((network, optimizer))
    assert_same(trained[0][0], trained[1][0])
    assert_same_state(trained[0][1], trained[1][1])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_optimizer_that_is_made_there_trains(mode):
    networks = []
    for inference in (True, False):
        network = make_network()
        with torch.inference_mode(inference):
            optimizer = MTAdam(network.named_parameters(), lr=1e-2, **mode)
        for batch in make_loader():
            take_step(optimizer, three_losses(network, batch))
        networks.append(network)
    assert_same(*networks)


def test_a_checkpoint_that_is_made_there_resumes_bit_for_bit():
    network = make_network()
    optimizer = MTAdam(network.named_parameters(), lr=1e-2)
    batches = list(make_loader())
    for batch in batches[:3]:
        take_step(optimizer, three_losses(network, batch))
    resumed = make_network()
    resumed.load_state_dict(network.state_dict())
    again = MTAdam(resumed.named_parameters(), lr=1e-2)
    with torch.inference_mode():
        saved = optimizer.state_dict()
    again.load_state_dict(saved)
    for batch in batches[3:]:
        for one, other in ((network, optimizer), (resumed, again)):
            take_step(other, three_losses(one, batch))
    assert_same(resumed, network)
    assert_same_state(again, optimizer)

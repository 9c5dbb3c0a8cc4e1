"""What the page on Muon says can be combined with it, and what is refused."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_mtadam import MTAdam
from lightning_mtadam.balancers import FixedWeights, GradNorm, MetaBalance, SharedLayerBalancer, UncertaintyWeighting
from tests.lightning_models import QUIET, fit
from tests.recipes.programs import block

pytestmark = [
    QUIET,
    pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is there from torch 2.9 on"),
]
BALANCERS = {
    "shared layer": lambda: SharedLayerBalancer("trunk.3"),
    "GradNorm": lambda: GradNorm("trunk.3"),
    "fixed weights": lambda: FixedWeights({"label": 1.0, "rebuild": 1e-4}),
    "uncertainty": UncertaintyWeighting,
    "MetaBalance": MetaBalance,
}


@pytest.fixture(scope="module")
def names():
    """The classes of the page's program, without its runs."""
    found = {}
    exec(block("muon", "python").partition("METHODS =")[0], found)
    return found


def train(module):
    data = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    before = {name: one.detach().clone() for name, one in module.named_parameters()}
    fit(module, DataLoader(data, batch_size=20), max_epochs=1)
    return {name for name, one in module.named_parameters() if name in before and not torch.equal(one, before[name])}


@pytest.mark.parametrize("make_balancer", BALANCERS.values(), ids=BALANCERS)
def test_a_balancer_goes_before_muon_and_adamw(names, make_balancer):
    module = names["TwoHeads"](make_balancer())
    assert train(module) >= {name for name, _ in names["TwoHeads"]().named_parameters()}


def test_muon_may_take_its_part_of_mtadams_balanced_gradient(names):
    class Inside(names["TwoHeads"]):
        def configure_optimizers(self):
            self.hidden = [one for one in self.trunk.parameters() if one.ndim == 2]
            self.muon = torch.optim.Muon(self.hidden, lr=1e-3)
            return MTAdam(self.named_parameters(), balance_every=50)

        def on_before_optimizer_step(self, optimizer):
            self.muon.step()
            for matrix in self.hidden:
                matrix.grad = None
            self.after_muon = [one.detach().clone() for one in self.hidden]

        def on_train_batch_end(self, *args):
            assert all(map(torch.equal, self.hidden, self.after_muon)), "MTAdam has moved them as well"

    module = Inside()
    assert train(module) == {name for name, _ in module.named_parameters()}


def test_mtadam_beside_muon_is_refused(names):
    class Apart(names["TwoHeads"]):
        def configure_optimizers(self):
            hidden = [one for one in self.trunk.parameters() if one.ndim == 2]
            others = [one for one in self.parameters() if all(one is not matrix for matrix in hidden)]
            return names["Together"](torch.optim.Muon(hidden), MTAdam(others))

    with pytest.raises(MisconfigurationException, match="Together holds an MTAdam"):
        train(Apart())

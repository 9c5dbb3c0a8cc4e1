"""Ways to balance losses with any torch optimizer."""

from lightning_mtadam.balancers.balancer import Balancer
from lightning_mtadam.balancers.fixed_weights import FixedWeights
from lightning_mtadam.balancers.gradnorm import GradNorm
from lightning_mtadam.balancers.meta_balance import MetaBalance
from lightning_mtadam.balancers.output_balancer import OutputBalancer
from lightning_mtadam.balancers.torchjd_balancer import TorchJDBalancer
from lightning_mtadam.balancers.uncertainty import UncertaintyWeighting

__all__ = [
    "Balancer",
    "FixedWeights",
    "GradNorm",
    "MetaBalance",
    "OutputBalancer",
    "TorchJDBalancer",
    "UncertaintyWeighting",
]

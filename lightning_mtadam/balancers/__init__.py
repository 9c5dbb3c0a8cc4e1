"""Ways to balance losses with any torch optimizer, and what a balancer of your own is made of.

A balancer of your own is a subclass of :class:`Balancer`, which gets a :class:`Batch`; or of :class:`GradientBalancer`,
which gets the :class:`StepGradients`. ``docs/balancers/your_own.md`` writes one of each.
"""

from lightning_mtadam.balancers.balancer import Balancer
from lightning_mtadam.balancers.batch import Batch
from lightning_mtadam.balancers.fixed_weights import FixedWeights
from lightning_mtadam.balancers.gradient_balancer import GradientBalancer, StepGradients
from lightning_mtadam.balancers.gradnorm import GradNorm
from lightning_mtadam.balancers.meta_balance import MetaBalance
from lightning_mtadam.balancers.output_balancer import OutputBalancer
from lightning_mtadam.balancers.scalarizer_balancer import ScalarizerBalancer
from lightning_mtadam.balancers.shared_layer_balancer import SharedLayerBalancer
from lightning_mtadam.balancers.torchjd_balancer import TorchJDBalancer
from lightning_mtadam.balancers.uncertainty import UncertaintyWeighting

__all__ = [
    "Balancer",
    "Batch",
    "FixedWeights",
    "GradNorm",
    "GradientBalancer",
    "MetaBalance",
    "OutputBalancer",
    "ScalarizerBalancer",
    "SharedLayerBalancer",
    "StepGradients",
    "TorchJDBalancer",
    "UncertaintyWeighting",
]

"""The methods that are compared: optimizers by name."""

from __future__ import annotations

from example_projects.common.methods import NORMS_FROM_ONE, RECOMMENDED, RIVALS, Method, ablations
from example_projects.common.paper import numbers
from lightning_mtadam import MTAdam

# Ten classes are equals, of which any may be satisfied first, so the anchor is their geometric mean.
EQUALS = {"anchor": "mean"}

# The paper's Table 1, by its methods and metrics: percent of full MNIST's test images, the means of 100 runs.
PAPER = numbers((1,), ("mnist",))["mnist"]
IN_THE_PAPER = (
    "The test accuracy in the paper, with all of MNIST and the first class as MTAdam's anchor (mtadam-first-anchor): "
    + ", ".join(f"{method} {found['accuracy']:g}" for method, found in PAPER.items())
)

METHODS = {
    "mtadam": Method(MTAdam, options=EQUALS),
    "mtadam-first-anchor": Method(MTAdam),
    "mtadam-norms-from-one": NORMS_FROM_ONE,
    **{f"mtadam-every-{k}": Method(MTAdam, options={**EQUALS, "balance_every": k}) for k in (5, 20, 50, 200)},
    "recommended": RECOMMENDED,  # anchored at the first class
    **RIVALS,
    **ablations(anchor="mean"),
}

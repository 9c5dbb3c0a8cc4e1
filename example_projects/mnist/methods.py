"""The methods that are compared: optimizers by name."""

from __future__ import annotations

from example_projects.common.methods import RECOMMENDED, RIVALS, Method, ablations
from lightning_mtadam import MTAdam

# Ten classes are equals, of which any may be satisfied first, so the anchor is their geometric mean.
EQUALS = {"anchor": "mean"}

METHODS = {
    "mtadam": Method(MTAdam, options=EQUALS),
    "mtadam-first-anchor": Method(MTAdam),
    **{f"mtadam-every-{k}": Method(MTAdam, options={**EQUALS, "balance_every": k}) for k in (5, 20, 50, 200)},
    "recommended": RECOMMENDED,  # anchored at the first class
    **RIVALS,
    **ablations(anchor="mean"),
}

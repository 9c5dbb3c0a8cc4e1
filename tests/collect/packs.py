"""Random networks, and limits small enough that their parameters meet them."""

from unittest import mock

import torch
from hypothesis import strategies as st

from lightning_mtadam import layout

LIMITS = {"PACKED": 6, "PACK": 15}

small_packs = mock.patch.multiple(layout, **LIMITS)


@st.composite
def networks(draw):
    """Parameters of two dtypes, whether each is trained, and keys (groups, or none)."""
    count = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    dtypes = draw(st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=count, max_size=count))
    keys = draw(st.lists(st.sampled_from([None, "a", "b"]), min_size=count, max_size=count))
    trained = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    parameters = [torch.arange(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    return parameters, trained, keys

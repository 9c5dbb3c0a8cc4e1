"""Two workers share two cores, so each test process uses one thread. Ctrl-C works where a shell turned it off, too.

Hypothesis draws the same examples in every run: few, or with ``--hypothesis-profile=thorough`` many.
"""

import signal

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("quick", derandomize=True, deadline=None, max_examples=20)
settings.register_profile(
    "thorough", settings.get_profile("quick"), max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quick")

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for what a script starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

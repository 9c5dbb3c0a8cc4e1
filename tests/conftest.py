"""Two workers share two cores, so each test process uses one thread. Ctrl-C works where a shell turned it off, too."""

import signal

import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for what a script starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

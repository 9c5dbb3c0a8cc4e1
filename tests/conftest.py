"""Two workers share two cores, so each test process uses one thread."""

import torch

torch.set_num_threads(1)

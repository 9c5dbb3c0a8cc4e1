"""Several processes that train together: who they are, what they agree on, how gradients are averaged and sharded."""

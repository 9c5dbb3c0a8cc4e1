"""Problems of several losses, as tensors and functions: for experiments that train many networks."""

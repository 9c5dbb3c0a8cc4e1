"""The toy of the GradNorm paper: regression tasks whose scales differ."""

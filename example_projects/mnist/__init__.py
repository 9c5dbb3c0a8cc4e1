"""Ten class losses with weights far apart: MTAdam beside Adam on MNIST."""

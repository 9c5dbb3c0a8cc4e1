"""CycleGAN: translate images between two domains without pairs, on six losses."""

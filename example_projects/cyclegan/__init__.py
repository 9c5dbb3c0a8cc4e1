"""CycleGAN: images are translated between two domains without pairs, on six losses."""

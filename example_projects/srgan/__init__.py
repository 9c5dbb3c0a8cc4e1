"""Photographs four times larger: three losses of a GAN, balanced by MTAdam."""

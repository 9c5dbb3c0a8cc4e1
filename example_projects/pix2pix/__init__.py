"""Image-to-image translation from pairs: a pixel and an adversarial loss, of different magnitude."""

"""A physics-informed network: one equation, two losses of different magnitude."""

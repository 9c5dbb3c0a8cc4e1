"""What users do to ``p.grad`` between ``backward`` and ``step`` counts, or is refused."""

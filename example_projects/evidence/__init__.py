"""The evidence: every method on the same problems, with the same processor seconds for its search."""

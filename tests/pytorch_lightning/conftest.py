"""What is collected here."""

collect_ignore = ["imports.py"]  # importing it, as for doctests, would change what all other tests import

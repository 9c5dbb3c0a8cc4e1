"""Small projects on lightning_mtadam, each run as ``python -m example_projects.<name>``."""

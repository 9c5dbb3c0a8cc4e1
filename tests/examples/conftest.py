"""What holds for the tests of all example projects."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _quiet_again():
    """The command lowers the level of Lightning's messages: put it back."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)

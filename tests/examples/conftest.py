"""What holds for the tests of all example projects."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _quiet_again():
    """The command lowers the level of Lightning's messages: put it back."""
    loggers = [logging.getLogger(package) for package in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)

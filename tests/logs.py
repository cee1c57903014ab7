"""Messages of the package, which its library root keeps from pytest."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from transformers.utils import logging as transformers_logging


@contextmanager
def messages_of(name: str, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Collects the messages of a module, from level info on."""
    logger = transformers_logging.get_logger(name)
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger=logger.name)
    try:
        yield caplog
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.NOTSET)

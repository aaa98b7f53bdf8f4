"""Fixtures shared by the tests of serving."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kafka_broker import Broker
from shop import Shop, make_shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Shop:
    """A log with every kind of column that a schema can have, and a model for it."""
    return make_shop(tmp_path_factory.mktemp("shop") / "log")


@pytest.fixture(scope="session")
def broker(tmp_path_factory) -> Iterator[Broker]:
    """A broker for these tests only."""
    started = Broker(tmp_path_factory.mktemp("broker"))
    yield started
    started.close()

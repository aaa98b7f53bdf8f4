"""What the tests of serving share."""

from __future__ import annotations

import pytest
from shop import Shop, make_shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> Shop:
    """A log of everything that a schema can hold, and a model of it."""
    return make_shop(tmp_path_factory.mktemp("shop") / "log")

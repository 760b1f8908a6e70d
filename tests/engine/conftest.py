"""Every test here acts in a scheduler process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def context(scheduler_context: None) -> None:
    """For all of them."""

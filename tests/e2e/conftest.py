"""Real servers with the embedded models, each shared by the tests of several files: a start takes as long as many searches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.e2e.serving import KEY, ONE_TRAJECTORY_TOKENS, Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log.txt", ["--search", "ets"]) as running:
        yield running


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What the first one is, with pages of searches and metrics."""
    with serving(tmp_path_factory.mktemp("traced") / "log.txt", ["--search-trace", "--enable-metrics"]) as running:
        yield running


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One search at a time and none that waits, none wider than 64; and a PRM's pool that holds one trajectory."""
    flags = ["--search-max-running", "1", "--search-max-waiting", "0", "--search-max-width", "64"]
    flags += ["--search", "ets", "--prm-max-total-tokens", str(ONE_TRAJECTORY_TOKENS)]
    with serving(tmp_path_factory.mktemp("strict") / "log.txt", flags) as running:
        yield running


@pytest.fixture(scope="session")
def overlapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The overlap schedule, pages of searches and a key."""
    flags = ["--search-trace", "--api-key", KEY]
    with serving(tmp_path_factory.mktemp("overlapped") / "log.txt", flags, overlaps=True) as running:
        yield replace(running, api_key=KEY)

"""Real servers with the embedded models, each shared by the tests of several files: a start takes as long as many searches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.faulty import make_plugin
from tests.e2e.serving import ONE_TRAJECTORY_TOKENS, Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log.txt", ["--search", "ets"]) as running:
        yield running


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What the first one is, with pages of searches and metrics; and it takes faults, by the ids of searches (faulty.py)."""
    folder = tmp_path_factory.mktemp("traced")
    env = {**make_plugin(folder), "SGLANG_REQUEST_STATE_WAIT_TIMEOUT": "1"}
    with serving(folder / "log.txt", ["--search-trace", "--enable-metrics"], env=env) as running:
        yield running


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One search at a time and none that waits, none wider than 64; and a PRM's pool that holds one trajectory."""
    flags = ["--search-max-running", "1", "--search-max-waiting", "0", "--search-max-width", "64"]
    flags += ["--search", "ets", "--prm-max-total-tokens", str(ONE_TRAJECTORY_TOKENS)]
    with serving(tmp_path_factory.mktemp("strict") / "log.txt", flags) as running:
        yield running

"""Hostile and generated requests against the shared server: see bench/fuzz.py. `make fuzz` takes other seeds, and more."""

from __future__ import annotations

import json

import pytest

from bench.fuzz import fuzz
from tests.e2e.serving import PROBLEMS, Server

pytestmark = pytest.mark.server

NUM_REQUESTS = 500
SEED = 1
BUSY_STALL_S = 20.0  # two tests at a time share two cores; `make fuzz` holds the server to 2 s


def test_nothing_that_a_client_sends_breaks_or_stalls_the_server(server: Server) -> None:
    report = fuzz(server.url, NUM_REQUESTS, SEED)
    assert report.breaches(BUSY_STALL_S) == [], json.dumps(vars(report), indent=1)
    assert sum(report.statuses.values()) >= NUM_REQUESTS
    assert server.search(PROBLEMS[0]["prompt"], 4)["choices"][0]["text"]

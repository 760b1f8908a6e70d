"""Before any test imports sglang: make it importable on machines without CUDA. One profile for all hypothesis tests."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

from sglang_ets import cpu_shim

cpu_shim.install()

# No deadline: an example that waited for a busy core is no failure. In CI the examples are the same in every run.
settings.register_profile("sglang-ets", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sglang-ets")

gc.disable()  # while torch, sglang and the tests are imported; what they make stays, so it is never looked through again


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()

"""Before any test imports sglang: make it importable on machines without CUDA."""

from __future__ import annotations

from sglang_ets import cpu_shim

cpu_shim.install()

"""The embedded models, their held-out problems, and a client of the server that answers with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai

import sglang_ets
from sglang_ets.tools.datasets import EMBEDDED_PROBLEMS

EMBEDDED = "embedded"  # their name in rows
MODELS = Path(sglang_ets.__file__).parent / "models"
# ETS as it was tuned on their task, in full, so that it is the same with any model.
TUNED_ETS: dict[str, Any] = {"algorithm": "ets", "coverage": "reward", "kv_cost_weight": 4.0, "cluster_distance": 0.3}


def held_out_problems(count: int | None = None) -> list[dict[str, Any]]:
    """The first `count` shipped problems, or all: prompt, answer and expression of each."""
    lines = EMBEDDED_PROBLEMS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def client_of(url: str, timeout_s: float = 600) -> openai.OpenAI:
    """A client that asks once and waits long."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=timeout_s, max_retries=0)

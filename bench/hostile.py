"""Request bodies that no well-meaning client sends: a valid request with one to three of its values replaced.

Everything follows from the random generator that is given, so a seed names a run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATHS = ("/v1/completions", "/v1/chat/completions", "/generate")
PROMPT = "10*5-2+10*10+9-18=\n"
LONG_CHARS = 1_000_000
DEEP = 5_000  # brackets, far beyond any recursion limit
RAW_SHARE = 0.05  # of bodies that are no JSON object at all
RAW_BODIES = (b"", b"null", b"[]", b"{", b"\xff\xfe", b'"text"', b"[" * DEEP, b'{"a":' * DEEP)

TEXTS: tuple[Callable[[], str], ...] = (
    lambda: "",
    lambda: " ",
    lambda: "\x00",
    lambda: "a\x00b\x1f",
    lambda: "\ud800",  # a lone surrogate
    lambda: "🙂日本語\u202e\u2028",
    lambda: "</script><script>alert(1)</script>",
    lambda: "x" * LONG_CHARS,
    lambda: "\n" * 10_000,
    lambda: "[" * DEEP,
    lambda: "{" * DEEP,
    lambda: '{"width": 128}',
    lambda: "null",
    lambda: "1e400",
)
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 64, 1025, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"),
)  # fmt: skip
PATTERNS = (
    r"((?:ab){1000000})",
    r"((((a{1,99}){1,99}){1,99}){1,99})",
    "(" * 500,
    "(" * 500 + ")" * 500,
    r"(a+)+b",
    r"(\p{L}+)",
    r"(?P<x>a)(?P<y>b)",
    "no_group",
    "(",
    r"((?=a)*)",
    "(" + "a|" * 2_000 + "a)",
    r"(.*){64}x",
)
SEARCH_KEYS = (
    "algorithm", "max_steps", "max_step_tokens", "step_delimiter", "kv_cost_weight", "diversity_weight", "coverage", "kv_cost",
    "kv_budget_tokens", "cluster_distance", "center_embeddings", "rebase_temperature", "score_aggregation", "answer",
    "answer_pattern", "answer_equality", "deadline_s", "return_tree", "return_embeddings", "unknown",
)  # fmt: skip
SAMPLING_KEYS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "seed", "n",
    "stop", "logit_bias", "max_tokens", "stream", "logprobs", "echo", "best_of", "user", "priority", "ignore_eos",
    "stop_token_ids", "min_tokens", "skip_special_tokens", "rid", "response_format", "tools", "suffix", "regex", "ebnf",
)  # fmt: skip


@dataclass(frozen=True)
class HostileRequest:
    """One request: where it goes and what it carries."""

    path: str
    body: bytes

    def fields(self) -> set[str]:
        """Names of what it sets, itself or among its sampling parameters; none if it is no JSON object."""
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            return set()
        if not isinstance(body, dict):
            return set()
        sampling = body.get("sampling_params")
        return {*body, *(sampling if isinstance(sampling, dict) else ())}

    def shown(self, length: int = 200) -> str:
        text = self.body.decode("utf-8", "replace")
        return f"POST {self.path} {text if len(text) <= length else f'{text[:length]}... ({len(text)} characters)'}"


def hostile_request(rng: random.Random) -> HostileRequest:
    """The next request of this generator."""
    path = rng.choice(PATHS)
    if rng.random() < RAW_SHARE:
        return HostileRequest(path, rng.choice(RAW_BODIES))
    body = _valid_native(rng) if path == "/generate" else _valid_openai(rng, path)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _spoil(rng, body, path)
    return HostileRequest(path, json.dumps(body).encode("utf-8", "surrogatepass"))


def _valid_openai(rng: random.Random, path: str) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": PROMPT}
    if path == "/v1/chat/completions":
        asked = {"messages": [{"role": "user", "content": PROMPT}]}
    body = {"model": "default", **asked, "max_tokens": rng.choice((4, 16)), "temperature": 1.0}
    if rng.random() < 0.8:
        body["search_width"] = rng.choice((2, 4, 8))
        body["search"] = {"algorithm": rng.choice(("ets", "ets_kv", "rebase", "dvts", "beam", "best_of_n"))}
    return body


def _valid_native(rng: random.Random) -> dict[str, Any]:
    sampling: dict[str, Any] = {"max_new_tokens": rng.choice((4, 16))}
    if rng.random() < 0.8:
        sampling["custom_params"] = {"ets": {"search_width": rng.choice((2, 4))}}
    return {"text": PROMPT, "sampling_params": sampling}


def _spoil(rng: random.Random, body: dict[str, Any], path: str) -> None:
    """Replace one value by something that it should not be."""
    if path == "/generate":
        _spoil_native(rng, body)
        return
    kind = rng.random()
    if kind < 0.45:
        search = body.setdefault("search", {})
        if isinstance(search, dict):
            key = rng.choice(SEARCH_KEYS)
            search[key] = rng.choice(PATTERNS) if key == "answer_pattern" and rng.random() < 0.8 else _value(rng)
    elif kind < 0.55:
        body[rng.choice(("search", "search_width"))] = _value(rng)
    elif kind < 0.65:
        body[rng.choice(("prompt", "messages", "model"))] = _value(rng)
    else:
        body[rng.choice(SAMPLING_KEYS)] = _value(rng)


def _spoil_native(rng: random.Random, body: dict[str, Any]) -> None:
    kind = rng.random()
    sampling = body.get("sampling_params")
    if kind < 0.2 or not isinstance(sampling, dict):
        body[rng.choice(("text", "input_ids", "rid", "stream", "return_logprob", "sampling_params"))] = _value(rng)
        return
    custom = sampling.get("custom_params")
    if kind < 0.7 and isinstance(custom, dict):
        inner = custom.get("ets")
        if rng.random() < 0.5 or not isinstance(inner, dict):
            custom["ets"] = _value(rng)
        else:
            inner[rng.choice((*SEARCH_KEYS, "search_width", "n", "seed"))] = _value(rng)
    else:
        sampling[rng.choice((*SAMPLING_KEYS, "max_new_tokens", "custom_params"))] = _value(rng)


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(TEXTS)()
    if kind < 0.7:
        return rng.choice(NUMBERS)
    if kind < 0.8 or depth > 2:
        return rng.choice((None, True, False, [], {}))
    if kind < 0.9:
        return [_value(rng, depth + 1) for _ in range(rng.choice((1, 2, 17)))]
    return {str(rng.choice(SEARCH_KEYS)): _value(rng, depth + 1)}

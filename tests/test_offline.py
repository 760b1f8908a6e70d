"""The offline engine: flags as keyword arguments, and what sglang returns as a typed result."""

from __future__ import annotations

from typing import Any

import pytest

import sglang_ets
from sglang_ets.offline import SearchFailed, SearchResult, arguments, result_of

ANSWER = {
    "text": "7",
    "token_ids": [7],
    "finish_reason": "stop",
    "score": 0.5,
    "step_scores": [0.5],
    "answer": "7",
    "votes": 1.0,
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 9, "answer_tokens": 1, "prm_tokens": 12}


def meta(**changes: Any) -> dict[str, Any]:
    report = {"results": [ANSWER], "usage": USAGE, "search": {"width": 4}}
    return {"finish_reason": {"type": "length"}, "search": [{"progress": {}}, report], **changes}


def test_keyword_arguments_are_the_flags_of_the_server() -> None:
    given = {"model_path": "/m", "tp": 2, "enable_metrics": True, "skip_server_warmup": False, "search_answer": None}
    assert arguments(given) == ["--model-path", "/m", "--tp", "2", "--enable-metrics"]
    assert arguments({"cuda_graph_bs": [1, 2]}) == ["--cuda-graph-bs", "1", "2"]
    with pytest.raises(TypeError, match="model_path must be a text, a number, True or a list of these, got dict"):
        arguments({"model_path": {}})


def test_the_last_report_is_the_result() -> None:
    result = result_of(meta())
    assert result.text == "7"
    assert (result.answers[0].step_scores, result.answers[0].token_ids) == ((0.5,), (7,))
    assert (result.usage, result.search, result.tree) == (USAGE, {"width": 4}, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": {"type": "abort", "message": "search failed: no"}}, "search failed: no"),
        ({"search": []}, "the scheduler returned no result"),
    ],
)
def test_a_search_without_a_result_raises(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchFailed, match=message):
        result_of(meta(**changes))


def test_the_package_offers_the_engine_by_name() -> None:
    assert sglang_ets.SearchResult is SearchResult
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sglang_ets.Nothing  # noqa: B018

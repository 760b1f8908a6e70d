"""A search as plain data: its result, and its figures while it runs."""

from __future__ import annotations

import time
from typing import Any

from sglang_ets.core.answer import RankedAnswer
from sglang_ets.engine.live import ROOT, LiveSearch
from sglang_ets.engine.tree_updates import TreeNews
from sglang_ets.wire import TRACE_KEY


def result_of(live: LiveSearch, answers: list[RankedAnswer]) -> dict[str, Any]:
    """What travels back to the API server: ranked results, usage and figures, as plain data."""
    completion_tokens = sum(len(node.token_ids) for node in live.search.tree.nodes)
    returned = answers[: live.config.num_results]
    result: dict[str, Any] = {
        "results": [_answer_dict(answer) for answer in returned],
        "usage": {
            "prompt_tokens": live.prompt_tokens,
            "completion_tokens": completion_tokens,
            "answer_tokens": sum(len(answer.token_ids) for answer in returned),
            "prm_tokens": live.prm_tokens,
        },
        "search": figures_of(live),
    }
    if live.news is not None:
        result[TRACE_KEY] = news_of(live, live.news)
    if live.config.return_tree:
        result["tree"] = live.search.tree.to_dict(with_embeddings=live.config.return_embeddings)
    return result


def _answer_dict(answer: RankedAnswer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "score": answer.score,
        "step_scores": list(answer.step_scores),
        "answer": answer.answer,
        "votes": answer.votes,
    }


def news_of(live: LiveSearch, news: TreeNews) -> dict[str, Any]:
    """What a live page needs beyond what it was told before: the figures so far, and the steps that changed."""
    return {"figures": figures_of(live), **news.take(live.search.tree)}


def figures_of(live: LiveSearch) -> dict[str, Any]:
    """`metadata.search` of a response without the tree, or how far it is while the search runs."""
    nodes = [node for node in live.search.tree.nodes if node.id != ROOT]
    config = live.config
    held = [sample.held_tokens for sample in live.kv] or [0]
    referenced = [sample.referenced_tokens for sample in live.kv] or [0]
    retained = [sample.retained_tokens for sample in live.kv if sample.retained_tokens is not None] or [0]
    return {
        "id": live.owner,
        "algorithm": config.algorithm,
        "width": config.width,
        "seed": config.seed,
        "rebase_temperature": config.rebase_temperature,
        **config.weights._asdict(),
        "finish_reason": live.end_reason,
        "levels": len(live.kv),
        "nodes_made": len(nodes),
        "nodes_retained": sum(node.state in ("retained", "complete") for node in nodes),
        "nodes_pruned": sum(node.state == "pruned" for node in nodes),
        "nodes_failed": sum(node.state == "failed" for node in nodes),
        "kv_tokens_peak": max(held),
        "kv_tokens_mean": sum(held) / len(held),
        "kv_retained_mean": sum(retained) / len(retained),
        "kv_referenced_peak": max(referenced),
        "kv_referenced_mean": sum(referenced) / len(referenced),
        "kv_levels": [
            {
                "depth": sample.depth,
                "leaves": sample.num_leaves,
                "held": sample.held_tokens,
                "referenced": sample.referenced_tokens,
                "retained": sample.retained_tokens,
            }
            for sample in live.kv
        ],
        "kv_pressure_releases": live.num_pressure_releases,
        "prm_tokens": live.prm_tokens,
        "solver": _solver_figures(live),
        "seconds": time.monotonic() - live.started_s,
    }


def _solver_figures(live: LiveSearch) -> dict[str, Any]:
    reports = live.solver_reports
    return {
        "calls": len(reports),
        "fallbacks": live.num_fallbacks,
        "statuses": sorted({str(report.status) for report in reports}),
        "build_ms": sum(report.build_ms for report in reports),
        "solve_ms": sum(report.solve_ms for report in reports),
        "loop_blocked_ms_max": max(live.select_blocked_ms, default=0.0),
        "level_loop_ms_mean": sum(live.loop_ms) / max(1, len(live.loop_ms)),
        "level_loop_ms_max": max(live.loop_ms, default=0.0),
    }

"""A search as plain data: its result, its figures while it runs, and what was not as it should be."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sglang_ets.core.answer import RankedAnswer
from sglang_ets.core.config import OUTER_FIELDS, SearchConfig
from sglang_ets.core.ilp import TIME_LIMIT_S
from sglang_ets.core.tree import Node
from sglang_ets.engine.live import ROOT, LiveSearch
from sglang_ets.engine.tree_changes import TreeChanges
from sglang_ets.wire import TRACE_KEY


def result_of(live: LiveSearch, answers: list[RankedAnswer]) -> dict[str, Any]:
    """What travels back to the API server: ranked results, usage and figures, as plain data."""
    config = live.search.config
    completion_tokens = sum(len(node.token_ids) for node in live.search.tree.nodes)
    returned = answers[: config.num_results]
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
    if live.changes is not None:
        result[TRACE_KEY] = changes_of(live, live.changes)
    if config.return_tree:
        result["tree"] = live.search.tree.to_dict(with_embeddings=config.return_embeddings)
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


def changes_of(live: LiveSearch, changes: TreeChanges) -> dict[str, Any]:
    """What a live page needs beyond its last report: the figures so far, and the steps that changed."""
    return {"figures": figures_of(live), **changes.report(live.search.tree)}


def figures_of(live: LiveSearch) -> dict[str, Any]:
    """`search` of an answer without the tree, or how far it is while the search runs."""
    nodes = [node for node in live.search.tree.nodes if node.id != ROOT]
    config = live.search.config
    held = [sample.held_tokens for sample in live.kv] or [0]
    referenced = [sample.referenced_tokens for sample in live.kv] or [0]
    retained = [sample.retained_tokens for sample in live.kv if sample.retained_tokens is not None] or [0]
    return {
        "id": live.rid,
        "algorithm": config.algorithm,
        "width": config.width,
        "seed": config.seed,
        "preset": config.preset,
        "preset_settings": config.preset_settings,
        "rebase_temperature": config.rebase_temperature,
        **config.weights._asdict(),
        "finish_reason": live.end_reason,
        "early_stop": None if live.search.early_end is None else asdict(live.search.early_end),
        "levels": len(live.kv),
        "nodes_made": len(nodes),
        "nodes_retained": sum(node.state in ("retained", "complete") for node in nodes),
        "nodes_pruned": sum(node.state == "pruned" for node in nodes),
        "nodes_revived": live.search.num_revived,
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
        "kv_cost_weight_max": live.kv_cost_weight_max,
        "kv_pressure_releases": live.num_pressure_releases,
        "prm_pressure_releases": live.num_prm_releases,
        "prm_tokens": live.prm_tokens,
        "tokens_computed": live.tokens_computed,
        "forks": live.forks,
        "speculation": _speculation_figures(live) if live.search.speculates else None,
        "solver": _solver_figures(live),
        "seconds": time.monotonic() - live.started_s,
        "warnings": warnings_of(live),
    }


def _speculation_figures(live: LiveSearch) -> dict[str, Any]:
    guesses = live.guesses
    return {
        "leaves": guesses.num_leaves,
        "children": guesses.num_children,
        "children_used": guesses.num_used,
        "hit_rate": guesses.num_used / max(1, guesses.num_children),
        "tokens_wasted": guesses.tokens_wasted,
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


def warnings_of(live: LiveSearch) -> list[str]:
    """What the client must know to judge the answer, a sentence each; empty if all went as it should."""
    tree, config = live.search.tree, live.search.config
    num_steps = len(tree.nodes) - 1
    failed = [node for node in tree.nodes if node.state == "failed"]
    warnings = [f"{count} of {num_steps} steps failed: {reason}" for reason, count in _reasons(failed).items()]
    if live.num_pressure_releases:
        warnings.append(
            f"the KV pool was full and this search gave up its KV {live.num_pressure_releases} times, to compute it again; "
            "lower search_width or raise --max-total-tokens"
        )
    if live.num_prm_releases:
        warnings.append(
            f"the PRM's KV pool was full and this search gave up {live.num_prm_releases} locks in it, to compute their KV "
            "again; lower search_width or raise --prm-max-total-tokens"
        )
    if live.num_fallbacks:
        warnings.append(
            f"the solver failed in {live.num_fallbacks} of {len(live.kv)} levels, where REBASE decided instead"
        )
    num_late = sum(report.status == "time_limit" for report in live.solver_reports)
    if num_late:
        warnings.append(
            f"the solver's time of {TIME_LIMIT_S:g} s ended in {num_late} of {len(live.kv)} levels, where the best leaves that "
            "it had were kept; lower search_width"
        )
    if live.end_reason in ("deadline", "kv_budget"):
        is_late = live.end_reason == "deadline"
        limit = f"deadline_s of {config.deadline_s:g}" if is_late else f"kv_budget_tokens of {config.kv_budget_tokens}"
        warnings.append(
            f"{limit} ended the search after {len(live.kv)} levels with {len(tree.complete())} of {config.width} "
            "trajectories complete"
        )
    if live.search.num_given_up:
        warnings.append(
            f"max_total_tokens of {config.max_total_tokens} did not suffice: {live.search.num_given_up} of {config.width} "
            f"trajectories were not grown to their end, {len(tree.complete())} are complete; raise it or lower search_width"
        )
    return warnings + live.notes


def lost_level(live: LiveSearch, level: int) -> str | None:
    """Why the level that has just been completed is too thin to go on from; None if at most half its steps failed."""
    steps = [node for node in live.search.tree.nodes if node.level == level]
    failed = [node for node in steps if node.state == "failed"]
    if 2 * len(failed) <= len(steps):
        return None
    reasons = "; ".join(_reasons(failed))
    return f"{len(failed)} of the {len(steps)} steps of level {level} failed, more than half: {reasons}"


def _reasons(failed: list[Node]) -> dict[str, int]:
    """Reason -> number of nodes. Reasons that differ in their figures alone stand as the first of them."""
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    for node in failed:
        reason = first.setdefault(re.sub(r"\d+", "#", node.reason), node.reason)
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def default_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a search whose request gives none; `diversity_weight` None follows the width."""
    config = SearchConfig.of_defaults(settings)
    own = {name: value for name, value in asdict(config).items() if name not in OUTER_FIELDS}
    return {**own, "step_delimiter": list(config.step_delimiter), "max_tokens": config.max_tokens}


def state_of(live: LiveSearch, held_tokens: int) -> dict[str, Any]:
    """A search that runs, for `/server_info`."""
    return {
        "id": live.rid,
        "algorithm": live.search.config.algorithm,
        "width": live.search.config.width,
        "levels": len(live.kv),
        "nodes_made": len(live.search.tree.nodes) - 1,
        "held_kv_tokens": held_tokens,
        "seconds": time.monotonic() - live.started_s,
    }


def finished_line(result: Mapping[str, Any]) -> str:
    """One finished search for a person who reads the log."""
    figures, usage, best = result["search"], result["usage"], result["results"][0]
    return (
        f"search {figures['id']} {figures['finish_reason']} in {figures['seconds']:.2f} s: {figures['algorithm']} width "
        f"{figures['width']}, {figures['levels']} levels, {figures['nodes_made']} nodes ({figures['nodes_pruned']} "
        f"pruned), KV peak {figures['kv_tokens_peak']} of {figures['kv_referenced_peak']} referenced tokens, "
        f"{usage['completion_tokens']} tokens generated, {usage['prm_tokens']} read by the PRM, "
        f"answer {best['answer']!r} with score {best['score']:.3f}"
    )

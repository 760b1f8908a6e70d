"""The client-driven search without servers: requests, answers read, selection as in the core, a whole search on fakes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.client_search import table, wire
from bench.client_search.choose import choose, kept_leaves
from bench.client_search.driver import Client, prm_marker
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.ilp import CostTree, objective, solve
from sglang_ets.core.kv_costs import token_costs
from sglang_ets.core.search import Expand
from sglang_ets.core.selection import Level, Rebase
from sglang_ets.core.tree import SearchTree

CONFIG = SearchConfig(width=4, step_delimiter=("\n",), algorithm="rebase", max_tokens=64)


def answer(ids: list[int], reason: dict[str, Any], text: str = "") -> dict[str, Any]:
    return {"output_ids": ids, "text": text, "meta_info": {"finish_reason": reason}}


# ---- what goes over HTTP ----


def test_one_trajectory_asks_for_n_and_several_for_a_row_each() -> None:
    first = wire.generate_request([((1, 2), Expand(0, (1, 2, 3), 9))], CONFIG, 1.0)
    assert first["input_ids"] == [1, 2]
    assert first["sampling_params"]["n"] == 3
    level = wire.generate_request([((1, 2), Expand(1, (4, 5), 9)), ((1, 7), Expand(2, (6,), 5))], CONFIG, 1.0)
    assert level["input_ids"] == [[1, 2], [1, 2], [1, 7]]
    assert [params["max_new_tokens"] for params in level["sampling_params"]] == [9, 9, 5]
    assert all(params["stop"] == ["\n"] and params["no_stop_trim"] for params in level["sampling_params"])


def test_finish_reasons_become_ends_of_steps() -> None:
    reasons = [{"type": "stop", "matched": "\n"}, {"type": "stop", "matched": 1}, {"type": "length", "length": 9}]
    assert [wire.finish_of(answer([], reason), CONFIG) for reason in reasons] == ["step", "stop", "length"]
    with pytest.raises(RuntimeError, match="abort"):
        wire.finish_of(answer([], {"type": "abort", "message": "full"}), CONFIG)


@pytest.mark.parametrize(
    ("texts", "marker", "first"),
    [
        (["a", "=", "b", "\n"], "=", 7),  # what comes after the marker counts
        (["a", "=", "=", "\n"], "=", 7),  # the first marker
        (["a", "b", "c", "\n"], "=", 5),  # no marker: all of it
        (["a", "b", "c", "="], "=", 5),  # nothing after it: all of it
        (["a", "=", "b", "\n"], None, 5),
    ],
)
def test_tokens_up_to_the_marker_do_not_count(texts: list[str], marker: str | None, first: int) -> None:
    scoring = wire.scoring_of((0,) * 5, (9, 8, 7, 3), texts, marker)
    assert (scoring.start, scoring.first, len(scoring.token_ids)) == (5, first, 9)


def test_score_is_the_product_of_the_counted_probabilities() -> None:
    scoring = wire.Scoring((1, 2, 3, 4, 5), start=2, first=3)
    body = wire.score_request([scoring])
    assert body["logprob_start_len"] == [1]
    assert body["sampling_params"]["max_new_tokens"] == 0
    probabilities = [None, 0.01, 0.5, 0.25]  # of tokens 2 (not known), 3 (not counted), 4 and 5
    entries = [[None if p is None else math.log(p), 0, None] for p in probabilities]
    said = {"meta_info": {"input_token_logprobs": entries}}
    assert wire.score_of(said, scoring) == pytest.approx(0.125)
    assert wire.score_of(said, wire.Scoring((1, 2, 3, 4, 5), 2, 2)) == pytest.approx(0.00125)


@pytest.mark.parametrize("entries", [[[-1.0, 4, None]], [[-1.0, 3, None], [None, 4, None], [-1.0, 5, None]]])
def test_a_missing_log_probability_is_an_error(entries: list[list[Any]]) -> None:
    with pytest.raises(RuntimeError, match="expected a number for each"):
        wire.score_of({"meta_info": {"input_token_logprobs": entries}}, wire.Scoring((1, 2, 3, 4, 5), 2, 3))


# ---- selection ----


def grown(branching: list[int], lengths: list[int]) -> CostTree:
    """Of a tree in which step i of each level has `branching[i % n]` children."""
    tree = SearchTree(10)
    leaves = [tree.root]
    made = 0
    for _ in range(3):
        below = []
        for place, node in enumerate(leaves):
            for _child in range(branching[place % len(branching)]):
                child = tree.add_child(node)
                tree.set_step(child, range(made, made + lengths[made % len(lengths)]), "", "step")
                below.append(child)
                made += 1
        leaves = below
    return token_costs([tree.trajectory_token_ids(leaf) for leaf in leaves])


@settings(max_examples=25)
@given(
    branching=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    seed=st.integers(0, 2**32 - 1),
    algorithm=st.sampled_from(["ets", "ets_kv", "rebase", "dvts"]),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_the_client_selects_as_well_as_the_core(
    branching: list[int], lengths: list[int], seed: int, algorithm: Any, weight: float
) -> None:
    draw = np.random.default_rng(seed)
    costs = grown(branching, lengths)
    size = costs.leaf.size
    level = Level(
        scores=draw.random(size), kv=costs, nodes=costs, embeddings=draw.normal(size=(size, 3)).astype(np.float32),
        subtree=np.arange(size) % 2, growth_tokens=1.0, remaining_width=16,
    )  # fmt: skip
    config = SearchConfig(
        algorithm=algorithm, width=16, kv_cost_weight=weight, cluster_distance=0.3, coverage="uniform"
    )
    client, core = choose(level, config), config.policy.select(level, config)
    assert client.allocation.sum() == core.allocation.sum() == 16
    if algorithm in ("rebase", "dvts"):
        assert client.allocation.tolist() == core.allocation.tolist()
        return
    assert (client.clusters is None) == (algorithm == "ets_kv")
    shares = Rebase().select(level, config).allocation / 16
    coverage = config.weights.diversity_weight if algorithm == "ets" else 0.0
    kept = kept_leaves(level, config, client.clusters)
    best, _ = solve(shares, costs, weight, core.clusters, coverage)
    # Equal values, not equal sets: a leaf that is worth nothing may be kept or not.
    worth = [objective(chosen, shares, costs, weight, core.clusters, coverage) for chosen in (kept, best)]
    assert worth[0] == pytest.approx(worth[1], abs=1e-6)
    assert not client.allocation[~kept].any()


def test_ets_without_embeddings_is_refused() -> None:
    costs = grown([2], [3])
    size = costs.leaf.size
    level = Level(np.ones(size), costs, costs, None, np.zeros(size, dtype=np.int64), 1.0, 4)
    with pytest.raises(ValueError, match="encoder"):
        choose(level, SearchConfig(algorithm="ets", width=4, coverage="uniform"))
    with pytest.raises(ValueError, match="coverage must be uniform"):
        choose(level, SearchConfig(algorithm="ets", width=4, coverage="reward"))


# ---- a whole search ----


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class FakePolicy:
    """Writes two steps: a letter by the place of the row, then the answer."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        self.calls.append(body)
        is_first = not isinstance(body["input_ids"][0], list)
        count = body["sampling_params"]["n"] if is_first else len(body["input_ids"])
        said = [f"{place % 2}=x\n" if is_first else f"The answer is {place}" for place in range(count)]
        ends = {"type": "stop", "matched": "\n" if is_first else 1}
        return [answer([ord(letter) for letter in text], ends, text) for text in said]


class FakePrm:
    """Finds every token probable at 0.9."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        self.calls.append(body)
        pairs = zip(body["input_ids"], body["logprob_start_len"], strict=True)
        wanted = [
            [[None, 0, None]] + [[math.log(0.9), token, None] for token in ids[start + 1 :]] for ids, start in pairs
        ]
        return [{"meta_info": {"input_token_logprobs": entries}} for entries in wanted]


@pytest.mark.parametrize("algorithm", ["rebase", "ets"])
def test_a_search_makes_two_calls_a_level(algorithm: Any) -> None:
    policy, prm = FakePolicy(), FakePrm()

    def encode(texts: Any) -> Any:
        return np.array([[1.0, float(text[0] == "0")] for text in texts], dtype=np.float32)

    client = Client(policy, prm, Letters(), "=", encode)
    config = replace(CONFIG, algorithm=algorithm, coverage="uniform", answer_pattern="the_answer_is")
    solved = client.solve("1+1\n", config)
    assert [len(side.calls) for side in (policy, prm)] == [2, 2]
    assert len(prm.calls[0]["input_ids"]) == 2  # four steps, of which two are different
    assert solved.levels == 2
    assert solved.completion_tokens == 4 * len("0=x\n") + 4 * len("The answer is 0")
    assert sorted(found.answer or "" for found in solved.answers) == ["0", "1", "2", "3"]
    # "0=x\n" counts after its "=": two tokens. The next step is worse, and a path is as good as its worst step.
    assert solved.answers[0].step_scores == pytest.approx((0.9**2, 0.9 ** len("The answer is 0")))
    assert solved.part_s["other"] >= 0 and solved.part_s["generate"] > 0
    assert (solved.part_s["encode"] > 0) == (algorithm == "ets")


def test_best_of_n_is_refused_because_it_knows_no_levels() -> None:
    client = Client(FakePolicy(), FakePrm(), Letters(), "=", None)
    with pytest.raises(ValueError, match="level by level"):
        client.solve("1\n", SearchConfig(width=4, algorithm="best_of_n", step_delimiter=("\n",)))


# ---- tables ----


def row(system: str, number: int, seconds: float, **more: float) -> dict[str, Any]:
    made = {"system": system, "algorithm": "rebase", "width": 16, "in_flight": 8, "round": number, "problems": 8}
    return made | {"seconds": seconds, "cpu_s": seconds, "completion_tokens": 800, "right": 6} | more


def test_ratios_are_taken_within_rounds_and_open_rounds_left_out() -> None:
    parts = {f"{part}_s": 1.0 for part in table.PARTS}
    done = [row("in_scheduler", 0, 2.0), row("client", 0, 8.0, **parts), row("sampling", 0, 1.0)]
    done += [row("in_scheduler", 1, 4.0), row("client", 1, 8.0, **parts), row("sampling", 1, 4.0)]
    done += [row("in_scheduler", 2, 1.0)]
    text = table.tables(done)
    assert "3.00x (2.00 to 4.00)" in text
    assert "75 % (50 to 100)" in text
    assert "1.00 (20 %)" in text
    assert "| 16 | rebase | 8 | 1 | 2 | 16 |" in text


def test_a_client_is_compared_with_every_number_of_servers() -> None:
    parts = {f"{part}_s": 1.0 for part in table.PARTS}
    done = [row("in_scheduler", 0, 8.0), row("in_scheduler", 0, 4.0, replicas=2), row("client", 0, 8.0, **parts)]
    done += [row("sampling", 0, 8.0), row("sampling", 0, 2.0, replicas=2), row("sampling", 0, 1.0, replicas=4)]
    one, two = table.tables(done).split("\n\n")[0].splitlines()[2:]
    assert "| 8 | 1 | 1 | 8 |" in one and "1.00x (1.00 to 1.00)" in one
    assert "| 8 | 2 | 1 | 8 |" in two and "2.00x (2.00 to 2.00)" in two


def test_models_are_compared_apart() -> None:
    parts = {f"{part}_s": 1.0 for part in table.PARTS}
    done = [row("in_scheduler", 0, 2.0), row("client", 0, 8.0, **parts), row("sampling", 0, 1.0)]
    own = [one | {"model": "own", "seconds": 8.0} for one in done]
    embedded, other = table.tables(done + own).split("\n\n")[0].splitlines()[2:]
    assert embedded.startswith("| embedded | 16 |") and "4.00x (4.00 to 4.00)" in embedded
    assert other.startswith("| own | 16 |") and "1.00x (1.00 to 1.00)" in other


def test_a_model_without_a_prm_config_counts_whole_steps(tmp_path: Path) -> None:
    assert prm_marker(tmp_path) is None
    (tmp_path / "prm_config.json").write_text('{"format": "judge"}')
    with pytest.raises(ValueError, match="likelihood, got 'judge'"):
        prm_marker(tmp_path)

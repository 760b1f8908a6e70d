"""Which text is final when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_ets.core.config import SearchConfig
from sglang_ets.core.search import Search
from sglang_ets.core.selection import Selection
from sglang_ets.engine.progress import answerable, progress_report, shared_prefix, shared_text


@given(st.lists(st.text(alphabet="ab\n", max_size=6), min_size=1, max_size=6))
def test_shared_prefix_is_the_longest(texts: list[str]) -> None:
    prefix = shared_prefix(texts)
    assert all(text.startswith(prefix) for text in texts)
    longer = {text[: len(prefix) + 1] for text in texts}
    assert len(longer) > 1 or longer == {prefix}


class Scripted:
    """A search of the pure core with scripted steps, and the reports that its selections gave."""

    def __init__(self, width: int) -> None:
        self.search = Search(SearchConfig(algorithm="rebase", width=width), 3)
        self.live: Any = SimpleNamespace(search=self.search, final_text="", changes=None)
        self.reports: list[dict[str, Any]] = []
        self.search.start()

    def step(self, node_id: int, text: str, score: float = 0.5, finish: Any = "step") -> None:
        self.search.on_step(node_id, (1,), text, finish)
        self.search.on_scored(node_id, score, None)

    def select(self, *allocation: int) -> str:
        """The final text after a selection."""
        self.search.on_selected(Selection(np.array(allocation)))
        if not self.search.is_over:
            self.live.final_text = shared_text(self.search)
        self.reports.append(progress_report(self.live, 7)["progress"])
        return str(self.live.final_text)


def test_final_is_what_complete_and_retained_trajectories_share() -> None:
    run = Scripted(3)
    run.step(1, "ab1\n", 0.9)
    run.step(2, "ab2\n")
    run.step(3, "x\n", 0.1)
    assert run.select(2, 1, 0) == "ab"  # the pruned one does not count
    run.step(4, "c", 0.8, "stop")
    run.step(5, "d\n")
    run.step(6, "e\n")
    assert run.select(2, 0) == "ab1\n"  # what is complete counts, what is pruned does not
    assert [(report["level"], report["retained"], report["complete"]) for report in run.reports] == [
        (1, 2, 0),
        (2, 1, 1),
    ]
    assert [report["text"] for report in run.reports] == ["ab", "ab1\n"]
    assert (run.reports[0]["best_score"], run.reports[0]["kv_held_tokens"]) == (0.9, 7)


def test_a_complete_trajectory_that_shares_nothing_keeps_the_rest_back() -> None:
    run = Scripted(3)
    run.step(1, "done", 0.9, "stop")
    run.step(2, "ab\n")
    run.step(3, "ab\n")
    assert run.select(1, 1) == ""


def test_what_was_given_up_earlier_is_no_answer() -> None:
    """With nothing complete, the parent of pruned steps is an unfinished end again, but not of the final text."""
    run = Scripted(2)
    run.step(1, "a\n")
    run.step(2, "b\n")
    assert run.select(1, 1) == ""
    run.step(3, "1\n")
    run.step(4, "2\n")
    assert run.select(0, 2) == "b\n2\n"
    run.search.stop("deadline")
    assert {t.text for t in run.search.trajectories()} == {"a\n", "b\n2\n"}
    assert [t.text for t in answerable(run.live)] == ["b\n2\n"]


def test_a_failed_level_leaves_the_retained_parents() -> None:
    run = Scripted(2)
    run.step(1, "a1\n")
    run.step(2, "a2\n")
    assert run.select(2, 0) == "a1\n"
    run.search.on_failed(3, "no KV")
    run.search.on_failed(4, "no KV")
    assert run.search.is_over
    assert [t.text for t in answerable(run.live)] == ["a1\n"]


@given(st.data())
def test_final_text_only_grows_and_every_answer_begins_with_it(data: st.DataObject) -> None:
    run = Scripted(4)
    final = ""
    for _level in range(5):
        waiting = [node.id for node in run.search.tree.nodes if node.state == "open" and node.finish is None]
        for node_id in waiting:
            kind = data.draw(st.sampled_from(["step", "step", "stop", "failed"]))
            if kind == "failed":
                run.search.on_failed(node_id, "scripted")
            else:
                run.step(node_id, data.draw(st.sampled_from(["a\n", "b\n", "ab\n"])), finish=kind)
        leaves = [node for node in run.search.tree.nodes if node.state == "open"]
        if run.search.is_over or not leaves:
            break
        shares = data.draw(st.lists(st.integers(0, 2), min_size=len(leaves), max_size=len(leaves)))
        grown = run.select(*shares)
        assert grown.startswith(final)
        final = grown
        if data.draw(st.booleans()):
            break
    run.search.stop("deadline")
    ends, answers = run.search.trajectories(), answerable(run.live)
    assert all(answer.text.startswith(final) for answer in answers)
    assert bool(answers) == bool(ends)
    if run.search.tree.complete():
        assert answers == ends

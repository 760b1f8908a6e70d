"""Which text is final when, and the chunks of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState

from sglang_ets.api.streaming import DONE, stream_chunks
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.search import Search
from sglang_ets.core.selection import Selection
from sglang_ets.engine.progress import answerable, report_progress, shared_prefix
from tests.api.test_protocol import RESULT, chat, completion


@given(st.lists(st.text(alphabet="ab\n", max_size=6), min_size=1, max_size=6))
def test_shared_prefix_is_the_longest(texts: list[str]) -> None:
    prefix = shared_prefix(texts)
    assert all(text.startswith(prefix) for text in texts)
    longer = {text[: len(prefix) + 1] for text in texts}
    assert len(longer) > 1 or longer == {prefix}


# ---- in the scheduler ----


class Scripted:
    """A search of the pure core with scripted steps, and what its client was told."""

    def __init__(self, width: int, *, stream: bool = True) -> None:
        self.sent: list[dict[str, Any]] = []
        self.search = Search(SearchConfig(algorithm="rebase", width=width), 3)
        self.live: Any = SimpleNamespace(
            owner="a",
            search=self.search,
            req=SimpleNamespace(stream=stream, customized_info=None),
            is_answered=False,
            final_text="",
            news=None,
            branches={0: SimpleNamespace(text="")},
        )
        self.coordinator: Any = SimpleNamespace(
            ledger=SimpleNamespace(held_tokens=lambda _owner: 7),
            scheduler=SimpleNamespace(output_streamer=SimpleNamespace(stream_output=self._stream)),
        )
        self.search.start()

    def _stream(self, reqs: Sequence[Any], _return_logprob: bool) -> None:
        self.sent.append(reqs[0].customized_info["search"][0]["progress"])

    def step(self, node_id: int, text: str, score: float = 0.5, finish: Any = "step") -> None:
        parent = self.search.tree.nodes[node_id].parent
        assert parent is not None
        self.live.branches[node_id] = SimpleNamespace(text=self.live.branches[parent.id].text + text)
        self.search.on_step(node_id, (1,), text, finish)
        self.search.on_scored(node_id, score, None)

    def select(self, *allocation: int) -> str:
        """The final text after a selection."""
        self.search.on_selected(Selection(np.array(allocation)))
        report_progress(self.coordinator, self.live)
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
    assert [(told["level"], told["retained"], told["complete"]) for told in run.sent] == [(1, 2, 0), (2, 1, 1)]
    assert [told["text"] for told in run.sent] == ["ab", "ab1\n"]
    assert (run.sent[0]["best_score"], run.sent[0]["kv_held_tokens"]) == (0.9, 7)


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


def test_nobody_is_told_without_a_stream_or_after_the_end() -> None:
    run = Scripted(2, stream=False)
    run.step(1, "a\n")
    run.step(2, "a\n")
    assert run.select(1, 1) == "a\n"
    assert run.sent == []
    run.live.req.stream = True
    run.search.stop("deadline")
    report_progress(run.coordinator, run.live)
    assert run.sent == []


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


# ---- in the API server ----

FIGURES = {"level": 1, "retained": 2, "complete": 0, "best_score": 0.5, "kv_held_tokens": 9}


def reported(*reports: dict[str, Any], **info: Any) -> dict[str, Any]:
    return {"meta_info": {"id": "id", "search": list(reports), **info}}


def progress(text: str, level: int = 1) -> dict[str, Any]:
    return {"progress": {**FIGURES, "level": level, "text": text}}


def events_of(request: Any, answers: Sequence[dict[str, Any]]) -> list[str]:
    async def rest() -> AsyncIterator[dict[str, Any]]:
        for answer in answers[1:]:
            yield answer

    async def run() -> list[str]:
        return [event async for event in stream_chunks(request, "id", answers[0], rest())]

    return asyncio.run(run())


def content(choice: dict[str, Any]) -> str:
    return str(choice["delta"].get("content", "") if "delta" in choice else choice["text"])


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("early", [[], ["1+"], ["", "1+2", "1+2", "1+2=3"]], ids=["none", "one", "all"])
@pytest.mark.parametrize("every", [1, 2, 5], ids=["each report", "two at once", "all at once"])
def test_a_stream_joins_to_the_answer(make: Any, with_usage: bool, early: list[str], every: int) -> None:
    request = make(stream=True, stream_options={"include_usage": with_usage})
    told = [progress(text, level) for level, text in enumerate(early, 1)]
    answers = [reported(*told[: i + 1]) for i in range(len(told)) if i % every == every - 1] + [reported(*told, RESULT)]
    events = events_of(request, answers)
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in events)
    assert events[-1] == DONE
    chunks = [json.loads(event[6:]) for event in events[:-1]]
    usage = [chunk["usage"] for chunk in chunks if "usage" in chunk]
    assert len(usage) == with_usage
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, text in enumerate(["1+2=3", "1+2=4"]):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(content(choice) for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == ("stop" if index == 0 else "length")
        assert make is completion or mine[0]["delta"]["role"] == "assistant"
    shown = [chunk["metadata"]["search"] for chunk in chunks if "metadata" in chunk]
    levels = [{"progress": {**FIGURES, "level": level}} for level in range(1, len(early) + 1)]
    assert shown == [*levels, RESULT["search"]]


EARLY = [[], ["", "", ""], ["", "1+"], ["1+", "1+2"], ["", "1+2=3", "1+2=3"]]


def streaming(request: Any, early: Sequence[str]) -> openai.OpenAI:
    """The official client of a server that streams a search which reports these final texts before its result."""
    levels = [progress(text, level) for level, text in enumerate(early, 1)]
    answers = [reported(*levels[: i + 1]) for i in range(len(levels))] + [reported(*levels, RESULT)]
    content = "".join(events_of(request, answers)).encode()
    headers = {"content-type": "text/event-stream"}
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=content, headers=headers))
    return openai.OpenAI(
        base_url="http://x/v1", api_key="k", max_retries=0, http_client=httpx.Client(transport=transport)
    )


@pytest.mark.parametrize("early", EARLY, ids=str)
def test_the_official_accumulator_joins_a_chat(early: list[str]) -> None:
    client = streaming(chat(stream=True, n=2, stream_options={"include_usage": True}), early)
    state = ChatCompletionStreamState()
    roles: list[int] = []
    for chunk in client.chat.completions.create(model="m", messages=[], stream=True):
        roles += [choice.index for choice in chunk.choices if choice.delta.role is not None]
        state.handle_chunk(chunk)
    done = state.current_completion_snapshot  # the final one is refused where a choice has reached its length
    assert [(choice.message.role, choice.message.content) for choice in done.choices] == [
        ("assistant", "1+2=3"),
        ("assistant", "1+2=4"),
    ]
    assert [choice.finish_reason for choice in done.choices] == ["stop", "length"]
    assert done.usage is not None and done.usage.completion_tokens == 90
    assert roles == [0, 1], "each choice has its role once, in its first chunk"


@pytest.mark.parametrize("early", EARLY, ids=str)
def test_a_client_of_completions_joins_the_texts(early: list[str]) -> None:
    client = streaming(completion(stream=True, n=2, stream_options={"include_usage": True}), early)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(model="m", prompt="p", stream=True):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing comes after the end of a choice"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert (texts, reasons) == (["1+2=3", "1+2=4"], ["stop", "length"])
    assert usage is not None and usage.completion_tokens == 90


@pytest.mark.parametrize("answers", [[reported(progress("1"))], [reported(progress("1")), "abort"]])
def test_a_search_that_fails_on_the_way_ends_with_an_error(answers: list[Any]) -> None:
    reason = {"type": "abort", "message": "no\nKV", "status_code": 500}
    answers = [reported(progress("1"), finish_reason=reason) if answer == "abort" else answer for answer in answers]
    *_, error, done = events_of(completion(stream=True), answers)
    assert done == DONE
    message = json.loads(error[6:])["error"]["message"]
    assert message == ("no KV" if len(answers) == 2 else "the scheduler returned no result")

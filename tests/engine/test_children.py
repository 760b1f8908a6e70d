"""Children of a search as sglang requests: their ids, parameters, ends, and where they are found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_MATCHED_STR,
    FINISH_MATCHED_TOKEN,
    FINISHED_MATCHED_REGEX,
)

from sglang_ets.engine import children
from sglang_ets.engine.children import (
    NAN_STOP,
    ChildReq,
    ChildSpec,
    SearchIds,
    StepEnd,
    child_seed,
    children_in_engine,
    make_child,
    step_end,
    without_children,
)
from tests.engine.fakes import EOS, FakeBatch, request

DELIMITERS = ("\n\n", "Step", 7)


def spec(**fields: Any) -> ChildSpec:
    return ChildSpec(SearchIds().new(), request("pa", "Q", **fields), 5, DELIMITERS)


def child(node_id: int = 3, **fields: Any) -> ChildReq:
    shared = spec(**fields)
    return make_child(shared, [shared.member(node_id, (0, node_id))], (1, 2), 20)


def test_ids_of_children_begin_with_their_search_and_with_nothing_else() -> None:
    of_process = SearchIds()
    ids = [of_process.new() for _ in range(12)]
    given = [ChildSpec(search_id, request("pa", "Q"), 0, ()).child_id(node) for search_id in ids for node in (0, 1, 11)]
    assert len(set(given)) == len(given)
    for search_id in ids:
        assert sum(rid.startswith(search_id) for rid in given) == 3
    assert not any(rid.startswith("pa") for rid in given)
    assert all(sum(rid.startswith(other) for rid in given) == 1 for other in given), (
        "sglang aborts by beginnings of ids"
    )


def test_a_child_continues_the_prompt_with_the_parameters_of_its_client() -> None:
    shared = spec(stop=["END"], max_new_tokens=500)
    parent = shared.parent
    parent.sampling_params.temperature = 0.7
    parent.extra_key = "tenant"
    made = make_child(shared, [shared.member(3, (2,))], (1, 2), 20)
    params = made.sampling_params
    assert list(made.origin_input_ids) == [ord("Q"), 1, 2]
    assert (params.temperature, params.max_new_tokens, params.n, params.custom_params) == (0.7, 20, 1, None)
    assert params.stop_strs == ["END", "\n\n", "Step"]
    assert params.stop_str_max_len == 4
    assert params.stop_token_ids == {7}
    assert made.extra_key == "tenant"
    assert made.eos_token_ids == {EOS}
    # The client's own parameters are as they were.
    assert (parent.sampling_params.max_new_tokens, parent.sampling_params.stop_strs) == (500, ["END"])
    assert not parent.sampling_params.stop_token_ids


def test_the_child_of_a_prompt_looks_for_no_delimiter() -> None:
    shared = spec()
    made = make_child(shared, [shared.member(0, ())], (), 0)
    assert (made.sampling_params.max_new_tokens, made.sampling_params.stop_strs) == (0, [])


def test_seeds_differ_by_place_prompt_and_seed_and_are_what_they_were() -> None:
    prompt, other = child().spec.parent.origin_input_ids, request("x", "R").origin_input_ids
    places = ((), (0,), (1,), (0, 0), (0, 1), (1, 0))
    seeds = {child_seed(seed, ids, at) for seed in (0, 1, 2**63 - 1) for ids in (prompt, other) for at in places}
    assert len(seeds) == 36
    assert all(0 <= seed < 2**61 - 1 for seed in seeds)
    assert child_seed(1000, prompt, (3, 0)) == 50370761282220387
    assert child(3).sampling_params.sampling_seed == child_seed(5, prompt, (0, 3))


@pytest.mark.parametrize(
    ("reason", "end"),
    [
        (FINISH_ABORT("no memory"), StepEnd("failed", "no memory")),
        (FINISH_LENGTH(length=20), StepEnd("length")),
        (FINISH_MATCHED_TOKEN(matched=7), StepEnd("step")),
        (FINISH_MATCHED_TOKEN(matched=EOS), StepEnd("stop")),
        (FINISH_MATCHED_TOKEN(matched=9), StepEnd("stop")),
        (FINISH_MATCHED_STR(matched="\n\n"), StepEnd("step")),
        (FINISH_MATCHED_STR(matched="END"), StepEnd("stop", stop_text="END")),
        (FINISH_MATCHED_STR(matched="Step"), StepEnd("stop", stop_text="Step")),  # the client's own, too
        (FINISH_MATCHED_STR(matched=NAN_STOP), StepEnd("failed", "the policy model's logits are not finite")),
        (FINISHED_MATCHED_REGEX(matched="a+"), StepEnd("stop", stop_text="a+")),
        (None, StepEnd("failed", "unknown finish reason None")),
    ],
)
def test_ends_in_the_words_of_the_search(reason: Any, end: StepEnd) -> None:
    made = child(stop=["END", "Step"])
    made.finished_reason = reason
    assert step_end(made) == end


def test_a_delimiter_token_that_is_the_clients_own_stop_ends_the_answer() -> None:
    shared = spec()
    shared.parent.sampling_params.stop_token_ids = {7}
    made = make_child(shared, [shared.member(1, (0,))], (), 20)
    made.finished_reason = FINISH_MATCHED_TOKEN(matched=7)
    assert step_end(made) == StepEnd("stop")


def test_children_are_found_in_queue_and_batches_once_and_in_the_order_of_their_nodes() -> None:
    shared = spec()
    made = [make_child(shared, [shared.member(node, (node,))], (), 9) for node in (4, 1, 3, 2)]
    scheduler = SimpleNamespace(
        waiting_queue=[made[0], request("plain", "x", search=False)],
        running_batch=FakeBatch([made[1], made[2]]),
        last_batch=FakeBatch([made[2], made[3]]),
    )
    ids = {req.rid for req in made}
    assert children_in_engine(scheduler, ids) == [made[1], made[3], made[2], made[0]]
    assert children_in_engine(scheduler, {made[2].rid}) == [made[2]]
    scheduler.last_batch = None
    assert children_in_engine(scheduler, ids) == [made[1], made[2], made[0]]


def test_children_are_hidden_from_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = request("plain", "x", search=False)
    reqs = [child(), plain]
    assert without_children(reqs) == [plain]
    monkeypatch.setattr(children.ChildReq, "any_made", False)
    assert without_children(reqs) is reqs  # a process that never ran a search does not look

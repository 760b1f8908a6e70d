"""What fuzz, soak, capacity and fairness say about made-up runs: a broken rule must be seen."""

from __future__ import annotations

import json
import random
import time

import httpx
import pytest

from bench import capacity, fairness, soak
from bench.fuzz import FuzzReport, fault_of, outcome_of
from bench.hostile import PATHS, HostileRequest, hostile_request
from bench.soak import SoakReport, after_warm_up, slopes


def test_a_seed_names_the_hostile_requests() -> None:
    runs = [
        [hostile_request(rng) for _ in range(300)] for rng in (random.Random(3), random.Random(3), random.Random(4))
    ]
    assert runs[0] == runs[1] != runs[2]
    assert {request.path for request in runs[0]} == set(PATHS)
    assert max(len(request.shown()) for request in runs[0]) < 300


def test_hostile_requests_are_mostly_json_that_a_server_must_read() -> None:
    rng = random.Random(0)
    requests = [hostile_request(rng) for _ in range(300)]
    readable = [request for request in requests if request.fields()]
    assert 250 < len(readable) < 300


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"undocumented": ["POST /x: 500"]}, "5xx"),
        ({"unanswered": ["POST /x"]}, "no answer"),
        ({"ordinary": 3, "ordinary_failed": 1}, "1 of 3 ordinary requests failed"),
        ({"slowest_ordinary_s": 9.0}, "took 9.0 s"),
        ({"grown_mb": 9e3}, "memory grew"),
        ({"locks": 2}, "2 locks are left"),
    ],
)
def test_each_rule_of_a_fuzz_can_be_broken(broken: dict[str, object], said: str) -> None:
    assert FuzzReport(seed=0).breaches() == []
    (breach,) = FuzzReport(seed=0, **broken).breaches()  # type: ignore[arg-type]
    assert said in breach


GRAMMAR = "Grammar accept_token failed: Tokens not accepted: 0\nAccepted tokens: [29, 34]\nKey string: null"
UNFINISHED = "search failed: no trajectory was completed (kv_budget); raise kv_budget_tokens"
TOO_LATE = "deadline_s of 1e-300 passed before the search had any text; raise it, or send fewer requests at once"


@pytest.mark.parametrize(
    ("body", "status", "message", "name"),
    [
        ({"regex": "null"}, 500, GRAMMAR, "a grammar that no token of the model fits"),
        ({"sampling_params": {"ebnf": "x"}}, 500, GRAMMAR, "a grammar that no token of the model fits"),
        ({"prompt": "x"}, 500, GRAMMAR, None),
        ({"regex": "null"}, 503, GRAMMAR, None),
        ({"regex": "null"}, 500, "Grammar accept_token failed", None),
        ({"search_width": 4}, 500, UNFINISHED, "a search without an answer"),
        ({"sampling_params": {"custom_params": {}}}, 500, UNFINISHED, "a search without an answer"),
        ({"search_width": 4}, 504, f"{TOO_LATE}", "a deadline before any text"),
        ({"search_width": 4}, 500, f"{TOO_LATE}", None),
        ({"search_width": 4}, 500, f"{UNFINISHED} and more", None),
        ({"regex": "null"}, 500, UNFINISHED, None),
        ([], 500, UNFINISHED, None),
    ],
)
def test_a_documented_fault_is_known_by_field_and_message(
    body: object, status: int, message: str, name: str | None
) -> None:
    request = HostileRequest("/generate", json.dumps(body).encode())
    assert fault_of(request, status, message) == name


@pytest.mark.parametrize(
    ("status", "text", "outcome"),
    [
        (200, '{"choices": []}', (200, '{"choices": []}')),
        (200, "[1]", (200, "[1]")),
        (500, "Internal Server Error", (500, "Internal Server Error")),
        (500, '{"object": "error", "message": "no", "code": 7}', (500, "no")),
        (400, '{"error": {"message": "no", "code": 7}}', (400, "no")),
        (200, 'data: {"id": 1}\n\ndata: {"error": {"message": "no", "code": 500}}\n\ndata: [DONE]\n', (500, "no")),
        (200, 'data: {"error": {"message": "no", "code": null}}\n', (200, "no")),
    ],
)
def test_an_error_event_is_the_outcome_of_its_stream(status: int, text: str, outcome: tuple[int, str]) -> None:
    assert outcome_of(httpx.Response(status, text=text)) == outcome


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"errors": ["search 500"]}, "1 errors that nobody caused"),
        ({"ordinary": 3, "ordinary_failed": 1}, "ordinary requests failed"),
        ({"slopes_mb_per_min": {"scheduler": 3.0}, "memory_mb": {"scheduler": (900.0, 960.0)}}, "memory grows"),
        ({"locks": 1}, "1 locks are left"),
    ],
)
def test_each_rule_of_a_soak_can_be_broken(broken: dict[str, object], said: str) -> None:
    memory = {"python": (900.0, 940.0), "scheduler": (900.0, 960.0)}
    sound = SoakReport(minutes=1, seed=0, slopes_mb_per_min={"python": 9.0, "scheduler": 1.5}, memory_mb=memory)
    assert sound.breaches() == []
    (breach,) = SoakReport(minutes=1, seed=0, **broken).breaches()  # type: ignore[arg-type]
    assert said in breach


def test_a_soak_is_one_line_of_a_table() -> None:
    row = {**vars(SoakReport(minutes=3, seed=0)), "num_errors": 0, "ordinary": 9}
    row |= {"slopes_mb_per_min": {"sglang::sched": 0.25}, "memory_mb": {"sglang::sched": [900.0, 901.2]}}
    row["outcomes"] = {"search 200": 5, "search 429": 1, "search 504": 1, "left 200": 2}
    row["outcomes"] |= {"hostile 400": 7, "hostile 200": 1}
    line = soak.table([row]).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")][1:8] == ["3", "5", "2", "2", "8", "0", "9"]
    assert "| sched 900 to 901 | sched +0.2 |" in line


def test_memory_slopes_leave_the_warm_up_out() -> None:
    samples = [(60.0 * minute, {"a": 100.0 + 10 * minute, "b": 500.0 if minute < 2 else 50.0}) for minute in range(9)]
    assert slopes(after_warm_up(samples)) == pytest.approx({"a": 10.0, "b": 0.0}, abs=1e-6)
    assert slopes(samples[:2]) == {}


def test_only_a_deadline_makes_a_late_search_the_clients_own_doing() -> None:
    assert soak.is_expected({"search": {"deadline_s": 1.0}}, 504)
    assert [status for status in (200, 429, 504, 500, 400) if soak.is_expected({"search": {}}, status)] == [200, 429]


def test_requests_without_an_answer_are_errors_and_end_no_client() -> None:
    report = SoakReport(minutes=0, seed=0)
    clients = soak.SoakClients("http://127.0.0.1:1", report, time.monotonic() + 2.0, soak.WIDTHS)
    clients.run()
    assert {"search unanswered", "left unanswered", "hostile unanswered"} == set(report.outcomes)
    assert len(report.errors) == report.outcomes.total()


def capacity_row(policy: str, in_flight: int, rate: float, *flags: str) -> dict[str, object]:
    place = {"width": 64, "share": 0.25, "policy": policy, "in_flight": in_flight, "round": 0, "flags": list(flags)}
    return {**place, "pool_tokens": 9000, "problems_per_s": rate, "right": 3, "problems": 4}


def test_capacity_compares_each_policy_at_its_own_best() -> None:
    made = [capacity_row("rebase", 8, 0.04), capacity_row("rebase", 1, 0.1), capacity_row("ets b=4", 8, 0.2)]
    made.append(capacity_row("ets b=4", 8, 0.3, "--search-kv-pressure", "4"))
    rebase, ets, pressed = capacity.table(made).splitlines()[2:]
    assert "| rebase | 0.04 | 0.1 | 1 | 1.00x | 0.40 | 3 of 4 |" in rebase
    assert "| ets b=4 | 0.2 | 0.2 | 8 | 2.00x | 1.00 | 3 of 4 |" in ets
    assert "| ets b=4 --search-kv-pressure 4 | 0.3 |" in pressed


def test_fairness_shows_ratios_to_plain_sampling() -> None:
    made = [
        {"load": load, "width": 8, "algorithm": "rebase", "round": 0, "first_token_s": [first], "per_token_s": [0.1]}
        for load, first in (("search", 0.3), ("plain", 0.2), ("nothing", 0.1))
    ]
    head, *_, last = fairness.table(made).splitlines()
    assert "| search / plain |  | 1.50x |  | 1.00x |" in last
    assert head.count("|") == last.count("|")

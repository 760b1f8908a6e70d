"""Early stopping: what is settled stays, and what is likely is as likely as it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom

from sglang_ets.core.answer import Trajectory, aggregate, rank
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.stopping import Ballot, early_reason, highest_score, is_settled, probability

RULES = ("best", "majority", "weighted_majority")
AGGREGATIONS = ("last", "min", "mean", "prod")
MAX_STEPS = 6
INTEGERS = ("1", "2", "3")
ANSWERS = (*INTEGERS, "x", "y", None)
SCORES = st.integers(0, 20).map(lambda value: value / 20)
PATHS = st.lists(SCORES, min_size=1, max_size=3)


def config(answer: str = "majority", **fields: Any) -> SearchConfig:
    return SearchConfig(answer=answer, answer_pattern="boxed", max_steps=MAX_STEPS, **fields)  # type: ignore[arg-type]


def trajectory(number: int, answer: str | None, scores: list[float]) -> Trajectory:
    return Trajectory(number, (number,), f"{number} \\boxed{{{answer}}}" if answer else "none", tuple(scores), "stop")


def votes(*counts: int, num_left: int, scores: float = 1.0) -> Ballot:
    """`counts[i]` votes for the integer i."""
    answers = [str(place) for place, count in enumerate(counts) for _ in range(count)]
    return Ballot(tuple([scores] * len(answers)), tuple(answers), num_left, 1.0, scores)


@pytest.mark.parametrize("rule", AGGREGATIONS)
@given(begun=st.lists(SCORES, max_size=MAX_STEPS), to_come=st.lists(SCORES, max_size=MAX_STEPS))
def test_no_continuation_scores_higher_than_the_ceiling(rule: Any, begun: list[float], to_come: list[float]) -> None:
    whole = (begun + to_come)[: max(len(begun), MAX_STEPS)]
    if whole:
        assert aggregate(whole, rule) <= highest_score(begun, rule, MAX_STEPS) + 1e-12


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("answer", RULES)
@given(data=st.data())
def test_what_is_settled_no_vote_can_change(answer: str, aggregation: Any, data: st.DataObject) -> None:
    """Trajectories to come may have any answer, grow from any leaf, be made before others, and fail; texts may be joined."""
    equality = data.draw(st.sampled_from(["math", "text"]))
    settings = config(answer, score_aggregation=aggregation, answer_equality=equality)
    likely = st.sampled_from(ANSWERS) | st.just("1")
    complete = data.draw(st.lists(st.tuples(likely, PATHS), min_size=1, max_size=8))
    leaves = data.draw(st.lists(PATHS, min_size=1, max_size=3))
    to_come = data.draw(st.lists(st.tuples(likely, st.sampled_from(leaves), PATHS), max_size=4))
    ballot = Ballot(
        tuple(aggregate(scores, aggregation) for _, scores in complete),
        tuple(given for given, _ in complete),
        max(1, len(to_come)),
        max(highest_score(leaf, aggregation, MAX_STEPS) for leaf in leaves),
        max(aggregate(leaf, aggregation) for leaf in leaves),
    )
    if not is_settled(settings, ballot):
        return
    label = {"x": data.draw(st.sampled_from([*INTEGERS, "x"])), "y": data.draw(st.sampled_from([*INTEGERS, "x", "y"]))}
    label = {text: label.get(label.get(text, text), label.get(text, text)) for text in (*INTEGERS, "x", "y")}

    def same(texts: Any) -> list[int]:
        labels = [label[text] for text in texts]
        return [labels.index(one) for one in labels]

    join = same if equality == "math" else None
    early = rank([trajectory(n, *one) for n, one in enumerate(complete)], settings, join)[0]
    everything = [*complete, *((given, [*leaf, *rest]) for given, leaf, rest in to_come)]
    order = data.draw(st.permutations(range(len(everything))))
    whole = rank([trajectory(n, *everything[n]) for n in order], settings, join)[0]
    if answer == "best":
        assert (early.text, early.score) == (whole.text, whole.score) or early.score == whole.score
    else:
        assert early.answer is not None and whole.answer is not None
        assert same([early.answer, whole.answer]) == [0, 0] if join else early.answer == whole.answer


def test_a_majority_is_settled_when_no_rival_can_reach_it() -> None:
    assert is_settled(config(), votes(5, 2, num_left=2))
    assert not is_settled(config(), votes(5, 2, num_left=3)), "a tie falls by scores"
    assert not is_settled(config(), votes(2, num_left=2)), "a new answer may come"
    assert not is_settled(config(num_results=2), votes(9, 1, num_left=1)), "the second place may change"


def test_texts_that_may_be_equal_in_value_count_together() -> None:
    ballot = Ballot((1.0,) * 6, ("1", "1", "1", "1", "x", "y"), 1, 1.0, 1.0)
    assert is_settled(config(), ballot)
    assert not is_settled(config(), Ballot((1.0,) * 7, (*ballot.answers, "2"), 1, 1.0, 1.0))
    assert is_settled(config(answer_equality="text"), Ballot((1.0,) * 7, (*ballot.answers, "2"), 1, 1.0, 1.0))


def test_scores_beyond_the_range_settle_nothing() -> None:
    assert not is_settled(config("weighted_majority"), votes(5, num_left=1, scores=2.0))
    assert not is_settled(config("weighted_majority"), votes(5, num_left=1, scores=-1.0))
    assert is_settled(config("weighted_majority"), votes(5, num_left=1, scores=0.9))


@pytest.mark.parametrize(("first", "second", "num_left"), [(3, 1, 6), (4, 4, 8), (5, 0, 11), (9, 8, 40), (2, 1, 1)])
def test_the_probability_of_a_majority_is_that_of_a_beta_binomial(first: int, second: int, num_left: int) -> None:
    drawn = betabinom(num_left, 1 + first, 1 + second)
    wins = sum(drawn.pmf(k) for k in range(num_left + 1) if first + k > second + num_left - k)
    expected = wins if first > second else 0.0
    assert probability(config(), votes(first, second, num_left=num_left)) == pytest.approx(expected)
    assert probability(
        config("weighted_majority"), votes(first, second, num_left=num_left, scores=1.0)
    ) == pytest.approx(expected)


def test_weak_votes_that_agree_do_not_make_a_winner_likely_while_a_strong_one_may_come() -> None:
    """What ended searches of `best_of_n` on the embedded task on wrong answers: the first to end scored .02."""
    rule = config("weighted_majority", early_stop="likely")
    weak, agreeing = (0.02, 0.02, 0.01, 0.02, 0.01), ("46",) * 5
    among_weak = Ballot(weak, agreeing, 3, 1.0, 0.02)
    assert early_reason(rule, among_weak) == "likely"
    assert probability(rule, replace(among_weak, promise=0.9)) < 0.8, "a strong one grows"
    assert probability(rule, Ballot((*weak, 0.9), (*agreeing, None), 3, 1.0, 0.02)) < 0.8, "a strong one came"


def test_the_best_so_far_is_likely_the_best_of_all() -> None:
    assert probability(config("best"), votes(19, num_left=1, scores=0.5)) == pytest.approx(0.95)
    assert probability(config("best"), Ballot((), (), 4, 1.0, 0.0)) == 0.0


def test_each_rule_stops_where_it_says() -> None:
    ballot = votes(9, 1, num_left=8)
    reasons = {name: early_reason(config(early_stop=name), ballot) for name in ("off", "settled", "likely")}
    assert reasons == {"off": None, "settled": None, "likely": "likely"}
    assert early_reason(config(early_stop="likely", early_stop_probability=1.0), ballot) is None
    assert early_reason(config(early_stop="likely"), votes(9, 1, num_left=1)) == "settled"
    assert early_reason(config(early_stop="off"), votes(9, 1, num_left=1)) is None

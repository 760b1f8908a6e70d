"""Where searches that ran to their end could have ended earlier, what that saves, and whether `likely` is as likely as it says.

    sglang-ets run --data embedded --width 16 --algorithm best_of_n rebase ets --set early_stop=off --out trees.jsonl
    python -m bench.studies.stopping trees.jsonl

The trees are those that runs saved, of any model (`bench.real_model --trees` saves them too). A search is gone through again
on paper: after each level, or with `best_of_n` after each trajectory, the project's own rule says whether it may end, and its
answer then is held against that of the whole search. Answers are one vote if their texts are equal. All trajectories of
`best_of_n` are taken to decode in step, a token each at a time. A width and policy is a row of `--out`; beside what each rule
saves and changes stands how often the winner of a moment stayed the winner, by the probability that it had then.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from bench import rows
from bench.studies import saved
from bench.studies.saved import Key, key_of
from bench.trees import Node, path_to, trajectory_text
from sglang_ets.core.answer import Trajectory, aggregate, rank
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.patterns import extract_answer
from sglang_ets.core.stopping import MAX_SCORE, MIN_SCORE, Ballot, early_reason, highest_score, probability
from sglang_ets.math_process import MathProcess
from sglang_ets.tools.grading import grade
from sglang_ets.tools.run import EMBEDDED

RULES: dict[str, dict[str, Any]] = {
    "off": {"early_stop": "off"},
    "settled": {"early_stop": "settled"},
    "likely 0.95": {"early_stop": "likely", "early_stop_probability": 0.95},
    "likely 0.8": {"early_stop": "likely", "early_stop_probability": 0.8},
}
BINS = (0.5, 0.8, 0.95, 1.0)
FREE = "best_of_n"


@dataclass(frozen=True)
class Moment:
    """When a search may end: what is complete, and what was generated until then."""

    ballot: Ballot
    answer: str | None
    tokens: int
    decode_steps: int


def config_of(row: Mapping[str, Any]) -> SearchConfig:
    """The settings of a row of `sglang-ets run`, as far as they decide an answer."""
    defaults = {"answer_pattern": "the_answer_is", "answer": "weighted_majority"} if row["data"] == EMBEDDED else {}
    given = json.loads(row["search"])
    own = {
        name: given[name] for name in ("answer", "answer_pattern", "score_aggregation", "max_steps") if name in given
    }
    config = SearchConfig.from_request(row["width"], own, defaults, n=None, max_tokens=None, seed=None)
    return replace(config, answer_equality="text")


class Replay:
    """One search that ran to its end, to be looked at from any moment of it.

    `is_free`: trajectories do not wait for each other, so time is tokens of a trajectory; else it is levels.
    """

    def __init__(self, nodes: Sequence[Node], config: SearchConfig, *, is_free: bool) -> None:
        self._config, self._is_free = config, is_free
        self._steps = [node for node in nodes if node["token_ids"]]
        self._by_id = {node["id"]: node for node in self._steps}
        self._trajectories = [
            Trajectory(end["id"], (), trajectory_text(end, self._by_id), self._scores(end), "stop")
            for end in self._steps
            if end["state"] == "complete"
        ]
        self._time_of = {node["id"]: self._time(node) for node in self._steps}
        self._next_time: dict[int, int] = {}  # when the first child of a node had ended
        for node in self._steps:
            time = self._time_of[node["id"]]
            self._next_time[node["parent"]] = min(time, self._next_time.get(node["parent"], time))

    def _time(self, node: Node) -> int:
        if self._is_free:
            return sum(len(step["token_ids"]) for step in path_to(node, self._by_id))
        return int(node["depth"])

    def moments(self) -> list[Moment]:
        """Every moment at which it may end, in order; the last is its end. None if no trajectory was completed."""
        return [self._moment(now) for now in sorted({self._time_of[one.node_id] for one in self._trajectories})]

    def _moment(self, now: int) -> Moment:
        config, rule = self._config, self._config.score_aggregation
        done = [one for one in self._trajectories if self._time_of[one.node_id] <= now]
        growing = [self._scores(s) for s in self._steps if s["state"] != "complete" and self._grows(s, now)]
        ballot = Ballot(
            tuple(aggregate(one.step_scores, rule) for one in done),
            tuple(extract_answer(one.text, config.answer_pattern) for one in done),
            len(self._trajectories) - len(done),
            max(
                (highest_score(own, rule, config.max_steps) for own in growing), default=MAX_SCORE
            ),  # no step has ended
            max((aggregate(own, rule) for own in growing), default=MIN_SCORE),
        )
        return Moment(ballot, rank(done, config)[0].answer, *self._cost(now))

    def _grows(self, node: Node, now: int) -> bool:
        """Whether it is the last step that its trajectory has then; a level's are not selected from yet."""
        time = self._time_of[node["id"]]
        return time <= now < self._next_time.get(node["id"], 0) if self._is_free else time == now

    def _scores(self, node: Node) -> tuple[float, ...]:
        return tuple(step["score"] for step in path_to(node, self._by_id) if step["score"] is not None)

    def _cost(self, now: int) -> tuple[int, int]:
        """Tokens generated until then, and decode steps that took."""
        if self._is_free:
            sizes = [(len(node["token_ids"]), self._time_of[node["id"]]) for node in self._steps]
            return sum(min(size, max(0, now - time + size)) for size, time in sizes), now
        levels: dict[int, list[int]] = defaultdict(list)
        for node in self._steps:
            if node["depth"] <= now:
                levels[node["depth"]].append(len(node["token_ids"]))
        return sum(map(sum, levels.values())), sum(map(max, levels.values()))


def ends(found: Sequence[Moment], config: SearchConfig) -> Iterator[tuple[str, Moment]]:
    """Where each rule ends the search."""
    for name, rule in RULES.items():
        own = replace(config, **rule)
        yield name, next((moment for moment in found[:-1] if early_reason(own, moment.ballot)), found[-1])


def figures(made: Sequence[Mapping[str, Any]], judge: MathProcess) -> dict[Key, dict[str, Any]]:
    """Sums over the searches of each width and policy, by rule; and moments by the probability of their winner."""
    sums: dict[Key, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    kept: dict[Key, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for row in made:
        search, config = row["search_result"], config_of(row)
        key = key_of(row)
        found = Replay(search["tree"]["nodes"], config, is_free=search["algorithm"] == FREE).moments()
        if not found:
            continue  # no trajectory was completed
        whole = found[-1]
        for name, end in ends(found, config):
            verdicts = {
                "changed": end.answer != whole.answer,
                "right": grade(judge, end.answer, row["expected"]).is_right,
                "ended_early": end is not whole,
            }
            counts = {verdict: int(holds) for verdict, holds in verdicts.items()}
            sums[key][name].update(counts, searches=1, tokens=end.tokens, decode_steps=end.decode_steps)
        for moment in found[:-1]:
            chance = probability(config, moment.ballot)
            low = max((edge for edge in BINS if edge <= chance), default=None)
            if low is not None:
                kept[key][f"{low:g}"][0] += int(moment.answer == whole.answer)
                kept[key][f"{low:g}"][1] += 1
    return {
        key: {"rules": {name: dict(own) for name, own in by_rule.items()}, "kept": dict(kept[key])}
        for key, by_rule in sums.items()
    }


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """What each rule saves and changes; then, by probability, how often a winner stayed."""
    latest = {(row["data"], row["width"], row["policy"]): row for row in done}
    header = ["data", "width", "policy", "`early_stop`", "ended early", "answers changed", "right", "tokens saved",
              "decode steps saved"]  # fmt: skip
    cells: list[list[Any]] = []
    stayed: list[list[Any]] = []
    for (data, width, policy), row in latest.items():
        off = row["rules"]["off"]
        for name, own in row["rules"].items():
            saved = [f"{1 - own[cost] / off[cost]:.1%}" for cost in ("tokens", "decode_steps")]
            counts = [f"{own[count]}/{own['searches']}" for count in ("ended_early", "changed", "right")]
            cells.append([data, width, policy, name, *counts, *saved])
        shares = [row["kept"].get(f"{low:g}", [0, 0]) for low in BINS]
        stayed.append([data, width, policy, *(f"{won}/{all_}" if all_ else "" for won, all_ in shares)])
    names = [*(f"{low:g} to {high:g}" for low, high in pairwise(BINS)), "settled"]
    return "\n\n".join([rows.markdown(header, cells), rows.markdown(["data", "width", "policy", *names], stayed)])


def _figures(made: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    judge = MathProcess()
    try:
        return figures(made, judge)
    finally:
        judge.stop()


if __name__ == "__main__":
    saved.main("stopping_replay", __doc__, _figures, table)

"""Settings of one search: frozen, validated when made, and able to cross a process boundary as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Algorithm = Literal["best_of_n", "beam", "dvts", "rebase", "ets_kv", "ets"]
KvCost = Literal["tokens", "nodes"]
Aggregation = Literal["last", "min", "mean", "prod"]
AnswerRule = Literal["best", "majority", "weighted_majority"]
Coverage = Literal["uniform", "reward"]
AnswerEquality = Literal["math", "text"]

MIN_WIDTH, MAX_WIDTH = 2, 1024
MAX_STEPS_LIMIT = 1024
MAX_PATTERN_CHARS = 500
MAX_DELIMITERS = 16
MAX_WEIGHT = 1e6
PUBLISHED_COST_WEIGHT, REWARD_COST_WEIGHT = 1.0, 4.0
# Coverage weight by width, as published (field note 1; SqueezeAILab/ETS).
DIVERSITY_WEIGHTS = {16: 1.5, 64: 1.4, 256: 1.45}

# What a request calls a field, where that differs from our name.
REQUEST_NAMES = {"width": "search_width", "num_results": "n"}
# Fields that stand beside `search` in a request, not inside it.
OUTER_FIELDS = ("width", "num_results", "max_tokens", "seed")


@dataclass(frozen=True)
class SearchConfig:
    """One search's settings.

    Raises:
        ValueError: a field breaks its rule; the message is one sentence with the field, the rule, the value and a remedy.
    """

    algorithm: Algorithm = "ets"
    width: int = 16  # trajectories to grow, 2..1024
    num_results: int = 1  # ranked answers returned, 1..width
    max_tokens: int = 1024  # policy model tokens of one trajectory (ETS: 1024)
    max_steps: int = 25  # depth of the tree (ETS: 25)
    max_step_tokens: int = 256  # policy model tokens of one step (ETS: 256)
    step_delimiter: tuple[str | int, ...] = ("\n\n",)  # texts or token ids that end a step
    kv_cost_weight: float | None = None  # lambda_b: worth of the level's KV against its score; None: see `cost_weight`
    diversity_weight: float | None = None  # lambda_d: worth of covering every cluster; None: see `coverage_weight`
    coverage: Coverage = "reward"  # what a cluster is worth: the reward of its leaves, or as much as any other (ETS)
    kv_cost: KvCost = "tokens"  # what kept KV is counted in
    cluster_distance: float = 0.3  # cosine distance below which steps mean the same, 0..2 (ETS: 0.05 with a BERT)
    center_embeddings: bool = (
        True  # distances are measured from the mean of the search's steps so far, not from the origin
    )
    rebase_temperature: float = 0.2  # softmax temperature over step scores (REBASE: 0.2)
    score_aggregation: Aggregation = "last"  # step scores -> score of a trajectory, for ranking
    answer: AnswerRule = "best"
    answer_pattern: str = "boxed"  # a preset of `answer.PRESETS`, or a regular expression with one group
    answer_equality: AnswerEquality = "math"  # votes of answers equal in value are one (math-verify), or of equal texts
    kv_budget_tokens: int | None = None  # hard limit on KV held beyond the prompt; ets and ets_kv only
    deadline_s: float | None = None  # the search answers with what it has after this long
    return_tree: bool = False
    return_embeddings: bool = False  # each node of the returned tree carries its step's embedding
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("algorithm", self.algorithm, get_args(Algorithm))
        _integer("width", self.width, MIN_WIDTH, MAX_WIDTH)
        _integer("num_results", self.num_results, 1, self.width)
        _integer("max_tokens", self.max_tokens, 1, None)
        _integer("max_steps", self.max_steps, 1, MAX_STEPS_LIMIT)
        _integer("max_step_tokens", self.max_step_tokens, 1, None)
        _delimiters(self.step_delimiter)
        for name in ("kv_cost_weight", "diversity_weight"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0.0, MAX_WEIGHT)
        _choice("coverage", self.coverage, get_args(Coverage))
        _choice("kv_cost", self.kv_cost, get_args(KvCost))
        _number("cluster_distance", self.cluster_distance, 0.0, 2.0)
        _number("rebase_temperature", self.rebase_temperature, 1e-3, 1e3)
        _choice("score_aggregation", self.score_aggregation, get_args(Aggregation))
        _choice("answer", self.answer, get_args(AnswerRule))
        _choice("answer_equality", self.answer_equality, get_args(AnswerEquality))
        _pattern(self.answer_pattern)
        self._check_limits()

    def _check_limits(self) -> None:
        if self.kv_budget_tokens is not None:
            _integer("kv_budget_tokens", self.kv_budget_tokens, 1, None)
            if self.algorithm not in ("ets", "ets_kv"):
                raise ValueError(
                    f"kv_budget_tokens needs algorithm ets or ets_kv, got {self.kv_budget_tokens} with "
                    f"{self.algorithm!r}; change the algorithm or leave the budget out"
                )
            if self.kv_cost != "tokens":
                raise _wrong("kv_cost", "tokens when kv_budget_tokens is set", self.kv_cost, "a budget counts tokens")
        if self.deadline_s is not None:
            _number("deadline_s", self.deadline_s, 1e-3, 1e6)
        for name in ("center_embeddings", "return_tree"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "true or false", getattr(self, name), "send a JSON boolean")
        if not isinstance(self.return_embeddings, bool) or (self.return_embeddings and not self.return_tree):
            rule = "true or false, and false without return_tree"
            raise _wrong("return_embeddings", rule, self.return_embeddings, "set return_tree to true as well")
        _integer("seed", self.seed, 0, 2**63 - 1)

    @property
    def is_solved(self) -> bool:
        """Whether an integer program chooses the leaves."""
        return self.algorithm in ("ets_kv", "ets")

    @property
    def _covers_by_reward(self) -> bool:
        return self.algorithm == "ets" and self.coverage == "reward"

    @property
    def cost_weight(self) -> float:
        """`kv_cost_weight`, or 4 where coverage is by reward (README, results at width 64) and the published 1 elsewhere."""
        if self.kv_cost_weight is not None:
            return self.kv_cost_weight
        return REWARD_COST_WEIGHT if self._covers_by_reward else PUBLISHED_COST_WEIGHT

    @property
    def coverage_weight(self) -> float:
        """`diversity_weight`, or `cost_weight` where coverage is by reward, or the published one of the nearest width."""
        if self.diversity_weight is not None:
            return self.diversity_weight
        if self._covers_by_reward:
            return self.cost_weight
        nearest = min(DIVERSITY_WEIGHTS, key=lambda width: (abs(width - self.width), width))
        return DIVERSITY_WEIGHTS[nearest]

    @classmethod
    def from_request(
        cls,
        search_width: int,
        search: Mapping[str, Any] | None,
        defaults: Mapping[str, Any],
        *,
        n: int | None,
        max_tokens: int | None,
        seed: int | None,
    ) -> SearchConfig:
        """Settings of a request: its own values over the server's defaults over the fields' defaults.

        `defaults` may hold flags that are no search settings; they are passed over. A value of None in `search` means
        "not given", except where None is a value of the field.

        Raises:
            ValueError: an unknown key inside `search`, or a value that breaks its rule.
        """
        inner = [field.name for field in fields(cls) if field.name not in OUTER_FIELDS]
        given = dict(search or {})
        unknown = [key for key in given if key not in inner]
        if unknown:
            raise ValueError(f"search has no setting {unknown[0]!r}; valid settings are {', '.join(inner)}")
        values = {f.name: defaults[f.name] for f in fields(cls) if defaults.get(f.name) is not None}
        values |= {key: value for key, value in given.items() if value is not None or key in NULLABLE}
        outer = {"num_results": n, "max_tokens": max_tokens, "seed": seed}
        values |= {key: value for key, value in outer.items() if value is not None}
        values["width"] = search_width
        if "step_delimiter" in values:
            values["step_delimiter"] = _as_tuple(values["step_delimiter"])
        return cls(**values)

    def to_json(self) -> str:
        """Plain text that `from_json` reads back to an equal value."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SearchConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not a JSON object with our fields, or a value breaks its rule.
        """
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError(
                "search settings must be a JSON object, got a text nested too deep; send it flat"
            ) from None
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or any(key not in names for key in values):
            raise ValueError(f"search settings must be a JSON object with the fields {', '.join(names)}, got {text!r}")
        if "step_delimiter" in values:
            values["step_delimiter"] = _as_tuple(values["step_delimiter"])
        return cls(**values)


def check_width(config: SearchConfig, max_width: int) -> None:
    """Raises:
    ValueError: the search is wider than this server allows.
    """
    if config.width > max_width:
        raise ValueError(
            f"search_width must be at most {max_width} on this server, got {config.width}; "
            "ask for less or raise --search-max-width"
        )


NULLABLE = ("kv_cost_weight", "diversity_weight", "kv_budget_tokens", "deadline_s")


def _wrong(field: str, rule: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"{REQUEST_NAMES.get(field, field)} must be {rule}, got {value!r}; {remedy}")


def _choice(field: str, value: object, names: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in names:
        raise _wrong(field, f"one of {', '.join(names)}", value, "choose one of these names")


def _integer(field: str, value: object, low: int, high: int | None) -> None:
    rule = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise _wrong(field, rule, value, "choose a value in that range")


def _number(field: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        raise _wrong(field, f"a number from {low:g} to {high:g}", value, "choose a value in that range")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer can read it: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _delimiters(value: object) -> None:
    rule = f"1 to {MAX_DELIMITERS} texts or token ids"
    if not isinstance(value, tuple) or not 1 <= len(value) <= MAX_DELIMITERS:
        raise _wrong("step_delimiter", rule, value, 'for example ["\\n\\n"]')
    for item in value:
        is_text = isinstance(item, str) and item != "" and _is_unicode(item)
        is_id = isinstance(item, int) and not isinstance(item, bool) and item >= 0
        if not is_text and not is_id:
            raise _wrong("step_delimiter", rule, value, f"{item!r} is neither a non-empty text nor a token id")


def _pattern(value: object) -> None:
    # Whether it compiles is checked by `answer.compile_pattern`, which knows the presets and the regex engine.
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_PATTERN_CHARS:
        rule = f"a preset name or a regular expression of 1 to {MAX_PATTERN_CHARS} characters"
        raise _wrong("answer_pattern", rule, value, "for example boxed")
    from sglang_ets.core.patterns import check_pattern

    check_pattern(value)

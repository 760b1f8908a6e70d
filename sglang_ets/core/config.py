"""Settings of one search: frozen, validated when made, and able to cross a process boundary as plain text.

`python -m sglang_ets.core.config` prints the table of docs/api.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from sglang_ets.core import registry
from sglang_ets.core.patterns import PRESETS, check_pattern
from sglang_ets.core.presets import PUBLISHED_COST_WEIGHT, Preset, preset_values, published_diversity_weight
from sglang_ets.core.settings import (
    MAX_COUNT,
    as_fields,
    check_fields,
    is_unicode,
    markdown_table,
    setting,
    settings_of,
    shown,
    wrong,
)

KvCost = Literal["tokens", "nodes"]
Aggregation = Literal["last", "min", "mean", "prod"]
AnswerRule = Literal["best", "majority", "weighted_majority"]
Coverage = Literal["uniform", "reward"]
AnswerEquality = Literal["math", "text"]
EarlyStop = Literal["settled", "likely", "off"]

MIN_WIDTH, MAX_WIDTH = 2, 1024
MAX_STEPS_LIMIT = 1024
MAX_DELIMITERS, MAX_DELIMITER_CHARS = 16, 64
MAX_WEIGHT = 1e6
MAX_JSON_CHARS = 20_000  # of all settings as text: more than the longest that the rules allow
# By coverage; see "Weights for a model that nobody knows" in docs/results.md.
COST_WEIGHTS = {"uniform": 1.5, "reward": 4.0}


class Weights(NamedTuple):
    """The weights in force: what a search was given, or what its width and coverage mean."""

    kv_cost_weight: float  # lambda_b of the paper
    diversity_weight: float  # lambda_d


def _check_delimiters(value: object) -> None:
    remedy = 'for example ["\\n\\n"]'
    if not isinstance(value, tuple) or not 1 <= len(value) <= MAX_DELIMITERS:
        raise wrong("step_delimiter", f"1 to {MAX_DELIMITERS} texts or token ids", value, remedy)
    for item in value:
        is_text = isinstance(item, str) and 1 <= len(item) <= MAX_DELIMITER_CHARS and is_unicode(item)
        is_id = isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_COUNT
        if not is_text and not is_id:
            rule = f"texts of 1 to {MAX_DELIMITER_CHARS} whole characters or token ids"
            raise wrong("step_delimiter", rule, item, remedy)


@dataclass(frozen=True)
class SearchConfig:
    """One search's settings. Each field is the only place where its rule, help, flag and names stand.

    Raises:
        ValueError: a field breaks its rule; the message is one sentence with the field, the rule, the value and a remedy.
    """

    algorithm: str = setting(
        "ets", "how leaves are kept", default_text="the server's `--search`", choices=registry.names
    )
    width: int = setting(
        16,
        "trajectories to grow; absent or 1: an ordinary request",
        low=MIN_WIDTH,
        high=MAX_WIDTH,
        request_name="search_width",
        is_outer=True,
        default_text="an ordinary request",
        values_text=f"{MIN_WIDTH} to `--search-max-width`",
    )
    num_results: int = setting(
        1,
        "ranked answers to return, at most the finished trajectories; repeated texts come after all others",
        low=1,
        high=MAX_WIDTH,
        request_name="n",
        is_outer=True,
        values_text="1 to `search_width`",
    )
    max_tokens: int = setting(
        1024,
        "length of one trajectory at most",
        low=1,
        unit="tokens",
        is_outer=True,
        has_flag=True,
        default_text="`1024`, embedded task `512`; half of the context at most",
    )
    max_steps: int = setting(25, "steps of one trajectory at most", low=1, high=MAX_STEPS_LIMIT, has_flag=True)
    max_step_tokens: int = setting(
        256,
        "length of one step at most",
        low=1,
        unit="tokens",
        has_flag=True,
        default_text="`256`, embedded task `64`",
    )
    step_delimiter: tuple[str | int, ...] = setting(
        ("\n\n",),
        "texts or token ids that end a step",
        has_flag=True,
        default_text='`"\\n\\n"`, embedded task `"\\n"`',
        values_text=f"up to {MAX_DELIMITERS} texts (up to {MAX_DELIMITER_CHARS} characters) or token ids",
        json_type=str | int | list[str | int],
        check=_check_delimiters,
    )
    kv_cost_weight: float | None = setting(
        None,
        "weight of the KV that must be retained (`ets`, `ets_kv`; lambda_b of the paper)",
        low=0.0,
        high=MAX_WEIGHT,
        has_flag=True,
        default_text='1.5; 4 for `coverage: "reward"`; 1 for `ets_kv`',
    )
    diversity_weight: float | None = setting(
        None,
        "weight of covered clusters (`ets`; lambda_d)",
        low=0.0,
        high=MAX_WEIGHT,
        has_flag=True,
        default_text='as published, 1.4 to 1.5 by width; as `kv_cost_weight` for `coverage: "reward"`',
    )
    coverage: Coverage = setting(
        "uniform",
        "what a covered cluster is worth: the same as any other, or the reward of its leaves",
        has_flag=True,
        default_text="`uniform`, embedded task `reward`",
    )
    kv_cost: KvCost = setting("tokens", "what retained KV is counted in; as published: nodes", has_flag=True)
    cluster_distance: float = setting(
        0.1,
        "cosine distance below which two steps mean the same",
        low=0.0,
        high=2.0,
        has_flag=True,
        default_text="`0.1`, embedded task `0.3`",
    )
    center_embeddings: bool = setting(
        True, "measure that distance from the mean of the search's steps so far, not from the origin"
    )
    rebase_temperature: float = setting(
        0.2, "temperature of the softmax over step scores", low=1e-3, high=1e3, has_flag=True
    )
    score_aggregation: Aggregation = setting("last", "step scores to the score of a trajectory", has_flag=True)
    answer: AnswerRule = setting(
        "best", "how the results are ranked", has_flag=True, default_text="`best`, embedded task `weighted_majority`"
    )
    answer_pattern: str = setting(
        "boxed",
        "where the answer stands in a trajectory",
        has_flag=True,
        default_text="`boxed`, embedded task `the_answer_is`",
        values_text="`boxed`, `the_answer_is`, `gsm8k`, `last_number`, or a regular expression with one group",
        check=check_pattern,
    )
    answer_equality: AnswerEquality = setting(
        "math", "which answers are one vote: those equal in value (math-verify), or equal texts"
    )
    preset: Preset = setting(
        "default", "settings by one word: ours, or everything as published; each setting of its own wins", has_flag=True
    )
    early_stop: EarlyStop = setting(
        "settled",
        "end before the last trajectory when no vote to come can change the first answer (needs `n` 1), or when it is likely "
        "that none will",
        has_flag=True,
    )
    early_stop_probability: float = setting(
        0.95, "how likely that must be for `likely`", low=0.5, high=1.0, has_flag=True
    )
    speculate: bool = setting(
        False,
        "begin steps of the best leaves in rows that wait for the longest steps of a level; the tree is the same",
        has_flag=True,
    )
    max_total_tokens: int | None = setting(
        None,
        "tokens that all trajectories together may generate; as they run out the search narrows",
        low=1,
        unit="tokens",
    )
    kv_budget_tokens: int | None = setting(
        None, "hard limit on KV beyond the prompt (`ets`, `ets_kv`)", low=1, unit="tokens"
    )
    deadline_s: float | None = setting(
        None, "answer with the best so far after this long", low=1e-3, high=1e6, unit="seconds"
    )
    return_tree: bool = setting(False, "return the whole tree in the figures")
    return_embeddings: bool = setting(False, "with the tree, the embedding of each step")
    seed: int = setting(0, "seed of the search", low=0, high=2**63 - 1, is_outer=True, default_text="a fresh one")
    policy_settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # the algorithm's own; a request has them by its name

    def __post_init__(self) -> None:
        check_fields(self)
        registry.make(self.algorithm, self.policy_settings)  # refuses what the policy does not take
        if self.num_results > self.width:
            raise wrong("n", f"at most search_width, {self.width}", self.num_results, "ask for fewer or search wider")
        if self.kv_budget_tokens is not None and not self.is_solved:
            raise ValueError(
                f"kv_budget_tokens needs algorithm ets or ets_kv, got {self.kv_budget_tokens} with "
                f"{self.algorithm!r}; change the algorithm or leave the budget out"
            )
        if self.kv_budget_tokens is not None and self.kv_cost != "tokens":
            remedy = "set it to tokens, or leave kv_budget_tokens out"
            raise wrong("kv_cost", "tokens when kv_budget_tokens is set", self.kv_cost, remedy)
        if self.return_embeddings and not self.return_tree:
            raise wrong("return_embeddings", "false without return_tree", True, "set return_tree to true as well")

    @cached_property
    def policy(self) -> Any:
        """The `SelectionPolicy` of the algorithm, with its own settings."""
        return registry.make(self.algorithm, self.policy_settings)

    @property
    def reads_costs(self) -> bool:
        """Whether the policy reads what the leaves cost."""
        return "costs" in registry.reads(self.algorithm)

    @property
    def reads_embeddings(self) -> bool:
        """Whether the policy reads what the leaves' last steps mean."""
        return "embeddings" in registry.reads(self.algorithm)

    @property
    def num_pruned_shown(self) -> int:
        """Pruned leaves that a level holds at most beside its own; 0: what is pruned does not come back."""
        return registry.num_pruned_shown(self.policy, self.width)

    @property
    def is_solved(self) -> bool:
        """Whether an integer program chooses the leaves."""
        return self.algorithm in ("ets_kv", "ets")

    @property
    def preset_settings(self) -> dict[str, Any]:
        """What the preset sets, with the values in force."""
        return {name: getattr(self, name) for name in preset_values(self.preset, self.width)}

    @property
    def has_own_pattern(self) -> bool:
        """Whether a client's expression finds the answers: it may take its time, so it is not run on the scheduler loop."""
        return self.answer_pattern not in PRESETS

    @property
    def weights(self) -> Weights:
        """The weights in force: those given, and for one that is None the default that fits the others.

        Coverage by reward weighs as much as KV; any other coverage as published for the nearest width.
        """
        is_by_reward = self.algorithm == "ets" and self.coverage == "reward"
        kv = self.kv_cost_weight
        if kv is None:
            kv = COST_WEIGHTS[self.coverage] if self.algorithm == "ets" else PUBLISHED_COST_WEIGHT
        diversity = self.diversity_weight
        if diversity is None:
            diversity = kv if is_by_reward else published_diversity_weight(self.width)
        return Weights(kv, diversity)

    @classmethod
    def of_defaults(cls, defaults: Mapping[str, Any]) -> SearchConfig:
        """Settings of a request that gives none of its own; raises as `from_request` does."""
        return cls.from_request(MIN_WIDTH, None, defaults, n=None, max_tokens=None, seed=None)

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
        most_tokens: int | None = None,
    ) -> SearchConfig:
        """Settings of a request: its own values over its preset over the server's flags over the server's preset.

        Without `max_tokens` of its own, a trajectory may have `most_tokens` at most, whatever the defaults say.

        `defaults` may hold flags that are no search settings; they are passed over. A value of None in `search` means
        "not given", except where None is a value of the field.

        Raises:
            ValueError: an unknown key inside `search`, or a value that breaks its rule.
        """
        settings = settings_of(cls)
        inner = {item.name: item for item in settings if not item.about.is_outer}
        given = search or {}
        unknown = next((key for key in given if key not in inner and key not in registry.names()), None)
        if unknown is not None:
            beside = next((i for i in settings if i.about.is_outer and unknown in (i.name, i.request_name)), None)
            remedy = f"valid settings are {', '.join(inner)}"
            if beside is not None:
                remedy = f"{beside.request_name} stands beside search, not inside it; move it there"
            raise ValueError(f"search has no setting {shown(unknown)}; {remedy}")
        values = {item.name: defaults[item.name] for item in settings if defaults.get(item.name) is not None}
        if given.get("preset") is None:
            values = preset_values(values.get("preset"), search_width) | values
        values |= preset_values(given.get("preset"), search_width)
        if most_tokens is not None:
            values["max_tokens"] = min(values.get("max_tokens", cls.max_tokens), most_tokens)
        values |= {
            key: value for key, value in given.items() if key in inner and (value is not None or inner[key].is_nullable)
        }
        values["policy_settings"] = _policy_settings(values.get("algorithm", cls.algorithm), given, defaults)
        outer = {"num_results": n, "max_tokens": max_tokens, "seed": seed}
        values |= {key: value for key, value in outer.items() if value is not None}
        return cls(**as_fields(settings, {**values, "width": search_width}))

    def to_json(self) -> str:
        """Plain text that `from_json` reads back to an equal value."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SearchConfig:
        """Read what `to_json` wrote. The text may also come from a client.

        Raises:
            ValueError: not a JSON object with our fields, or a value breaks its rule.
        """
        settings = settings_of(cls)
        names = [*(item.name for item in settings), "policy_settings"]
        if len(text) > MAX_JSON_CHARS:
            rule = f"at most {MAX_JSON_CHARS} characters of JSON"
            raise ValueError(f"search settings must be {rule}, got {len(text)}; leave out what is not needed")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):  # the text is bounded, its depth and its digits are not
            values = None
        if not isinstance(values, dict) or any(key not in names for key in values):
            fields_text = ", ".join(names)
            raise ValueError(
                f"search settings must be a JSON object with the fields {fields_text}, got {shown(text)}; use these names"
            )
        return cls(**as_fields(settings, values))


def _policy_settings(algorithm: object, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The algorithm's own settings: those of the request over the server's flags, which are named `algorithm.setting`.

    Raises:
        ValueError: settings of another policy, or no object.
    """
    for name in given:
        if name in registry.names() and name != algorithm:
            raise ValueError(
                f"{name} in search needs algorithm {name!r}, got {shown(algorithm)}; name it, or leave {name} out"
            )
    if not isinstance(algorithm, str) or algorithm not in registry.names():
        return {}  # refused with the other fields
    own = given.get(algorithm)
    if own is not None and not isinstance(own, dict):
        raise wrong(algorithm, "an object of the policy's own settings", own, f"for example {{{algorithm!r}: {{}}}}")
    names = [item.name for item in registry.own_settings(algorithm)]
    flags = {name: defaults[f"{algorithm}.{name}"] for name in names if defaults.get(f"{algorithm}.{name}") is not None}
    return {**flags, **(own or {})}


def check_width(config: SearchConfig, max_width: int) -> None:
    """Raises:
    ValueError: the search is wider than this server allows.
    """
    if config.width > max_width:
        raise ValueError(
            f"search_width must be at most {max_width} on this server, got {config.width}; "
            "ask for less or raise --search-max-width"
        )


def check_vocabulary(config: SearchConfig, num_tokens: int) -> None:
    """Raises:
    ValueError: a step is to end at a token that the model does not have.
    """
    for item in config.step_delimiter:
        if isinstance(item, int) and item >= num_tokens:
            rule = f"texts or token ids below {num_tokens}, the size of the model's vocabulary"
            raise wrong("step_delimiter", rule, item, "give a token of this model")


# Fields that stand beside `search` in a request, not inside it.
OUTER_FIELDS = tuple(item.name for item in settings_of(SearchConfig) if item.about.is_outer)


if __name__ == "__main__":
    print(markdown_table(SearchConfig))

"""One problem from its prompt to its answer, level by level, as a client does it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.client_search import wire
from bench.client_search.choose import choose, needs_embedding
from sglang_ets.core.answer import RankedAnswer, rank
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.kv_costs import token_costs
from sglang_ets.core.search import Action, Expand, Finish, Score, Search, Select
from sglang_ets.core.tree import Node

PARTS = ("generate", "score", "encode", "select")
Part = Literal["generate", "score", "encode", "select"]
Generate = Callable[[Mapping[str, Any]], Any]  # answer to a body for `/generate` of a server
Encoder = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class Solved:
    """What one search found and what it cost. Seconds are of the wall, as its thread saw them."""

    answers: list[RankedAnswer]
    completion_tokens: int
    prm_tokens: int
    levels: int
    seconds: float
    part_s: dict[str, float]  # seconds by part; "other" is the rest


@dataclass(frozen=True)
class Client:
    """The two servers and the encoder that all problems share; `solve` may run in many threads at once."""

    policy: Generate
    prm: Generate
    tokenizer: Any  # of both models
    marker: str | None  # of the PRM: a step counts after it
    encoder: Encoder | None
    temperature: float = 1.0

    def solve(self, prompt: str, config: SearchConfig) -> Solved:
        """Run one search to its end.

        Raises:
            RuntimeError: a server refused a call or gave up a step.
        """
        return _Run(self, prompt, config).to_end()


@dataclass
class _Run:
    """One search under way. Used by one thread."""

    client: Client
    prompt: str
    config: SearchConfig
    part_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    prm_tokens: int = 0

    def to_end(self) -> Solved:
        started = time.perf_counter()
        self.prompt_ids = tuple(self.client.tokenizer(self.prompt)["input_ids"])
        self.search = Search(self.config, len(self.prompt_ids))
        actions = self.search.start()
        while not any(isinstance(action, Finish) for action in actions):
            if any(isinstance(action, Select) for action in actions):
                actions = self._select(next(action for action in actions if isinstance(action, Select)))
            else:
                actions = self._level([action for action in actions if isinstance(action, Expand)])
        answers = rank(self.search.trajectories(), self.config)
        seconds = time.perf_counter() - started
        nodes = self.search.tree.nodes
        return Solved(
            answers,
            sum(len(node.token_ids) for node in nodes),
            self.prm_tokens,
            max(node.depth for node in nodes),
            seconds,
            {**{part: self.part_s[part] for part in PARTS}, "other": seconds - sum(self.part_s.values())},
        )

    def _level(self, expansions: list[Expand]) -> list[Action]:
        """Sample the steps of a level, then score them: two calls, one after the other."""
        nodes = self._generate(expansions)
        scores = self._score(nodes)
        embeddings = self._encode(nodes)
        actions: list[Action] = []
        for node, score in zip(nodes, scores, strict=True):
            actions += self.search.on_scored(node.id, score, embeddings.get(node.id))
        return actions

    def _generate(self, expansions: list[Expand]) -> list[Node]:
        tree = self.search.tree
        growths = [(self._path_ids(tree.nodes[expand.parent_id]), expand) for expand in expansions]
        with self._timed("generate"):
            answers = self.client.policy(wire.generate_request(growths, self.config, self.client.temperature))
        nodes = [tree.nodes[node_id] for expand in expansions for node_id in expand.node_ids]
        for node, answer in zip(nodes, wire.listed(answers), strict=True):
            finish = wire.finish_of(answer, self.config)
            asked = self.search.on_step(node.id, tuple(answer["output_ids"]), answer["text"], finish)
            if not all(isinstance(action, Score) for action in asked):
                raise ValueError(f"this driver goes level by level; {self.config.algorithm} does not: use another one")
        return nodes

    def _score(self, nodes: Sequence[Node]) -> list[float]:
        """One row per distinct trajectory. A path is as good as its worst step (likelihood format)."""
        scorings: dict[tuple[int, ...], wire.Scoring] = {}
        paths = [self._path_ids(node) for node in nodes]
        for node, path in zip(nodes, paths, strict=True):
            if path not in scorings:
                texts = [self.client.tokenizer.decode([token]) for token in node.token_ids]
                before = path[: len(path) - len(node.token_ids)]
                scorings[path] = wire.scoring_of(before, node.token_ids, texts, self.client.marker)
        wanted = list(scorings.values())
        with self._timed("score"):
            answers = wire.listed(self.client.prm(wire.score_request(wanted)))
        own = {
            path: wire.score_of(*pair) for path, pair in zip(scorings, zip(answers, wanted, strict=True), strict=True)
        }
        self.prm_tokens += sum(len(scoring.token_ids) - scoring.start for scoring in wanted)
        worst = [1.0 if node.parent is None or node.parent.score is None else node.parent.score for node in nodes]
        return [min(parent, own[path]) for parent, path in zip(worst, paths, strict=True)]

    def _encode(self, nodes: Sequence[Node]) -> dict[int, NDArray[np.float32]]:
        wanted = [node for node in nodes if needs_embedding(node, self.config)]
        if not wanted or self.client.encoder is None:
            return {}
        with self._timed("encode"):
            vectors = self.client.encoder([node.text for node in wanted])
        return {node.id: vector for node, vector in zip(wanted, vectors, strict=True)}

    def _select(self, asked: Select) -> list[Action]:
        with self._timed("select"):
            tree = self.search.tree
            leaves = [tree.nodes[leaf_id] for leaf_id in asked.leaf_ids]
            level = self.search.level(token_costs([tree.trajectory_token_ids(leaf) for leaf in leaves]))
            selection = choose(level, self.config)
        return self.search.on_selected(selection)

    def _path_ids(self, node: Node) -> tuple[int, ...]:
        return self.prompt_ids + self.search.tree.trajectory_token_ids(node)

    @contextmanager
    def _timed(self, part: Part) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.part_s[part] += time.perf_counter() - started


def prm_marker(model_path: Path) -> str | None:
    """The text after which a step counts, from the PRM's `prm_config.json`; a model without one counts whole steps.

    Raises:
        ValueError: the PRM is not one that a stock server can score by log-probabilities.
    """
    file = model_path / "prm_config.json"
    if not file.exists():
        return None
    prm_config = json.loads(file.read_text(encoding="utf-8"))
    if prm_config.get("format") != "likelihood":
        raise ValueError(
            f"the client scores PRMs of format likelihood, got {prm_config.get('format')!r}; choose another PRM"
        )
    marker = prm_config.get("score_after")
    return None if marker is None else str(marker)

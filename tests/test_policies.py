"""Policies of other people: found by name, held to their rules, told their own settings; docs/policies.md as it stands."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_ets import flags
from sglang_ets.api.protocol import options_model
from sglang_ets.core import registry
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.selection import Level, Rebase, Selection
from sglang_ets.testing import replay, trees_in
from tests.engine.fakes import World

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
TREE = ROOT / "tests" / "data" / "tree.json"
EXAMPLE, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MAX_EXAMPLE_LINES = 35  # with imports


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_given", {})
    monkeypatch.setenv(flags.POLICY.env, "")
    registry._installed.cache_clear()
    registry._class_of.cache_clear()
    yield
    registry._installed.cache_clear()
    registry._class_of.cache_clear()


@pytest.fixture
def top_k(tmp_path: Path) -> str:
    (tmp_path / "top_k.py").write_text(EXAMPLE, encoding="utf-8")
    sys.modules.pop("sglang_ets_policy_top_k", None)
    return f"{tmp_path / 'top_k.py'}:TopK"


@pytest.mark.usefixtures("scheduler_context")
def test_the_example_is_short_and_searches(top_k: str) -> None:
    assert len(EXAMPLE.strip().splitlines()) <= MAX_EXAMPLE_LINES
    assert registry.load(top_k) == registry.load(top_k) == "top_k"
    world = World()
    world.ask(algorithm="top_k", top_k={"keep": 2}, return_tree=True, early_stop="off")
    world.run()
    result = world.answer()
    assert (result["search"]["algorithm"], result["search"]["warnings"]) == ("top_k", [])
    first = [node for node in result["tree"]["nodes"] if node["depth"] == 1 and node["finish"] == "step"]
    assert sum(node["allocation"] > 0 for node in first) == 2
    world.assert_balanced()


def test_the_example_is_replayed_as_shown(
    top_k: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tree.json").write_bytes(TREE.read_bytes())
    exec(compile(USE, "docs/policies.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"depth \d: 2 of \d+ leaves, \d+% of the KV", line) for line in lines)


def test_own_settings_are_flags_defaults_and_schema(top_k: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = re.findall(r"^    sglang-ets serve (.*)$", PAGE, re.MULTILINE)
    argv = [*shown.replace("top_k.py:TopK", top_k).split(), "--prm-model-path", "p"]
    flags.load_policies(argv)
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    assert "Leaves that go on" in parser.format_help() and "--search-particles-temperature" in parser.format_help()
    settings = flags.from_namespace(parser.parse_args(argv))
    outer: dict[str, Any] = {"n": None, "max_tokens": None, "seed": None}
    config = SearchConfig.from_request(8, None, settings, **outer)
    assert (config.algorithm, config.policy.keep, config.policy.one_per_parent) == ("top_k", 3, False)
    own = {"top_k": {"keep": 2, "one_per_parent": True}}
    config = SearchConfig.from_request(8, own, settings, **outer)
    assert (config.policy.keep, config.policy.one_per_parent) == (2, True)
    assert SearchConfig.from_json(config.to_json()).policy == config.policy
    properties = options_model(SearchConfig).model_json_schema()["properties"]
    assert "top_k" in properties["algorithm"]["anyOf"][0]["enum"]
    schema = properties["top_k"]["anyOf"][0]["properties"]
    assert schema["keep"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 1024}
    monkeypatch.setattr(registry, "_given", {})
    flags.load_policies()  # a child process learns it from the environment
    assert "top_k" in registry.names()


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"algorithm": "top_k", "top_k": {"keep": 0}}, "top_k.keep must be an integer from 1 to 1024, got 0; "),
        (
            {"algorithm": "top_k", "top_k": {"kept": 1}},
            "top_k has no setting 'kept' of its own; valid settings are keep, one",
        ),
        ({"algorithm": "top_k", "top_k": 3}, "top_k must be an object of the policy's own settings, got 3; "),
        ({"algorithm": "ets", "top_k": {}}, "top_k in search needs algorithm 'top_k', got 'ets'; "),
        ({"algorithm": "ets", "ets": {"keep": 1}}, "ets has no setting 'keep' of its own; it has none"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(top_k: str, search: dict[str, Any], message: str) -> None:
    registry.load(top_k)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SearchConfig.from_request(4, search, {}, n=None, max_tokens=None, seed=None)


def test_installed_packages_announce_policies(top_k: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("best_k", "tests.test_policies:Announced", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    assert registry.names()[-1] == "best_k"
    assert isinstance(SearchConfig(algorithm="best_k").policy, Announced)
    with pytest.raises(ValueError, match="is named 'best_k', and so is another policy"):
        registry.load("tests.test_policies:Announced")


class Announced(Rebase):
    name = "best_k"


class Wasteful:
    def select(self, level: Level, _config: Any) -> Selection:
        return Selection(np.ones(level.scores.size + 1, dtype=np.int64))


class Moody:
    def __init__(self) -> None:
        self.turn = 0

    def select(self, level: Level, _config: Any) -> Selection:
        self.turn += 1
        allocation = np.zeros(level.scores.size, dtype=np.int64)
        allocation[self.turn % 2] = level.remaining_width
        return Selection(allocation)


class Curious(Rebase):
    reads = ("weather",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("TopK", "a policy must be given as module:Class or file.py:Class, got 'TopK'"),
        ("nowhere.at_all:TopK", "nowhere.at_all:TopK cannot be loaded (ModuleNotFoundError"),
        ("/nowhere/top_k.py:TopK", "cannot be loaded (FileNotFoundError"),
        ("tests.test_policies:Missing", "cannot be loaded (AttributeError"),
        ("tests.test_policies:ROOT", "must be a class with a method select"),
        ("tests.test_policies:Curious", "whose `reads` are among costs, embeddings, pruned, got ['weather']"),
        ("sglang_ets.core.selection:Ets", "is named 'ets', and so is another policy"),
    ],
)
def test_what_is_no_policy_ends_the_start(spec: str, message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        flags.load_policies([f"--search-policy={spec}"])


@pytest.mark.usefixtures("scheduler_context")
def test_a_policy_that_does_not_share_out_the_width_fails_its_search(caplog: pytest.LogCaptureFixture) -> None:
    registry.load("tests.test_policies:Wasteful")
    world = World()
    world.ask(algorithm="wasteful")
    world.run()
    assert "the policy wasteful must give 4 leaves whole numbers of children that sum to 4" in world.error()
    world.assert_balanced()


def test_replay_checks_decisions() -> None:
    with pytest.raises(ValueError, match="must give 16 leaves whole numbers"):
        list(replay(Wasteful(), [TREE]))
    with pytest.raises(ValueError, match="Moody must decide equal levels equally"):
        list(replay(Moody(), [TREE]))
    with pytest.raises(ValueError, match="a recorded tree must have nodes, got choices"):
        list(replay(Rebase(), [{"choices": []}]))


def test_replay_shows_the_levels_as_the_server_did() -> None:
    """REBASE on its own recorded tree decides as it did on the server."""
    tree = ROOT / "tests" / "data" / "tree_rebase.json"
    nodes = {node["id"]: node for one in trees_in(tree) for node in one["nodes"]}
    decisions = list(replay(Rebase(), [tree]))
    assert [decision.level.depth for decision in decisions] == [1, 2, 3, 4, 5]
    for decision in decisions:
        assert [nodes[leaf]["allocation"] for leaf in decision.leaf_ids] == decision.selection.allocation.tolist()
        assert 0.0 < decision.kv_kept <= 1.0


@pytest.mark.parametrize("name", [*registry.BUILT_IN])
def test_every_policy_of_ours_can_be_replayed(name: str) -> None:
    config = SearchConfig(algorithm=name, width=16)
    assert len(list(replay(config.policy, [TREE], config))) == 5

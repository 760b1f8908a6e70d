"""The hidden states that a step's tokens were sampled from reach whoever scores it, however its tokens came."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

from sglang_ets.engine import token_states
from tests.engine.fakes import ScriptedPrm, World
from tests.engine.test_speculation import asked_in_loop
from tests.engine.test_strands import MODES, every, grown, release_all, retract_one, tree_of, world_of


def reading(mode: str, **traits: Any) -> World:
    return World(world_of(mode, **traits).scheduler, ScriptedPrm(reads_states=True))


def nothing(_world: World) -> None:
    pass


@pytest.mark.parametrize("act", [nothing, retract_one, release_all])
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("speculates", [False, True])
def test_every_step_brings_its_own(
    mode: str, overlaps: bool, speculates: bool, act: Callable[[World], None], caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"width": 16, "speculate": speculates}
    world = grown(asked_in_loop(reading(mode, overlaps=overlaps)), every(5, act), **fields)
    assert world.prm.num_states_read == sum(node["score"] is not None for node in tree_of(world)["nodes"]) > 16
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
    without = grown(asked_in_loop(world_of(mode, overlaps=overlaps)), every(5, act), **fields)
    assert tree_of(world) == tree_of(without)


def test_nobody_keeps_states_that_nobody_reads() -> None:
    seen: set[CaptureHiddenMode] = set()

    def look(world: World) -> None:
        seen.update(req.return_hidden_states_mode for req in world.scheduler.running_batch.reqs)

    grown(world_of("shared"), look, width=4)
    assert seen == {CaptureHiddenMode.NULL}
    grown(reading("shared"), look, width=4)
    assert CaptureHiddenMode.LAST in seen and CaptureHiddenMode.FULL not in seen


def batch(mode: ForwardMode, kept: CaptureHiddenMode) -> Any:
    return SimpleNamespace(forward_mode=mode, return_hidden_states_mode=kept)


def result(states: list[list[float]] | None, lengths: list[int] | None = None) -> Any:
    kept = None if states is None else torch.tensor(states, dtype=torch.bfloat16)
    return SimpleNamespace(logits_output=SimpleNamespace(hidden_states=kept), extend_input_len_per_req=lengths)


def test_rows_are_found_beside_a_request_that_wants_the_states_of_all_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_states, "get_server_return_hidden_states_mode", lambda: CaptureHiddenMode.LAST)
    read, last, full = token_states.token_states, CaptureHiddenMode.LAST, CaptureHiddenMode.FULL
    rows = [[1.0], [2.0], [3.0]]
    for decodes in (batch(ForwardMode.DECODE, last), batch(ForwardMode.DECODE, full), batch(ForwardMode.EXTEND, last)):
        assert read(decodes, result(rows)).tolist() == rows  # type: ignore[union-attr]
    assert read(batch(ForwardMode.EXTEND, full), result(rows, [2, 1])).tolist() == [[2.0], [3.0]]  # type: ignore[union-attr]
    assert read(batch(ForwardMode.EXTEND, last), result(None)) is None
    assert read(batch(ForwardMode.EXTEND, last), SimpleNamespace(logits_output=None)) is None

"""`ets_tree` stands among sglang's attention backends, and sglang's deterministic mode refuses it."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.arg_groups.overrides import _deterministic_attention_backend
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.server_args import ServerArgs
from sglang_ets.patches import tree_attention

from sglang_ets.core.attention_plan import TREE_BACKEND


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ATTENTION_BACKENDS, TREE_BACKEND, raising=False)
    tree_attention.register()


def test_it_can_be_chosen_and_stands_once_in_the_list() -> None:
    tree_attention.register()
    assert ATTENTION_BACKEND_CHOICES.count(TREE_BACKEND) == 1
    assert ATTENTION_BACKENDS[TREE_BACKEND] is tree_attention.create
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = ["--model-path", "/model", "--attention-backend", TREE_BACKEND]
    assert parser.parse_args(given).attention_backend == TREE_BACKEND


def test_sums_that_depend_on_the_batch_are_refused_with_deterministic_inference() -> None:
    view: Any = SimpleNamespace(enable_deterministic_inference=True, attention_backend=TREE_BACKEND)
    with pytest.raises(ValueError, match=f"explicitly specified '{TREE_BACKEND}'"):
        _deterministic_attention_backend(view)

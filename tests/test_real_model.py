"""The bench on a real model and its checkpoint, as far as they go without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.real_model import POLICIES, settings, summary
from bench.smollm2 import MARKER, cache_folder, check_file, is_whole


def row(policy: str, problem: str, is_right: bool, **more: Any) -> dict[str, Any]:
    made = {"setting": f"{policy}@8", "policy": policy, "width": 8, "problem": problem, "seed": 0, "is_right": is_right}
    return made | {"is_right_strict": False, "completion_tokens": 10, "seconds": 1.0} | more


def test_every_policy_is_asked_beside_the_plain_baselines() -> None:
    names = [setting.name for setting in settings(8, POLICIES)]
    assert names == ["greedy", "self_consistency", *POLICIES]
    assert all(setting.search["step_delimiter"] == ["\n"] for setting in settings(8, POLICIES)[2:])


def test_the_summary_compares_kv_and_counts_disagreement() -> None:
    kv = {"kv_tokens_peak": 9, "prm_tokens": 1, "levels": 2, "leaves": 8.0, "distinct_texts": 7.0, "step_tokens": 20.0}
    done = [
        row("rebase", "a", True, kv_tokens_mean=100, clusters=None, **kv),
        row("ets", "a", False, kv_tokens_mean=50, clusters=3.0, **kv),
        row("self_consistency", "a", False),
    ]
    text, lines = summary(done, seed=0)
    assert {line["policy"]: line.get("kv_reduction") for line in lines} == {
        "rebase": 1.0,
        "ets": 2.0,
        "self_consistency": None,
    }
    assert "| rebase | 8 | 8.0 | 7.0 |  | 20.0 | 1.00 |" in text
    assert "| ets | 8 | 8.0 | 7.0 | 3.0 | 20.0 | 0.00 |" in text


def test_another_file_than_the_known_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="must contain"):
        check_file(tmp_path / "missing.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="must have sha256"):
        check_file(other)


def test_a_checkpoint_is_whole_only_with_the_marker_of_this_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder == tmp_path / "sglang-ets" / "smollm2"
    folder.mkdir(parents=True)
    assert not is_whole(folder)
    (folder / MARKER).write_text('{"gguf_sha256": "of an older one"}')
    assert not is_whole(folder)

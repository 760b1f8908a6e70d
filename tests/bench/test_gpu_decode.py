"""The bench of decode attention that reads shared KV once, in Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sglang_ets.kernels.dispatch import INTERPRETED

from bench import rows

if not INTERPRETED:
    pytest.skip("runs in test_interpreter.py, under TRITON_INTERPRET=1", allow_module_level=True)

from bench.gpu import decode


def test_decode_attention_is_checked_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["decode", "--smoke", "--out", str(out)])
    decode.main()
    measured = list(rows.read(out))
    assert [row["model"] for row in measured] == ["tiny", "tiny MHA"]
    for row in measured:
        assert row["tree_kv_bytes"] < row["stock_kv_bytes"]
        assert min(row["stock_us"], row["tree_us"], row["bound_us"]) > 0
    assert "| tiny MHA | float32 |" in capsys.readouterr().out

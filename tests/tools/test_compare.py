"""Two recorded searches of one problem on one page."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from sglang_ets.tools.compare import compared, main

DATA = Path(__file__).resolve().parents[1] / "data"
TREES = [DATA / "tree_rebase.json", DATA / "tree.json"]


def answers() -> list[dict[str, object]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in TREES]


def test_the_page_has_both_trees_and_what_they_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.html"
    main([*map(str, TREES), "--output", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text(encoding="utf-8")
    frames = [html.unescape(frame) for frame in re.findall(r'srcdoc="([^"]*)"', page)]
    assert len(frames) == 2 and all("<script" in frame for frame in frames)
    assert "The answer is 183" in frames[0] and "The answer is 38" in frames[1]
    assert not re.search(r'(?:src|href)="http', page), "self-contained"
    for answer in answers():
        assert f"<td>{answer['search']['kv_tokens_peak']}</td>" in page  # type: ignore[index]
    assert "<th>rebase</th><th>ets</th><th>ratio</th>" in page and "<td>183</td><td>38</td>" in page


def test_both_pages_draw_their_kv_bars_at_one_scale() -> None:
    """So that who holds less has the shorter bars."""
    frames = [html.unescape(frame) for frame in re.findall(r'srcdoc="([^"]*)"', compared(TREES))]
    scales = [int(found.group(1)) for frame in frames if (found := re.search(r'"kv_scale_tokens":(\d+)', frame))]
    held = [answer["search"]["kv_tokens_peak"] for answer in answers()]  # type: ignore[index]
    assert scales == [max(held)] * 2 and len(set(held)) == 2


def test_a_figure_of_both_has_a_ratio_and_one_that_a_side_lacks_has_none(tmp_path: Path) -> None:
    first, second = answers()
    first["search"]["tokens_computed"] = 300  # type: ignore[index]
    second["search"].pop("tokens_computed", None)  # type: ignore[attr-defined]
    for search, seconds in ((first["search"], 3.0), (second["search"], 1.5)):
        search["seconds"] = seconds  # type: ignore[index]
    for name, answer in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(answer))
    page = compared([tmp_path / "a.json", tmp_path / "b.json"])
    assert "<th>tokens computed</th><td>300</td><td>-</td><td></td>" in page
    assert "<th>seconds</th><td>3.0</td><td>1.5</td><td>2.00</td>" in page


def test_a_text_of_a_model_stays_text(tmp_path: Path) -> None:
    answer = answers()[0]
    answer["choices"][0]["search"]["answer"] = "<script>alert(1)</script>"  # type: ignore[index]
    (tmp_path / "odd.json").write_text(json.dumps(answer))
    page = compared([tmp_path / "odd.json", TREES[1]])
    assert "<script>alert" not in re.sub(r'srcdoc="[^"]*"', "", page)


def test_what_is_no_tree_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(TREES[0]), str(tmp_path / "missing.json"), "-o", str(tmp_path / "x.html")])
    assert "cannot read" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()

"""README's figures and the rows behind them; the recorded trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import readme
from bench.ilp import compare, recorded_cases
from bench.redundancy import purity_of, redundancy
from sglang_ets.core.config import SearchConfig


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_tables_are_made_of_rows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme.BLOCK.search(text)
    assert readme.rendered(text) == text, "run `python -m bench.readme`"


def test_every_table_is_shown() -> None:
    shown = {block[2] for page in readme.PAGES for block in readme.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert shown == set(readme.TABLES)


def test_a_changed_figure_is_noticed() -> None:
    text = "<!-- results: selection -->\n| made up |\n<!-- end -->"
    assert readme.rendered(text) != text


def test_recorded_levels_are_solved_as_well_as_by_cbc() -> None:
    row = compare(
        recorded_cases()[256][:3], 3, SearchConfig(algorithm="ets", width=256, kv_cost_weight=2.0)
    )  # its smoke mode has smaller ones
    assert row["levels"] == 3
    assert row["columns"] > row["core_columns"]


def test_redundancy_counts_texts_and_meanings() -> None:
    def node(number: int, parent: int, text: str, cluster: int) -> dict[str, object]:
        ids = [ord(letter) for letter in text]
        made = {"id": number, "parent": parent, "depth": 1, "text": text, "token_ids": ids}
        return made | {"score": 0.5, "finish": "step", "cluster": cluster}

    nodes = [
        node(1, 0, "so 1+2=3:3", 0),
        node(2, 0, "so 1+2=3:3", 0),
        node(3, 0, "now 1+2=3:3", 0),
        node(4, 0, "1+2=4:4", 0),
    ]
    found = redundancy(nodes)
    assert (found.leaves, found.distinct_texts, found.distinct_meanings, found.clusters) == (4, 3, 2, 1)
    assert found.purity == 0.75
    assert purity_of([0, 1], ["a", "a"]) == 1.0

"""The suggested cut, where two groups of distances part, and the command that asks a server for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sglang_ets.launch_server import EMBEDDED
from sglang_ets.tools import calibrate
from sglang_ets.tools.calibrate import histogram, level_embeddings, pair_distances, read_prompts, suggest_cut
from tests.tools.test_ask import FIGURES, searched, serving


def test_cut_lies_between_two_groups() -> None:
    draw = np.random.default_rng(0)
    same, other = 10 ** draw.normal(-3, 0.2, 200), 10 ** draw.normal(-0.8, 0.2, 300)
    cut = suggest_cut(np.concatenate([same, other]))
    assert same.max() < cut < other.min()
    assert sum("suggested" in line for line in histogram(np.concatenate([same, other]), cut).splitlines()) == 1


def test_too_few_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="more prompts"):
        suggest_cut(np.array([0.1, 0.1]))


def test_pairs_of_one_text_do_not_count() -> None:
    embeddings = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    assert pair_distances(["a", "a", "b"], embeddings).tolist() == pytest.approx([1.0, 1.0])


def test_levels_hold_unfinished_leaves_with_an_embedding() -> None:
    nodes = [
        {"depth": 1, "finish": "step", "text": "a", "embedding": [1.0, 0.0]},
        {"depth": 1, "finish": "stop", "text": "b", "embedding": [0.0, 1.0]},
        {"depth": 2, "finish": "step", "text": "c", "embedding": None},
        {"depth": 2, "finish": "step", "text": "d", "embedding": [0.0, 1.0]},
    ]
    assert [texts for texts, _ in level_embeddings(nodes)] == [["a"], ["d"]]


# ---- the command ----

TREE = {
    "nodes": [
        {"depth": 1, "finish": "step", "text": text, "embedding": embedding}
        for text, embedding in (("a", [1.0, 0.0]), ("b", [1.0, 0.1]), ("c", [0.0, 1.0]), ("d", [-1.0, 0.2]))
    ]
}


@pytest.mark.parametrize("flags", [[], ["--chat"]])
@pytest.mark.parametrize(
    ("model", "asked"), [("a-model", ["1+2=\n", "3"]), (EMBEDDED["--served-model-name"], ["1+2=\n", "3\n"])]
)
def test_prompts_arrive_as_they_stand_in_the_file(
    model: str, asked: list[str], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('{"prompt": "1+2=\\n"}\n\n3\r\n', encoding="utf-8-sig")
    chunks = searched(bool(flags))
    chunks[-2]["search"] = {**FIGURES, "tree": TREE}
    with serving(chunks, model=model) as (server, url):
        calibrate.main(["--base-url", f"{url}/v1", "--prompts", str(file), "--width", "4", *flags])
    sent = [body["messages"][0]["content"] if flags else body["prompt"] for body in server.bodies]
    assert sent == asked
    assert {json.dumps(body["search"]) for body in server.bodies} == {json.dumps(calibrate.SETTINGS)}
    assert "suggested --search-cluster-distance" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "sentence"), [(None, "No such file"), ("\n \n", "has none"), (b"\xff", "decode")])
def test_a_file_without_prompts_is_one_sentence(content: str | bytes | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=sentence) as caught:
        calibrate.main(["--prompts", str(file)])
    assert "\n" not in str(caught.value)


def test_text_that_looks_like_json_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('[1]\n{"question": 2}\n{"prompt": "3"}\n5\n', encoding="utf-8")
    assert read_prompts(file) == ["[1]", '{"question": 2}', "3", "5"]


def test_a_server_that_refuses_is_one_sentence() -> None:
    with serving([], status=400) as (_, url), pytest.raises(SystemExit, match=r"^sglang-ets calibrate: ") as caught:
        calibrate.main(["--base-url", url])
    assert "\n" not in str(caught.value)

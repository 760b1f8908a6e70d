"""The page of a tree: figures against what servers measured, hostile text, bad files, and Chromium drawing it."""

from __future__ import annotations

import html
import itertools
import json
import random
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_ets.api import view
from sglang_ets.api.view import read_view, render

DATA = Path(__file__).parents[1] / "data"
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
BROWSER_LIMIT_S = 120
MAX_SECONDS_5000 = 5.0
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH")


def real(name: str = "tree") -> dict[str, Any]:
    """Answers of a server on the embedded models, width 16, with `return_tree`: `tree` by ets, `tree_rebase` by rebase."""
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return found


def step(node_id: int, parent: int, depth: int, **fields: Any) -> dict[str, Any]:
    plain = {"text": f"step {node_id}\n", "token_ids": [node_id], "finish": "step", "score": 0.5, "allocation": 0}
    return {
        "id": node_id,
        "parent": parent,
        "depth": depth,
        **plain,
        "cluster": None,
        "state": "pruned",
        "reason": "",
        **fields,
    }


def synthetic(num_nodes: int, width: int = 250) -> dict[str, Any]:
    """A tree of levels of `width` steps; about a third of each level is retained."""
    draw = random.Random(0)
    nodes: list[dict[str, Any]] = []
    parents = [0]
    depth = 0
    while len(nodes) < num_nodes:
        depth += 1
        made = []
        for place in range(min(width, num_nodes - len(nodes))):
            token_ids = [draw.randrange(1000) for _ in range(draw.randrange(5, 60))]
            chosen = parents[place * len(parents) // width]
            fields = {"token_ids": token_ids, "score": draw.random(), "cluster": draw.randrange(9)}
            made.append(step(len(nodes) + 1, chosen, depth, **fields))
            nodes.append(made[-1])
        kept = [node for node in made if draw.random() < 0.3] or made[:1]
        for node in kept:
            node["state"] = "retained"
        parents = [node["id"] for node in kept]
    return {"prompt_tokens": 100, "nodes": nodes}


def embedded(page: str) -> dict[str, Any]:
    """The data inside a page, as its script reads it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


# ---- figures ----


@pytest.mark.parametrize("name", ["tree", "tree_rebase"])
def test_kv_from_the_tree_is_what_the_radix_cache_counted(name: str) -> None:
    levels = read_view(real(name), name).levels
    assert len(levels) == len(real(name)["search"]["kv_levels"])
    for level in levels:
        assert level.held_tokens == level.measured_held_tokens
        assert level.retained_tokens == level.measured_retained_tokens


def test_rebase_on_its_own_tree_keeps_what_it_kept() -> None:
    levels = read_view(real("tree_rebase"), "").levels
    assert [level.rebase_tokens for level in levels] == [level.retained_tokens for level in levels]


def test_rebase_on_another_tree_is_its_own_choice() -> None:
    levels = read_view(real(), "").levels
    assert levels[0].rebase_tokens is not None and levels[0].retained_tokens is not None
    assert levels[0].rebase_tokens > levels[0].retained_tokens


@pytest.mark.parametrize("pick", [lambda d: d, lambda d: d["search"], lambda d: d["search"]["tree"]])
def test_answer_figures_and_bare_tree_are_all_read(pick: Any) -> None:
    found = read_view(pick(real()), "")
    assert len(found.nodes) == 96
    assert [level.held_tokens for level in found.levels] == [337, 686, 801, 629, 882, 1055]
    assert all(answer.node is not None for answer in found.answers)


def test_answers_stand_at_the_node_that_ends_them() -> None:
    found = read_view(real(), "")
    texts = {node.id: node for node in found.nodes}
    assert [answer.answer for answer in found.answers] == ["38", "173", "193", "163"]
    for answer in found.answers:
        assert texts[answer.node or 0].text.endswith(f"The answer is {answer.answer}")


def test_nothing_is_invented_where_it_is_not_known() -> None:
    found = real()["search"]
    found["algorithm"] = "best_of_n"  # its levels are never complete at one time
    levels = read_view(found, "").levels
    assert {(level.held_tokens, level.retained_tokens, level.rebase_tokens) for level in levels} == {(None, None, None)}
    tree = real()["search"]["tree"]
    for node in tree["nodes"]:
        del node["token_ids"]
    assert {(level.held_tokens, level.rebase_tokens) for level in read_view(tree, "").levels} == {(None, None)}


def test_warnings_stand_on_the_page_and_no_text_of_them_is_markup() -> None:
    answer = real()
    assert read_view(answer, "").warnings == ()
    answer["search"]["warnings"] = [HOSTILE, "2 of 8 steps failed: no memory", 5]
    found = read_view(answer, "")
    assert found.warnings == (HOSTILE, "2 of 8 steps failed: no memory")
    page = render(found)
    assert embedded(page)["warnings"] == [HOSTILE, "2 of 8 steps failed: no memory"]
    assert page.count("</script>") == 2
    answer["search"]["warnings"] = "none"
    assert read_view(answer, "").warnings == ()


# ---- hostile and bad input ----

HOSTILE = "</script><script>document.title='broken out'</script><!--<script> \u2028\ud83d & /*DATA*/ \x00"


def test_hostile_text_stays_text() -> None:
    tree = {"prompt_tokens": 1, "nodes": [step(1, 0, 1, text=HOSTILE, reason=HOSTILE)]}
    page = render(read_view(tree, HOSTILE))
    assert page.count("</script>") == 2
    assert "<!--" not in page
    assert embedded(page)["nodes"][0]["text"] == HOSTILE
    page.encode("utf-8")


def test_page_asks_for_nothing_outside() -> None:
    page = render(read_view(real(), "x"))
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|//cdn|@import|url\(", page)


BAD_TREES: list[tuple[Any, str]] = [
    ([], "JSON object, got list"),
    ({}, "search.tree, got none"),
    ({"search": {"id": "x"}}, "return_tree true"),
    ({"prompt_tokens": -1, "nodes": [step(1, 0, 1)]}, "prompt_tokens must be an integer of 0 or more, got -1"),
    ({"prompt_tokens": 1, "nodes": []}, "at least one step"),
    ({"prompt_tokens": 1, "nodes": ["x"]}, r"nodes\[0\] must be an object, got str"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1), step(1, 0, 1)]}, r"id of nodes\[1\] must be new, got 1"),
    ({"prompt_tokens": 1, "nodes": [step(1, 7, 1)]}, "earlier node, got 7"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 2)]}, "one more than its parent's, got 2"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, score=float("nan"))]}, "finite number or null, got nan"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, score=True)]}, "finite number or null, got True"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, text=None)]}, "must be text, got None"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, state="gone")]}, "one of open, retained, pruned, complete, failed"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, cluster="a")]}, "cluster"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, token_ids="a")]}, "list of token ids"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, allocation=None)]}, "allocation"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, level=-1)]}, "level of"),
    ({"prompt_tokens": 1, "nodes": [step(1, 0, 1, finish="x")]}, "step, stop, length or null, got 'x'"),
]


@pytest.mark.parametrize(("data", "message"), BAD_TREES)
def test_bad_trees_are_refused_in_one_sentence(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_view(data, "")
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_command_writes_beside_the_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "a.json"
    given.write_text(json.dumps(real()), encoding="utf-8")
    view.main([str(given)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert embedded((tmp_path / "a.html").read_text(encoding="utf-8"))["title"] == "a"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_command_refuses_bad_files(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "a.json"
    given.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        view.main([str(given)])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_command_names_a_missing_file_and_a_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["none.json"], [str(DATA / "tree.json"), "-o", str(tmp_path / "no" / "a.html")]):
        with pytest.raises(SystemExit) as caught:
            view.main(arguments)
        assert caught.value.code == 2
        assert "No such file or directory" in capsys.readouterr().err


def test_a_search_that_revived_steps_has_no_kv_of_one_depth() -> None:
    """Its levels are of several depths, so neither the tree nor what was measured says what a depth held."""
    answer = real()
    nodes = answer["search"]["tree"]["nodes"]
    assert read_view(answer, "").levels[-1].measured_held_tokens is not None
    nodes[-1]["level"] = nodes[-1]["depth"] + 2
    levels = read_view(answer, "").levels
    kv = [(one.held_tokens, one.retained_tokens, one.rebase_tokens, one.measured_held_tokens) for one in levels]
    assert set(kv) == {(None,) * 4}
    assert sum(level.generated_tokens for level in levels) == sum(len(node["token_ids"]) for node in nodes)


def test_temperature_of_rebase_must_be_positive() -> None:
    with pytest.raises(ValueError, match="above 0, got 0"):
        read_view(real(), "", 0.0)


def test_rebase_is_compared_at_the_temperature_of_the_search() -> None:
    answer = real()
    assert read_view(answer, "").rebase_temperature == 0.2  # recorded before servers told it
    answer["search"]["rebase_temperature"] = 5.0
    flat = read_view(answer, "")
    assert flat.rebase_temperature == 5.0
    assert flat.levels != read_view(answer, "", 0.2).levels
    answer["search"]["rebase_temperature"] = "hot"
    assert read_view(answer, "").rebase_temperature == 0.2


def test_colours_rise_in_lightness() -> None:
    """A scale that is read without telling red from green must be ordered by lightness alone."""
    script = (Path(view.__file__).parent / "view_page.js").read_text(encoding="utf-8")
    found = re.search(r"SCALE = (\[\[.*?\]\])", script)
    assert found is not None
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in json.loads(found[1])]
    assert all(a + 20 < b for a, b in itertools.pairwise(lightness))


# ---- Chromium ----

PROBE = """<script>
setTimeout(() => {
  const plot = document.getElementById("plot"), canvas = document.getElementById("base"), out = {};
  const ratio = canvas.width / canvas.clientWidth;
  const nodes = JSON.parse(document.getElementById("data").textContent).nodes;
  const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let matching = 0, seen = 0;
  for (const node of nodes) {
    if (node.state === "pruned" || node.state === "failed") continue;
    const b = treePage.boxOf(node.id);
    const at = 4 * (Math.round((b.y + 4) * ratio) * image.width + Math.round((b.x + b.w - 3) * ratio));
    const pixel = image.data.slice(at, at + 3);
    const wanted = treePage.colourOf(node.id).match(/\\d+/g).map(Number);
    seen += 1;
    matching += wanted.every((value, i) => Math.abs(value - pixel[i]) < 8) ? 1 : 0;
  }
  const b = treePage.boxOf(CLICK), r = plot.getBoundingClientRect();
  const at = { clientX: r.left + b.x + b.w / 2, clientY: r.top + b.y + b.h / 2, bubbles: true };
  plot.dispatchEvent(new PointerEvent("pointermove", at));
  out.tip = document.getElementById("tip").textContent;
  plot.dispatchEvent(new MouseEvent("click", at));
  out.clicked = plot.dataset.selected;
  out.steps = document.querySelectorAll("#steps li").length;
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowUp", bubbles: true }));
  out.up = plot.dataset.selected;
  document.body.dataset.probe = JSON.stringify({ ...out, drawn: plot.dataset.drawn, matching, seen, title: document.title });
}, 300);
</script>"""


def browse(page: Path, fragment: str = "") -> tuple[str, str]:
    """The DOM that Chromium makes of a page, and what its console said."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,820",
        "--enable-logging=stderr",
    ]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command += [profile, "--virtual-time-budget=3000", "--dump-dom", f"{page.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_LIMIT_S, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def probed(dom: str) -> dict[str, Any]:
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None, "the probe has not run"
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@needs_chromium
def test_chromium_draws_the_tree_and_a_click_selects_a_path(tmp_path: Path) -> None:
    page = tmp_path / "tree.html"
    page.write_text(render(read_view(real(), "tree")).replace("</body>", PROBE.replace("CLICK", "83") + "</body>"))
    dom, console = browse(page)
    assert console == ""
    found = probed(dom)
    assert found["drawn"] == "96"
    assert found["seen"] == 58 and found["matching"] == found["seen"]
    assert "The answer is" in found["tip"] and "score" in found["tip"]
    assert found["clicked"] == "83" and found["steps"] == 6
    nodes = {node["id"]: node for node in real()["search"]["tree"]["nodes"]}
    assert found["up"] == str(nodes[83]["parent"])


@needs_chromium
def test_chromium_selects_what_the_address_names_and_shows_the_whole_text(tmp_path: Path) -> None:
    page = tmp_path / "tree.html"
    page.write_text(render(read_view(real(), "tree")))
    dom, console = browse(page, "#node=83")
    assert console == ""
    assert 'data-selected="83"' in dom
    steps = dom[dom.index('<ol id="steps">') : dom.index("</section>", dom.index('<ol id="steps">'))]
    nodes = {node["id"]: node for node in real()["search"]["tree"]["nodes"]}
    at = nodes[83]
    while at["parent"]:
        assert at["text"].strip() in steps
        at = nodes[at["parent"]]


@needs_chromium
def test_chromium_shows_warnings(tmp_path: Path) -> None:
    answer = real()
    answer["search"]["warnings"] = ["2 of 8 steps failed: <b>no memory</b>"]
    page = tmp_path / "tree.html"
    page.write_text(render(read_view(answer, "tree")))
    dom, console = browse(page)
    assert console == ""
    assert '<ul id="warnings"><li>Warning: 2 of 8 steps failed: &lt;b&gt;no memory&lt;/b&gt;</li></ul>' in dom


@needs_chromium
def test_chromium_runs_no_script_of_the_model(tmp_path: Path) -> None:
    hostile = HOSTILE.replace("\ud83d", "")  # half a character ends --dump-dom itself
    tree = {"prompt_tokens": 1, "nodes": [step(1, 0, 1, text=f"{hostile}<img src=x onerror=alert(1)>")]}
    page = tmp_path / "tree.html"
    page.write_text(render(read_view(tree, "x")))
    dom, console = browse(page, "#node=1")
    assert console == ""
    assert "<title>x: search tree</title>" in dom
    assert "&lt;img src=x" in dom


@needs_chromium
def test_five_thousand_steps_are_made_and_drawn_in_seconds(tmp_path: Path) -> None:
    started = time.perf_counter()
    page = render(read_view(synthetic(5000), "big"))
    assert time.perf_counter() - started < MAX_SECONDS_5000
    timed = "<script>const started = performance.now();</script>"
    after = "<script>document.body.dataset.probe = JSON.stringify({ ms: performance.now() - started });</script>"
    path = tmp_path / "big.html"
    path.write_text(page.replace("<main>", f"{timed}<main>").replace("</body>", f"{after}</body>"))
    dom, console = browse(path)
    assert console == ""
    assert 'data-drawn="5000"' in dom
    assert 0 < probed(dom)["ms"] < MAX_SECONDS_5000 * 1e3

"""README and docs/: what they tell a reader to type works, and what they name exists."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sglang_ets.patches import tree_attention

from bench import rows
from sglang_ets import cli, flags
from sglang_ets.api.protocol import REFUSED, UNSUPPORTED_SERVER
from sglang_ets.core.config import SearchConfig
from sglang_ets.engine.admission import REFUSED_NATIVE, REFUSED_SAMPLING
from sglang_ets.engine.startup import pool_need
from sglang_ets.launch_server import chosen_flags, print_choices
from sglang_ets.tools import ask
from tests.documented import PAGES, ROOT, Command, commands, of_page
from tests.tools.test_plan import QWEN_7B

README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LIMITS = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
PRM_CONTEXT_TOKENS = QWEN_7B["max_position_embeddings"]
MAX_STOPS = 12


def named(command: Command) -> str:
    return f"{command.page}: {' '.join(command.text.split())[:60]}"


def untested(page: str, text: str) -> list[str]:
    """What a page tells a reader to type and nobody has said how it is tested."""
    return [one.text for one in of_page(page, text) if one.kind != "inline" and one.way is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_tested(page: Path) -> None:
    assert untested(page.name, page.read_text(encoding="utf-8")) == [], "say in `WAYS` how they are tested"


def test_a_command_that_nobody_tests_is_noticed() -> None:
    text = "Type this:\n\n    sglang-ets fly \\\n        --far  # away\n    sglang-ets view tree.json\n\nand look.\n"
    assert untested("new.md", text) == ["sglang-ets fly --far"]


# ---- commands that start a server, install, or take long ----


@pytest.fixture(scope="module")
def server_parser() -> argparse.ArgumentParser:
    """All flags that a server with search takes."""
    from sglang.srt.server_args import ServerArgs

    tree_attention.register()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    flags.add_flags(parser)
    return parser


def server_settings(argv: list[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings of a search on the server that these arguments start on a GPU."""
    return flags.from_namespace(parser.parse_args([*chosen_flags(argv, has_cuda=True), *argv]))


def module_flags(module: str, given: list[str]) -> None:
    """The module is there and its source names the flags."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
    assert spec is not None and spec.origin is not None, module
    source = Path(spec.origin).read_text(encoding="utf-8")
    if "rows.add_arguments(" in source:
        source += inspect.getsource(rows.add_arguments)
    for flag in given:
        assert not flag.startswith("--") or f'"{flag}"' in source, f"{module} knows no {flag}"


def make_target(argv: list[str]) -> None:
    """The target is there and, if it runs a bench, the bench and its flags."""
    done = subprocess.run(["make", "-n", *argv[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = re.search(r"-m (bench\.[\w.]+) *(.*)$", done.stdout, re.MULTILINE)
    if argv[1].startswith("bench-"):
        assert ran is not None, done.stdout
    if ran is not None:
        module_flags(ran[1], ran[2].split())


def check_start(argv: list[str], parser: argparse.ArgumentParser) -> None:
    """Whether what a command names exists, without running it."""
    match argv:
        case ["make", *_]:
            make_target(argv)
        case ["pip", "install", "."]:
            assert (ROOT / "setup.py").exists()
        case ["sglang-ets"]:
            pass
        case ["sglang-ets", "serve", *rest] | ["python", "-m", "sglang_ets.launch_server", *rest]:
            assert flags.is_on(server_settings(rest, parser))
        case ["sglang-ets", "ask", *rest] if rest:
            ask.parser().parse_args(rest)
        case ["sglang-ets", command, *rest]:
            module_flags(cli.COMMANDS[command][0], rest)
        case ["python", "-m", module, *rest]:
            module_flags(module, rest)
        case _:
            pytest.fail(f"nobody looks at {argv}")


@pytest.mark.parametrize("command", commands("started"), ids=named)
def test_what_is_started_exists(command: Command, server_parser: argparse.ArgumentParser) -> None:
    check_start(command.argv, server_parser)


@pytest.mark.parametrize("command", [one for one in commands() if one.kind == "inline"], ids=named)
def test_what_prose_mentions_exists(command: Command, server_parser: argparse.ArgumentParser) -> None:
    check_start(command.argv, server_parser)


def test_own_models_start_as_shown(server_parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [one for one in commands("started") if one.page == "README.md" and "--model-path" in one.argv]
    print_choices(chosen_flags(command.argv[2:], has_cuda=True), has_cuda=True)
    assert capsys.readouterr().err in README
    settings = server_settings(command.argv[2:], server_parser)
    need, pool = pool_need(settings), settings["prm_max_total_tokens"]
    pool_gb = pool * 2 * 28 * 4 * 128 * 2 / 1e9  # keys and values of 28 layers, 4 heads of 128, two bytes each
    assert (
        f"context of {PRM_CONTEXT_TOKENS} tokens, KV pool of {pool} tokens ({pool_gb:.2f} GB); a search of width "
        f"{need.width} with trajectories of {need.longest(PRM_CONTEXT_TOKENS)} tokens that share nothing needs "
        f"{need.tokens(PRM_CONTEXT_TOKENS)} (--prm-max-total-tokens" in " ".join(README.split())
    )


# ---- commands that need no server ----


def run_plan(argv: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Output, with the configurations of the two models where the Hub would have them."""
    for option in ("--model-path", "--prm-model-path"):
        model = folder / argv[argv.index(option) + 1]
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(QWEN_7B))
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as left:
        cli.main(argv[1:])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", commands("run"), ids=named)
def test_what_needs_no_server(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    match command.argv:
        case ["sglang-ets", "plan", *_]:
            out = run_plan(command.argv, tmp_path, monkeypatch, capsys)
            assert out in LIMITS
            (pools,) = re.findall(r"^flags: (.+)$", out, re.MULTILINE)
            assert pools in README  # the command beside it starts a server with them
        case ["sglang-ets", "view", "tree.json"]:
            (tmp_path / "tree.json").write_bytes((ROOT / "tests" / "data" / "tree.json").read_bytes())
            monkeypatch.chdir(tmp_path)
            cli.main(command.argv[1:])
            assert "The answer is 38" in (tmp_path / "tree.html").read_text(encoding="utf-8")
        case argv:
            pytest.fail(f"nobody looks at the outcome of {argv}")


# ---- commands of other programs ----


def searches_in(text: str) -> list[dict[str, Any]]:
    """The objects with a `search_width` in Python or JSON text, and the pairs of a command line."""
    literals = re.findall(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)?\}", text)
    bodies = [ast.literal_eval(literal) for literal in literals if "search_width" in literal]
    return bodies or [{"search_width": int(width)} for width in re.findall(r"search_width=(\d+)", text)]


@pytest.mark.parametrize("command", commands("foreign"), ids=named)
def test_other_programs_send_searches(command: Command) -> None:
    if command.kind == "python":
        compile(command.text, command.page, "exec")
    bodies = searches_in(command.text)
    assert bodies
    for body in bodies:
        if body["search_width"] > 1:
            SearchConfig.from_request(
                body["search_width"], body.get("search"), {"algorithm": "ets"}, n=None, max_tokens=None, seed=None
            )


# ---- names and links ----


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods of a file; a method with its class."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_every_place_of_the_walk_exists() -> None:
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", ARCHITECTURE)
    assert len(places) > MAX_STOPS
    missing = [f"{file}:{name}" for file, name in places if name not in definitions(ROOT / file)]
    assert not missing, f"docs/architecture.md names what is not there: {missing}"


def test_the_walk_has_at_most_twelve_stops() -> None:
    walk = ARCHITECTURE.split("\n## ")[1]
    stops = re.findall(r"^(\d+)\. (?=.*$)", walk, re.MULTILINE)
    assert [int(stop) for stop in stops] == list(range(1, len(stops) + 1))
    assert len(stops) <= MAX_STOPS
    assert all("`" in text for text in re.split(r"^\d+\. ", walk, flags=re.MULTILINE)[1:])


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    for page in PAGES[1:]:
        assert f"(docs/{page.name}" in README, page.name


def test_limits_name_all_that_is_refused() -> None:
    names = {*REFUSED, *REFUSED_NATIVE.values(), *REFUSED_SAMPLING}
    assert not {name for name in names if f"`{name}`" not in LIMITS}
    for _, what in UNSUPPORTED_SERVER.values():
        assert what in LIMITS


def test_flags_of_the_server_are_documented() -> None:
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert not {flag.name for flag in flags.SERVER_FLAGS if f"`--{flag.name}`" not in api}

"""Parameter files of the ETS and REBASE repositories: each key is read, and what they ask for is a search that can be had."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from sglang_ets.core.config import SearchConfig
from sglang_ets.tools import import_yaml, run
from sglang_ets.tools.import_yaml import KEYS, main

ROOT = Path(__file__).resolve().parents[2]
FILE = """\
temperature: 1.0 # of sampling
max_step_tokens: 256
max_tokens: 1024
select_method: "{method}"
num_threads: 8
softmax_temperature: 0.2
reward_model_type: "llemma"
policy_model_type: "{policy}"
store_path: ./exp_results/ets_{width}/
width: {width}
lambdac: 1.0
lambdas: {diversity}
"""


def written(
    folder: Path, method: str = "softmax_costmodel", policy: str = "llemma", width: int = 16, diversity: float = 1.5
) -> str:
    path = folder / f"ets_{width}.yaml"
    path.write_text(FILE.format(method=method, policy=policy, width=width, diversity=diversity))
    return str(path)


def search_of(printed: str) -> tuple[SearchConfig, run.Asked]:
    (command,) = re.findall(r"^sglang-ets run (.*)$", printed, re.MULTILINE)
    args = run.parser().parse_args([*shlex.split(command), "--data", "embedded", "--limit", "1"])
    ((asked, _),) = run.jobs_of(args)
    config = SearchConfig.from_request(
        asked.width, json.loads(asked.search), {}, n=None, max_tokens=asked.max_tokens, seed=None
    )
    return config, asked


@pytest.mark.parametrize(("width", "diversity"), [(16, 1.5), (64, 1.4), (256, 1.45)])
def test_the_published_files_are_the_papers_preset(
    width: int, diversity: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([written(tmp_path, width=width, diversity=diversity)])
    config, asked = search_of(capsys.readouterr().out)
    published = SearchConfig.from_request(width, {"preset": "paper"}, {}, n=None, max_tokens=None, seed=None)
    own = {"step_delimiter": ("ки",), "answer_pattern": "the_answer_is"}
    assert config == SearchConfig(**{**vars(published), **own})
    assert (asked.temperature, asked.is_chat) == (1.0, False)


@pytest.mark.parametrize(
    ("method", "diversity", "algorithm"),
    [
        ("softmax", 1.5, "rebase"),
        ("beam_search", 1.5, "beam"),
        ("dvts", 1.5, "dvts"),
        ("softmax_costmodel", 0, "ets_kv"),
    ],
)
def test_every_method_has_its_algorithm(
    method: str, diversity: float, algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([written(tmp_path, method=method, policy="llama", diversity=diversity)])
    out = capsys.readouterr().out
    config, _ = search_of(out)
    assert (config.algorithm, config.step_delimiter, config.answer_pattern) == (algorithm, ("\n\n",), "boxed")
    assert f"--search {algorithm} " in out and "--prm-format llemma" in out


def test_what_has_no_counterpart_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("select_method: softmax_costmodel\nlambdac: 0\nlambdas: 1\nfixedwidth: 4\n")
    main([str(path)])
    out = capsys.readouterr().out
    assert "# lambdac 0 was +1e-4 there" in out and "# fixedwidth has no counterpart" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mood: 3", "must have keys among temperature"[:20]),
        ("a: [", "must be YAML"),
        ("select_method: mcts", "select_method must be one of softmax_costmodel"),
        ("policy_model_type: gpt", "policy_model_type must be one of llemma"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main([str(path)])
    assert message in capsys.readouterr().err


def test_sweeps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[list[str]] = []
    monkeypatch.setattr(import_yaml.run, "main", ran.append)
    main([written(tmp_path), written(tmp_path, width=64), "--run", "--data", "set.jsonl", "--limit", "3"])
    assert [command[command.index("--width") + 1] for command in ran] == ["16", "64"]
    assert all(command[command.index("--limit") + 1] == "3" for command in ran)
    assert all(command[command.index("--split") + 1] == "all" for command in ran), "the published sets are whole"
    assert (tmp_path / "exp_results" / "ets_64").is_dir()


def test_the_page_has_every_key() -> None:
    page = (ROOT / "docs" / "from-ets.md").read_text(encoding="utf-8")
    assert not {key for key in KEYS if f"`{key}`" not in page}

"""The script that runs real clients: its task file, what it recorded, and the environment that it keeps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import sglang_ets
from bench.clients import __main__ as clients

ROOT = Path(clients.__file__).resolve().parents[2]
TASK = yaml.safe_load((ROOT / "bench/clients/lm_eval_task/embedded_arithmetic.yaml").read_text(encoding="utf-8"))
RECORDED = json.loads((ROOT / "tests/data/clients.json").read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_task_holds_the_first_embedded_problems() -> None:
    problems = lines(ROOT / TASK["dataset_kwargs"]["data_files"]["test"])
    embedded = lines(Path(sglang_ets.__file__).parent / "models" / "problems.jsonl")
    assert problems == [{"prompt": one["prompt"], "answer": str(one["answer"])} for one in embedded[: len(problems)]]
    assert len(problems) == 8


def test_lm_eval_put_the_settings_of_the_task_into_the_body() -> None:
    (body,) = [case["body"] for case in RECORDED if case["name"] == "lm_eval_text"]
    asked = TASK["generation_kwargs"]
    assert {key: body[key] for key in ("search_width", "search", "temperature")} == {
        key: asked[key] for key in ("search_width", "search", "temperature")
    }
    assert (body["max_tokens"], body["stop"]) == (asked["max_gen_toks"], asked["until"])


def test_the_environment_is_made_once_for_a_list_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake_run(command: list[str], **_options: Any) -> None:
        commands.append(command)
        (tmp_path / "made").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", fake_run)
    for num_commands in (2, 2):
        assert clients.environment(tmp_path / "made") == tmp_path / "made" / "bin" / "python"
        assert len(commands) == num_commands
    assert commands[1][-len(clients.PACKAGES) :] == [*clients.PACKAGES]
    monkeypatch.setattr(clients, "PACKAGES", ("langchain-openai==0",))
    clients.environment(tmp_path / "made")
    assert len(commands) == 4, "another list makes it anew"


def test_clients_see_neither_our_packages_nor_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setattr(subprocess, "run", lambda _command, **options: seen.append(options))
    clients.run_clients(Path("python"), "http://server")
    assert len(seen) == 1 + len(clients.evaluations("http://server"))
    for options in seen:
        assert options["check"]
        assert "PYTHONPATH" not in options["env"]
        assert options["env"]["HF_HUB_OFFLINE"] == "1"

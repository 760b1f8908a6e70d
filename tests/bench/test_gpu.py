"""The kit for a machine with a GPU, as far as a CPU can tell: what it gathers, its stand-in, its parts and their failures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from bench import rows
from bench.gpu import prepare, rehearse
from bench.gpu.rehearse import PARTS, Part, run_part, run_within

STAND_IN = Path(rehearse.__file__).parent / "stand_in"


def python(*arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheels_are_pinned_and_sglang_is_the_pinned_one() -> None:
    text = (Path(prepare.__file__).parent / "wheels.txt").read_text(encoding="utf-8")
    pins = prepare.requirements(text, "1.2.3")
    assert pins[-1] == "sglang==1.2.3" and "sglang==" not in text
    assert len(pins) > 30 and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert set(rehearse.BROUGHT).isdisjoint(pin.split("==")[0] for pin in pins)


def test_the_wheel_of_sglang_is_for_a_platform_that_is_asked_for() -> None:
    text = distribution("sglang").read_text("WHEEL") or ""
    (tag,) = re.findall(r"^Tag: .*-(\w+)$", text, re.MULTILINE)
    assert tag in prepare.PLATFORMS


def test_a_kit_has_bench_the_tests_of_the_kernels_and_the_file_that_is_called(tmp_path: Path) -> None:
    prepare.copy_sources(tmp_path)
    for path in ("bench/rows.py", "bench/gpu/rehearse.py", "tests/kernels/test_cuda.py", "tests/kernels/conftest.py"):
        assert (tmp_path / path).is_file(), path
    assert not (tmp_path / "bench" / "results").exists()
    assert (tmp_path / "bench/gpu/stand_in/sgl_kernel/scalar_type.py").is_file()
    printed = python("-c", "from bench import rows; print(rows.provenance()['commit'])", env={"PATH": ""}, cwd=tmp_path)
    assert printed.strip() == rows.commit_of(Path(rows.__file__).parent)


CALLS = """
import sgl_kernel
from sgl_kernel import silu_and_mul
from sgl_kernel.kvcacheio import transfer_kv_all_layer
from sgl_kernel.utils import is_arch_support_pdl
assert is_arch_support_pdl() is False
assert not hasattr(sgl_kernel, "__wrapped__")
for kernel in (silu_and_mul, transfer_kv_all_layer):
    try:
        kernel(1)
    except NotImplementedError as error:
        print(error)
"""


def test_the_stand_in_lets_everything_be_imported_and_nothing_be_called() -> None:
    printed = python("-c", CALLS, env={**os.environ, "PYTHONPATH": str(STAND_IN)})
    assert printed.splitlines() == [
        f"{name} is not on this machine; choose a backend of sglang that does without it"
        for name in ("sgl_kernel.silu_and_mul", "sgl_kernel.kvcacheio.transfer_kv_all_layer")
    ]


def test_a_part_writes_its_rows_and_its_time(tmp_path: Path) -> None:
    first, end = run_part("machine", tmp_path, {}, smoke=True)
    assert first["part"] == "machine" and first["torch"] == torch.__version__
    assert set(first["brought"]) == set(rehearse.BROUGHT)
    assert end["part_s"] > 0 and "error" not in end


def test_a_part_that_fails_or_takes_too_long_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part_machine.jsonl").write_text('{"part": "machine"}\n')  # of an earlier rehearsal
    (broken,) = run_part("machine", tmp_path, {"PYTHONHOME": str(tmp_path)}, smoke=True)
    assert "encodings" in broken["error"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        (silent,) = run_part("machine", tmp_path, {}, smoke=True)
    assert silent["error"] == "exit status 1, without a word"
    monkeypatch.setitem(PARTS, "machine", Part(PARTS["machine"].run, limit_s=0))
    (slow,) = run_part("machine", tmp_path, {}, smoke=True)
    assert slow["error"] == "more than 0 s"


STARTS_SOMETHING = """
import pathlib, sys, time
from bench.server import _end_by_exit
_end_by_exit()  # as `running_server` does
try:
    print("started", flush=True)
    time.sleep(60)
finally:
    pathlib.Path(sys.argv[1]).write_text("stopped")
"""


def test_a_part_that_takes_too_long_stops_what_it_has_started(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+", encoding="utf-8") as log:
        status = run_within(4, [sys.executable, "-c", STARTS_SOMETHING, str(tmp_path / "end")], os.environ, log)
        log.seek(0)
        assert log.read() == "started\n"
    assert status is None
    assert (tmp_path / "end").read_text() == "stopped"


def test_one_failure_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(name: str, *_args: object) -> list[dict[str, object]]:
        ran.append(name)
        return [{"part": name, "part_s": 1.0, **({"error": "Traceback\nit broke\n"} if name == "machine" else {})}]

    monkeypatch.setattr(rehearse, "run_part", run)
    monkeypatch.setattr(sys, "argv", ["rehearse", "--smoke", "--folder", str(tmp_path)])
    rehearse.main()
    assert ran == list(PARTS)
    out = tmp_path / "rows.jsonl"
    assert [row["part"] for row in rows.read(out)] == list(PARTS)
    assert {row["run"] for row in rows.read(out)} == set(rows.runs(out)), "in the form of committed rows"
    assert capsys.readouterr().out.startswith("machine: 1 s, 0 rows, it broke\n")
    assert rehearse.table(list(rows.read(out))).splitlines()[2:4] == [
        "| machine | 0 | it broke |",
        "| kernel_results | 0 | done |",
    ]


def kit_wheel(folder: Path, version: str) -> Path:
    """A wheel of a package of this version, without a module."""
    folder.mkdir()
    file = folder / f"kit_wheel-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: kit-wheel\nVersion: {version}\n"
    with ZipFile(file, "w") as wheel:
        for name, text in (("METADATA", metadata), ("WHEEL", "Wheel-Version: 1.0\n"), ("RECORD", "")):
            wheel.writestr(f"kit_wheel-{version}.dist-info/{name}", text)
    return file


def test_wheels_are_a_row_and_the_versions_that_were_installed_last_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(rows, "PACKAGES", ("kit-wheel",))
    monkeypatch.setattr(rows, "provenance", rows.provenance.__wrapped__)
    out = tmp_path / "rows.jsonl"
    for run, number in enumerate(("4.5", "4.6"), start=1):
        wheel = kit_wheel(tmp_path / number, number)
        flags = ["--wheels", str(wheel.parent), "--folder", str(tmp_path), "--parts"]
        monkeypatch.setattr(sys, "argv", ["rehearse", *flags])
        monkeypatch.setattr(rows, "_begun", {})  # another process
        rehearse.main()
        row = list(rows.read(out))[-1]
        assert list(row["wheels_mib"]) == [wheel.name] and row["part_s"] > 0
        assert rows.runs(out)[run]["versions"] == {"kit-wheel": number}


def test_rows_of_another_bench_are_this_rehearsals_and_none_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(arguments: list[str], _env: object) -> str:
        rows.append(Path(arguments[arguments.index("--out") + 1]), {"case": "new"})
        return ""

    monkeypatch.setattr(rehearse, "_output", bench)
    rows.append(tmp_path / "bench.kernels.jsonl", {"case": "old"})
    assert list(rehearse.kernel_times(True, tmp_path)) == [{"case": "new"}]


def test_the_limits_of_the_parts_leave_room_in_ten_minutes_for_a_usual_run() -> None:
    first = list(PARTS)[:4]
    assert first == ["machine", "kernel_results", "decode_times", "triton_server"]
    assert sum(PARTS[name].limit_s for name in first) <= 600, "what matters most comes within any lease"


def test_the_committed_rehearsal_ran_whole_and_searches_of_both_servers_agreed() -> None:
    kit = list(rows.read(rows.RESULTS / "gpu_kit_cpu.jsonl"))
    ends = [row for row in kit if "part_s" in row]
    assert [end["part"] for end in ends] == ["install", *PARTS]
    assert not [end["error"] for end in ends if "error" in end]
    answers: dict[str, list[list[str]]] = {}
    for row in kit:
        if "answers" in row:
            assert row["nodes_failed"] == 0
            if row["policy"] != "plain sampling":  # which has no seeds of its own on stock sglang
                answers.setdefault(row["part"], []).append(row["answers"])
    assert len(answers["tree_server"]) == 2 and answers["tree_server"] == answers["triton_server"]
    held = {row["part"]: row for row in kit if "held" in row}
    assert set(held) == {"triton_server", "tree_server", "large_model"}
    for row in held.values():
        state = row["held"]
        assert (state["live"], state["failed"], state["held_kv_tokens"], state["locks"], state["prm"]["locks"]) == (
            0,
        ) * 5
    assert held["tree_server"]["first_shared"] and not held["triton_server"]["first_shared"]

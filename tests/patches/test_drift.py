"""`make drift`: another version of sglang is compared from its wheel, which is neither installed nor imported."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from sglang_ets.patches import PATCHES, drift
from sglang_ets.patches.sources import Sources

SCHEDULER = "sglang/srt/managers/scheduler.py"
INFO = "sglang/srt/mem_cache/unified_cache/unified_tree_core_interface.py"
# A comment, which is no change; other code; and a field that our ledger reads.
EDITS = {
    SCHEDULER: [
        ("    def abort_request(", "    # a comment\n    def abort_request("),
        ("    def init_memory_pools(self", "    def init_memory_pools(self, budget=None"),
    ],
    INFO: [("    num_children: int\n", "")],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed sglang's files that the patches need, edited. It cannot be imported."""
    read = Sources.installed()
    drift.compare(read)
    path = tmp_path_factory.mktemp("wheel") / "sglang-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sglang/__init__.py", "raise AssertionError('imported')")
        archive.writestr("sglang/lib.so", "")
        for file in read.files:
            name, text = file.relative_to(read.root).as_posix(), file.read_text(encoding="utf-8")
            for old, new in EDITS.get(name, []):
                assert old in text
                text = text.replace(old, new)
            archive.writestr(name, text)
    return path


def test_a_wheel_is_compared_without_being_imported(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = set(sys.modules)
    assert drift.main([str(wheel)]) == 1
    assert {name for name in set(sys.modules) - loaded if name.split(".")[0] == "sglang"} == set()
    printed = capsys.readouterr().out
    lines = {line.split("`")[1]: line for line in printed.splitlines() if "`" in line}
    assert lines["managers.scheduler.Scheduler.abort_request"].endswith("| none | nothing |")
    assert "| text | read the new code" in lines["managers.scheduler.Scheduler.init_memory_pools"]
    broken = lines["managers.scheduler.Scheduler.process_batch_result"]
    assert "| contract | adapt `after_batch`: " in broken and "TreePathNodeInfo has no num_children |" in broken
    assert printed.endswith(f"none {len(PATCHES) - 2}, text 1, contract 1\n")


def test_only_python_files_of_sglang_are_unpacked(wheel: Path, tmp_path: Path) -> None:
    sources = drift.unpack(wheel, tmp_path / "here")
    assert (sources.root / SCHEDULER).is_file()
    assert not (sources.root / "sglang/lib.so").exists()


def test_the_installed_sglang_has_not_drifted(capsys: pytest.CaptureFixture[str]) -> None:
    assert drift.main([]) == 0
    assert capsys.readouterr().out.endswith(f"none {len(PATCHES)}, text 0, contract 0\n")


def test_a_version_that_pip_does_not_find_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"pip found no wheel of sglang 9\.9\.9; give a version"):
        drift.fetch("9.9.9", tmp_path)

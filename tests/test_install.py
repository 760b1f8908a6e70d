"""How `make` installs: which packages go into which environment, and which versions of sglang it takes."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_install", ROOT / ".ci" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sglang_of(wanted: list[str]) -> list[str]:
    return [item for item in wanted if item.startswith("sglang==")]


def test_a_version_that_is_not_supported_is_one_sentence(install: ModuleType) -> None:
    with pytest.raises(
        SystemExit, match=r"^SGLANG must be a version .* \([\d., ]+\), got 0\.4; docs/patches\.md [\w ]+$"
    ):
        install.requirements("0.4")


def test_a_supported_version_has_an_environment_of_its_own(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "setup.py").write_text(
        'SGLANG_VERSION = "2.0"\nSUPPORTED_SGLANG = [SGLANG_VERSION, "1.9"]\n'
        'INSTALL_REQUIRES = [f"sglang=={SGLANG_VERSION}", "torch"]\nTEST_REQUIRES = ["sglang-router"]\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(install, "ROOT", tmp_path)
    pinned, older = install.requirements(), install.requirements("1.9")
    assert pinned == install.requirements("2.0") == ["sglang==2.0", "torch", "sglang-router"]
    assert older == ["sglang==1.9", "torch", "sglang-router"]
    assert install.home_of(tmp_path, pinned) != install.home_of(tmp_path, older)


def test_a_long_command_shows_that_it_goes_on_and_a_failure_is_one(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "SIGN_OF_LIFE_S", 0.05)
    install.run_patiently("sleep", "0.2")
    assert capfd.readouterr().out.startswith("  still installing after 0 s\n")
    with pytest.raises(subprocess.CalledProcessError, match="status 1"):
        install.run_patiently("false")


def test_the_version_that_setup_pins_is_supported(install: ModuleType) -> None:
    pin = sglang_of(install.requirements())
    assert len(pin) == 1
    assert sglang_of(install.requirements(pin[0].removeprefix("sglang=="))) == pin


@pytest.mark.parametrize(("given", "folder"), [((), ".venv"), (("SGLANG=1.9",), ".venv-1.9")])
def test_make_keeps_the_environments_of_versions_apart(given: tuple[str, ...], folder: str) -> None:
    said = subprocess.run(
        ["make", "--dry-run", "--always-make", "unit", *given], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    version = "".join(given).removeprefix("SGLANG=")
    assert f'" {folder} {version}'.rstrip() in said.replace(" >&2", "")
    assert f" {folder}/bin/python -m pytest " in said

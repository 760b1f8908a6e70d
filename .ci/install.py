"""Install for `make`: the packages once per set of requirements, then a thin environment for this clone.

    python3 .ci/install.py CACHE VENV [VERSION of sglang]

`CACHE/<key>` is a virtual environment with everything that setup.py requires; the key is a hash of those requirements
and of the Python version. It is built under another name and renamed when complete, so an interrupted build is never
taken for a whole one; a lock keeps two builders apart.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LISTS = ("SGLANG_VERSION", "SUPPORTED_SGLANG", "INSTALL_REQUIRES", "TEST_REQUIRES")
SIGN_OF_LIFE_S = 30.0
PIP = ("-m", "pip", "--disable-pip-version-check", "install")


def requirements(sglang: str | None = None) -> list[str]:
    """The requirement lists of setup.py, read without running setuptools; with another sglang than the one it pins.

    Raises:
        SystemExit: that version is not supported.
    """
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assigns = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") in LISTS]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(assigns, []), "setup.py", "exec"), names)  # only these assignments
    supported = names["SUPPORTED_SGLANG"]
    if sglang is not None and sglang not in supported:
        raise SystemExit(
            f"SGLANG must be a version that setup.py lists as supported ({', '.join(supported)}), got {sglang}; "
            "docs/patches.md says what another one takes"
        )
    wanted = [*names["INSTALL_REQUIRES"], *names["TEST_REQUIRES"]]
    pin = f"sglang=={names['SGLANG_VERSION']}"
    return [f"sglang=={sglang}" if sglang and item == pin else item for item in wanted]


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def run_patiently(*command: str | Path) -> None:
    """As `run`, for a command that says nothing for minutes: a line each `SIGN_OF_LIFE_S` says that it goes on."""
    started = time.monotonic()
    with subprocess.Popen([str(part) for part in command]) as process:
        while process.poll() is None:
            try:
                process.wait(SIGN_OF_LIFE_S)
            except subprocess.TimeoutExpired:
                print(f"  still installing after {time.monotonic() - started:.0f} s", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


def home_of(cache: Path, wanted: list[str]) -> Path:
    """Where the shared environment for these requirements is, or will be."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256("\n".join([version, *sorted(wanted)]).encode()).hexdigest()[:16]
    return cache / f"py{version}-{key}"


def build_packages(cache: Path, wanted: list[str]) -> Path:
    """The shared environment for these requirements, built if it is missing."""
    home = home_of(cache, wanted)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            partial = cache / f"{home.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            print(f"installing {len(wanted)} requirements into {home} (about 11 GB, 8 minutes; once)", flush=True)
            run(sys.executable, "-m", "venv", partial)
            log = home.with_suffix(".log")
            run_patiently(partial / "bin" / "python", *PIP, "-q", "--progress-bar", "off", "--log", log, *wanted)
            partial.rename(home)
    return home


def build_thin_venv(venv: Path, packages: Path) -> None:
    """An environment with this clone installed, on top of the shared packages."""
    run(sys.executable, "-m", "venv", "--clear", venv)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = packages / "lib" / version / "site-packages"
    own = venv / "lib" / version / "site-packages"
    # Through addsitedir rather than a bare path, so that .pth files of the shared packages count too.
    (own / "shared_packages.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n", encoding="utf-8")
    (venv / "bin" / "ruff").symlink_to(
        packages / "bin" / "ruff"
    )  # `python -m ruff` looks for it beside the interpreter
    run(venv / "bin" / "python", *PIP, "-q", "--no-deps", "-e", ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("venv", type=Path)
    parser.add_argument("sglang", nargs="?", help="a supported version; default: the one that setup.py pins")
    args = parser.parse_args()
    started = time.monotonic()
    build_thin_venv(ROOT / args.venv, build_packages(args.cache, requirements(args.sglang)))
    print(f"installed in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

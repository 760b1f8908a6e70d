"""Gathers what a machine with a GPU and without a package index needs, where there is an index.

    python -m bench.gpu.prepare FOLDER

FOLDER then holds the wheels, a copy of bench/, and the tests of the kernels; carry it there, and follow rehearse.py.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from bench import rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SGLANG = "sglang"
KERNEL_WHEEL = "sglang-kernel"
PYTHON = "3.12"
GLIBC = 34  # the minor version that sglang's own wheel asks for; the other machine's must be as new
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 16, -1)), "manylinux2014_x86_64")
LEFT_OUT = ("results", "data", "__pycache__")  # of bench/
KERNEL_TESTS = ("__init__.py", "kernels")
MIB = 1 << 20


def requirements(text: str, sglang_version: str) -> list[str]:
    """The pins, sglang's among them, which setup.py alone states."""
    pins = [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    return [*pins, f"{SGLANG}=={sglang_version}"]


def download(pins: list[str], folder: Path) -> None:
    """Fetch wheels for the other machine's Python, through pip and without dependencies.

    Raises:
        CalledProcessError: pip could not find one.
    """
    platforms = [item for name in PLATFORMS for item in ("--platform", name)]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    pip = [sys.executable, "-m", "pip"]
    shutil.rmtree(
        ROOT / "build", ignore_errors=True
    )  # setuptools would put into the wheel what an older build has left there
    subprocess.run([*pip, "download", "--quiet", *options, "--dest", str(folder), *pins], check=True)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)


def copy_sources(folder: Path) -> None:
    """bench/ and the tests that need a GPU, beside the wheels; the one file of sgl_kernel that is called; and the commit."""
    (folder / rows.COMMIT_FILE).write_text(rows.commit_of(ROOT / "bench"), encoding="utf-8")
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    for name in KERNEL_TESTS:
        source, target = ROOT / "tests" / name, folder / "tests" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    file = kernel_wheel_file("scalar_type.py")
    if file is not None:
        shutil.copy(file, folder / "bench" / "gpu" / "stand_in" / "sgl_kernel")


def kernel_wheel_file(name: str) -> Path | None:
    """A file of the installed wheel `sgl_kernel`, which is not imported; None if it is not installed."""
    try:
        file = Path(str(distribution(KERNEL_WHEEL).locate_file(f"sgl_kernel/{name}")))
    except PackageNotFoundError:
        return None
    return file if file.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    wheels = args.folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    download(requirements((HERE / "wheels.txt").read_text(encoding="utf-8"), version(SGLANG)), wheels)
    copy_sources(args.folder)
    size = sum(file.stat().st_size for file in wheels.iterdir())
    print(
        f"{len(list(wheels.iterdir()))} wheels, {size / MIB:.1f} MiB; there: python -m bench.gpu.rehearse --wheels wheels"
    )


if __name__ == "__main__":
    main()

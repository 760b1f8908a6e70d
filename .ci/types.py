"""mypy over pyproject's files. `kernels/` and `patches/` are checked under the names that they are imported by (setup.py)."""

from __future__ import annotations

import sys

from mypy import build
from mypy.main import process_options
from mypy.modulefinder import BuildSource

PREFIX = {"kernels": "sglang_ets.", "patches": "sglang_ets."}


def main() -> None:
    found, options = process_options([])
    sources = [
        BuildSource(source.path, PREFIX.get(source.module.split(".")[0], "") + source.module) for source in found
    ]
    try:
        errors = build.build(sources, options).errors
    except build.CompileError as error:
        errors = error.messages
    if errors:
        sys.exit("\n".join(errors))
    print(f"no type errors in {len(sources)} files")


if __name__ == "__main__":
    main()

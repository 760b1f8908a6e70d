"""`python -m sglang_ets.patches DOC` writes the tables between the marks of docs/patches.md, or of the file given."""

from __future__ import annotations

import sys
from pathlib import Path

from sglang_ets.patches.docs import DOC, filled

path = Path(sys.argv[1] if len(sys.argv) > 1 else DOC)
path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

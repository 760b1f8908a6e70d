"""docs/scaling.md shows what `sglang-ets plan` computes and which tests there are."""

from __future__ import annotations

import re

from tests.scaling_tables import CONFIGURATIONS, DOC, ROOT, filled


def test_the_tables_are_as_computed() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m tests.scaling_tables"
    assert text.count("<!-- scaling: ") == 3


def test_every_configuration_has_its_test() -> None:
    for one in CONFIGURATIONS:
        path, name = one.test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), one.test

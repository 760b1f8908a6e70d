"""PRM formats: which tokens of a step carry its score, and how hidden states become one. Pure data, no engine.

Both formats here read the policy model's own tokens, so the two tokenizers must be the same; the engine checks that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

AUTO = "auto"
NAMES = ("likelihood", "token_classification")
CONFIG_FILE = "prm_config.json"  # beside the checkpoint: {"format": ..., "score_after": ...}
CLASSIFIER_SUFFIX = "ForTokenClassification"


@dataclass(frozen=True)
class Likelihood:
    """A causal LM judges a step by how probable it finds it: the product of the probabilities of its tokens.

    With `score_after`, only the tokens after the first one that contains it count: what comes before is choice, not
    correctness. The score of a path is the smallest of its steps' scores, since a wrong step cannot be made good.
    """

    score_after: str | None = None
    name: str = "likelihood"

    def first_scored(self, token_texts: Sequence[str]) -> int:
        """Index of the first token of the step that counts; 0 when the marker does not occur."""
        if self.score_after is None:
            return 0
        hits = [place for place, text in enumerate(token_texts) if self.score_after in text]
        return hits[0] + 1 if hits and hits[0] + 1 < len(token_texts) else 0


@dataclass(frozen=True)
class TokenClassification:
    """A two-label head, read at the last token of the step (its delimiter): softmax, probability of `label`.

    Source: the checkpoints that TRL's PRMTrainer writes.
    """

    label: int = 1
    name: str = "token_classification"


PrmFormat = Likelihood | TokenClassification


def choose_format(model_path: str, wanted: str) -> PrmFormat:
    """The format by name, or with "auto" from `prm_config.json` or the checkpoint's architecture.

    Raises:
        SystemExit: the name is unknown, or nothing tells the format.
    """
    folder = Path(model_path)
    own = _read(folder / CONFIG_FILE)
    name = own.get("format") if wanted == AUTO else wanted
    if name is None:
        architectures = _read(folder / "config.json").get("architectures") or [""]
        name = "token_classification" if str(architectures[0]).endswith(CLASSIFIER_SUFFIX) else None
    if name == "likelihood":
        marker = own.get("score_after")
        return Likelihood(None if marker is None else str(marker))
    if name == "token_classification":
        return TokenClassification()
    raise SystemExit(
        f"--prm-format must be one of {', '.join((AUTO, *NAMES))}, got {wanted!r}, and {model_path} does not tell its own; "
        "name the format"
    )


def _read(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

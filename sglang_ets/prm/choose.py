"""Which format a PRM checkpoint has: by name, by its own `prm_config.json`, by architecture or by a known name."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

from sglang_ets.prm.formats import (
    Conversation,
    Head,
    Judge,
    Llemma,
    PlainText,
    PrmFormat,
    QwenPrm,
    Shepherd,
    Skywork,
    StepProbability,
    Tokenizer,
    TokenRows,
    piece_id,
    single_token,
)

AUTO = "auto"
POLICY_HEAD = "policy_head"  # reads the policy model's own states: see `policy_head`
NAMES = (
    "likelihood",
    "token_classification",
    "math_shepherd",
    "llemma",
    "rlhflow",
    "qwen_prm",
    "skywork",
    "judge",
    "confidence",
    POLICY_HEAD,
)
WITHOUT_PRM = ("judge", "confidence")  # the policy model's own weights serve, if no PRM is named
CONFIG_FILE = "prm_config.json"  # beside the checkpoint: {"format": ..., "score_after": ...}
# Formats that read a head of their own, and the architectures that have it. All others read the language model's.
HEADS = {
    "qwen_prm": "Qwen2ForProcessRewardModel",
    "skywork": "Qwen2ForPrmModel",
    "token_classification": "*ForTokenClassification",
}
KNOWN_NAMES = {"math-shepherd": "math_shepherd", "llemma-reward": "llemma", "llama3.1-8b-prm": "rlhflow"}
LLEMMA_LABEL = 8094  # the token whose logit is the reward


def choose_format(model_path: str, wanted: str, tokenizer: Tokenizer) -> PrmFormat:
    """The format of a checkpoint.

    Raises:
        SystemExit: the name is unknown, nothing tells the format, or the tokenizer lacks a token that it needs.
    """
    return _build(_format_name(model_path, wanted), read_json(model_path, CONFIG_FILE), tokenizer)


def is_policy_head(model_path: str | None, wanted: str) -> bool:
    """Whether the PRM is a head on the policy model's own states, and no model."""
    if wanted != AUTO or model_path is None:
        return wanted == POLICY_HEAD
    return Path(model_path).is_dir() and read_json(model_path, CONFIG_FILE).get("format") == POLICY_HEAD


def check_checkpoint(model_path: str, wanted: str) -> None:
    """Before anything is loaded: there is a checkpoint of a model, and its head is the one that the format reads.

    Raises:
        SystemExit: there is none, nothing tells the format, or scores in this format would mean nothing.
    """
    try:
        config = read_json(model_path, "config.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"--prm-model-path must name a checkpoint, got {model_path!r} ({reason})") from error
    if not config:
        raise SystemExit(
            f"--prm-model-path must name a folder with a checkpoint or a model on the Hub, got {model_path!r}, in which no "
            "config.json is found"
        )
    name, architecture = _format_name(model_path, wanted), _architecture(config)
    own = next((format_name for format_name, head in HEADS.items() if fnmatchcase(architecture, head)), None)
    if architecture and own != (name if name in HEADS else None):
        reads = f"the head of {HEADS[name]}" if name in HEADS else "the head of a language model"
        remedy = f"give --prm-format {own}" if own else "give another --prm-format, or another checkpoint"
        raise SystemExit(f"--prm-format {name} reads {reads}, and {model_path} is a {architecture}; {remedy}")


def _format_name(model_path: str, wanted: str) -> str:
    name = _recognised(model_path, read_json(model_path, CONFIG_FILE)) if wanted == AUTO else wanted
    if name not in NAMES:
        raise SystemExit(
            f"--prm-format must be one of {', '.join((AUTO, *NAMES))}, got {wanted!r}, and {model_path} does not tell "
            "its own; name the format"
        )
    return name


def _architecture(config: dict[str, object]) -> str:
    return str((config.get("architectures") or [""])[0])  # type: ignore[index]


def _recognised(model_path: str, own: dict[str, object]) -> str | None:
    if "format" in own:
        return str(own["format"])
    architecture = _architecture(read_json(model_path, "config.json"))
    for format_name, head in HEADS.items():
        if fnmatchcase(architecture, head):
            return format_name
    name = model_path.rstrip("/").lower()
    return next((known for part, known in KNOWN_NAMES.items() if part in name), None)


def _build(name: str, own: dict[str, object], tokenizer: Tokenizer) -> PrmFormat:
    plain = PlainText(tokenizer)
    if name == "likelihood":
        marker = own.get("score_after")
        after = None if marker is None else str(marker)
        return PrmFormat(name, plain, StepProbability("product", after), reads_policy_tokens=True)
    if name == "confidence":
        return PrmFormat(name, plain, StepProbability("mean"), reads_policy_tokens=True)
    if name == "token_classification":
        separator = str(own.get("separator", "\n"))
        return PrmFormat(name, PlainText(tokenizer, separator), Head(), reads_policy_tokens=True)
    if name == "qwen_prm":
        single_token(tokenizer, "<extra_0>", name)
        return PrmFormat(name, QwenPrm(tokenizer), Head())
    if name == "skywork":
        return PrmFormat(name, Skywork(tokenizer), Head("sigmoid", 0))
    if name == "judge":
        judge = Judge(tokenizer)
        return PrmFormat(name, judge, judge.verdicts())
    if name == "llemma":
        label = int(str(own.get("label_id", LLEMMA_LABEL)))
        return PrmFormat(name, Llemma(tokenizer), TokenRows((label,)))
    if name == "rlhflow":
        signs = tuple(single_token(tokenizer, sign, name) for sign in ("+", "-"))
        return PrmFormat(name, Conversation(tokenizer), TokenRows(signs))
    signs = tuple(piece_id(tokenizer, sign) for sign in ("+", "-"))
    return PrmFormat(name, Shepherd(tokenizer), TokenRows(signs))


def read_json(model_path: str, name: str) -> dict[str, object]:
    """A JSON file of a checkpoint in a folder or on the Hub; empty if it has none."""
    path: str | None = str(Path(model_path) / name)
    if not Path(model_path).is_dir():
        from transformers.utils.hub import cached_file  # heavy, and not needed for folders

        path = cached_file(model_path, name, _raise_exceptions_for_missing_entries=False)
    if path is None or not Path(path).exists():
        return {}
    return dict(json.loads(Path(path).read_text(encoding="utf-8")))

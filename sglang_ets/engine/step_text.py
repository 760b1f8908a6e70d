"""The text of a step, cut so that the steps of a trajectory joined are the text of its tokens.

A step may end inside a character: a token limit counts tokens, and the tokens of byte-level vocabularies are bytes. What
such a step ends with is not decodable yet; its text comes with the next step, or with the trajectory's last one as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"  # what tokenizers decode bytes to that are no character, or not one yet
MAX_PENDING_TOKENS = 3  # a character of UTF-8 has four bytes at most, and a token one byte at least


@dataclass(frozen=True)
class StepText:
    """What a step adds to the text of its trajectory."""

    text: str
    num_pending_tokens: int  # last tokens of the trajectory whose text the next step brings


def read_step(tokenizer: Any, token_ids: Sequence[int], num_new: int, text_before: str, *, is_last: bool) -> StepText:
    """The text of the last `num_new` of a trajectory's `token_ids`, behind `text_before`.

    `num_new` counts the step's tokens and those that were pending before it. With `is_last` nothing stays pending.
    """
    text, num_pending = _decode(tokenizer, token_ids), 0
    while not is_last and text.endswith(REPLACEMENT) and num_pending < min(num_new, MAX_PENDING_TOKENS):
        num_pending += 1
        text = _decode(tokenizer, token_ids[: len(token_ids) - num_pending])
    if text.startswith(text_before):
        return StepText(text[len(text_before) :], num_pending)
    # The tokenizer decodes the tokens before otherwise in this context. Their text was given out: add only what is new.
    end, start = len(token_ids) - num_pending, len(token_ids) - num_new
    before = _decode(tokenizer, token_ids[:start])
    new = text[len(before) :] if text.startswith(before) else _decode(tokenizer, token_ids[start:end])
    return StepText(new, num_pending)


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

"""Steps that end anywhere, inside a character too: joined, their texts are the text of the trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sglang_ets.engine.step_text import REPLACEMENT, read_step

TEXTS = ["x = 3 € and y\n", "我们先算 7*8，再减。", "🙂👍🏽 = 👨‍👩‍👧", "naïve – “quoted”\n\n", "a\ufffdb\ufffd", "é"]


class ByteTokenizer:
    """A token is a byte, as in the smallest byte-level vocabulary; 256 is a special token without text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def fallback_tokenizer() -> Any:
    """SentencePiece's way: characters, and `<0xNN>` pieces for the bytes of those that have no piece of their own."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: byte for byte, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def joined(tokenizer: Any, steps: Sequence[Sequence[int]]) -> list[str]:
    """Texts of the steps of one trajectory, as the coordinator reads them."""
    ids: tuple[int, ...] = ()
    pieces: list[str] = []
    num_pending = 0
    for place, step in enumerate(steps):
        ids += tuple(step)
        is_last = place == len(steps) - 1
        read = read_step(tokenizer, ids, num_pending + len(step), "".join(pieces), is_last=is_last)
        pieces.append(read.text)
        num_pending = read.num_pending_tokens
        assert 0 <= num_pending <= 3
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_a_cut_at_every_byte(text: str) -> None:
    data = text.encode()
    for cut in range(len(data) + 1):
        first, second = joined(ByteTokenizer(), [data[:cut], data[cut:]])
        assert first + second == text
        assert text.startswith(first)


@pytest.mark.parametrize("text", TEXTS)
def test_a_token_a_step(text: str) -> None:
    for tokenizer in (ByteTokenizer(), fallback_tokenizer()):
        pieces = joined(tokenizer, [[byte] for byte in text.encode()])
        assert "".join(pieces) == text
        assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_two_cuts_with_byte_pieces(text: str) -> None:
    data, tokenizer = text.encode(), fallback_tokenizer()
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            assert "".join(joined(tokenizer, [data[:first], data[first:second], data[second:]])) == text


def test_the_character_that_was_cut_comes_with_the_step_that_ends_it() -> None:
    data = "3 €!".encode()
    assert joined(ByteTokenizer(), [data[:3], data[3:]]) == ["3 ", "€!"]


def test_the_last_step_brings_what_never_became_a_character() -> None:
    data = "3 €".encode()[:-1]
    assert joined(ByteTokenizer(), [data[:3], data[3:]]) == ["3 ", REPLACEMENT]


def test_special_tokens_between_the_bytes_of_a_character_do_no_harm() -> None:
    data = [*"3 €!".encode()]
    assert joined(ByteTokenizer(), [[*data[:3], 256], data[3:]]) == ["3 ", "€!"]


@given(st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=8))
def test_any_bytes_in_any_steps(steps: list[bytes]) -> None:
    whole = b"".join(steps).decode("utf-8", "replace")
    assert "".join(joined(ByteTokenizer(), steps)) == whole


@given(st.text(max_size=12), st.data())
def test_any_text_cut_anywhere(text: str, data: st.DataObject) -> None:
    encoded = text.encode("utf-8", "replace")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=4)))
    steps = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
    for tokenizer in (ByteTokenizer(), FALLBACK):
        assert "".join(joined(tokenizer, steps)) == encoded.decode()


def test_a_tokenizer_that_rewrites_the_text_before_a_step_loses_and_doubles_nothing() -> None:
    class Cleaning(ByteTokenizer):
        """Takes the space before a full stop away, as `clean_up_tokenization_spaces` does."""

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return super().decode(ids).replace(" .", ".")

    assert joined(Cleaning(), [b"so 2 ", b". And", b" 3 .", b" End"]) == ["so 2 ", ". And", " 3.", " End"]


FALLBACK = fallback_tokenizer()

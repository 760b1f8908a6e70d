"""The testbed's tokenizer: one token a character, in the file format every serving engine reads."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.testbed.task import ANSWER_PREFIX, CONNECTORS

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIALS = (PAD, EOS, UNKNOWN)
PAD_ID, EOS_ID, UNKNOWN_ID = range(3)
CHARACTERS = tuple("\n 0123456789+-*()=:") + tuple(sorted(set(ANSWER_PREFIX + "".join(CONNECTORS)) - {" "}))
VOCABULARY = {token: token_id for token_id, token in enumerate(SPECIALS + CHARACTERS)}

# A chat request's messages are put one after another, so that a problem may be sent as one user message.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def encode(text: str) -> list[int]:
    """Token ids of the task's own text; equal to the built tokenizer's, without its cost.

    Raises:
        KeyError: a character that the task never writes.
    """
    return [VOCABULARY[character] for character in text]


def build_tokenizer(model_max_length_tokens: int) -> PreTrainedTokenizerFast:
    """The tokenizer; it adds no beginning-of-text token and maps unknown characters to <unk>."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length_tokens,
        chat_template=CHAT_TEMPLATE,
    )

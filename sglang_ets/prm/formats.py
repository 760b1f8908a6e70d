"""PRM formats: how a question and its steps become the PRM's tokens, and where a step's score is read. No engine.

A format is a layout (tokens) and a readout (score). The score of a step is read at the last token that its layout makes,
so that one forward pass over the new tokens gives it. Layouts tokenise only the new step, and leave the tokens of all
earlier ones as they are: the same ids as tokenising the whole text at once (tests/prm/test_formats.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Tokenizer = Any  # a transformers tokenizer; it has no type of its own that all models share

SHEPHERD_TAG = "ки"
QWEN_TAG = "<extra_0>"
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
JUDGE_ASKS = "\n\nIs every step of this solution right so far? Answer Yes or No."
_QUESTION, _STEP = "\x02question\x03", "\x02step\x03"  # places in a rendered chat template


@dataclass(frozen=True)
class StepTokens:
    """A step in the PRM's tokens."""

    path: tuple[int, ...]  # what it adds to the trajectory
    query: tuple[int, ...] = ()  # follows for this score only, no later step sees it
    text_start: int = 0  # the step's own words are path[text_start:text_end]; tags and headers surround them
    text_end: int | None = None

    @property
    def read(self) -> tuple[int, ...]:
        """All tokens that the PRM extends; the score is read at the last one."""
        return self.path + self.query

    @property
    def words(self) -> slice:
        """Where the embedding is taken: the step's words, or everything if it has none."""
        words = slice(self.text_start, len(self.path) if self.text_end is None else self.text_end)
        return words if words.start < words.stop else slice(0, len(self.path or self.query))


@dataclass(frozen=True)
class Head:
    """A head of the checkpoint over the last hidden state."""

    activation: Literal["softmax", "sigmoid"] = "softmax"
    label: int = 1


@dataclass(frozen=True)
class TokenRows:
    """Rows of the language model head: the share of the first token among these, or the sigmoid of a single one."""

    token_ids: tuple[int, ...]

    @property
    def activation(self) -> Literal["softmax", "sigmoid"]:
        return "softmax" if len(self.token_ids) > 1 else "sigmoid"


@dataclass(frozen=True)
class StepProbability:
    """How probable a causal LM finds the step.

    `product`: product over the tokens after the first one that contains `score_after` (all, where none does); what comes
    before is choice, not correctness. A path has the smallest score of its steps: a wrong one cannot be made good.
    `mean`: geometric mean over all tokens, each step for itself: the model's confidence.
    """

    reduce: Literal["product", "mean"] = "product"
    score_after: str | None = None

    def first_scored(self, token_texts: Sequence[str]) -> int:
        """Index of the first token of the step that counts; 0 when the marker does not occur."""
        if self.score_after is None:
            return 0
        hits = [place for place, text in enumerate(token_texts) if self.score_after in text]
        return hits[0] + 1 if hits and hits[0] + 1 < len(token_texts) else 0


Readout = Head | TokenRows | StepProbability


class Layout(Protocol):
    """Texts to tokens, for one tokenizer."""

    def prompt(self, question: str) -> tuple[int, ...]:
        """Tokens before the first step."""

    def step(self, text: str, depth: int) -> StepTokens:
        """Tokens of the step at `depth` (1 is the first)."""


@dataclass(frozen=True)
class PrmFormat:
    """`reads_policy_tokens`: the PRM sees the policy model's own tokens, if the two tokenizers are the same."""

    name: str
    layout: Layout
    readout: Readout
    reads_policy_tokens: bool = False


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Tokens of a text that follows others: no special tokens around it."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def encode_after(tokenizer: Tokenizer, context: str, text: str) -> tuple[int, ...]:
    """Tokens of `text` behind `context`: a SentencePiece tokenizer puts a space before a text that stands alone."""
    head, whole = encode(tokenizer, context), encode(tokenizer, context + text)
    return whole[len(head) :] if whole[: len(head)] == head else encode(tokenizer, text)


def encode_start(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Tokens of a text that begins a sequence, with the begin-of-text token where the tokenizer has one."""
    ids = tuple(tokenizer.encode(text))
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id else ids


def piece_id(tokenizer: Tokenizer, word: str) -> int:
    """The token of a word behind a space: SentencePiece's own piece for it, else the last token of its encoding."""
    piece = tokenizer.get_vocab().get("\u2581" + word)
    return int(piece) if piece is not None else encode(tokenizer, " " + word)[-1]


def single_token(tokenizer: Tokenizer, text: str, why: str) -> int:
    """Raises:
    SystemExit: the tokenizer splits the text.
    """
    ids = encode(tokenizer, text)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise SystemExit(f"{why} needs a tokenizer with one token for {text!r}, got {ids}; choose another --prm-format")
    return ids[0]


@dataclass(frozen=True)
class PlainText:
    """The question and the steps as they are; with a separator, steps are stripped and end in it (TRL's PRMTrainer)."""

    tokenizer: Tokenizer
    separator: str | None = None

    def prompt(self, question: str) -> tuple[int, ...]:
        return encode_start(self.tokenizer, question if self.separator is None else question.rstrip() + self.separator)

    def step(self, text: str, depth: int) -> StepTokens:
        if self.separator is None:
            return StepTokens(encode_after(self.tokenizer, "\n", text))
        words = encode_after(self.tokenizer, self.separator, text.strip())
        return StepTokens(words + encode_after(self.tokenizer, ".", self.separator), text_end=len(words))


@dataclass(frozen=True)
class Shepherd:
    """Question, then "Step i: ..." lines, each ending in a tag. Source: the model card of Math-Shepherd."""

    tokenizer: Tokenizer

    def prompt(self, question: str) -> tuple[int, ...]:
        return encode_start(self.tokenizer, question.strip())

    def step(self, text: str, depth: int) -> StepTokens:
        words = text.strip()
        numbered = words if words.startswith("Step ") else f"Step {depth}: {words}"
        before = " " if depth == 1 else "\n"
        own = encode_after(self.tokenizer, SHEPHERD_TAG, before + numbered)
        return StepTokens((*own, piece_id(self.tokenizer, SHEPHERD_TAG)), text_end=len(own))


@dataclass(frozen=True)
class Llemma:
    """Headed question and solution, each step with a tag at its end."""

    tokenizer: Tokenizer

    def prompt(self, question: str) -> tuple[int, ...]:
        return encode_start(self.tokenizer, f"# Question\n\n{question.strip()}\n\n# Solution\n\n")

    def step(self, text: str, depth: int) -> StepTokens:
        before = "" if depth == 1 else "\n\n"
        own = encode_after(self.tokenizer, "\n\n" if depth == 1 else SHEPHERD_TAG, before + text.strip())
        return StepTokens((*own, piece_id(self.tokenizer, SHEPHERD_TAG)), text_end=len(own))


@dataclass(frozen=True)
class QwenPrm:
    """Chat template, one assistant turn, a special token behind every step. Source: model card of Qwen2.5-Math-PRM."""

    tokenizer: Tokenizer

    def prompt(self, question: str) -> tuple[int, ...]:
        turns = [{"role": "system", "content": QWEN_SYSTEM}, {"role": "user", "content": question.strip()}]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return encode(self.tokenizer, rendered)

    def step(self, text: str, depth: int) -> StepTokens:
        words = encode(self.tokenizer, text.strip())
        return StepTokens((*words, single_token(self.tokenizer, QWEN_TAG, "qwen_prm")), text_end=len(words))


@dataclass(frozen=True)
class Skywork:
    """Problem and steps; every line is tokenised alone and ended by the newline token, and the last line's end is read.

    Source: Skywork-o1-Open-PRM's inference, which splits a solution at newlines.
    """

    tokenizer: Tokenizer

    def prompt(self, question: str) -> tuple[int, ...]:
        return encode(self.tokenizer, f"{self.tokenizer.bos_token or ''}{question.strip()}\n")

    def step(self, text: str, depth: int) -> StepTokens:
        newline = encode(self.tokenizer, "\n")[-1]
        lines = [(*encode(self.tokenizer, line), newline) for line in text.strip().split("\n")]
        path = tuple(token for line in lines for token in line)
        return StepTokens(path, text_end=len(path) - 1)


@dataclass(frozen=True)
class Conversation:
    """A user turn a step, answered by "+"; read before the answer. Source: RLHFlow's Llama3.1-8B-PRM model cards."""

    tokenizer: Tokenizer

    def _pieces(self) -> tuple[str, str, str]:
        turns = [("user", _QUESTION), ("assistant", "+"), ("user", _STEP), ("assistant", "+")]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False
        )
        before, rest = rendered.split(_QUESTION)
        between, after = rest.split(_STEP)
        header = after[: after.index("+")]
        return before, header, between[len(header) :]  # until the question; step to answer; answer to next step

    def prompt(self, question: str) -> tuple[int, ...]:
        return encode(self.tokenizer, self._pieces()[0] + question.strip())

    def step(self, text: str, depth: int) -> StepTokens:
        _, header, answered = self._pieces()
        before = () if depth == 1 else encode(self.tokenizer, answered)
        own = encode(self.tokenizer, (" " if depth == 1 else "") + text.strip())
        end = len(before) + len(own)
        return StepTokens((*before, *own, *encode(self.tokenizer, header)), text_start=len(before), text_end=end)


@dataclass(frozen=True)
class Judge:
    """A causal LM is asked after every step whether the solution is right so far; the question is not kept."""

    tokenizer: Tokenizer

    def _around(self) -> tuple[str, str]:
        asked = f"Problem:\n{_QUESTION}\n\nSolution:\n{_STEP}{JUDGE_ASKS}"
        if not self.tokenizer.chat_template:
            before, after = f"{asked}\nAnswer:".split(_STEP)
            return before, after
        turns = [{"role": "user", "content": asked}]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, after = rendered.split(_STEP)
        return before, after

    def verdicts(self) -> TokenRows:
        """Yes and No, as they follow the query.

        Raises:
            SystemExit: the tokenizer splits one of them.
        """
        space = "" if self.tokenizer.chat_template else " "
        return TokenRows(tuple(single_token(self.tokenizer, space + word, "judge") for word in ("Yes", "No")))

    def prompt(self, question: str) -> tuple[int, ...]:
        text = self._around()[0].replace(_QUESTION, question.strip())
        return encode(self.tokenizer, text) if self.tokenizer.chat_template else encode_start(self.tokenizer, text)

    def step(self, text: str, depth: int) -> StepTokens:
        before = "" if depth == 1 else "\n"
        own = encode_after(self.tokenizer, "\n" if depth == 1 else ".", before + text.strip())
        return StepTokens(own, encode_after(self.tokenizer, ".", self._around()[1]))

"""Tiny random PRM checkpoints in the published layouts, and what transformers says about whole solutions.

The references are written from the model cards: they render and tokenise a whole solution at once and share no code with
`sglang_ets.prm`, so that they show tokens that drift as well as wrong scores.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models import llama, mistral, qwen2, qwen3

from bench.testbed.task import distinct_problems, solve
from tests.e2e.serving import PROBLEMS

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<extra_0>"]
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
VOCABULARY = 600
WIDTH = 64


def corpus() -> list[str]:
    rng = random.Random(0)
    texts = ["Yes No Yes No", "user assistant system + - + -", SYSTEM, "# Question # Solution Problem: Solution:"] * 40
    texts += [
        " ки\nStep 1: so ки\n\n" * 4,
        "Is every step of this solution right so far? Answer Yes or No. Answer: Yes",
    ] * 40
    return texts + ["".join(solve(problem, rng)) for problem in distinct_problems("train", 60)]


# As Qwen's and Llama 3's, digits apart: a sign takes the line breaks behind it, and line breaks go together.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


@cache
def sentence_piece() -> Tokenizer:
    """As Llama 2's and Mistral's: a space belongs to the word behind it, and a text begins with one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    newline = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.Metaspace(prepend_scheme="first")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({character for text in corpus() for character in text})
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def save_tokenizer(kind: str, folder: Path) -> None:
    core = byte_level() if kind == "byte" else sentence_piece()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """One published layout: `heads` names the extra weights with their shapes."""

    format: str
    architecture: str
    tokenizer: str
    heads: dict[str, tuple[int, ...]]
    given: str = "auto"  # --prm-format
    settings: tuple[tuple[str, Any], ...] = ()  # prm_config.json


CLASSIFIER = {"score.weight": (2, WIDTH), "score.bias": (2,)}
CASES = (
    Case("token_classification", "LlamaForTokenClassification", "byte", CLASSIFIER),
    Case("token_classification", "Qwen2ForTokenClassification", "byte", CLASSIFIER),
    Case("token_classification", "Qwen3ForTokenClassification", "byte", {"score.weight": (2, WIDTH)}),
    Case(
        "qwen_prm",
        "Qwen2ForProcessRewardModel",
        "byte",
        {
            "score.0.weight": (WIDTH, WIDTH),
            "score.0.bias": (WIDTH,),
            "score.2.weight": (2, WIDTH),
            "score.2.bias": (2,),
            "lm_head.weight": (VOCABULARY, WIDTH),  # the published checkpoint carries one that nothing reads
        },
    ),
    Case("skywork", "Qwen2ForPrmModel", "byte", {"v_head.summary.weight": (1, WIDTH), "v_head.summary.bias": (1,)}),
    Case("math_shepherd", "MistralForCausalLM", "piece", {"lm_head.weight": (VOCABULARY, WIDTH)}, "math_shepherd"),
    Case("llemma", "LlamaForCausalLM", "piece", {"lm_head.weight": (VOCABULARY, WIDTH)}, "llemma", (("label_id", 77),)),
    Case("rlhflow", "LlamaForCausalLM", "byte", {"lm_head.weight": (VOCABULARY, WIDTH)}, "rlhflow"),
    Case("judge", "Qwen2ForCausalLM", "byte", {}, "judge"),  # tied: the embeddings are the head
)

_MODELS: dict[str, tuple[Any, Any]] = {
    "Llama": (llama.LlamaConfig, llama.LlamaModel),
    "Mistral": (mistral.MistralConfig, mistral.MistralModel),
    "Qwen2": (qwen2.Qwen2Config, qwen2.Qwen2Model),
    "Qwen3": (qwen3.Qwen3Config, qwen3.Qwen3Model),
}


class Reference:
    """The checkpoint in transformers, float32."""

    def __init__(self, case: Case, folder: Path, num_heads: int = 2) -> None:
        torch.manual_seed(0)
        family = case.architecture.split("For")[0]
        make_config, make_model = _MODELS[family]
        config = make_config(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=num_heads,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=2048, initializer_range=0.2,
            tie_word_embeddings=not case.heads, num_labels=2,
        )  # fmt: skip
        self.trunk = make_model(config).eval()
        self.heads = {name: torch.randn(shape) * 0.3 for name, shape in case.heads.items()}
        self.case = case
        folder.mkdir(parents=True, exist_ok=True)
        trunk = {f"model.{name}": value.contiguous() for name, value in self.trunk.state_dict().items()}
        save_file(trunk | self.heads, folder / "model.safetensors", metadata={"format": "pt"})
        written = {**config.to_dict(), "architectures": [case.architecture], "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(written))
        if case.settings:
            (folder / "prm_config.json").write_text(json.dumps(dict(case.settings)))
        save_tokenizer(case.tokenizer, folder)
        # As the file says: AutoTokenizer would put Qwen2's own splitting of digits in place of this one's.
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    @torch.no_grad()
    def hidden(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self.trunk(torch.tensor([list(token_ids)])).last_hidden_state[0]

    def head(self, name: str, states: torch.Tensor) -> torch.Tensor:
        logits = states @ self.heads[f"{name}weight"].T
        return logits + self.heads[f"{name}bias"] if f"{name}bias" in self.heads else logits

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """float[n] from float[n, H] at the places where the format reads."""
        form, vocabulary = self.case.format, self.tokenizer.get_vocab()
        if form == "token_classification":
            return self.head("score.", states).softmax(-1)[:, 1]
        if form == "qwen_prm":
            return self.head("score.2.", self.head("score.0.", states).relu()).softmax(-1)[:, 1]
        if form == "skywork":
            return self.head("v_head.summary.", states)[:, 0].sigmoid()
        logits = states @ self.heads.get("lm_head.weight", self.trunk.embed_tokens.weight).T
        if form == "llemma":
            return logits[:, 77].sigmoid()
        words = {"math_shepherd": ("▁+", "▁-"), "rlhflow": ("+", "-"), "judge": ("Yes", "No")}[form]
        return logits[:, [vocabulary[word] for word in words]].softmax(-1)[:, 0]

    @torch.no_grad()
    def step_scores(self, question: str, steps: Sequence[str]) -> tuple[list[int], list[float]]:
        """Tokens of the whole solution and the score of every step."""
        if self.case.format == "judge":
            asked = [judged(self, question, steps[: end + 1]) for end in range(len(steps))]
            return asked[-1], [float(self.score(self.hidden(ids)[-1:])) for ids in asked]
        token_ids, places = WHOLE[self.case.format](self, question, [step.strip() for step in steps])
        assert len(places) == len(steps)
        return token_ids, self.score(self.hidden(token_ids)[places]).tolist()


def _encode(reference: Reference, text: str) -> list[int]:
    return list(reference.tokenizer.encode(text, add_special_tokens=False))


def _where(token_ids: Sequence[int], token: int) -> list[int]:
    return [place for place, found in enumerate(token_ids) if found == token]


def judged(reference: Reference, question: str, steps: Sequence[str]) -> list[int]:
    """Ours, so no card says how: the text around the solution, and every step alone."""
    asked = f"Problem:\n{question.strip()}\n\nSolution:\n@@\n\nIs every step of this solution right so far? Answer Yes or No."
    turns = [{"role": "user", "content": asked}]
    before, after = reference.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).split(
        "@@"
    )
    pieces = [before, steps[0].strip(), *(f"\n{step.strip()}" for step in steps[1:]), after]
    return [token for piece in pieces for token in _encode(reference, piece)]


def _separated(reference: Reference, question: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    """As TRL's PRMTrainer: every step alone, and the separator's tokens behind it."""
    token_ids, ends = _encode(reference, f"{question.strip()}\n"), []
    for step in steps:
        token_ids += _encode(reference, step) + _encode(reference, "\n")
        ends.append(len(token_ids) - 1)
    return token_ids, ends


def _lines(reference: Reference, question: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    """Splits the whole solution at newlines; a step is read at the end of its last line."""
    newline = _encode(reference, "\n")[-1]
    token_ids, ends = _encode(reference, f"{question.strip()}\n"), []
    for line in "\n".join(steps).split("\n"):
        token_ids += [*_encode(reference, line), newline]
        ends.append(len(token_ids) - 1)
    lines = [step.count("\n") + 1 for step in steps]
    return token_ids, [ends[sum(lines[: step + 1]) - 1] for step in range(len(steps))]


def _qwen(reference: Reference, question: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    turns = [("system", SYSTEM), ("user", question.strip()), ("assistant", "<extra_0>".join(steps) + "<extra_0>")]
    rendered = reference.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False
    )
    token_ids = _encode(reference, rendered.removesuffix("<|im_end|>\n"))
    return token_ids, _where(token_ids, reference.tokenizer.convert_tokens_to_ids("<extra_0>"))


def _shepherd(reference: Reference, question: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    lines = [f"Step {number}: {step} ки" for number, step in enumerate(steps, 1)]
    token_ids = _encode(reference, f"{question.strip()} " + "\n".join(lines))
    return token_ids, _where(token_ids, reference.tokenizer.convert_tokens_to_ids("▁ки"))


def _llemma(reference: Reference, question: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    text = f"# Question\n\n{question.strip()}\n\n# Solution\n\n" + "\n\n".join(f"{step} ки" for step in steps)
    token_ids = _encode(reference, text)
    return token_ids, _where(token_ids, reference.tokenizer.convert_tokens_to_ids("▁ки"))


def _rlhflow(reference: Reference, question: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    turns = []
    for index, step in enumerate(steps):
        content = f"{question.strip()} {step}" if index == 0 else step
        turns += [{"role": "user", "content": content}, {"role": "assistant", "content": "+"}]
    rendered = reference.tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("+<|im_end|>\n")
    token_ids = _encode(reference, rendered)
    header = _encode(reference, "<|im_start|>assistant\n")
    return token_ids, [
        start + len(header) - 1 for start in range(len(token_ids)) if token_ids[start : start + len(header)] == header
    ]


WHOLE: dict[str, Callable[[Reference, str, Sequence[str]], tuple[list[int], list[int]]]] = {
    "token_classification": _separated,
    "skywork": _lines,
    "qwen_prm": _qwen,
    "math_shepherd": _shepherd,
    "llemma": _llemma,
    "rlhflow": _rlhflow,
}
QUESTION = PROBLEMS[5]["prompt"]

"""Batched sampling from a testbed model, with a KV cache and without padding."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import DynamicCache, LlamaForCausalLM

from bench.testbed.task import Problem, answer_of
from bench.testbed.tokenizer import CHARACTERS, EOS_ID, SPECIALS, encode

MAX_NEW_TOKENS = 512
BATCH_ROWS = 256


def decode(token_ids: Sequence[int]) -> str:
    """The text of generated tokens up to the end-of-text token; other special tokens read as "?"."""
    characters = []
    for token_id in token_ids:
        if token_id == EOS_ID:
            break
        characters.append(CHARACTERS[token_id - len(SPECIALS)] if token_id >= len(SPECIALS) else "?")
    return "".join(characters)


def sample(
    network: LlamaForCausalLM, chosen: Sequence[Problem], num_samples: int, temperature: float, seed: int
) -> list[list[str]]:
    """`num_samples` solutions of each problem, in order; temperature 0 is greedy.

    Rows of one batch have prompts of one length, so that neither a mask nor positions are needed.
    """
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, problem in enumerate(chosen):
        by_length[len(problem.prompt)] += [index] * num_samples
    solutions: list[list[str]] = [[] for _ in chosen]
    for rows in by_length.values():
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            prompts = torch.tensor([encode(chosen[index].prompt) for index in batch])
            for index, token_ids in zip(batch, _continue(network, prompts, temperature, generator), strict=True):
                solutions[index].append(decode(token_ids))
    return solutions


@torch.inference_mode()
def _continue(
    network: LlamaForCausalLM, prompts: torch.Tensor, temperature: float, generator: torch.Generator
) -> list[list[int]]:
    # prompts: int64[N, T]
    cache = DynamicCache(config=network.config)
    made: list[list[int]] = [[] for _ in range(len(prompts))]
    rows, token_ids = torch.arange(len(prompts)), prompts
    for _ in range(MAX_NEW_TOKENS):
        logits = network(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        if temperature == 0:
            drawn = logits.argmax(-1)
        else:
            drawn = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
        for row, token_id in zip(rows.tolist(), drawn.tolist(), strict=True):
            made[row].append(token_id)
        going = drawn != EOS_ID
        if not going.any():
            break
        # Finished rows leave only when many are done: each departure copies the cache.
        if going.sum() <= 0.75 * len(going):
            cache.batch_select_indices(going.nonzero()[:, 0])
            rows, drawn = rows[going], drawn[going]
        token_ids = drawn[:, None]
    return made


def greedily_right(network: LlamaForCausalLM, chosen: Sequence[Problem]) -> list[float]:
    """1 for each problem whose greedy solution ends in the right answer, else 0."""
    solutions = sample(network, chosen, num_samples=1, temperature=0.0, seed=0)
    return [float(answer_of(texts[0]) == one.answer) for texts, one in zip(solutions, chosen, strict=True)]


def greedy_accuracy(network: LlamaForCausalLM, chosen: Sequence[Problem]) -> float:
    """The share of problems that are solved greedily."""
    return statistics.fmean(greedily_right(network, chosen))

"""The likelihood verifier: a step is as good as a causal LM finds its text after the marker probable."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from transformers import LlamaForCausalLM

from bench.testbed.task import Problem, split_steps
from bench.testbed.tokenizer import PAD_ID, UNKNOWN_ID, VOCABULARY

MARKER = "="
BATCH_ROWS = 128


@torch.inference_mode()
def step_scores(network: LlamaForCausalLM, rows: Sequence[tuple[Problem, str]]) -> list[list[float]]:
    """For each (problem, solution text): one score in [0, 1] per step.

    A score is the product of the probabilities of the step's tokens after its first "=", or of all its tokens where it
    has none; the end-of-text token is not counted.
    """
    scores = []
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        texts = [problem.prompt + text for problem, text in batch]
        token_ids = torch.full((len(texts), max(map(len, texts))), PAD_ID)
        for index, text in enumerate(texts):
            # Characters are tokens, so a character's index is its token's.
            token_ids[index, : len(text)] = torch.tensor([VOCABULARY.get(character, UNKNOWN_ID) for character in text])
        log_p = network(token_ids[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        taken = log_p.gather(-1, token_ids[:, 1:, None])[..., 0].numpy()  # float32[N, T-1]
        scores += [_by_step(problem, text, row) for (problem, text), row in zip(batch, taken, strict=True)]
    return scores


def _by_step(problem: Problem, text: str, log_probabilities: np.ndarray) -> list[float]:
    # log_probabilities[i] is that of character i + 1 of prompt + text.
    scores, at = [], len(problem.prompt)
    for step in split_steps(text):
        after = step.find(MARKER) + 1
        scores.append(float(np.exp(log_probabilities[at + after - 1 : at + len(step) - 1].sum())))
        at += len(step)
    return scores


def path_scores(scores: Sequence[float]) -> list[float]:
    """The score of each prefix: the least step score so far."""
    return list(accumulate(scores, min))


def area_under_curve(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The probability that a right item scores above a wrong one; ties count one half.

    Raises:
        ValueError: all labels are equal.
    """
    values, is_right = np.asarray(scores), np.asarray(labels, dtype=bool)
    right, wrong = values[is_right], values[~is_right]
    if not len(right) or not len(wrong):
        raise ValueError(f"labels must hold both classes, got {len(right)} right of {len(values)}; score more steps.")
    return float(mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong)))

"""Trains the PRM with a head: two layers and a two-label classifier on the frozen likelihood verifier.

    python -m bench.testbed.head

A solver's last state predicts the next token, so whether a token is right shows only where that prediction meets the
token itself: one layer later. Layer one on top learns that meeting (its states regress the verifier's own log-probability
of the token, an auxiliary loss that is thrown away), layer two gathers it over the prefix. Labels are exact and dense:
every token of a solution is labelled "all up to here is right". Samples are the policy model's own.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, smooth_l1_loss
from transformers import LlamaForCausalLM, LlamaForTokenClassification

from bench.testbed.likelihood import area_under_curve
from bench.testbed.sampling import sample
from bench.testbed.task import CONNECTORS, Problem, problems, reductions, split_steps, step_is_right
from bench.testbed.tokenizer import PAD_ID, build_tokenizer, encode
from bench.testbed.train import CONTEXT_TOKENS, IGNORED, MODELS

NUM_NEW_LAYERS = 2
LOWEST_LOG_PROBABILITY = -8.0  # the auxiliary target is cut here: how wrong a wrong token is does not matter
SAMPLES_A_PROBLEM = 6


@dataclass(frozen=True)
class HeadRecipe:
    """What one training run does."""

    seed: int = 0
    num_problems: int = 3_000
    solutions_an_update: int = 64
    num_updates: int = 1500
    matrix_rate: float = 0.01
    other_rate: float = 0.002
    auxiliary_weight: float = 0.3


@dataclass(frozen=True)
class Labelled:
    """One solution: int64[T] tokens with the prompt, and a label a token (1 right so far, 0 wrong, -100 prompt)."""

    token_ids: list[int]
    labels: list[int]


def right_characters(problem: Problem, solution: str) -> int:
    """How many first characters of a solution begin some right solution (a wrong character ends it)."""
    right, expression = 0, problem.expression
    for step in split_steps(solution):
        if step_is_right(problem, step) and (step.endswith("\n") or right + len(step) == len(solution)):
            right += len(step)
            expression = step.rsplit(":", 1)[1].strip()
            continue
        return right + max((_common(step, possible) for possible in _possible_steps(expression)), default=0)
    return right


def _possible_steps(expression: str) -> list[str]:
    return [f"{connector} {line}" for line in reductions(expression) for connector in CONNECTORS]


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def label(problem: Problem, solution: str) -> Labelled:
    """Tokens and dense labels of one solution. Characters are tokens."""
    prompt, own = encode(problem.prompt), encode(solution)
    right = right_characters(problem, solution)
    return Labelled(prompt + own, [IGNORED] * len(prompt) + [int(place < right) for place in range(len(own))])


def collect(policy: LlamaForCausalLM, recipe: HeadRecipe) -> list[Labelled]:
    """The policy model's solutions of training problems, labelled."""
    chosen = list(islice(problems("train", recipe.seed + 1), recipe.num_problems))
    solutions = sample(policy, chosen, SAMPLES_A_PROBLEM, temperature=1.0, seed=recipe.seed)
    pairs = [(problem, text) for problem, texts in zip(chosen, solutions, strict=True) for text in texts]
    return [label(problem, text) for problem, text in pairs if "?" not in text]  # a special token reads as "?"


def padded(rows: Sequence[Labelled]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64[N, T] token ids and labels."""
    width = max(len(row.token_ids) for row in rows)
    token_ids, labels = torch.full((len(rows), width), PAD_ID), torch.full((len(rows), width), IGNORED)
    for index, row in enumerate(rows):
        token_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        labels[index, : len(row.labels)] = torch.tensor(row.labels)
    return token_ids, labels


def with_head(verifier: LlamaForCausalLM, seed: int) -> LlamaForTokenClassification:
    """The verifier's trunk, frozen, with new layers and a head above it."""
    torch.manual_seed(seed)
    config = type(verifier.config).from_dict(verifier.config.to_dict())
    config.num_hidden_layers += NUM_NEW_LAYERS
    config.num_labels = 2
    model = LlamaForTokenClassification(config)
    known = {name: value for name, value in verifier.model.state_dict().items() if not name.startswith("norm.")}
    model.model.load_state_dict(known, strict=False)
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(name not in known)
    return model


class HeadTrainee:
    """The model, its auxiliary readout and its optimisers."""

    def __init__(self, verifier: LlamaForCausalLM, recipe: HeadRecipe) -> None:
        self.model = with_head(verifier, recipe.seed)
        self._verifier, self._recipe = verifier, recipe
        width = verifier.config.hidden_size
        self._auxiliary = torch.nn.Sequential(torch.nn.RMSNorm(width), torch.nn.Linear(width, 1))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and p.shape[0] > 2]
        others = [p for p in trained if p.ndim != 2 or p.shape[0] <= 2] + list(self._auxiliary.parameters())
        self._optimizers = (
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.0, momentum=0.95, nesterov=True),
            torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def update(self, token_ids: torch.Tensor, labels: torch.Tensor, rate: float) -> tuple[float, float]:
        """One update; returns the losses of the labels (nats a token) and of the auxiliary target."""
        for optimizer, base in zip(self._optimizers, (self._recipe.matrix_rate, self._recipe.other_rate), strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = self.model.model(token_ids, use_cache=False, output_hidden_states=True)
            logits = self.model.score(states.last_hidden_state)
            met = self._auxiliary(states.hidden_states[-2])[..., 0]
        kept = labels != IGNORED
        loss = cross_entropy(logits.float()[kept], labels[kept])
        target = self._log_probabilities(token_ids, states.hidden_states[-1 - NUM_NEW_LAYERS])
        auxiliary = smooth_l1_loss(met.float()[:, 1:][kept[:, 1:]], target[kept[:, 1:]])
        (loss + self._recipe.auxiliary_weight * auxiliary).backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item(), auxiliary.item()

    @torch.no_grad()
    def _log_probabilities(self, token_ids: torch.Tensor, trunk: torch.Tensor) -> torch.Tensor:
        """float32[N, T-1]: the verifier's log-probability of each token after the first."""
        logits = self._verifier.lm_head(self._verifier.model.norm(trunk[:, :-1].detach()).float())
        taken = logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None])[..., 0]
        return taken.clamp_min(LOWEST_LOG_PROBABILITY)


@torch.inference_mode()
def head_scores(model: LlamaForTokenClassification, rows: Sequence[tuple[Problem, str]]) -> list[list[float]]:
    """For each (problem, solution text): the probability of "right so far" at the last token of each step."""
    scores = []
    for start in range(0, len(rows), 128):
        batch = rows[start : start + 128]
        token_ids, _ = padded([Labelled(encode(p.prompt) + encode(text), []) for p, text in batch])
        right = model(token_ids, use_cache=False).logits.float().softmax(-1)[..., 1]
        for (problem, text), row in zip(batch, right, strict=True):
            at, own = len(problem.prompt), []
            for step in split_steps(text):
                at += len(step)
                own.append(float(row[at - 1]))
            scores.append(own)
    return scores


def area_on_first_errors(model: LlamaForTokenClassification, rows: Sequence[tuple[Problem, str]]) -> tuple[float, int]:
    """AUC on steps whose prefix is right, and the number of these steps."""
    values, labels = [], []
    for (problem, text), scores in zip(rows, head_scores(model, rows), strict=True):
        for step, score in zip(split_steps(text), scores, strict=True):
            values.append(score)
            labels.append(step_is_right(problem, step))
            if not labels[-1]:
                break
    return area_under_curve(values, labels), len(values)


def ship_head(model: LlamaForTokenClassification, folder: Path) -> None:
    """Writes weights (bfloat16), config, tokenizer and the PRM format."""
    copied = LlamaForTokenClassification(model.config)
    copied.load_state_dict(model.state_dict())
    copied.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(CONTEXT_TOKENS).save_pretrained(folder)
    (folder / "prm_config.json").write_text(json.dumps({"format": "token_classification"}, indent=2) + "\n")


def train(recipe: HeadRecipe, models: Path, output: Path) -> None:
    """The whole run; writes a preliminary model every 300 updates."""
    started = time.monotonic()
    policy = LlamaForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)
    verifier = LlamaForCausalLM.from_pretrained(models / "prm", dtype=torch.float32)
    held_out = list(islice(problems("validation", recipe.seed), 60))
    texts = sample(policy, held_out, 8, temperature=1.0, seed=recipe.seed + 1)
    probed = [(problem, text) for problem, own in zip(held_out, texts, strict=True) for text in own if "?" not in text]
    examples = collect(policy, recipe)
    print(f"{time.monotonic() - started:7.1f} s {len(examples)} solutions", flush=True)
    trainee, rng = HeadTrainee(verifier, recipe), random.Random(recipe.seed)
    for update in range(recipe.num_updates):
        rows = rng.sample(examples, recipe.solutions_an_update)
        rate = min(1.0, 2.5 * (1 - update / recipe.num_updates))
        loss, auxiliary = trainee.update(*padded(rows), rate)
        if update % 25 == 0:
            print(f"{time.monotonic() - started:7.1f} s {update:5d}  loss {loss:.3f} aux {auxiliary:.3f}", flush=True)
        if update % 150 == 149:
            area, count = area_on_first_errors(trainee.model, probed)
            print(f"{time.monotonic() - started:7.1f} s {update:5d}  AUC {area:.4f} on {count} steps", flush=True)
            ship_head(trainee.model, output)
    ship_head(trainee.model, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=HeadRecipe.seed)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--output", type=Path, default=MODELS / "prm_head")
    parser.add_argument("--num-problems", type=int, default=HeadRecipe.num_problems)
    parser.add_argument("--num-updates", type=int, default=HeadRecipe.num_updates)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = HeadRecipe(arguments.seed, arguments.num_problems, num_updates=arguments.num_updates)
    train(recipe, arguments.models, arguments.output)


if __name__ == "__main__":
    main()

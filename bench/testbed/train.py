"""Trains the testbed's two models on one CPU thread and writes them to sglang_ets/models/.

    python -m bench.testbed.train

One trunk is trained at a flat learning rate. A branch is annealed to zero early and becomes the policy model (imperfect
on purpose: it is the first branch that reaches `POLICY_ACCURACY`); the trunk goes on and, annealed, becomes the
`likelihood` PRM. All budgets are in tokens, so the same seed gives the same schedule on any machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from bench.testbed.sampling import greedy_accuracy
from bench.testbed.task import Problem, distinct_problems, problems, solve
from bench.testbed.tokenizer import EOS_ID, PAD_ID, VOCABULARY, build_tokenizer, encode

MODELS = Path(__file__).resolve().parents[2] / "sglang_ets" / "models"
CONTEXT_TOKENS = 1024
POLICY_ACCURACY = 0.45
NUM_PROBED = 100
NUM_SHIPPED_PROBLEMS = 400
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """What one training run does. Tokens are those of prompts and solutions, without padding."""

    seed: int = 0
    problems_per_update: int = 32
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    preview_tokens: int = 1_500_000
    first_branch_tokens: int = 4_500_000
    branch_every_tokens: int = 600_000
    branch_anneal_tokens: int = 500_000
    trunk_tokens: int = 10_330_000
    trunk_anneal_tokens: int = 2_500_000


class Batches:
    """An endless stream of (token ids, labels, number of tokens); copies go on from the same place independently."""

    def __init__(self, recipe: Recipe) -> None:
        self._num_problems = recipe.problems_per_update
        self._problems: Iterator[Problem] = problems("train", recipe.seed)
        self._rng = random.Random(recipe.seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """int64[N, T] token ids, int64[N, T] labels (-100 on prompt and padding), tokens without padding."""
        rows, prompt_lengths = [], []
        for _ in range(self._num_problems):
            problem = next(self._problems)
            prompt = encode(problem.prompt)
            rows.append(prompt + encode("".join(solve(problem, self._rng))) + [EOS_ID])
            prompt_lengths.append(len(prompt))
        token_ids = torch.full((len(rows), max(map(len, rows))), PAD_ID)
        labels = torch.full_like(token_ids, IGNORED)
        for index, (row, num_prompt) in enumerate(zip(rows, prompt_lengths, strict=True)):
            token_ids[index, : len(row)] = torch.tensor(row)
            labels[index, num_prompt : len(row)] = token_ids[index, num_prompt : len(row)]
        return token_ids, labels, sum(map(len, rows))


class Trainee:
    """A network with its optimisers; owns both, and steps them in place."""

    def __init__(self, recipe: Recipe, network: LlamaForCausalLM) -> None:
        self.network = network
        self.tokens = 0
        self._recipe = recipe
        matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in network.named_parameters() if p.ndim != 2 or "embed" in name]
        self._optimizers = (
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.0, momentum=0.95, nesterov=True),
            torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def branch(self) -> Trainee:
        """An independent copy, optimiser state included."""
        twin = Trainee(self._recipe, copy.deepcopy(self.network))
        twin.tokens = self.tokens
        for mine, theirs in zip(self._optimizers, twin._optimizers, strict=True):
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
        return twin

    def update(self, batches: Batches, rate: float) -> float:
        """One optimiser update at `rate` times the recipe's learning rates; returns the loss in nats a token."""
        token_ids, labels, num_tokens = batches.next()
        for optimizer, base in zip(self._optimizers, (self._recipe.matrix_rate, self._recipe.other_rate), strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.network.model(token_ids[:, :-1], use_cache=False).last_hidden_state
            trained = labels[:, 1:] != IGNORED
            logits = self.network.lm_head(hidden[trained])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][trained])
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tokens += num_tokens
        return loss.item()

    def anneal(self, batches: Batches, num_tokens: int) -> None:
        """Trains for `num_tokens` more while the learning rate falls linearly to zero."""
        start = self.tokens
        while self.tokens < start + num_tokens:
            self.update(batches, rate=1 - (self.tokens - start) / num_tokens)


def new_network(seed: int) -> LlamaForCausalLM:
    """A randomly initialised network of 0.85 M parameters, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def ship(network: LlamaForCausalLM, folder: Path) -> None:
    """Writes weights (bfloat16), config and tokenizer as one directory that transformers and sglang load."""
    copied = copy.deepcopy(network).to(torch.bfloat16)
    copied.config.architectures = ["LlamaForCausalLM"]
    ends = {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    copied.generation_config = GenerationConfig(**ends, do_sample=True, temperature=1.0)
    copied.save_pretrained(folder)
    build_tokenizer(CONTEXT_TOKENS).save_pretrained(folder)


def ship_prm(network: LlamaForCausalLM, folder: Path) -> None:
    """`ship`, and the file that says how a likelihood is read as a step score."""
    ship(network, folder)
    settings = {"format": "likelihood", "score_after": "="}
    (folder / "prm_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_problems(path: Path) -> None:
    """Writes the held-out test problems as JSON lines with prompt, answer and expression."""
    rows = [
        {"prompt": problem.prompt, "answer": problem.answer, "expression": problem.expression}
        for problem in distinct_problems("test", NUM_SHIPPED_PROBLEMS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(recipe: Recipe, models: Path) -> None:
    """The whole run; writes policy/ and prm/ below `models`, preliminary ones first."""
    started = time.monotonic()
    probed = distinct_problems("validation", NUM_PROBED)
    trunk, batches = Trainee(recipe, new_network(recipe.seed)), Batches(recipe)
    num_updates, has_preview, has_policy = 0, False, False
    next_branch_tokens = recipe.first_branch_tokens
    while trunk.tokens < recipe.trunk_tokens:
        loss = trunk.update(batches, rate=1.0)
        num_updates += 1
        if num_updates % 50 == 0:
            _report(started, trunk.tokens, f"loss {loss:.3f}")
        if not has_preview and trunk.tokens >= recipe.preview_tokens:
            ship(trunk.network, models / "policy")
            ship_prm(trunk.network, models / "prm")
            has_preview = True
        if not has_policy and trunk.tokens >= next_branch_tokens:
            next_branch_tokens += recipe.branch_every_tokens
            branch = trunk.branch()
            branch.anneal(batches, recipe.branch_anneal_tokens)
            accuracy = greedy_accuracy(branch.network, probed)
            _report(started, branch.tokens, f"branch: greedy {accuracy:.3f}")
            ship(branch.network, models / "policy")
            ship_prm(branch.network, models / "prm")
            has_policy = accuracy >= POLICY_ACCURACY
    trunk.anneal(batches, recipe.trunk_anneal_tokens)
    _report(started, trunk.tokens, f"PRM: greedy {greedy_accuracy(trunk.network, probed):.3f}")
    ship_prm(trunk.network, models / "prm")


def _report(started: float, tokens: int, text: str) -> None:
    print(f"{time.monotonic() - started:7.1f} s {tokens / 1e6:6.2f} M tokens  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--models", type=Path, default=MODELS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.models.mkdir(parents=True, exist_ok=True)
    write_problems(arguments.models / "problems.jsonl")
    train(Recipe(seed=arguments.seed), arguments.models)


if __name__ == "__main__":
    main()

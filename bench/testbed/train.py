"""Trains the testbed's two models on one CPU thread and writes them to sglang_ets/models/.

    python -m bench.testbed.train

First problems of 7 integers, which teach the arithmetic with little copying, until the learning rate is zero; then, from
there, problems of 4 to 12 integers. While the learning rate of this second stage falls to zero the network gets better from
probe to probe: the first that solves `POLICY_ACCURACY` of the probed validation problems becomes the policy model (imperfect
on purpose), and the last the `likelihood` PRM. All budgets are in tokens, and batch number i depends only on the seed and i,
so the same seed gives the same schedule on any machine, and an interrupted run goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from bench.testbed.muon import Muon
from bench.testbed.sampling import greedy_accuracy
from bench.testbed.task import distinct_problems, problems, solve
from bench.testbed.tokenizer import EOS_ID, PAD_ID, VOCABULARY, build_tokenizer, encode

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "sglang_ets" / "models"
CHECKPOINT = ROOT / "build" / "testbed.pt"
CONTEXT_TOKENS = 1024
POLICY_ACCURACY = 0.45
NUM_PROBED = 200
NUM_SHIPPED_PROBLEMS = 400
IGNORED = -100
CHECKPOINT_EVERY_UPDATES = 200
REPORT_EVERY_UPDATES = 50


@dataclass(frozen=True)
class Stage:
    """What is trained on, and for how long. Tokens are those of prompts and solutions, without padding.

    All problems of one update have the same number of integers, drawn anew for each update: rows of about one length need
    little padding.
    """

    fewest_integers: int
    most_integers: int
    flat_tokens: int
    anneal_tokens: int


@dataclass(frozen=True)
class Recipe:
    """What one training run does."""

    seed: int = 0
    short: Stage = Stage(7, 7, 10_300_000, 2_500_000)
    long: Stage = Stage(4, 12, 9_800_000, 6_000_000)
    tokens_per_update: int = 4_800
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    probe_every_tokens: int = 500_000


def batch(recipe: Recipe, stage: Stage, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Batch `index`: int64[N, T] token ids, int64[N, T] labels (-100 on prompt and padding), tokens without padding."""
    rng = random.Random(f"{recipe.seed}/{stage.most_integers}/{index}")
    stream = problems("train", rng.getrandbits(32), rng.randint(stage.fewest_integers, stage.most_integers))
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    num_tokens = 0
    for problem in stream:
        prompt = encode(problem.prompt)
        rows.append(prompt + encode("".join(solve(problem, rng))) + [EOS_ID])
        prompt_lengths.append(len(prompt))
        num_tokens += len(rows[-1])
        if num_tokens >= recipe.tokens_per_update:
            break
    token_ids = torch.full((len(rows), max(map(len, rows))), PAD_ID)
    labels = torch.full_like(token_ids, IGNORED)
    for at, (row, num_prompt) in enumerate(zip(rows, prompt_lengths, strict=True)):
        token_ids[at, : len(row)] = torch.tensor(row)
        labels[at, num_prompt : len(row)] = token_ids[at, num_prompt : len(row)]
    return token_ids, labels, num_tokens


class Trainee:
    """A network with its optimisers; owns both, and steps them in place."""

    def __init__(self, recipe: Recipe, stage: Stage, network: LlamaForCausalLM) -> None:
        self.network = network
        self.tokens = 0
        self.num_updates = 0
        self._recipe, self._stage = recipe, stage
        matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in network.named_parameters() if p.ndim != 2 or "embed" in name]
        self._optimizers = (
            Muon(matrices, lr=recipe.matrix_rate),
            torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def state(self) -> dict[str, Any]:
        """All that `load` needs to go on from here; shares memory with this object."""
        return {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "tokens": self.tokens,
            "num_updates": self.num_updates,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.network.load_state_dict(state["network"])
        for optimizer, kept in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.tokens, self.num_updates = state["tokens"], state["num_updates"]

    def update(self, rate: float) -> None:
        """One optimiser update at `rate` times the recipe's learning rates."""
        token_ids, labels, num_tokens = batch(self._recipe, self._stage, self.num_updates)
        for optimizer, base in zip(self._optimizers, (self._recipe.matrix_rate, self._recipe.other_rate), strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
        hidden = self.network.model(token_ids[:, :-1], use_cache=False).last_hidden_state
        trained = labels[:, 1:] != IGNORED
        loss = torch.nn.functional.cross_entropy(self.network.lm_head(hidden[trained]), labels[:, 1:][trained])
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tokens += num_tokens
        self.num_updates += 1
        if self.num_updates % REPORT_EVERY_UPDATES == 0:
            _report(f"{self.tokens / 1e6:.2f} M tokens, loss {loss.item():.3f}")


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


class Run:
    """One training run: it owns the checkpoint, and writes policy/ and prm/ below `models`."""

    def __init__(self, recipe: Recipe, models: Path, checkpoint: Path) -> None:
        """Goes on from `checkpoint` if there is one.

        Raises:
            ValueError: the checkpoint is of another recipe.
        """
        self._recipe, self._models, self._checkpoint = recipe, models, checkpoint
        self._kept = torch.load(checkpoint) if checkpoint.exists() else {"recipe": asdict(recipe)}
        if self._kept["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} must be of this recipe, it is of {self._kept['recipe']}; delete it.")

    def to_end(self, short_model: Path | None) -> None:
        """Both stages. `short_model` is the directory of a model that has been through the first, which is then left out."""
        if short_model:
            network = LlamaForCausalLM.from_pretrained(short_model, dtype=torch.float32)
        else:
            network = new_network(self._recipe.seed)
            if "long" not in self._kept:
                self._train("short", self._recipe.short, network, lambda trainee: None)
        probes = Probes(self._recipe, self._models, self._kept.get("has_policy", False))
        self._train("long", self._recipe.long, network, probes.after)
        _report(f"the PRM solves {greedy_accuracy(network, probes.problems):.3f} greedily")
        ship_prm(network, self._models / "prm")
        self._checkpoint.unlink(missing_ok=True)

    def _train(self, name: str, stage: Stage, network: LlamaForCausalLM, after: Callable[[Trainee], Any]) -> None:
        """One stage, in place; `after` sees the trainee after each update, and what it returns is kept with the checkpoint."""
        trainee = Trainee(self._recipe, stage, network)
        if name in self._kept:
            trainee.load(self._kept[name])
        while trainee.tokens < stage.flat_tokens + stage.anneal_tokens:
            trainee.update(rate=min(1.0, 1 - (trainee.tokens - stage.flat_tokens) / stage.anneal_tokens))
            has_policy = after(trainee)
            if trainee.num_updates % CHECKPOINT_EVERY_UPDATES == 0:
                kept = {"recipe": self._kept["recipe"], name: trainee.state(), "has_policy": has_policy}
                _save(self._checkpoint, kept)


class Probes:
    """Looks at the network from time to time while the learning rate falls, and ships the policy model once."""

    def __init__(self, recipe: Recipe, models: Path, has_policy: bool) -> None:
        self.problems = distinct_problems("validation", NUM_PROBED)
        self._every, self._stage = recipe.probe_every_tokens, recipe.long
        self._models, self._has_policy = models, has_policy
        self._next: int | None = None

    def after(self, trainee: Trainee) -> bool:
        """Whether there is a policy model yet."""
        if self._next is None:  # also after an interruption: the next whole multiple
            self._next = max(self._stage.flat_tokens, trainee.tokens - trainee.tokens % self._every + self._every)
        if not self._has_policy and trainee.tokens >= self._next:
            self._next += self._every
            accuracy = greedy_accuracy(trainee.network, self.problems)
            _report(f"{trainee.tokens / 1e6:.2f} M tokens: solves {accuracy:.3f} greedily")
            ship(trainee.network, self._models / "policy")
            ship_prm(trainee.network, self._models / "prm")
            self._has_policy = accuracy >= POLICY_ACCURACY
        return self._has_policy


def _save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def _report(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--short-model", type=Path, help="a model that has been through the first stage")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.models.mkdir(parents=True, exist_ok=True)
    write_problems(arguments.models / "problems.jsonl")
    Run(Recipe(seed=arguments.seed), arguments.models, arguments.checkpoint).to_end(arguments.short_model)


if __name__ == "__main__":
    main()

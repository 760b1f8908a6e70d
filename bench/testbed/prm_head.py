"""A PRM for a policy model that has none: two labels on its own hidden states, learned from its own rollouts.

    python -m bench.testbed.prm_head --model-path FOLDER --data gsm8k --out prm-head
    python -m bench.testbed.prm_head --model-path FOLDER --rollouts run.jsonl --out prm-head      # of `sglang-ets run`
    sglang-ets serve --search ets --model-path FOLDER --prm-model-path prm-head
    python -m bench.testbed.prm_head --model-path FOLDER --format token_classification --out prm-head    # as a model of its own
    python -m bench.testbed.prm_head --model-path FOLDER --reader-path LARGER --rollouts run.jsonl --out prm-head

Rollouts are the trajectories of `best_of_n` on problems that are left for validation. Every step is labelled with the outcome:
whether the final answer is right. One forward pass a rollout gives the hidden state from which each step's last token was
sampled, and the one at that token; a logistic regression on half of the problems is the head. The first kind is `policy_head`:
the server has these states already when a step has ended, so the PRM has no weights, no KV and no pass of its own. The second
kind is a checkpoint of the model, a `*ForTokenClassification`, for any server; `--reader-path` makes it of another model of the
same tokenizer. One of each kind is learned after each of `--layers` and one of the last states, and that which foretells
outcomes best is saved; a checkpoint ends at its layer, which saves the rest of its passes. Many problems teach more than many
rollouts of each.

On the other half of the problems both are compared with the likelihoods of the model itself, and with its verdict if asked
after every step whether all is right so far (`--judge`), by AUC: over last steps, over all steps (what a search selects by),
and within a problem (right against wrong rollouts of the same problem, which is all that a choice among them can use).

The server recognises the format of what is in `--out` by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.optimize import minimize
from tqdm import tqdm

from bench import rows
from bench.embedded import client_of
from bench.server import running_server
from bench.testbed.rollouts import Rollout, halves, rollouts_in, some_of
from bench.testbed.verifiers import CHECKPOINT, Floats, compare, judged, name_of, read, scores_of, table, tables
from sglang_ets.prm.choose import CONFIG_FILE, POLICY_HEAD
from sglang_ets.prm.formats import Judge
from sglang_ets.prm.policy_head import LinearHead
from sglang_ets.tools import run as runs
from sglang_ets.tools.datasets import load

FORMATS = (POLICY_HEAD, CHECKPOINT)
POOL_TOKENS = 20_000
TIMEOUT_S = 3600
# On the squared weights of standardised features, beside the mean loss.
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
NUM_FOLDS = 4

# ---- rollouts ----


def sample(args: argparse.Namespace, out: Path) -> None:
    """Ask a server of its own for what the file lacks."""
    problems = load(args.data, args.skip + args.problems, "validation")[args.skip :]
    search = json.dumps({"algorithm": "best_of_n", "early_stop": "off"})
    asked = runs.Asked(Path(args.data).name, args.width, search, args.temperature, args.seed, args.max_tokens)
    with (
        tempfile.TemporaryDirectory() as blank,
        running_server(flags(args, Path(blank))) as url,
        tqdm(unit="problem") as bar,
    ):
        client = client_of(url, TIMEOUT_S)
        for done, total in runs.run(client, [(asked, problem) for problem in problems], out, args.in_flight):
            bar.total, bar.n = total, done
            bar.refresh()


def flags(args: argparse.Namespace, blank: Path) -> list[str]:
    """Of the server. Its PRM is a head without knowledge, saved in `blank`, which costs no pass: all scores are one half."""
    size = transformers.AutoConfig.from_pretrained(args.model_path).hidden_size
    LinearHead(np.zeros(size), 0.0).save(blank)
    return ["--search", "ets", "--model-path", args.model_path, "--prm-model-path", str(blank), "--dtype", args.dtype,
            "--max-total-tokens", str(args.pool_tokens)]  # fmt: skip


# ---- training ----


def fit(states: Floats, labels: Floats, weights: Floats, penalty: float) -> LinearHead:
    """Weighted logistic regression with a squared penalty: float64[N, H], float64[N] of 0 and 1, float64[N]."""
    mean = np.average(states, axis=0, weights=weights)
    deviation = np.sqrt(np.average((states - mean) ** 2, axis=0, weights=weights)) + 1e-6
    scaled, share = (states - mean) / deviation, weights / weights.sum()

    def loss(both: Floats) -> tuple[float, Floats]:
        margins = (scaled @ both[:-1] + both[-1]) * (2 * labels - 1)
        value = share @ np.logaddexp(0, -margins) + penalty / 2 * both[:-1] @ both[:-1]
        slope = -share * (2 * labels - 1) / (1 + np.exp(np.clip(margins, -500, 500)))
        return float(value), np.append(scaled.T @ slope + penalty * both[:-1], slope.sum())

    both = minimize(loss, np.zeros(states.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weight = both[:-1] / deviation
    return LinearHead(weight, float(both[-1] - weight @ mean))


@dataclass(frozen=True)
class Learned:
    """A head, and what its training says of it."""

    head: LinearHead
    penalty: float
    loss: float  # log loss in cross-validation, nats a rollout


def train(rollouts: Sequence[Rollout], states: Sequence[Floats]) -> Learned:
    """The head of all of them, with the penalty of the least log loss over all steps in cross-validation by problem.

    A ranking alone would not do: policies read how far apart scores are. `states` are those of each rollout's steps,
    float64[K, H].
    """
    counts = [len(own) for own in states]
    labels = np.repeat([float(rollout.is_right) for rollout in rollouts], counts)
    weights = np.repeat([1 / count for count in counts], counts)  # a rollout counts once, however many steps it has
    names = sorted({rollout.problem for rollout in rollouts})
    fold_of = {name: number % NUM_FOLDS for number, name in enumerate(names)}
    folds = np.repeat([fold_of[rollout.problem] for rollout in rollouts], counts)
    every = np.concatenate(states)

    def loss(penalty: float) -> float:
        scores = np.empty(len(every))
        for fold in range(NUM_FOLDS):
            seen, unseen = folds != fold, folds == fold
            scores[unseen] = fit(every[seen], labels[seen], weights[seen], penalty).scores(every[unseen])
        return log_loss(scores, labels, weights)

    losses = {penalty: loss(penalty) for penalty in PENALTIES}
    best = min(PENALTIES, key=losses.__getitem__)
    return Learned(fit(every, labels, weights, best), best, losses[best])


def log_loss(scores: Floats, labels: Floats, weights: Floats) -> float:
    """Weighted mean of -log of the probability that was given to what came, in nats."""
    given = np.clip(np.where(labels > 0, scores, 1 - scores), np.finfo(np.float64).tiny, None)
    return float(np.average(-np.log(given), weights=weights))


# ---- the checkpoint ----


def save(model_path: str, head: LinearHead, dtype: torch.dtype, out: Path) -> None:
    """The model with the head as a checkpoint that the server recognises. It ends at the head's layer.

    Raises:
        SystemExit: the server has no such architecture.
    """
    from sglang_ets.prm.models import CLASSES  # imports sglang

    config = transformers.AutoConfig.from_pretrained(model_path, num_labels=2)
    if head.layer is not None:
        config.num_hidden_layers = head.layer
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: head.layer]
    model = transformers.AutoModelForTokenClassification.from_pretrained(model_path, config=config, dtype=dtype)
    if (name := type(model).__name__) not in CLASSES:
        known = ", ".join(known for known in CLASSES if known.endswith("TokenClassification"))
        raise SystemExit(
            f"the server must know the architecture with the head, one of {known}, got {name}; add it there"
        )
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(np.stack([np.zeros_like(head.weight), head.weight])))
        model.score.bias.copy_(torch.tensor([0.0, head.bias]))
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
    about = {"format": CHECKPOINT, "separator": "\n\n"}
    (out / CONFIG_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")


def learn(
    model_path: str,
    rollouts: Sequence[Rollout],
    dtype: torch.dtype,
    seed: int,
    layers: Sequence[int] | None = None,
    *,
    asks_judge: bool = False,
) -> tuple[dict[str, LinearHead], list[rows.Row]]:
    """The heads of one half of the problems, by format, and what they and their rivals are worth on the other."""
    trained, tested = halves(rollouts)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
    layers = inner_layers(model.config.num_hidden_layers) if layers is None else layers
    steps = [read(model, rollout, layers) for rollout in tqdm(rollouts, unit="rollout")]
    if asks_judge:
        judge = Judge(transformers.AutoTokenizer.from_pretrained(model_path))
        for place in tqdm(tested, unit="rollout judged"):
            steps[place] = replace(steps[place], verdicts=judged(model, judge, rollouts[place]))

    def of(places: Sequence[int], things: Sequence[Any]) -> list[Any]:
        return [things[place] for place in places]

    learned = {
        name: train(of(trained, rollouts), [step.states[name] for step in of(trained, steps)])
        for name in steps[0].states
    }
    heads = {name: one.head for name, one in learned.items()}

    def best_of(kind: str) -> LinearHead:
        known = [layer for layer in (None, *layers) if name_of(kind, layer) in learned]
        layer = min(known, key=lambda layer: learned[name_of(kind, layer)].loss)
        return replace(heads[name_of(kind, layer)], layer=layer)

    best = {kind: best_of(kind) for kind in FORMATS}
    chosen = of(tested, rollouts)
    reads = [scores_of(step, heads) for step in of(tested, steps)]
    about = {
        "train_problems": len({one.problem for one in of(trained, rollouts)}), "train_rollouts": len(trained),
        "test_problems": len({one.problem for one in chosen}), "test_rollouts": len(tested),
        "share_right": sum(one.is_right for one in chosen) / len(chosen),
        "penalty": {name: one.penalty for name, one in learned.items()},
        "loss": {name: one.loss for name, one in learned.items()},
        "layer": {kind: head.layer for kind, head in best.items()},
    }  # fmt: skip
    return best, [{**about, **row} for row in compare(chosen, reads, seed)]


def inner_layers(num_layers: int) -> list[int]:
    """Half of them and two thirds: what is known of an answer's fate is often clearer there than at the end."""
    return sorted({num_layers // 2, num_layers * 2 // 3} - {0, num_layers})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="the policy model: a folder or a name on the Hub")
    parser.add_argument("--reader-path", help="the model whose states are read; default: the policy model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the head")
    parser.add_argument("--format", default=POLICY_HEAD, choices=FORMATS)
    parser.add_argument("--rollouts", type=Path, help="rows of `sglang-ets run`; default: sampled into --out")
    parser.add_argument("--data", default="gsm8k", help="of which the problems left for validation are sampled")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many, to choose settings on")
    parser.add_argument("--width", type=int, default=4, help="rollouts of each problem")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--pool-tokens", type=int, default=POOL_TOKENS, help="KV of the server that samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, nargs="*", help="inner layers to learn heads of too (default: two)")
    parser.add_argument("--judge", action="store_true", help="ask the model that reads after every step, to compare")
    parser.add_argument("--of-each", type=int, help="read only so many rollouts of each problem")
    parser.add_argument("--answer-pattern", default="boxed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=Path, help="append what was measured to this file, and rewrite its tables")
    args = parser.parse_args()
    reader_path = args.reader_path or args.model_path
    if args.reader_path and args.format == POLICY_HEAD:
        parser.error(
            f"--format must be {CHECKPOINT} with --reader-path: a policy head reads the policy model's own states"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.rollouts or args.out / "rollouts.jsonl"
    if args.rollouts is None:
        sample(args, path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_path)
    rollouts = rollouts_in(path, tokenizer, args.answer_pattern)
    if args.of_each:
        rollouts = some_of(rollouts, args.of_each, args.seed)
    dtype = getattr(torch, args.dtype)
    heads, made = learn(reader_path, rollouts, dtype, args.seed, args.layers, asks_judge=args.judge)
    names = {"model": args.model_path, "reader": reader_path, "data": args.data}
    made = [{key: Path(name).name for key, name in names.items()} | row for row in made]
    if args.format == POLICY_HEAD:
        heads[POLICY_HEAD].save(args.out)
    else:
        save(reader_path, heads[CHECKPOINT], dtype, args.out)
    print(table(made))
    if args.rows:
        for row in made:
            rows.append(args.rows, row)
        args.rows.with_suffix(".md").write_text(f"{tables(list(rows.read(args.rows)))}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

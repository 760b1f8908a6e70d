"""What can tell right from wrong steps of a model that has no PRM, and how well: heads, its verdicts, its likelihoods."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from bench import rows
from bench.testbed.likelihood import area_under_curve
from bench.testbed.rollouts import Rollout
from sglang_ets.prm.choose import POLICY_HEAD
from sglang_ets.prm.formats import Judge
from sglang_ets.prm.policy_head import LinearHead

CHECKPOINT = "token_classification"
LABELS = {CHECKPOINT: "head", POLICY_HEAD: "policy head"}  # in tables
CHUNK_TOKENS = 64  # of which all logits exist at once
NUM_RESAMPLES = 1000
HEADER = ["verifier", "AUC, last steps", "95 %", "AUC, all steps", "AUC within a problem", "best of n right"]

Floats = NDArray[np.float64]
Read = dict[str, Floats]  # of the steps of one rollout: a score each, under each verifier


@dataclass(frozen=True)
class Step:
    """What one forward pass says about each of the K steps of a rollout."""

    states: Mapping[str, Floats]  # by the name of a head, float64[K, H]: what its score is read from
    log_probabilities: Floats  # float64[K], sums over their tokens
    lengths: Floats  # float64[K], tokens
    verdicts: Floats | None = None  # float64[K], of the judge, if it is asked


@torch.inference_mode()
def read(model: Any, rollout: Rollout, layers: Sequence[int] = ()) -> Step:
    """One pass over the prompt and all steps. `model`: a causal LM of transformers; `layers`: see `LinearHead`."""
    token_ids = [*rollout.prompt_ids, *(token for step in rollout.steps for token in step)]
    decoder = model.get_decoder()
    seen = decoder(torch.tensor([token_ids]), use_cache=False, output_hidden_states=bool(layers))
    hidden = seen.last_hidden_state[0]  # float[T, H]
    first = len(rollout.prompt_ids)
    head, states = model.get_output_embeddings(), hidden[first - 1 : -1]
    taken = torch.cat([
        head(piece).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for piece, ids in zip(states.split(CHUNK_TOKENS), torch.tensor(token_ids[first:]).split(CHUNK_TOKENS), strict=True)
    ])  # fmt: skip
    lengths = [len(step) for step in rollout.steps]
    ends = np.cumsum(lengths)
    sums = [float(piece.double().sum()) for piece in taken.split(lengths)]
    chosen_at = first + ends - 2  # the state that a step's last token was chosen from
    places = {CHECKPOINT: (hidden, first + ends - 1), POLICY_HEAD: (hidden, chosen_at)}
    for layer in layers:
        inner = seen.hidden_states[layer][0]
        places[name_of(POLICY_HEAD, layer)] = inner, chosen_at
        if hasattr(decoder, "norm"):  # as a model that ends here gives it; no other kind becomes a checkpoint
            places[name_of(CHECKPOINT, layer)] = decoder.norm(inner), first + ends - 1
    read_from = {name: states[torch.from_numpy(at)].double().numpy() for name, (states, at) in places.items()}
    return Step(read_from, np.array(sums), np.array(lengths, dtype=np.float64))


def name_of(kind: str, layer: int | None) -> str:
    """What a head of this format and layer is called here."""
    return kind if layer is None else f"{LABELS[kind]} of layer {layer}"


@torch.inference_mode()
def judged(model: Any, judge: Judge, rollout: Rollout) -> Floats:
    """float64[K]: the share of Yes against No after each step, as with `--prm-format judge`. The questions are not kept."""
    verdicts, cache, scores = list(judge.verdicts().token_ids), transformers.DynamicCache(), []
    new = judge.prompt(rollout.question)
    for depth, text in enumerate(rollout.texts, 1):
        step = judge.step(text, depth)
        token_ids = torch.tensor([[*new, *step.read]])
        logits = model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1, verdicts]
        scores.append(float(logits.double().softmax(-1)[0]))
        cache.crop(cache.get_seq_length() - len(step.query))
        new = ()
    return np.array(scores)


def scores_of(step: Step, heads: Mapping[str, LinearHead]) -> Read:
    """Every verifier on every step, as the server would score it. The last one knows nothing but the length."""
    verdicts = {} if step.verdicts is None else {"judge": step.verdicts}
    likelihood = np.exp(step.log_probabilities)
    return {
        **{LABELS.get(name, name): head.scores(step.states[name]) for name, head in heads.items()},
        **verdicts,
        "likelihood": np.array(list(accumulate(likelihood, min))),
        "confidence": np.exp(step.log_probabilities / step.lengths),
        "shortness alone": -np.cumsum(step.lengths),
    }


def compare(rollouts: Sequence[Rollout], reads: Sequence[Read], seed: int) -> list[rows.Row]:
    """A row for each verifier, on problems that no head has seen."""
    return [{"verifier": name, **_measured(rollouts, [one[name] for one in reads], seed)} for name in reads[0]]


def _measured(rollouts: Sequence[Rollout], scores: Sequence[Floats], seed: int) -> rows.Row:
    labels = [rollout.is_right for rollout in rollouts]
    last = [float(own[-1]) for own in scores]
    every = [(float(score), label) for own, label in zip(scores, labels, strict=True) for score in own]
    of_problem: dict[str, list[int]] = defaultdict(list)
    for place, rollout in enumerate(rollouts):
        of_problem[rollout.problem].append(place)
    draw, resampled = np.random.default_rng(seed), []
    for _ in range(NUM_RESAMPLES):
        drawn = draw.choice(len(of_problem), len(of_problem))
        places = [place for index in drawn for place in list(of_problem.values())[index]]
        resampled.append(_auc([last[place] for place in places], [labels[place] for place in places]))
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    within = [_auc([last[at] for at in own], [labels[at] for at in own]) for own in of_problem.values()]
    best = [labels[max(own, key=last.__getitem__)] for own in of_problem.values()]
    return {
        "auc_last": _auc(last, labels), "low": float(low), "high": float(high),
        "auc_all": _auc([score for score, _ in every], [label for _, label in every]),
        "auc_within": float(np.nanmean(within)), "mixed_problems": int(np.isfinite(within).sum()),
        "best_of_n": sum(best) / len(best),
    }  # fmt: skip


def _auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    return area_under_curve(scores, labels) if len(set(labels)) == 2 else math.nan


def tables(made: Sequence[rows.Row]) -> str:
    """A table of each head; rows of one run stand together."""
    by_run: dict[int, list[rows.Row]] = defaultdict(list)
    for row in made:
        by_run[row["run"]].append(row)
    return "\n\n".join(table(own) for own in by_run.values())


def table(made: Sequence[rows.Row]) -> str:
    """A markdown table of the rows of one run."""
    cells = [
        [row["verifier"], f"{row['auc_last']:.3f}", f"[{row['low']:.3f}, {row['high']:.3f}]", f"{row['auc_all']:.3f}",
         f"{row['auc_within']:.3f}", f"{row['best_of_n']:.3f}"]
        for row in made
    ]  # fmt: skip
    first = made[0]
    reader = f" read by {first['reader']}" if first.get("reader", first["model"]) != first["model"] else ""
    return (
        f"{first['model']}{reader}, {first['data']}: "
        f"head of {first['train_rollouts']} rollouts of {first['train_problems']} problems, "
        f"tested on {first['test_rollouts']} rollouts ({first['share_right']:.0%} right) of {first['test_problems']} others, "
        f"{first['mixed_problems']} of which have right and wrong ones\n\n{rows.markdown(HEADER, cells)}"
    )

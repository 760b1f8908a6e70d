"""Which normalisation of embeddings lets their distance tell meanings apart? On the embedded task and on SmolLM2.

    python -m bench.studies.cluster_variants --smoke
    python -m bench.studies.cluster_variants --model embedded
    python -m bench.studies.cluster_variants --model smollm2 --data gsm8k

Embeddings are those of a server: the last layer's mean over a step's tokens. Pairs of steps of one level whose texts differ
are either the same in meaning or not. Embedded task: the meaning is known, it is the expression that is left. SmolLM2: nobody
knows it; a stand-in is used, the numbers and operators of the step in their order. (Rows of other layers and of last tokens
are of commits that computed hidden states anew; see their runs.)

Two figures a variant: the AUC with which the cosine distance tells same from different, and the purity of the clusters at the
cut that finds as many clusters as there are meanings. One variant of one model is one row.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import rows
from bench.datasets import load
from bench.redundancy import meaning, purity_of
from bench.testbed.likelihood import area_under_curve
from bench.testbed.task import distinct_problems
from bench.trees import rebase_trees
from sglang_ets.core.clusters import RunningCenter, cluster_labels, cosine_distances
from sglang_ets.tools.calibrate import suggest_cut

SYMBOLS = re.compile(r"\d+(?:\.\d+)?|[-+*/=%]")
CUTS = np.geomspace(1e-4, 1.0, 60)
MIN_STD = 1e-6
WIDTH = 16
NORMALISATIONS = (
    "raw", "centred on the level", "centred on the search so far", "centred on other prompts", "centred on all",
    "standardised on all",
)  # fmt: skip

Embeddings = NDArray[np.float32]
Tree = list[dict[str, Any]]


@dataclass(frozen=True)
class Steps:
    """The steps of one level: its tree, texts, meanings, and float32[L, H]."""

    tree: int
    texts: tuple[str, ...]
    meanings: tuple[str, ...]
    embeddings: Embeddings


def embedded_trees(problems: int, seed: int) -> Iterator[Tree]:
    """The embedded models on validation problems."""
    return rebase_trees([p.prompt for p in distinct_problems("validation", problems, seed)], WIDTH, 256, seed)


def smollm2_trees(problems: int, data: str, seed: int) -> Iterator[Tree]:
    """SmolLM2 judging its own steps, through its chat template."""
    from transformers import AutoTokenizer

    from bench.real_model import flags
    from bench.smollm2 import checkpoint

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint())
    asked = (f"{problem.question}\nThink step by step, one short line a step." for problem in load(data, problems))
    turns = [[{"role": "user", "content": text}] for text in asked]
    prompts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    search = {"step_delimiter": ["\n"], "max_step_tokens": 48, "max_steps": 6}
    return rebase_trees(prompts, WIDTH, 160, seed, flags=flags("confidence"), search=search)


def symbols(step: str) -> str:
    """Numbers and operators of a step, in order."""
    return " ".join(SYMBOLS.findall(step))


def levels(trees: Iterator[Tree], meaning_of: Callable[[str], str]) -> Iterator[Steps]:
    """Every level with two texts or more that have a meaning; equal steps after one parent count once."""
    for tree, nodes in enumerate(trees):
        for depth in sorted({node["depth"] for node in nodes}):
            own = [n for n in nodes if n["depth"] == depth and n["finish"] == "step" and n["embedding"] is not None]
            kept = list({(n["parent"], n["text"]): n for n in own if meaning_of(n["text"])}.values())
            texts = tuple(node["text"] for node in kept)
            if len(set(texts)) > 1:
                embeddings = np.array([node["embedding"] for node in kept], dtype=np.float32)
                yield Steps(tree, texts, tuple(map(meaning_of, texts)), embeddings)


def normalised(tree_levels: Sequence[Steps], how: str) -> list[Embeddings]:
    """Every level's embeddings under one normalisation; "on all" uses the statistics of all levels.

    "The search so far" is the levels of the same tree up to this one, as served. "Other prompts" are trees of the other parity:
    a mean that was measured before.
    """
    sets = [level.embeddings for level in tree_levels]
    everything = np.concatenate(sets)
    if how == "raw":
        return sets
    if how == "centred on the level":
        return [one - one.mean(0) for one in sets]
    if how == "centred on the search so far":
        centers: dict[int, RunningCenter] = defaultdict(RunningCenter)
        return [centers[level.tree].centered(level.embeddings) for level in tree_levels]
    if how == "centred on other prompts":
        means = [
            np.concatenate([s.embeddings for s in tree_levels if s.tree % 2 == parity]).mean(0) for parity in (0, 1)
        ]
        return [level.embeddings - means[1 - level.tree % 2] for level in tree_levels]
    scale = np.maximum(everything.std(0), MIN_STD) if how == "standardised on all" else 1.0
    return [((one - everything.mean(0)) / scale).astype(np.float32) for one in sets]


def figures(tree_levels: Sequence[Steps], sets: Sequence[Embeddings]) -> dict[str, float]:
    """AUC over pairs of different texts, and clusters at the cut that finds as many as there are meanings."""
    distances, same = [], []
    for level, embeddings in zip(tree_levels, sets, strict=True):
        between = cosine_distances(embeddings)
        for a in range(len(level.texts)):
            for b in range(a):
                if level.texts[a] != level.texts[b]:
                    distances.append(float(between[a, b]))
                    same.append(level.meanings[a] == level.meanings[b])
    meanings = float(np.mean([len(set(level.meanings)) for level in tree_levels]))
    counts = [np.mean([cluster_labels(one, cut).max() + 1 for one in sets]) for cut in CUTS]
    cut = float(CUTS[int(np.argmin(np.abs(np.array(counts) - meanings)))])
    purities = [
        purity_of(cluster_labels(one, cut).tolist(), level.meanings)
        for level, one in zip(tree_levels, sets, strict=True)
    ]
    values, is_same = np.array(distances), np.array(same)
    return {
        "auc": area_under_curve((-values).tolist(), same),
        "pairs_same": int(is_same.sum()), "pairs_other": int((~is_same).sum()),
        "median_same": float(np.median(values[is_same])), "median_other": float(np.median(values[~is_same])),
        "meanings": meanings, "cut_of_equal_number": cut, "purity": float(np.mean(purities)),
        "suggested_cut": suggest_cut(values), "levels": len(tree_levels),
        "leaves": float(np.mean([len(level.texts) for level in tree_levels])),
    }  # fmt: skip


def table(done: Sequence[rows.Row]) -> str:
    """Markdown, the latest row of each variant."""
    latest = {(row["model"], row["layer"], row["pooling"], row["normalisation"]): row for row in done}
    header = ["model", "layer", "pooling", "normalisation", "AUC", "median distance: same, other", "cut, as many as meanings",
              "purity there", "suggested cut"]  # fmt: skip
    cells = [
        [
            *variant, f"{row['auc']:.3f}", f"{row['median_same']:.3g}, {row['median_other']:.3g}",
            row["cut_of_equal_number"], f"{row['purity']:.3f}", row["suggested_cut"],
        ]
        for variant, row in latest.items()
    ]  # fmt: skip
    return rows.markdown(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["embedded", "smollm2"], default="embedded")
    parser.add_argument("--data", default="gsm8k", help="for smollm2: a name or a file, see bench/datasets.py")
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "2 problems")
    args = parser.parse_args()
    if args.smoke:
        args.problems = 2
    out = rows.out_of(args, "cluster_variants")
    if args.model == "embedded":
        tree_levels = list(levels(embedded_trees(args.problems, args.seed), meaning))
    else:
        tree_levels = list(levels(smollm2_trees(args.problems, args.data, args.seed), symbols))
    for how in NORMALISATIONS:
        row = {"model": args.model, "layer": -1, "pooling": "mean", "normalisation": how, "problems": args.problems}
        rows.append(out, {**row, "seed": args.seed, **figures(tree_levels, normalised(tree_levels, how))})
    rows.publish(out, table(list(rows.read(out))))


if __name__ == "__main__":
    main()

"""Which embedding tells meanings apart? Layers, pooling and normalisation, on the embedded task and on SmolLM2.

    python -m bench.cluster_variants --smoke
    python -m bench.cluster_variants --model embedded
    python -m bench.cluster_variants --model smollm2 --data GSM8K.jsonl

Steps come from REBASE searches; their hidden states are computed again with transformers, from every layer asked for. Pairs of
steps of one level whose texts differ are either the same in meaning or not. Embedded task: the meaning is known, it is the
expression that is left. SmolLM2: nobody knows it; a stand-in is used, the numbers and operators of the step in their order.

Two figures a variant: the AUC with which the cosine distance tells same from different, and the purity of the clusters at the
cut that finds as many clusters as there are meanings. One variant of one model is one row.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from bench import rows
from bench.redundancy import meaning, purity_of
from bench.server import running_server
from bench.testbed.likelihood import area_under_curve
from bench.testbed.task import distinct_problems
from sglang_ets.core.clusters import RunningCenter, cluster_labels, cosine_distances
from sglang_ets.tools.calibrate import suggest_cut

MODELS = Path(__file__).resolve().parents[1] / "sglang_ets" / "models"
SYMBOLS = re.compile(r"\d+(?:\.\d+)?|[-+*/=%]")
CUTS = np.geomspace(1e-4, 1.0, 60)
POOL_TOKENS = 12_000
MIN_STD = 1e-6

Embeddings = NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """A model, what it is asked, and what a step of it means."""

    path: Path
    flags: tuple[str, ...]
    prompts: tuple[str, ...]
    search: dict[str, Any]
    max_tokens: int
    width: int
    meaning: Callable[[str], str]
    layers: tuple[int, ...]  # of `hidden_states`: 0 is the embedding, -1 the last, normalised


@dataclass(frozen=True)
class Steps:
    """The steps of one level: its tree, texts, meanings, and float32[L, H] by (layer, pooling)."""

    tree: int
    texts: tuple[str, ...]
    meanings: tuple[str, ...]
    embeddings: dict[tuple[int, str], Embeddings]


def embedded(problems: int, seed: int) -> Source:
    """The embedded PRM on validation problems."""
    prompts = tuple(problem.prompt for problem in distinct_problems("validation", problems, seed))
    flags = ("--search", "rebase")
    return Source(MODELS / "prm", flags, prompts, {}, 256, 16, meaning, (1, 2, 3, -1))


def smollm2(problems: int, data: Path) -> Source:
    """SmolLM2 judging its own steps on GSM8K, through its chat template."""
    from transformers import AutoTokenizer

    from bench.smollm2 import checkpoint

    path = checkpoint()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    questions = [json.loads(line)["question"] for line in data.read_text(encoding="utf-8").splitlines()[:problems]]
    turns = [
        [{"role": "user", "content": f"{question}\nThink step by step, one short line a step."}]
        for question in questions
    ]
    prompts = tuple(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns)
    flags = ("--search", "rebase", "--model-path", str(path), "--prm-format", "confidence", "--dtype", "float32",
             "--max-total-tokens", str(POOL_TOKENS), "--prm-max-total-tokens", str(POOL_TOKENS))  # fmt: skip
    search = {"step_delimiter": ["\n"], "max_step_tokens": 48, "max_steps": 6}
    return Source(path, flags, prompts, search, 160, 16, symbols, (8, 15, 23, -1))


def symbols(step: str) -> str:
    """Numbers and operators of a step, in order."""
    return " ".join(SYMBOLS.findall(step))


def trees(source: Source, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Nodes of one REBASE search a prompt."""
    search = {"algorithm": "rebase", "return_tree": True, **source.search}
    with running_server(source.flags) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800, max_retries=0)
        for prompt in tqdm(source.prompts, unit="tree"):
            answer = client.completions.create(
                model="default", prompt=prompt, max_tokens=source.max_tokens, temperature=1.0, seed=seed,
                extra_body={"search_width": source.width, "search": search},
            )  # fmt: skip
            yield list(answer.metadata["search"]["tree"]["nodes"])  # type: ignore[attr-defined]


@torch.inference_mode()
def levels(source: Source, seed: int) -> Iterator[Steps]:
    """Every level with two texts or more that have a meaning, with the states of all its steps."""
    from transformers import AutoModel, AutoTokenizer

    grown = list(zip(source.prompts, trees(source, seed), strict=True))
    tokenizer: Any = AutoTokenizer.from_pretrained(source.path)
    model = AutoModel.from_pretrained(source.path, dtype=torch.float32)
    for tree, (prompt, nodes) in enumerate(tqdm(grown, unit="tree", desc="hidden states")):
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        pooled = _pooled(model, prompt_ids, nodes, source.layers)
        for depth in sorted({node["depth"] for node in nodes}):
            own = [n for n in nodes if n["depth"] == depth and n["id"] in pooled and source.meaning(n["text"])]
            by_text = {(n["parent"], n["text"]): n for n in own}  # one of each: equal steps are equal anyway
            kept = list(by_text.values())
            if len({node["text"] for node in kept}) < 2:
                continue
            names = pooled[kept[0]["id"]]
            yield Steps(
                tree,
                tuple(node["text"] for node in kept),
                tuple(source.meaning(node["text"]) for node in kept),
                {name: np.stack([pooled[node["id"]][name] for node in kept]) for name in names},
            )


def _pooled(
    model: Any, prompt_ids: list[int], nodes: Sequence[dict[str, Any]], layers: Sequence[int]
) -> dict[int, dict[tuple[int, str], NDArray[np.float32]]]:
    """Mean and last state of each unfinished step, by node id; one forward pass a trajectory."""
    by_id = {node["id"]: node for node in nodes}
    inner = {node["parent"] for node in nodes}
    found: dict[int, dict[tuple[int, str], NDArray[np.float32]]] = {}
    seen: set[tuple[int, ...]] = set()
    for leaf in (node for node in nodes if node["id"] not in inner):
        path: list[dict[str, Any]] = []
        at: dict[str, Any] | None = leaf
        while at is not None:
            path.insert(0, at)
            at = by_id.get(at["parent"])
        ids = tuple(token for node in path for token in node["token_ids"])
        if ids in seen:
            continue
        seen.add(ids)
        states = model(torch.tensor([[*prompt_ids, *ids]]), output_hidden_states=True, use_cache=False).hidden_states
        start = len(prompt_ids)
        for node in path:
            end = start + len(node["token_ids"])
            if node["id"] not in found and node["finish"] == "step":
                own = {layer: states[layer][0, start:end] for layer in layers}
                found[node["id"]] = {(layer, "mean"): rows_.mean(0).numpy() for layer, rows_ in own.items()} | {
                    (layer, "last"): rows_[-1].numpy() for layer, rows_ in own.items()
                }
            start = end
    return found


NORMALISATIONS = (
    "raw",
    "centred on the level",
    "centred on the search so far",
    "centred on other prompts",
    "centred on all",
    "standardised on all",
)


def normalised(sets: Sequence[Embeddings], trees_of: Sequence[int], how: str) -> list[Embeddings]:
    """Every level's embeddings under one normalisation; "on all" uses the statistics of all levels.

    "The search so far" is the levels of the same tree up to this one, as served. "Other prompts" are trees of the other parity:
    a mean that was measured before.
    """
    everything = np.concatenate(sets)
    if how == "raw":
        return list(sets)
    if how == "centred on the level":
        return [one - one.mean(0) for one in sets]
    if how == "centred on the search so far":
        centers: dict[int, RunningCenter] = defaultdict(RunningCenter)
        return [centers[tree].centered(one) for one, tree in zip(sets, trees_of, strict=True)]
    if how == "centred on other prompts":
        means = [
            np.concatenate([one for one, t in zip(sets, trees_of, strict=True) if t % 2 == p]).mean(0) for p in (0, 1)
        ]
        return [one - means[1 - t % 2] for one, t in zip(sets, trees_of, strict=True)]
    scale = np.maximum(everything.std(0), MIN_STD) if how == "standardised on all" else 1.0
    return [((one - everything.mean(0)) / scale).astype(np.float32) for one in sets]


def figures(found: Sequence[Steps], sets: Sequence[Embeddings]) -> dict[str, float]:
    """AUC over pairs of different texts, and clusters at the cut that finds as many as there are meanings."""
    distances, same = [], []
    for level, embeddings in zip(found, sets, strict=True):
        between = cosine_distances(embeddings)
        for a in range(len(level.texts)):
            for b in range(a):
                if level.texts[a] != level.texts[b]:
                    distances.append(float(between[a, b]))
                    same.append(level.meanings[a] == level.meanings[b])
    meanings = float(np.mean([len(set(level.meanings)) for level in found]))
    counts = [np.mean([cluster_labels(one, cut).max() + 1 for one in sets]) for cut in CUTS]
    cut = float(CUTS[int(np.argmin(np.abs(np.array(counts) - meanings)))])
    purities = [
        purity_of(cluster_labels(one, cut).tolist(), level.meanings) for level, one in zip(found, sets, strict=True)
    ]
    values, is_same = np.array(distances), np.array(same)
    return {
        "auc": area_under_curve((-values).tolist(), same),
        "pairs_same": int(is_same.sum()),
        "pairs_other": int((~is_same).sum()),
        "median_same": float(np.median(values[is_same])),
        "median_other": float(np.median(values[~is_same])),
        "meanings": meanings,
        "cut_of_equal_number": cut,
        "purity": float(np.mean(purities)),
        "suggested_cut": suggest_cut(values),
        "levels": len(found),
        "leaves": float(np.mean([len(level.texts) for level in found])),
    }


def table(done: Sequence[dict[str, Any]]) -> str:
    """Markdown, the latest row of each variant."""
    latest = {(row["model"], row["layer"], row["pooling"], row["normalisation"]): row for row in done}
    header = ["model", "layer", "pooling", "normalisation", "AUC", "median distance: same, other", "cut, as many as meanings",
              "purity there", "suggested cut"]  # fmt: skip
    cells = [
        [
            row["model"], row["layer"], row["pooling"], row["normalisation"], f"{row['auc']:.3f}",
            f"{row['median_same']:.3g}, {row['median_other']:.3g}", row["cut_of_equal_number"], f"{row['purity']:.3f}",
            row["suggested_cut"],
        ]
        for row in latest.values()
    ]  # fmt: skip
    return rows.markdown(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["embedded", "smollm2"], default="embedded")
    parser.add_argument("--data", type=Path, help="GSM8K as JSON lines with `question`, for smollm2")
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "2 problems")
    args = parser.parse_args()
    if args.model == "smollm2" and args.data is None:
        parser.error("--model smollm2 needs --data, a file of GSM8K problems")
    if args.smoke:
        args.problems = 2
    out = rows.out_of(args, "cluster_variants")
    source = embedded(args.problems, args.seed) if args.model == "embedded" else smollm2(args.problems, args.data)
    torch.set_num_threads(1)
    found = list(levels(source, args.seed))
    trees_of = [level.tree for level in found]
    for layer, pooling in found[0].embeddings:
        sets = [level.embeddings[layer, pooling] for level in found]
        for how in NORMALISATIONS:
            row = {
                "model": args.model,
                "layer": layer,
                "pooling": pooling,
                "normalisation": how,
                "problems": args.problems,
            }
            rows.append(out, {**row, "seed": args.seed, **figures(found, normalised(sets, trees_of, how))})
    text = table(list(rows.read(out)))
    out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

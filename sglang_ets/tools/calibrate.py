"""Suggest a cluster cut for a PRM: `sglang-ets calibrate --base-url http://127.0.0.1:30000 --prompts FILE`.

A few searches with plain REBASE return their trees with embeddings. Of every level, the cosine distances of all pairs of
leaves whose text differs go into a histogram over log distance. Steps that mean the same lie in its lower part, steps that do
not in its upper part; the cut is where the variance within the two parts is smallest (Otsu's threshold). With few prompts this
is a hint: look at the histogram and at the clusters that it gives.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
from numpy.typing import NDArray

from sglang_ets.core.clusters import RunningCenter, cluster_labels, cosine_distances
from sglang_ets.tools.ask import DEFAULT_URL, AskFailed, Question, check_width, watch
from sglang_ets.tools.datasets import EMBEDDED_PROBLEMS

SMALLEST = 1e-5  # distances below this are rounding
NUM_BINS = 48
BAR_CHARS = 50
NUM_EMBEDDED = 8
SETTINGS = {"algorithm": "rebase", "return_tree": True, "return_embeddings": True}
TIMEOUT_S = 600.0


def level_embeddings(nodes: Sequence[dict[str, Any]]) -> list[tuple[list[str], NDArray[np.float32]]]:
    """Texts and centered embeddings (float32[L, H]) of the unfinished leaves of each level of a returned tree."""
    center = RunningCenter()
    levels: dict[int, list[dict[str, Any]]] = {}
    for node in nodes:
        if node["embedding"] is not None and node["finish"] == "step":
            levels.setdefault(node["depth"], []).append(node)
    return [
        (
            [leaf["text"] for leaf in leaves],
            center.centered(np.array([leaf["embedding"] for leaf in leaves], dtype=np.float32)),
        )
        for _, leaves in sorted(levels.items())
    ]


def pair_distances(texts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine distances of the pairs whose texts differ, float64[P]."""
    distances = cosine_distances(embeddings)
    rows, columns = np.triu_indices(len(texts), k=1)
    differs = np.array([texts[a] != texts[b] for a, b in zip(rows, columns, strict=True)], dtype=np.bool_)
    return distances[rows, columns][differs]


def suggest_cut(distances: NDArray[np.float64]) -> float:
    """Otsu's threshold on log10 distance.

    Raises:
        ValueError: fewer than two different distances.
    """
    logs = np.sort(np.log10(np.maximum(distances, SMALLEST)))
    if logs.size < 2 or logs[0] == logs[-1]:
        raise ValueError(f"a cut needs at least two different distances, got {logs.size} pairs; send more prompts")
    counts = np.arange(1, logs.size)
    sums = np.cumsum(logs)[:-1]
    low, high = sums / counts, (logs.sum() - sums) / (logs.size - counts)
    between = counts * (logs.size - counts) * (high - low) ** 2
    between[logs[1:] == logs[:-1]] = -1.0  # a cut lies between two different values
    best = int(np.argmax(between))
    return float(10 ** ((logs[best] + logs[best + 1]) / 2))


def histogram(distances: NDArray[np.float64], cut: float) -> str:
    """Bars over log10 distance, with the cut marked."""
    logs = np.log10(np.maximum(distances, SMALLEST))
    counts, edges = np.histogram(logs, bins=NUM_BINS, range=(np.log10(SMALLEST), np.log10(2.0)))
    lines = []
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count or low <= np.log10(cut) < high:
            mark = "  <- suggested cut" if low <= np.log10(cut) < high else ""
            lines.append(
                f"{10**low:9.5f}  {'#' * round(BAR_CHARS * count / max(1, counts.max())):<{BAR_CHARS}} {count}{mark}"
            )
    return "\n".join(lines)


def nodes_of(client: openai.OpenAI, question: Question) -> list[dict[str, Any]]:
    """Nodes of one search's tree.

    Raises:
        AskFailed: see `ask.watch`.
    """
    for watched in watch(client, question):
        figures = watched.figures
    return list(figures["tree"]["nodes"])  # type: ignore[index]  # `watch` raises without figures


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; a line that is a JSON object has it, with whatever newlines belong to it, under `prompt`.

    Raises:
        SystemExit: the file cannot be read, or holds no prompt.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--prompts must name a file of text, got {path} ({error}); give one prompt a line") from error
    if not lines:
        raise SystemExit(f"--prompts must name a file with one prompt a line, got {path}, which has none")
    return [_prompt_of(line.rstrip("\r")) for line in lines]


def _prompt_of(line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        return line
    return str(row["prompt"]) if isinstance(row, dict) and "prompt" in row else line


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="sglang-ets calibrate", description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument("--base-url", default=DEFAULT_URL, help=f"of the server (default {DEFAULT_URL})")
    flags.add_argument(
        "--prompts",
        type=Path,
        help='one prompt a line, as text or as {"prompt": ...}; default: problems of the embedded task',
    )
    flags.add_argument("--chat", action="store_true", help="send prompts as chat messages, not as plain prompts")
    flags.add_argument("--width", type=int, default=16)
    flags.add_argument("--max-tokens", type=int, default=256)
    flags.add_argument("--model", default="default")
    flags.add_argument("--api-key", default="none", help="if the server asks for one")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    prompts = read_prompts(args.prompts) if args.prompts else read_prompts(EMBEDDED_PROBLEMS)[-NUM_EMBEDDED:]
    base_url = args.base_url.rstrip("/").removesuffix("/v1")
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=args.api_key, timeout=TIMEOUT_S, max_retries=0)
    asked = Question("", args.width, args.chat, args.model, 1, args.max_tokens, settings=SETTINGS)
    try:
        check_width(args.width)
        trees = [nodes_of(client, replace(asked, text=prompt)) for prompt in prompts]
        levels = [level for nodes in trees for level in level_embeddings(nodes)]
        distances = np.concatenate([np.zeros(0), *(pair_distances(*level) for level in levels)])
        cut = suggest_cut(distances)
    except (AskFailed, ValueError) as error:
        sys.exit(f"sglang-ets calibrate: {error}")
    show(levels, distances, cut)


def show(levels: Sequence[tuple[list[str], NDArray[np.float32]]], distances: NDArray[np.float64], cut: float) -> None:
    """Print the histogram, the cut, and how many clusters it and its neighbours make of a level."""
    print(f"cosine distance of {distances.size} pairs of different steps in {len(levels)} levels\n")
    print(histogram(distances, cut))
    print(
        f"\nsuggested --search-cluster-distance {cut:.3g}; clusters per level (of leaves, distinct texts) at some cuts:"
    )
    leaves = np.mean([len(texts) for texts, _ in levels])
    texts_mean = np.mean([len(set(texts)) for texts, _ in levels])
    for candidate in sorted({0.1, 0.2, 0.3, 0.4, 0.6, cut}):
        clusters_mean = np.mean([cluster_labels(embeddings, candidate).max() + 1 for _, embeddings in levels])
        print(f"  {candidate:7.4f}  {clusters_mean:6.2f} clusters of {leaves:.2f} leaves, {texts_mean:.2f} texts")


if __name__ == "__main__":
    main()

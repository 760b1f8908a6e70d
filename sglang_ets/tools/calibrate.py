"""Suggest a cluster cut for a PRM: `python -m sglang_ets.tools.calibrate --url http://127.0.0.1:30000 --prompts FILE`.

A few searches with plain REBASE return their trees with embeddings. Of every level, the cosine distances of all pairs of
leaves whose text differs go into a histogram over log distance. Steps that mean the same lie in its lower part, steps that do
not in its upper part; the cut is where the variance within the two parts is smallest (Otsu's threshold). With few prompts this
is a hint: look at the histogram and at the clusters that it gives.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_ets.core.clusters import RunningCenter, cluster_labels, cosine_distances

SMALLEST = 1e-5  # distances below this are rounding
NUM_BINS = 48
BAR_CHARS = 50
EMBEDDED_PROBLEMS = Path(__file__).parents[1] / "models" / "problems.jsonl"
NUM_EMBEDDED = 8


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


def ask(url: str, prompt: str, width: int, max_tokens: int) -> list[dict[str, Any]]:
    """Nodes of one REBASE search's tree.

    Raises:
        SystemExit: the server is not there, or refuses.
    """
    body = {
        "model": "default",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "search_width": width,
        "search": {"algorithm": "rebase", "return_tree": True, "return_embeddings": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            search = json.load(response)["search"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"the server at {url} refused the search: {error.read().decode(errors='replace')}") from error
    except urllib.error.URLError as error:
        raise SystemExit(f"no server answers at {url} ({error.reason}); start one with --search ets") from error
    return list(search["tree"]["nodes"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sglang_ets.tools.calibrate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="a running server with --search")
    parser.add_argument("--prompts", type=Path, help="one prompt a line; default: problems of the embedded task")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args(arguments)
    if args.prompts:
        prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        lines = EMBEDDED_PROBLEMS.read_text(encoding="utf-8").splitlines()[-NUM_EMBEDDED:]
        prompts = [json.loads(line)["prompt"] for line in lines]
    levels = [
        level for prompt in prompts for level in level_embeddings(ask(args.url, prompt, args.width, args.max_tokens))
    ]
    distances = np.concatenate([np.zeros(0), *(pair_distances(*level) for level in levels)])
    try:
        cut = suggest_cut(distances)
    except ValueError as error:
        sys.exit(str(error))
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

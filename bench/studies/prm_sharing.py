"""What could be saved if ranks that each hold the whole PRM shared out the steps to score, instead of scoring all of them each?

    python -m bench.studies.prm_sharing

Counted in tokens that a forward pass computes, on recorded trees of real searches. A rank caches what it has computed.
`at home` scores a step where the step before it was scored; `anywhere` scores it on the rank that is then done first, which may
have to compute the trajectory again. A level is done when its slowest rank is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench import rows
from bench.ilp import recorded_trees
from bench.trees import Node

NUM_RANKS = (2, 4, 8)
PROMPT = 0


@dataclass(frozen=True)
class Step:
    """A distinct step: equal ones behind the same steps are scored once."""

    parent: int
    tokens: int
    depth: int


def distinct_steps(nodes: Sequence[Node]) -> dict[int, Step]:
    """By id, a parent before its children."""
    steps: dict[int, Step] = {}
    first = {PROMPT: PROMPT}  # of each node, the one that stands for it
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    for node in sorted(nodes, key=lambda node: (node["depth"], node["id"])):
        parent = first[node["parent"]]
        first[node["id"]] = known.setdefault((parent, tuple(node["token_ids"])), node["id"])
        if first[node["id"]] == node["id"]:
            steps[node["id"]] = Step(parent, len(node["token_ids"]), node["depth"])
    return steps


def levels(steps: dict[int, Step]) -> Iterator[list[int]]:
    """Ids by depth, longest step first."""
    for depth in range(1, 1 + max(step.depth for step in steps.values())):
        yield sorted((own for own in steps if steps[own].depth == depth), key=lambda own: -steps[own].tokens)


def new_tokens(steps: dict[int, Step], own: int, cached: set[int]) -> int:
    """Tokens of the step, one of what came before it, and what of the trajectory a rank has not in its cache."""
    tokens, at = 1, own
    while at != PROMPT and at not in cached:
        tokens += steps[at].tokens
        at = steps[at].parent
    return tokens


def gain(nodes: Sequence[Node], num_ranks: int, *, anywhere: bool) -> float:
    """How many times fewer tokens the slowest rank computes, over all levels, than a rank that computes everything."""
    steps = distinct_steps(nodes)
    cached: list[set[int]] = [set() for _ in range(num_ranks)]
    alone = shared = 0
    for level in levels(steps):
        load = [0] * num_ranks
        for own in level:
            homes = [rank for rank in range(num_ranks) if steps[own].parent in {PROMPT, *cached[rank]}]
            ranks = range(num_ranks) if anywhere else homes
            rank = min(ranks, key=lambda rank: load[rank] + new_tokens(steps, own, cached[rank]))
            load[rank] += new_tokens(steps, own, cached[rank])
            at = own
            while at != PROMPT and at not in cached[rank]:
                cached[rank].add(at)
                at = steps[at].parent
        alone += sum(steps[own].tokens + 1 for own in level)
        shared += max(load)
    return alone / shared


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    ways = [(anywhere, count) for anywhere in (False, True) for count in NUM_RANKS]
    header = ["width", *(f"{'anywhere' if anywhere else 'at home'}, {count} ranks" for anywhere, count in ways)]
    cells = [
        [width, *(gain(nodes, count, anywhere=anywhere) for anywhere, count in ways)]
        for width, nodes in recorded_trees()
    ]
    print(rows.markdown(header, cells))


if __name__ == "__main__":
    main()

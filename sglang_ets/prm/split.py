"""Over how many tensor-parallel ranks the PRM is split: over all, or not at all, with a whole copy on each. No engine."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_ets.prm.choose import read_json

WHOLE = 1


def splits_evenly(heads: int, kv_heads: int, inner: int, num_ranks: int) -> bool:
    """Whether each rank gets as many attention heads and as much of the feed-forward layers (`inner` wide) as the others.

    A head of keys and values may be on several ranks.
    """
    has_even_kv = kv_heads % num_ranks == 0 or num_ranks % kv_heads == 0
    return heads % num_ranks == 0 and inner % num_ranks == 0 and has_even_kv


def divides(config: Mapping[str, object], num_ranks: int) -> bool:
    """Whether a model with this `config.json` can be split over so many ranks."""
    text = config.get("text_config")
    sizes = {**config, **(text if isinstance(text, dict) else {})}
    heads = int(str(sizes.get("num_attention_heads") or num_ranks))
    kv_heads = int(str(sizes.get("num_key_value_heads") or heads))
    inner = int(str(sizes.get("intermediate_size") or num_ranks))
    return splits_evenly(heads, kv_heads, inner, num_ranks)


def num_prm_ranks(prm_path: str, policy_path: str, num_ranks: int, wanted: int | None = None) -> int:
    """Ranks of the PRM on a server of `num_ranks`. `wanted` is what --prm-tp says, if anything.

    Raises:
        SystemExit: the PRM cannot be split so.
    """
    if prm_path != policy_path:
        return ranks_of(read_json(prm_path, "config.json"), num_ranks, wanted)
    if wanted not in (None, num_ranks):
        raise SystemExit(
            f"--prm-tp {wanted} needs a --prm-model-path of its own, because the policy model's weights score and are on "
            f"{num_ranks} ranks; leave it out"
        )
    return num_ranks


def ranks_of(config: Mapping[str, object], num_ranks: int, wanted: int | None = None) -> int:
    """The same for a checkpoint of the PRM's own.

    Raises:
        SystemExit: it cannot be split so.
    """
    if wanted is None:
        return num_ranks if divides(config, num_ranks) else WHOLE
    if wanted not in (WHOLE, num_ranks):
        raise SystemExit(
            f"--prm-tp must be 1, for a whole PRM on each rank, or {num_ranks} as --tp, got {wanted}; leave it out"
        )
    if not divides(config, wanted):
        raise SystemExit(
            f"--prm-tp {wanted} does not divide the PRM's heads and layers; leave it out for a whole PRM on each rank"
        )
    return wanted

"""How large the PRM's KV pool is when no flag says so. No engine."""

from __future__ import annotations

from dataclasses import dataclass

SIZED_WIDTH = 64  # wider searches and several at once share the pool, and compute again what does not fit
DEVICE_SHARE = 0.25  # of the memory that is free on an accelerator once all weights are loaded
HOST_SHARE, HOST_LIMIT_BYTES = 0.125, 2**31  # the same on a CPU, where other programs need memory too
MIN_POOL_TOKENS = 16
GB = 1e9


@dataclass(frozen=True)
class PoolNeed:
    """What searches with the server's default settings need if their trajectories share nothing but the prompt."""

    width: int
    trajectory_tokens: int  # policy model tokens of one trajectory at most

    def tokens(self, context_tokens: int) -> int:
        """KV tokens of one search; the prompt is taken to be no longer than one trajectory."""
        return (self.width + 1) * self.longest(context_tokens)

    def longest(self, context_tokens: int) -> int:
        """KV tokens of one trajectory, which the PRM's context bounds."""
        return min(self.trajectory_tokens, context_tokens)


def check_pool_tokens(tokens: int | None) -> None:
    """What `--prm-max-total-tokens` may be; None: not given.

    Raises:
        SystemExit: it breaks the rule.
    """
    if tokens is not None and tokens < MIN_POOL_TOKENS:
        raise SystemExit(
            f"--prm-max-total-tokens must be at least {MIN_POOL_TOKENS}, got {tokens}; leave it out for a pool that follows "
            "width and limits"
        )


def budget_bytes(free_bytes: float, is_host: bool) -> int:
    """Memory that the pool may take of what is free."""
    return int(min(free_bytes * HOST_SHARE, HOST_LIMIT_BYTES) if is_host else free_bytes * DEVICE_SHARE)


def default_pool_tokens(need: PoolNeed, context_tokens: int, token_bytes: int, budget: int) -> int:
    """Tokens for one search of the sized width, or as many as the budget (bytes) holds.

    Raises:
        SystemExit: not even one trajectory fits.
    """
    fitting, longest = budget // token_bytes, need.longest(context_tokens)
    if fitting <= longest:
        raise SystemExit(
            f"the PRM's KV pool needs more than {longest} tokens ({longest * token_bytes / GB:.2f} GB) for one trajectory, but "
            f"its share of the free memory holds {fitting}; lower --search-max-tokens, free memory, or set "
            "--prm-max-total-tokens"
        )
    return min(need.tokens(context_tokens), fitting)

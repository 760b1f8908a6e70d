"""The radix ledger on a real radix cache (both tree cores) and a real allocator, without a server."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sglang_ets import cpu_shim

cpu_shim.install()

from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator  # noqa: E402  (needs the stand-in first)
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.unified_cache.components import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402

from sglang_ets.kv import LedgerImbalance, RadixLedger  # noqa: E402

POOL_TOKENS = 1000
PROMPT = list(range(100, 110))


@dataclass
class Pool:
    cache: Any
    allocator: Any
    ledger: RadixLedger

    def insert(self, ids: Sequence[int]) -> int:
        """Put the KV of `ids` into the cache as a finished request would; returns the node where it ends."""
        key = RadixKey(array("q", ids))
        self.cache.insert(InsertParams(key=key, value=self.allocator.alloc(len(ids))))  # frees what was cached before
        return int(self.cache.match_prefix(MatchPrefixParams(key=key)).last_device_node)

    @property
    def free(self) -> int:
        return int(self.allocator.available_size())

    def assert_balanced(self) -> None:
        assert self.ledger.num_holds == 0
        assert self.cache.protected_size() == 0
        assert self.free + self.cache.evictable_size() == POOL_TOKENS


@pytest.fixture(params=["rust", "python"])
def pool(request: pytest.FixtureRequest) -> Pool:
    rows = ReqToTokenPool(size=8, max_context_len=256, device="cpu", enable_memory_saver=False)
    allocator = TokenToKVPoolAllocator(POOL_TOKENS, torch.float32, "cpu", None, need_sort=False)
    cache = UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=allocator,
            page_size=1,
            tree_components=(ComponentType.FULL,),
            tree_core_backend=request.param,
        )
    )
    pool = Pool(cache, allocator, RadixLedger(cache, allocator))
    pool.insert(PROMPT)  # as a search does before its first level, so that a radix node ends with the prompt
    return pool


def test_unique_tokens_count_shared_prefixes_once(pool: Pool) -> None:
    a = pool.ledger.hold("s", pool.insert([*PROMPT, 1, 2, 3]))
    b = pool.ledger.hold("s", pool.insert([*PROMPT, 1, 4]))
    assert pool.ledger.unique_tokens([a]) == 13
    assert pool.ledger.unique_tokens([a, b]) == 10 + 3 + 1
    assert pool.ledger.held_tokens("s") == pool.cache.protected_size() == 14
    assert pool.ledger.held_tokens("other") == 0
    pool.ledger.hold("other", pool.insert([*PROMPT, 1, 4, 5]))
    assert pool.ledger.held_tokens("other") == 13
    assert pool.ledger.held_tokens() == pool.cache.protected_size() == 15


def test_drop_frees_exactly_the_private_tokens(pool: Pool) -> None:
    a = pool.ledger.hold("s", pool.insert([*PROMPT, 1, 2, 3]))
    b = pool.ledger.hold("s", pool.insert([*PROMPT, 1, 4]))
    before = pool.free
    assert pool.ledger.drop([a], keep_tokens=len(PROMPT)) == 2
    assert pool.free == before + 2
    assert pool.ledger.drop([b], keep_tokens=len(PROMPT)) == 2  # the 4, and the 1 that both shared
    assert pool.free == before + 4 == POOL_TOKENS - len(PROMPT)
    assert pool.ledger.freed_tokens == 4
    assert pool.ledger.drop([a, b]) == 0
    assert pool.ledger.freed_tokens == 4
    pool.assert_balanced()


def test_several_that_are_dropped_together_free_what_they_share(pool: Pool) -> None:
    a, b, c = (pool.ledger.hold("s", pool.insert([*PROMPT, *step])) for step in ([1, 2, 3], [1, 4], [9]))
    parent = pool.ledger.hold("s", pool.insert([*PROMPT, 1]))
    before = pool.free
    assert pool.ledger.drop([parent, b, a], len(PROMPT)) == 4  # 1, 2 3, 4
    assert pool.free == before + 4
    assert pool.ledger.unique_tokens([a, b, parent, c]) == len(PROMPT) + 1
    assert pool.ledger.drop([a, c, c]) == 11
    pool.assert_balanced()


def test_a_drop_among_frees_that_sglang_gathers_goes_with_them(pool: Pool) -> None:
    hold = pool.ledger.hold("s", pool.insert([*PROMPT, 1]))
    pool.allocator.free_group_begin()
    pool.ledger.drop([hold])
    assert pool.free == POOL_TOKENS - 11
    pool.allocator.free_group_end()
    assert pool.free == POOL_TOKENS
    pool.assert_balanced()


def test_prune_then_abort_frees_once(pool: Pool) -> None:
    hold = pool.ledger.hold("s", pool.insert([*PROMPT, 1]))
    assert pool.ledger.drop([hold]) == 11
    free = pool.free
    assert pool.ledger.drop([hold]) == 0
    pool.ledger.release(hold)
    assert pool.free == free
    pool.assert_balanced()


def test_a_leaf_that_somebody_else_locks_is_never_evicted(pool: Pool) -> None:
    node = pool.insert([*PROMPT, 1, 2])
    running = pool.cache.lock(node)
    hold = pool.ledger.hold("s", node)
    free = pool.free
    assert pool.ledger.drop([hold]) == 0
    assert pool.free == free
    pool.cache.unlock(running)
    pool.assert_balanced()


def test_two_holds_on_one_leaf_free_it_with_the_second(pool: Pool) -> None:
    ids = [*PROMPT, 1, 2]
    first, second = (pool.ledger.hold("s", pool.insert(ids)) for _ in range(2))
    assert pool.ledger.drop([first], len(PROMPT)) == 0
    assert pool.ledger.drop([second], len(PROMPT)) == 2
    pool.assert_balanced()


def test_an_inner_node_stays_while_a_child_is_cached(pool: Pool) -> None:
    parent = pool.ledger.hold("s", pool.insert([*PROMPT, 1]))
    child = pool.ledger.hold("s", pool.insert([*PROMPT, 1, 2]))
    assert pool.ledger.drop([parent], len(PROMPT)) == 0
    assert pool.ledger.drop([child], len(PROMPT)) == 2
    pool.assert_balanced()


def test_dropping_an_evicted_node_is_harmless(pool: Pool) -> None:
    hold = pool.ledger.hold("s", pool.insert([*PROMPT, 1]))
    pool.ledger.release(hold)
    other = pool.ledger.hold("s", pool.insert([*PROMPT, 1]))
    assert pool.ledger.drop([other]) == 11
    assert pool.ledger.drop([hold]) == 0
    assert pool.ledger.unique_tokens([hold, other]) == 0
    pool.assert_balanced()


def test_a_snapshot_counts_the_holds_that_are_left(pool: Pool) -> None:
    holds = [pool.ledger.hold("s", pool.insert([*PROMPT, *step])) for step in ([1, 2, 3], [1, 4])]
    paths = pool.ledger.snapshot(holds)
    assert paths.unique_tokens(holds) == 14
    pool.ledger.drop(holds[:1], len(PROMPT))
    assert paths.unique_tokens(holds) == pool.ledger.unique_tokens(holds) == 12


def test_a_hold_on_the_radix_root_holds_nothing(pool: Pool) -> None:
    root = int(pool.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", [999])))).last_device_node)
    holds = [pool.ledger.hold("s", node) for node in (root, pool.insert([*PROMPT, 1]), root)]
    paths = pool.ledger.snapshot(holds)
    assert len(paths.paths[root]) == 0
    assert paths.unique_tokens(holds) == 11
    for hold in holds:
        pool.ledger.release(hold)
    pool.assert_balanced()


def test_an_owner_that_ends_with_locks_is_a_bug_and_leaves_none(pool: Pool) -> None:
    pool.ledger.hold("s", pool.insert([*PROMPT, 1]))
    with pytest.raises(LedgerImbalance, match="1 locks on 11 KV tokens"):
        pool.ledger.end_owner("s")
    pool.ledger.end_owner("s")
    pool.assert_balanced()

"""Shared decoding: nodes whose tokens so far are equal are one row of the batch, a strand.

The row's logits are computed once, and every member draws its own token from them, with its own seed, through the stock
sampler. Members that draw another token than the first part from the strand: what is computed goes into the radix tree, and
they go on from there as a fork. So a tree is the same as if each node had a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import Sampler
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import get_exec

from sglang_ets.engine.children import ChildReq, Member, make_parted
from sglang_ets.kv import RadixLedger

DRAW_KEY = "ets_draw"  # attribute of a batch result
FURTHER_KEY = (
    "ets_further_tokens"  # attribute of a sampling info: int32[N, K - 1], what further seeds of its rows have drawn
)

# What belongs to rows other than those of searches, or was applied to the logits before members draw from them.
_NOT_OF_MEMBERS: dict[str, Any] = {
    "grammars": None,
    "grammar_mask": None,
    "rids_int": None,
    "bootstrap_room_ids_int": None,
    "penalizer_orchestrator": None,
    "acc_additive_penalties": None,
    "acc_scaling_penalties": None,
    "has_custom_logit_processor": False,
    "custom_params": None,
    "custom_logit_processor": None,
    "return_sampling_masks": None,
    "return_sampling_support_logprobs": None,
    "sampling_mask_batch_indices": None,
    "sampling_support_logprobs_capture_indices": None,
    "sampling_mask_top_ks": None,
    "logit_bias": None,
}
_OF_ROWS = ("temperatures", "top_ps", "top_ks", "min_ps")


def can_share(scheduler: Any) -> bool:
    """Whether members may draw from one row's logits: the sampler is sglang's own, and keeps nothing per row."""
    return type(scheduler.tp_worker.model_runner.sampler) is Sampler and not get_exec().features.enable_watermark


@dataclass
class Draw:
    """What the further members of a batch's strands draw in one forward pass, beside the first that each row stands for."""

    rows: list[tuple[int, ChildReq, tuple[Member, ...]]]  # place in the batch, strand, its further members at that time
    tokens: torch.Tensor | None = field(default=None, repr=False)  # int[M], of all further members in order

    @classmethod
    def of(cls, reqs: Sequence[Any]) -> Draw | None:
        """None if every request of the batch is drawn for itself alone."""
        rows = [
            (row, req, req.members[1:])
            for row, req in enumerate(reqs)
            if isinstance(req, ChildReq) and len(req.members) > 1
        ]
        return cls(rows) if rows else None

    def sample(
        self,
        original: Callable[..., Any],
        sampler: Any,
        logits_output: Any,
        info: Any,
        return_logprob: bool,
        top_logprobs_nums: Any,
        token_ids_logprobs: Any,
        positions: torch.Tensor,  # int64[N]
        *,
        at_once: bool = False,
        **others: Any,
    ) -> Any:
        """The tokens of the rows as sglang draws them; those of further members are kept aside.

        With `at_once` the sampler takes several seeds a row, so that a row's distribution is made once for all its members.
        """
        if at_once:
            own = info.sampling_seed
            info.sampling_seed = self._seeds(own)
            try:
                token_ids = original(
                    sampler,
                    logits_output,
                    info,
                    return_logprob,
                    top_logprobs_nums,
                    token_ids_logprobs,
                    positions,
                    **others,
                )
            finally:
                info.sampling_seed = own
            further = info.__dict__.pop(FURTHER_KEY)
            self.tokens = torch.cat([further[row, : len(members)] for row, _, members in self.rows])
            return token_ids
        logits = logits_output.next_token_logits
        places = [row for row, _, members in self.rows for _ in members]
        index = torch.tensor(places, dtype=torch.int64).to(logits.device, non_blocking=True)
        copies = LogitsProcessorOutput(
            next_token_logits=logits[index]
        )  # before the rows' own draw changes them in place
        token_ids = original(
            sampler, logits_output, info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions, **others
        )
        self.tokens = original(sampler, copies, self._info(info, index), False, [], [], positions[index])
        return token_ids

    def _seeds(self, own: torch.Tensor) -> torch.Tensor:
        """int64[N, K]: the seed of each row, then those of its further members; what is left over is 0."""
        most = max(len(members) for _, _, members in self.rows)
        seeds = torch.zeros((len(own), 1 + most), dtype=torch.int64)
        seeds[:, 0] = own
        for row, _, members in self.rows:
            seeds[row, 1 : 1 + len(members)] = torch.tensor([member.seed for member in members])
        return seeds

    def _info(self, info: Any, index: torch.Tensor) -> Any:
        """The sampling settings of each further member: those of its row, and its own seed if rows have seeds."""
        own = {name: getattr(info, name)[index] for name in _OF_ROWS}
        seeds = None
        if info.sampling_seed is not None:
            seeds = torch.tensor([m.seed for _, _, members in self.rows for m in members], dtype=torch.int64)
            seeds = seeds.to(index.device, non_blocking=True)
        return replace(info, **own, **_NOT_OF_MEMBERS, sampling_seed=seeds)

    def drawn(self, child: ChildReq) -> dict[int, int]:
        """Node id -> token, of the further members of this strand. Waits for the device, once for the batch.

        Raises:
            RuntimeError: a bug, the sampler was not asked.
        """
        return self._by_child[child.rid]

    @cached_property
    def _by_child(self) -> dict[str, dict[int, int]]:
        if self.tokens is None:
            raise RuntimeError(f"{len(self.rows)} strands were computed and none of their further members has drawn")
        tokens = iter(self.tokens.tolist())
        return {req.rid: {member.node_id: next(tokens) for member in members} for _, req, members in self.rows}


_awaited: Draw | None = None  # of the batch whose logits come next to the sampler


def run_batch(original: Callable[[], Any], reqs: Sequence[Any]) -> Any:
    """One forward pass of a batch of these requests; what further members drew goes along with its result."""
    global _awaited
    _awaited = draw = Draw.of(reqs)
    result = original()
    if getattr(result, "delay_sample_func", None) is None:
        _awaited = None  # nothing was sampled if the batch only brought prompts into the cache
    if draw is not None:
        setattr(result, DRAW_KEY, draw)
    return result


def take_awaited() -> Draw | None:
    """What the sampler that is called now draws for, once."""
    global _awaited
    draw, _awaited = _awaited, None
    return draw


def tokens_computed(batch: Any, row: int) -> int:
    """What a batch computed of one of its requests."""
    return int(batch.extend_lens[row]) if batch.forward_mode.is_extend() else 1


def partings(child: ChildReq, drawn: dict[int, int]) -> dict[int, list[Member]]:
    """Members that drew another token than the strand's first, by that token, in order; they leave the strand."""
    own = child.output_ids[-1]
    parted: dict[int, list[Member]] = {}
    kept = [child.members[0]]
    for member in child.members[1:]:
        token = drawn[member.node_id]
        (kept if token == own else parted.setdefault(token, [])).append(member)
    child.members = tuple(kept)
    return parted


class Strands:
    """Parts strands after each batch. Scheduler thread only."""

    def __init__(self, scheduler: Any, ledger: RadixLedger) -> None:
        self._scheduler = scheduler
        self._ledger = ledger

    def part(self, owner: str, child: ChildReq, drawn: dict[int, int]) -> list[ChildReq]:
        """Let members that drew another token leave the strand, which has just got its first one's token.

        Returns a child for each different token, behind a hold of the search `owner` on what it starts from. Its own token may
        have ended its step already.
        """
        parted = partings(child, drawn)
        if not parted:
            return []
        node = self._before_last(child)
        made = [make_parted(child, members, token, self._ledger.hold(owner, node)) for token, members in parted.items()]
        for one in made:
            one.last_node = node
            one.update_finish_state()
        return made

    def _before_last(self, child: ChildReq) -> int:
        """The radix node that ends before the strand's last token; its KV is complete."""
        cache, size = self._scheduler.tree_cache, child.seqlen - 1
        if not child.finished():
            child.refresh_fill_ids()
            cache.checkpoint(child, up_to=size)
            return int(child.last_node)
        # With the overlap schedule a finished strand has left its last token in the tree, too.
        ids = child.origin_input_ids + child.output_ids
        key = RadixKey(ids[:size], child.extra_key, cache_salt=child.cache_salt)
        return int(cache.match_prefix(MatchPrefixParams(key=key)).last_device_node)

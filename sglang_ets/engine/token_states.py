"""The hidden states from which a batch sampled: what a scorer reads that has no forward pass of its own."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.model_executor.forward_batch_info import get_server_return_hidden_states_mode


def token_states(batch: Any, result: Any) -> NDArray[np.float32] | None:
    """float32[N, H], a row for each request of the batch; None if its forward pass kept no states. Waits for the device."""
    states: torch.Tensor | None = getattr(getattr(result, "logits_output", None), "hidden_states", None)
    if states is None:
        return None
    if batch.forward_mode.is_extend() and _is_whole(batch):
        ends = torch.tensor(list(accumulate(result.extend_input_len_per_req))) - 1
        states = states[ends.to(states.device)]
    return np.asarray(states.float().cpu().numpy())


def _is_whole(batch: Any) -> bool:
    """Whether the states of all tokens were kept, because another request wants them."""
    return bool(max(batch.return_hidden_states_mode, get_server_return_hidden_states_mode()).is_full())

"""PRM architectures that sglang lacks, on sglang's own layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.registry import ModelRegistry

HEAD_NAMES = ("score.", "classifier.")


class LlamaForTokenClassification(LlamaForCausalLM):
    """Llama with one linear head over every token's last hidden state, as transformers lays it out."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config.tie_word_embeddings = True  # such checkpoints have no language model head
        super().__init__(config, *args, **kwargs)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """The trunk through sglang, the head by itself."""
        trunk = []
        loaded = set()
        for name, tensor in weights:
            if name.startswith(HEAD_NAMES):
                part = name.split(".", 1)[1]
                getattr(self.score, part).data.copy_(tensor)
                loaded.add(part)
            else:
                trunk.append((name, tensor))
        if loaded != {"weight", "bias"}:
            raise ValueError(
                f"the head needs score.weight and score.bias, found {sorted(loaded)}; check the checkpoint"
            )
        return super().load_weights(trunk)


def register() -> None:
    """Make the architectures known to sglang in this process. Idempotent."""
    ModelRegistry.models["LlamaForTokenClassification"] = LlamaForTokenClassification

"""PRM architectures that sglang lacks: its own trunks with the published heads over every token's last hidden state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.mistral import MistralForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.models.registry import ModelRegistry

NO_LANGUAGE_HEAD = "lm_head."  # some checkpoints still carry one; a PRM with a head of its own never reads it


def linear_head(config: Any) -> torch.nn.Module:
    """transformers' token classification: one linear layer."""
    return torch.nn.Linear(config.hidden_size, config.num_labels)


def two_layer_head(config: Any) -> torch.nn.Module:
    """Qwen2.5-Math-PRM: two labels behind one hidden layer."""
    width = config.hidden_size
    return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))


def value_head(config: Any) -> torch.nn.Module:
    """Skywork-o1-Open-PRM: one value; its sigmoid is the score."""
    return torch.nn.Linear(config.hidden_size, 1)


def _with_head(name: str, trunk: type, head: Callable[[Any], torch.nn.Module], prefixes: tuple[str, ...]) -> type:
    """A class `name`: the trunk, and a head in `score` whose weights have one of the prefixes in the checkpoint."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        config.tie_word_embeddings = True  # no language model head is allocated
        trunk.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        self.score = head(config)

    def load_weights(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        own: dict[str, torch.Tensor] = {}
        rest = []
        for full_name, tensor in weights:
            prefix = next((p for p in prefixes if full_name.startswith(p)), None)
            if prefix is not None:
                own[full_name[len(prefix) :]] = tensor
            elif not full_name.startswith(NO_LANGUAGE_HEAD):
                rest.append((full_name, tensor))
        _fill(self.score, own, prefixes[0])
        return trunk.load_weights(self, rest)  # type: ignore[attr-defined]

    return type(name, (trunk,), {"__init__": __init__, "load_weights": load_weights, "__module__": __name__})


def _fill(head: torch.nn.Module, weights: dict[str, torch.Tensor], prefix: str) -> None:
    """Copy the head's weights. A bias that the checkpoint leaves out is zero.

    Raises:
        ValueError: a weight is missing, or one is there that the head has no place for.
    """
    places = head.state_dict()
    missing = [prefix + key for key in places if key not in weights and not key.endswith("bias")]
    unknown = [prefix + key for key in weights if key not in places]
    if missing or unknown:
        raise ValueError(
            f"the PRM's head must have exactly {sorted(prefix + key for key in places)}, missing {missing}, unknown "
            f"{unknown}; check the checkpoint's architecture"
        )
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(weights[key]) if key in weights else place.zero_()


_TRUNKS = {
    "Llama": LlamaForCausalLM,
    "Mistral": MistralForCausalLM,
    "Qwen2": Qwen2ForCausalLM,
    "Qwen3": Qwen3ForCausalLM,
}
CLASSES = {
    **{
        f"{family}ForTokenClassification": _with_head(
            f"{family}ForTokenClassification", trunk, linear_head, ("score.", "classifier.")
        )
        for family, trunk in _TRUNKS.items()
    },
    "Qwen2ForProcessRewardModel": _with_head(
        "Qwen2ForProcessRewardModel", Qwen2ForCausalLM, two_layer_head, ("score.",)
    ),
    "Qwen2ForPrmModel": _with_head("Qwen2ForPrmModel", Qwen2ForCausalLM, value_head, ("v_head.summary.",)),
}


def register() -> None:
    """Make the architectures known to sglang in this process. Idempotent."""
    ModelRegistry.models.update(CLASSES)

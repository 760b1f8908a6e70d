"""What fits on a card: `sglang-ets plan --model-path M --prm-model-path P --memory-gb 80 --cards 1 --width 16 64 256`.

Reads the configurations of both checkpoints, not their weights, and prints what their weights and one token of their KV take,
how many tokens the two pools can hold, and how many searches of each width that is if their trajectories share nothing. A
search that prunes holds less: docs/results.md has what was measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_ets.prm.choose import AUTO, is_policy_head, read_json
from sglang_ets.prm.split import WHOLE, splits_evenly

GB = 1e9
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
# What sglang leaves for activations and CUDA graphs by default, as a rule: see --mem-fraction-static.
LARGE_CARD_GB, LARGE_RESERVE_GB, RESERVE_SHARE = 60.0, 10.0, 0.15
EXIT_DOES_NOT_FIT = 1


@dataclass(frozen=True)
class ModelSize:
    """One model as its configuration gives it; sizes of the whole model in bytes."""

    weight_bytes: int
    kv_bytes_per_token: int
    num_kv_heads: int
    num_heads: int
    inner_width: int  # of a feed-forward layer
    context_tokens: int

    def weights_on_card(self, tp: int) -> float:
        return self.weight_bytes / tp

    def kv_on_card(self, tp: int) -> float:
        """Bytes of a token; a head of keys and values is the least that a card holds."""
        return self.kv_bytes_per_token / min(tp, self.num_kv_heads)


# Of a PRM that is a head on the policy model: some kilobytes.
POLICY_HEAD_SIZE = ModelSize(0, 0, num_kv_heads=1, num_heads=1, inner_width=0, context_tokens=0)


@dataclass(frozen=True)
class Pools:
    """Tokens that the two KV pools hold, on each card alike; negative room is a model that does not fit."""

    room_bytes: float  # on a card, for both pools
    policy_tokens: int
    prm_tokens: int

    def searches(self, tokens: int) -> int:
        """How many searches that need this many tokens in each pool fit at once."""
        return min(self.policy_tokens, self.prm_tokens) // tokens


def model_size(model_path: str, kv_dtype: str | None = None) -> ModelSize:
    """Sizes from `config.json`, and from the files of the weights where they are in a folder.

    Raises:
        ValueError: the configuration names no layers or heads, or a number type that is not known.
    """
    config = read_json(model_path, "config.json")
    config = {**config, **_section(config, "text_config")}
    try:
        layers, heads, hidden = (
            int(str(config[key])) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
        )
    except KeyError as error:
        raise ValueError(
            f"{model_path} must have a config.json with {error}; give the folder of a checkpoint"
        ) from None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if (kv_dtype or dtype) not in DTYPE_BYTES or dtype not in DTYPE_BYTES:
        raise ValueError(
            f"the number type must be one of {', '.join(DTYPE_BYTES)}, got {kv_dtype or dtype!r}; give --kv-dtype"
        )
    kv_heads = int(str(config.get("num_key_value_heads") or heads))
    head_dim = int(str(config.get("head_dim") or hidden // heads))
    if "kv_lora_rank" in config:  # multi-head latent attention: one compressed vector a layer, whole on each card
        kv_heads, width = 1, int(str(config["kv_lora_rank"])) + int(str(config["qk_rope_head_dim"]))
    else:
        width = 2 * kv_heads * head_dim
    return ModelSize(
        weight_bytes=_weight_bytes(model_path, config, layers, hidden, heads, kv_heads, head_dim) or 0,
        kv_bytes_per_token=layers * width * DTYPE_BYTES[kv_dtype or dtype],
        num_kv_heads=kv_heads,
        num_heads=heads,
        inner_width=int(str(config.get("intermediate_size") or 0)),
        context_tokens=int(str(config.get("max_position_embeddings") or 0)),
    )


def _section(config: dict[str, object], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _weight_bytes(
    model_path: str, config: dict[str, object], layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Of the files, or of a dense transformer with a gated MLP and these sizes."""
    files = [path for path in Path(model_path).glob("*.safetensors") if not path.name.startswith("consolidated")]
    if files:
        return sum(path.stat().st_size for path in files)
    inner, vocabulary = (int(str(config.get(key) or 0)) for key in ("intermediate_size", "vocab_size"))
    experts = max(1, int(str(config.get("num_local_experts") or config.get("num_experts") or 1)))
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    parameters = layers * (attention + 3 * hidden * inner * experts) + embeddings
    return parameters * DTYPE_BYTES[str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")]


def prm_size(model_path: str) -> ModelSize:
    """Of a PRM; raises as `model_size` does."""
    return POLICY_HEAD_SIZE if is_policy_head(model_path, AUTO) else model_size(model_path)


def prm_ranks(prm: ModelSize, cards: int) -> int:
    """Over how many cards the PRM is split: all, or one copy on each where its heads do not divide."""
    is_even = splits_evenly(prm.num_heads, prm.num_kv_heads, prm.inner_width, cards)
    return cards if is_even else WHOLE


def plan_pools(policy: ModelSize, prm: ModelSize | None, memory_gb: float, cards: int, reserve_gb: float) -> Pools:
    """Share what the weights leave so that both pools hold the same number of tokens. Without `prm` the policy model's own
    weights score, with a pool of their own."""
    split = prm_ranks(prm, cards) if prm is not None else cards
    scorer = prm or policy
    weights = policy.weights_on_card(cards) + (prm.weights_on_card(split) if prm is not None else 0.0)
    room = (memory_gb - reserve_gb) * GB - weights
    tokens = max(0, int(room / (policy.kv_on_card(cards) + scorer.kv_on_card(split))))
    return Pools(room, tokens, tokens)


def search_tokens(width: int, prompt_tokens: int, max_tokens: int) -> int:
    """KV of one search at its largest, if its trajectories share nothing but the prompt."""
    return prompt_tokens + width * max_tokens


def default_reserve_gb(memory_gb: float) -> float:
    return LARGE_RESERVE_GB if memory_gb > LARGE_CARD_GB else RESERVE_SHARE * memory_gb


def report(args: argparse.Namespace) -> tuple[str, bool]:
    """The text to print, and whether everything fits."""
    policy = model_size(args.model_path, args.kv_dtype)
    prm = prm_size(args.prm_model_path) if args.prm_model_path else None
    reserve = default_reserve_gb(args.memory_gb) if args.reserve_gb is None else args.reserve_gb
    pools = plan_pools(policy, prm, args.memory_gb, args.cards, reserve)
    lines = [_model_line("policy model", policy, args.cards)]
    if prm is POLICY_HEAD_SIZE:
        lines.append("PRM: a head on the policy model's own states, without weights or KV of its own")
    elif prm is not None:
        split = prm_ranks(prm, args.cards)
        where = (
            ""
            if split == args.cards
            else f"; its {prm.num_heads} heads do not divide by {args.cards}: whole on each card"
        )
        lines.append(_model_line("PRM", prm, split) + where)
    lines.append(
        f"left for both KV pools: {pools.room_bytes / GB:.1f} of {args.memory_gb:g} GB a card ({reserve:g} GB in reserve)"
    )
    if not pools.policy_tokens:
        lines.append("this does not fit: take more cards, smaller models, or quantised weights")
        return "\n".join(lines), False
    prm_flag = "" if prm is POLICY_HEAD_SIZE else f" --prm-max-total-tokens {pools.prm_tokens}"
    lines.append(f"flags: --max-total-tokens {pools.policy_tokens}{prm_flag}")
    lines.append(f"\n{'width':>6}  {'tokens, nothing shared':>22}  {'at once':>8}")
    needs = {width: search_tokens(width, args.prompt_tokens, args.max_tokens) for width in args.width}
    lines += [f"{width:>6}  {need:>22}  {pools.searches(need):>8}" for width, need in needs.items()]
    longest = args.prompt_tokens + args.max_tokens
    for name, model in (("policy model", policy), ("PRM", prm)):
        if model is not None and 0 < model.context_tokens < longest:
            lines.append(
                f"the {name}'s context of {model.context_tokens} tokens is shorter than prompt and max_tokens, {longest}"
            )
    return "\n".join(lines), all(pools.searches(need) for need in needs.values())


def _model_line(name: str, model: ModelSize, tp: int) -> str:
    kv = model.kv_on_card(tp)
    return f"{name}: {model.weights_on_card(tp) / GB:.2f} GB of weights a card, {kv / 1e3:.1f} kB of KV a token"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan.

    Raises:
        SystemExit: 1 if a search of some width does not fit, 2 for wrong arguments.
    """
    parser = argparse.ArgumentParser(
        prog="sglang-ets plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--prm-model-path", help="left out: the policy model's own weights score")
    parser.add_argument("--memory-gb", type=float, default=80.0, help="of one card")
    parser.add_argument("--cards", type=int, default=1, help="tensor parallel size")
    parser.add_argument(
        "--reserve-gb", type=float, help="for activations and graphs; default: about what sglang reserves"
    )
    parser.add_argument("--kv-dtype", choices=list(DTYPE_BYTES), help="of the policy model's KV; default: its own")
    parser.add_argument("--width", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=1024, help="of one trajectory")
    args = parser.parse_args(argv)
    if min(args.cards, args.memory_gb, args.max_tokens, *args.width) <= 0 or math.isinf(args.memory_gb):
        parser.error("--cards, --memory-gb, --max-tokens and --width must be positive")
    try:
        text, fits = report(args)
    except ValueError as error:
        parser.error(str(error))
    print(text)
    sys.exit(0 if fits else EXIT_DOES_NOT_FIT)


if __name__ == "__main__":
    main()

"""Attention of one decode and of one level's extends on the CPU: stock sglang against `kernels/paged_attention.py`.

    python -m bench.attention [--smoke]

Each case first compares both results, then times both in turns in the same run, one layer at a time. Pages lie as a search
leaves them: siblings share the pages of their prefix. One row a case goes to bench/results/attention.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch

from bench import rows
from sglang_ets import cpu_shim

SEED = 0
MAX_ERROR = 1e-5
SIBLINGS = 4


@dataclass(frozen=True)
class Case:
    """One layer's attention: `sequences` rows of about `kv_tokens`, of which `new_tokens` are new."""

    model: str
    heads: int
    kv_heads: int
    head_size: int
    sequences: int
    kv_tokens: int
    new_tokens: int = 1


MODELS = {"embedded": (2, 2, 64), "SmolLM2-135M": (9, 3, 64)}
FULL = [
    Case(name, *shape, sequences, kv_tokens, new_tokens)
    for name, shape in MODELS.items()
    for sequences, kv_tokens in ((16, 200), (64, 200), (256, 200), (16, 1000))
    for new_tokens in (1, 30)
]
SMOKE = [Case("embedded", *MODELS["embedded"], 8, 60, new_tokens) for new_tokens in (1, 5)]


def inputs(case: Case) -> list[Any]:
    """What the backend passes by position, up to the lengths: query, output, pools, pages, rows, kv lengths."""
    generator = torch.Generator().manual_seed(SEED)
    own = max(case.new_tokens, case.kv_tokens // 5)  # tokens that a sequence shares with no other
    shared = case.kv_tokens - own
    lengths = torch.randint(case.kv_tokens - own // 2, case.kv_tokens + 1, (case.sequences,), generator=generator)
    pages = torch.zeros(case.sequences + 1, case.kv_tokens, dtype=torch.int32)
    used = 1
    for row in range(case.sequences):
        if row % SIBLINGS == 0:
            prefix = torch.arange(used, used + shared)
            used += shared
        pages[row + 1, :shared], pages[row + 1, shared:] = prefix, torch.arange(used, used + own)
        used += own
    query = torch.randn(case.sequences * case.new_tokens, case.heads, case.head_size, generator=generator)
    pools = [torch.randn(used, case.kv_heads, case.head_size, generator=generator) for _ in range(2)]
    return [query, torch.empty_like(query), *pools, pages, torch.arange(1, case.sequences + 1), lengths]


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """Milliseconds of both, in turns.

    Raises:
        RuntimeError: the results differ by more than `MAX_ERROR`.
    """
    cpu_shim.install()  # before anything of sglang is imported
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Stock
    from sglang_ets.patches.torch_native import decode, extend

    args, settings = inputs(case), {"scaling": None, "enable_gqa": case.heads != case.kv_heads}
    if case.new_tokens == 1:
        args = [*args, None]
        original, hook = Stock._run_sdpa_forward_decode, decode
    else:
        new = torch.full_like(args[-1], case.new_tokens)
        args, settings = [*args, args[-1] - new, new, None], {**settings, "causal": True}
        original, hook = Stock._run_sdpa_forward_extend, extend
    backend = SimpleNamespace()
    stock = lambda: original(backend, *args, **settings)  # noqa: E731
    ours = lambda: hook(original, backend, *args, **settings)  # noqa: E731
    expected = stock().clone()
    error = float((ours() - expected).abs().max())
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{case} is {error:.2e} from the stock result, more than {MAX_ERROR:.0e}")
    times: dict[str, list[float]] = {"stock_ms": [], "ours_ms": []}
    for _ in range(repetitions):
        times["stock_ms"].append(_milliseconds(stock))
        times["ours_ms"].append(_milliseconds(ours))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["stock_ms"] / medians["ours_ms"]
    return {**asdict(case), **medians, "ratio": ratio, "max_abs_error": error, "torch_threads": torch.get_num_threads()}


def _milliseconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown, one line a case."""
    header = ["heads of", "sequences", "KV tokens", "new tokens", "stock (ms a layer)", "ours (ms a layer)", "ratio"]
    names = ("model", "sequences", "kv_tokens", "new_tokens", "stock_ms", "ours_ms")
    return rows.markdown(header, [[*(row[name] for name in names), f"{row['ratio']:.1f}x"] for row in measured])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows.add_arguments(parser, "two small cases")
    args = parser.parse_args()
    out = rows.out_of(args, "attention")
    measured = [measure(case, repetitions=3 if args.smoke else 9) for case in (SMOKE if args.smoke else FULL)]
    for row in measured:
        rows.append(out, row)
    print(table(measured))


if __name__ == "__main__":
    main()

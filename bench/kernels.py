"""Bytes and time of the three kernels: `python -m bench.kernels [--smoke]`.

Each case first checks every implementation against float64, then times it and a baseline in the same run: the torch
reference on the CPU, and on a CUDA machine the reference and Triton there. The bytes come from kernels/traffic.py,
which a test compares with counted loads and stores. One JSON row per timing goes to bench/results/kernels.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.testing
from sglang_ets.kernels import describe_backend, pairwise_cosine, step_pool, step_score
from sglang_ets.kernels.dispatch import Backend
from sglang_ets.kernels.traffic import Traffic, pairwise_cosine_traffic, step_pool_traffic, step_score_traffic

from bench import rows
from bench.timing import in_turns

SEED = 20250
STEP_TOKENS = 48  # mean length of one reasoning step
HEAD_ROWS = 2
FULL_SIZES = ((64, 896, 32_000), (256, 4096, 8_192))  # width, hidden size, vocabulary of the full-logits baseline
SMOKE_SIZES = ((8, 128, 512),)
QUANTILES = (0.5, 0.1, 0.9)
MAX_ERROR = {"step_pool": 1e-6, "step_score": 1e-4, "pairwise_cosine": 5e-6}

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One kernel at one size. The plain way to compute it is the baseline in time, and the truth on float64."""

    kernel: str
    shape: dict[str, int]
    inputs: Inputs
    traffic: Traffic
    run: Callable[..., torch.Tensor]  # of the inputs and a backend
    plain: Callable[..., torch.Tensor]  # of the inputs
    plain_name: str


def cases(smoke: bool) -> Iterator[Case]:
    """The sizes of one level of a search: `width` new steps scored by a PRM of the given hidden size."""
    for width, hidden_size, vocabulary in SMOKE_SIZES if smoke else FULL_SIZES:
        generator = torch.Generator().manual_seed(SEED)
        yield pool_case(width, hidden_size, generator)
        yield score_case(width, hidden_size, vocabulary, generator)
        yield pairwise_case(width, hidden_size, generator)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def pool_case(width: int, hidden_size: int, generator: torch.Generator) -> Case:
    lengths = torch.randint(1, 2 * STEP_TOKENS, (width,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    num_rows = int(offsets[-1])
    hidden = torch.randn(num_rows, hidden_size, generator=generator).bfloat16()

    def one_segment_at_a_time(hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        means = [wide(hidden[a:b]).mean(dim=0) for a, b in itertools.pairwise(offsets.tolist())]
        return torch.nn.functional.normalize(torch.stack(means))

    return Case(
        kernel="step_pool",
        shape={"num_segments": width, "num_rows": num_rows, "hidden_size": hidden_size},
        inputs={"hidden": hidden, "offsets": offsets},
        traffic=step_pool_traffic(num_rows=num_rows, hidden_size=hidden_size, num_segments=width, dtype=hidden.dtype),
        run=step_pool,
        plain=one_segment_at_a_time,
        plain_name="one segment at a time",
    )


def score_case(width: int, hidden_size: int, vocabulary: int, generator: torch.Generator) -> Case:
    num_rows = width * STEP_TOKENS
    hidden = torch.randn(num_rows, hidden_size, generator=generator).bfloat16()
    head = (torch.randn(vocabulary, hidden_size, generator=generator) / hidden_size**0.5).bfloat16()
    positions = torch.arange(STEP_TOKENS - 1, num_rows, STEP_TOKENS)

    def few_rows(hidden: torch.Tensor, positions: torch.Tensor, head: torch.Tensor, backend: Backend) -> torch.Tensor:
        return step_score(hidden, positions, head[:HEAD_ROWS], backend=backend)

    def full_logits(hidden: torch.Tensor, positions: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        logits = hidden[positions] @ head.T
        return wide(logits[:, :HEAD_ROWS]).softmax(dim=1)[:, 0]

    return Case(
        kernel="step_score",
        shape={"num_positions": width, "num_rows": num_rows, "hidden_size": hidden_size, "vocabulary": vocabulary},
        inputs={"hidden": hidden, "positions": positions, "head": head},
        traffic=step_score_traffic(
            num_positions=width, hidden_size=hidden_size, num_head_rows=HEAD_ROWS, dtype=hidden.dtype, has_bias=False
        ),
        run=few_rows,
        plain=full_logits,
        plain_name="full-vocabulary logits",
    )


def pairwise_case(width: int, hidden_size: int, generator: torch.Generator) -> Case:
    embeddings = torch.nn.functional.normalize(torch.randn(width, hidden_size, generator=generator) + 0.3)

    def one_row_at_a_time(embeddings: torch.Tensor) -> torch.Tensor:
        return torch.stack([1 - torch.nn.functional.cosine_similarity(row, embeddings) for row in embeddings])

    return Case(
        kernel="pairwise_cosine",
        shape={"num_rows": width, "hidden_size": hidden_size},
        inputs={"embeddings": embeddings},
        traffic=pairwise_cosine_traffic(num_rows=width, hidden_size=hidden_size, dtype=embeddings.dtype),
        run=pairwise_cosine,
        plain=one_row_at_a_time,
        plain_name="one row at a time",
    )


def measure(case: Case, device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """Checks and times every implementation of one case on one device.

    Raises: RuntimeError if an implementation differs from float64 by more than the kernel's MAX_ERROR.
    """
    inputs = {name: tensor.to(device) for name, tensor in case.inputs.items()}
    exact = case.plain(**{name: each.double() if each.is_floating_point() else each for name, each in inputs.items()})
    backends: tuple[Backend, ...] = ("triton", "reference") if device.type == "cuda" else ("reference",)
    runs = {name: functools.partial(case.run, **inputs, backend=name) for name in backends}
    for name, run in {**runs, case.plain_name: functools.partial(case.plain, **inputs)}.items():
        error = float((run().double() - exact).abs().max())
        checked = name == "triton" or (name == "reference" and device.type == "cpu")  # torch may use TF32 on CUDA
        if checked and not error <= MAX_ERROR[case.kernel]:
            raise RuntimeError(
                f"{case.kernel} ({name} on {device}) is {error:.2e} from float64, more than "
                f"{MAX_ERROR[case.kernel]:.0e}: a time for a wrong result means nothing"
            )
        yield {
            "smoke": smoke,
            "seed": SEED,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "torch_threads": torch.get_num_threads(),
            "kernel": case.kernel,
            "implementation": name,
            "device": device.type,
            "shape": case.shape,
            "dtype": str(next(iter(inputs.values())).dtype).removeprefix("torch."),
            "max_abs_error": error,
            **(time_cuda(run) if device.type == "cuda" else time_cpu(run, repetitions=3 if smoke else 15)),
            **asdict(case.traffic),
        }


def time_cpu(run: Callable[[], torch.Tensor], repetitions: int) -> dict[str, float]:
    """Microseconds."""
    times_us = [1e3 * ms for ms in in_turns({"": run}, repetitions)[""]]
    p10, *_, p90 = statistics.quantiles(times_us, n=10, method="inclusive")
    return {"median_us": statistics.median(times_us), "p10_us": p10, "p90_us": p90}


def time_cuda(run: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Microseconds with a cold L2 cache, which do_bench flushes before every run."""
    median, p10, p90 = (1e3 * ms for ms in triton.testing.do_bench(run, quantiles=list(QUANTILES)))
    return {"median_us": median, "p10_us": p10, "p90_us": p90}


def table(measured: list[dict[str, Any]]) -> str:
    """The rows as markdown; the ratio is requested bytes over the lower bound, GB/s the lower bound over the median."""
    cells = []
    for row in measured:
        shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
        asked, least = row["requested_bytes"], row["lower_bound_bytes"]
        cells.append([
            row["kernel"], shape, row["implementation"], row["device"], f"{row['median_us']:.1f}", f"{row['p90_us']:.1f}",
            f"{asked / 1e6:.2f}", f"{least / 1e6:.2f}", f"{asked / least:.2f}", f"{least / row['median_us'] / 1e3:.2f}",
        ])  # fmt: skip
    header = "kernel, shape, implementation, device, median us, p90 us, MB asked, MB least, ratio, GB/s"
    return rows.markdown(header.split(", "), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes moved and time of the search's kernels.")
    rows.add_arguments(parser, "one tiny size, three repetitions")
    args = parser.parse_args()
    out = rows.out_of(args, "kernels")
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    measured: list[dict[str, Any]] = []
    for device in devices:
        print(describe_backend(device))
        for case in cases(args.smoke):
            measured += measure(case, device, args.smoke)
    for row in measured:
        rows.append(out, row)
    print(table(measured))
    print(
        "\nMB asked: loads and stores of the Triton kernel as if nothing were cached; GB/s: MB least over the median."
    )


if __name__ == "__main__":
    main()

